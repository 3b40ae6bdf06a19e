"""`raytune-ft fleet` on a real cluster: what it prints and keeps, how it ends, and how it goes on."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Run
from html_page import Page

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def run(run: Run) -> Run:
    """Runs `raytune-ft fleet`."""
    return partial(run, "fleet")


@pytest.fixture
def fleet_file(base: Path, capitals: Path, tmp_path: Path) -> Path:
    """Two jobs that can be trained, and one whose examples are all too long."""
    values = {
        "name": "tasks",
        "defaults": {
            "model": {"path": str(base), "weight_bits": 32},
            "data": {"sources": [{"uri": str(capitals)}], "max_tokens": 64},
            "method": {"rank": 4},
            "schedule": {"steps": 6},
            "batch": {"sequences": 4},
            "evaluate": {"metrics": ["exact_match"], "max_examples": 4, "max_new_tokens": 2},
            "publish": {"catalog": str(tmp_path / "catalog")},
        },
        "jobs": [{"name": "one"}, {"name": "two", "method": {"rank": 8}}, {"name": "long"}],
    }
    values["jobs"][2]["data"] = {"max_tokens": 8}  # type: ignore[index]  # a list of dicts
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def jobs_of(output: str) -> dict[str, dict[str, Any]]:
    (line,) = output.splitlines()
    return {job["name"]: job for job in json.loads(line)["jobs"]}


def test_a_fleet_from_its_first_failure_to_its_end(run: Run, fleet_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, said = run(fleet_file, "--output", out, "--json")
    assert code == 3, said
    jobs = jobs_of(printed)
    assert {name: job["state"] for name, job in jobs.items()} == {
        "one": "done",
        "two": "done",
        "long": "failed",
    }
    assert (jobs["one"]["version"], jobs["long"]["version"]) == (1, None)
    assert jobs["one"]["scores_after"]["token_loss"] < jobs["one"]["scores_before"]["token_loss"]
    assert "data.max_tokens = 8" in jobs["long"]["reason"]
    assert said.splitlines()[-1] == (
        "raytune-ft: tasks: 1 of 3 jobs failed: long; the same command with --retry-failed trains them again"
    )
    assert "two: done, exact match" in said
    assert json.loads((out / "result.json").read_text()) == json.loads(printed)
    page = (out / "report.html").read_text()
    assert len(Page(page).of_class("spark")) == 2
    assert "data.max_tokens = 8" in page

    # Once more: nothing is trained, and the page with the curves stays.
    code, printed, said = run(fleet_file, "--output", out, "--json")
    assert code == 3, said
    assert all(job["before"] for job in jobs_of(printed).values())
    assert (out / "report.html").read_text() == page

    # A changed job is another job, which runs without being asked to.
    code, printed, said = run(fleet_file, "--output", out, "--set", "jobs.2.data.max_tokens=64")
    assert code == 0, said
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert any(line.startswith("long: done, exact match") for line in lines)
    assert any(line.startswith("Jobs 3 of 3 done, 2 of them before, in ") for line in lines)
    assert f"Report {out / 'report.html'}" in lines
    assert (out / "report.html").read_text() != page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none.yaml"], "{folder}/none.yaml: no such file"),
        (["{file}", "--output", "s3://b/x"], "--output s3://b/x: name a local folder; …"),
        (["{file}", "--output", "{file}"], "--output {file}: is a file; name a folder"),
        (
            ["{file}", "--set", "lanes.max=0"],
            "{file} has 1 problem:\n  lanes.max = 0: must be greater than 0",
        ),
        (
            ["{file}", "--set", "defaults.model.path={folder}/none"],
            "model.path = {folder}/none: no such folder, and not a Hub id",
        ),
        (
            ["{file}", "--set", "jobs.1.method.targets=[q_proj, query]"],
            "{file} has 1 problem:\n  two: method.targets: no linear layer is called 'query'; the base has …",
        ),
        (
            ["{file}", "--set", "jobs.1.data.sources=[{{uri: {folder}/none.jsonl}}]"],
            "{file} has 1 problem:\n  two: data.sources[0].uri = {folder}/none.jsonl: no such file, …",
        ),
    ],
)
def test_mistakes_are_one_message(run: Run, fleet_file: Path, arguments: list[str], message: str) -> None:
    names = {"file": fleet_file, "folder": fleet_file.parent}
    code, printed, said = run(*(argument.format(**names) for argument in arguments), "--json")
    assert (code, printed) == (2, "")
    begins, _, _ = f"raytune-ft: {message.format(**names)}".partition("…")
    assert said.startswith(begins)
    assert not (fleet_file.parent / "catalog" / "fleets").exists()
