"""Every job file and fleet file that comes with the project is one."""

from pathlib import Path

import pytest

from raytune_ft.spec import FleetSpec, JobSpec, expand, read_job_or_fleet

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(JOBS.rglob("*.yaml"))


def jobs_of(file: Path) -> tuple[JobSpec, ...]:
    spec = read_job_or_fleet(file)
    return expand(spec, place=str(file)) if isinstance(spec, FleetSpec) else (spec,)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(JOBS)))
def test_a_shipped_file_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO", "/somewhere/demo")
    # A reader finds a job or fleet by its file's name.
    assert read_job_or_fleet(file).name in (file.stem, f"demo-{file.stem}")
    for job in jobs_of(file):
        assert "$" not in str(job.resolved())


def test_there_are_files() -> None:
    assert {"base", "subtraction", "fleet", "country-capital", "summarise"} <= {file.stem for file in FILES}


def test_the_fleet_trains_subtraction_as_the_job_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO", "/somewhere/demo")
    (alone,) = jobs_of(JOBS / "demo" / "subtraction.yaml")
    fleet = jobs_of(JOBS / "demo" / "fleet.yaml")
    assert [job.name for job in fleet] == ["subtraction", "smaller", "swapping", "successor"]
    assert fleet[0] == alone
