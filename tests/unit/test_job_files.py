"""Every job file that comes with the project is one."""

from pathlib import Path

import pytest

from raytune_ft.spec import read_job

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(JOBS.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(JOBS)))
def test_a_shipped_job_file_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO", "/somewhere/demo")
    job = read_job(file)
    assert "$" not in str(job.resolved())
    # A reader finds a job by its file's name.
    assert job.name in (file.stem, f"demo-{file.stem}")


def test_there_are_job_files() -> None:
    assert {"base", "subtraction", "country-capital", "summarise"} <= {file.stem for file in FILES}
