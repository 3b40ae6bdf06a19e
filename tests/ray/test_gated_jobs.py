"""Gates and forgetting on a real cluster: what is measured, kept, refused, and said again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import kill_once_kept, make_job  # type: ignore[import-not-found]  # this folder's

from raytune_ft.catalog import Catalog
from raytune_ft.catalog.gate import refusal_message
from raytune_ft.cli.main import main
from raytune_ft.errors import DataError
from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.train.launch import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

LEAST = {"schedule": {"steps": 2}}


def changed(job: JobSpec, **sections: Any) -> JobSpec:
    return parse_job({**job.resolved(), **sections})


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Thirty examples of another task."""
    path = tmp_path / "others.jsonl"
    lines = [json.dumps({"instruction": f"Spell {n}.", "output": "abc"[n % 3] * 3}) for n in range(30)]
    path.write_text("\n".join(lines) + "\n")
    return path


def asking(others: Path, **changes: Any) -> dict[str, Any]:
    """An evaluate section with forgetting."""
    forgetting = {"sources": [{"uri": str(others)}], "max_examples": 7}
    return {
        "metrics": ["exact_match"],
        "max_examples": 8,
        "max_new_tokens": 2,
        "forgetting": forgetting,
    } | changes


def test_a_refused_gate_keeps_the_version_and_leaves_the_alias(
    base: Path, capitals: Path, others: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    catalog = str(tmp_path / "catalog")
    job = make_job(base, capitals, catalog, evaluate=asking(others), **LEAST)
    publish = {"catalog": catalog, "alias": "production"}
    first = train(changed(job, publish=publish | {"gate": {"token_loss": "< 100"}}), tmp_path / "one")
    assert first["gate"] == {"alias": "production", "passed": True, "refused": [], "alias_version": 1}

    # Asked for more than it has, it goes on from its checkpoint, and is another version.
    gate = {"exact_match": ">= 1.5", "forgetting": "<= 100", "other_tasks/token_loss": "< 0"}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.resolved() | {"publish": publish | {"gate": gate}}))
    arguments = ["raytune-ft", "train", str(path), "--output", str(tmp_path / "two"), "--json"]
    results = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 5
        out, err = capsys.readouterr()
        results.append(json.loads(out))
        assert err.splitlines()[-1].startswith(
            "raytune-ft: capitals: published capitals@v2, but production was left at v1: exact_match = "
        )
    assert results[0] == results[1]
    result = results[0]
    assert result["gate"]["passed"] is False
    assert result["gate"]["alias_version"] == 1
    assert [reason.split()[0] for reason in result["gate"]["refused"]] == [
        "exact_match",
        "other_tasks/token_loss",
    ]
    store = Catalog.at(catalog)
    assert store.aliases("capitals") == {"production": 1}
    record = store.resolve("capitals@v2")
    assert record.job["publish"]["gate"] == gate
    assert record.data["other_tasks"]["examples"] == 7
    scores = record.scores_before, record.scores_after
    assert all(
        set(found or {}) == {"exact_match", "token_loss", "other_tasks/exact_match", "other_tasks/token_loss"}
        for found in scores
    )
    before, after = scores
    assert before
    assert after
    assert record.forgetting == after["other_tasks/token_loss"] - before["other_tasks/token_loss"]
    assert result["forgetting"] == record.forgetting != 0
    assert refusal_message(result, catalog)
    report = (tmp_path / "two" / "report.html").read_text()
    assert "refused, production was left at v1: exact_match" in report
    assert "Other tasks: Token loss" in report


@pytest.mark.slow
def test_without_metrics_forgetting_is_measured_alone_and_other_examples_make_another_version(
    base: Path, capitals: Path, others: Path, tmp_path: Path
) -> None:
    job = make_job(base, capitals, tmp_path / "catalog", evaluate=asking(others, metrics=[]), **LEAST)
    first = train(job, tmp_path / "out")
    assert set(first["scores_after"]) == {"other_tasks/token_loss"}
    assert "gate" not in first
    assert train(job, tmp_path / "out") == first
    others.write_text(others.read_text().replace("Spell", "Say"))
    second = train(job, tmp_path / "out")
    assert second["version"] == 2
    assert second["scores_before"] != first["scores_before"]


@pytest.mark.slow
def test_a_killed_run_measures_the_same(base: Path, capitals: Path, others: Path, tmp_path: Path) -> None:
    whole = make_job(base, capitals, tmp_path / "whole", evaluate=asking(others))
    torn = make_job(base, capitals, tmp_path / "torn", evaluate=asking(others))
    killed: list[int] = []
    kill = kill_once_kept(str(tmp_path / "torn"), killed)
    phases: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        phases.append(event["phase"])
        kill(event)

    reference = train(whole, tmp_path / "out")
    result = train(torn, tmp_path / "out2", on_event=on_event)
    assert len(killed) == 1
    assert phases.count("load") == 2
    assert phases.count("evaluate before") == 1, "what was measured of the base is kept"
    names = ("scores_before", "scores_after", "forgetting")
    assert [result[name] for name in names] == [reference[name] for name in names]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^evaluate\.forgetting\.sources\[0\]\.uri = .*others.jsonl: no such file"),
        ("", r"^evaluate\.forgetting\.sources\[0\]\.uri = .*: no records; the file is empty"),
        ("{}\n{}\n", r"^evaluate\.forgetting: 2 of 2 records are malformed"),
        (
            json.dumps({"instruction": "a" * 200, "output": "b"}),
            r"^evaluate\.forgetting: no example is left: the longest has \d+ tokens, and data.max_tokens is",
        ),
    ],
)
def test_bad_examples_of_other_tasks_show_before_training(
    base: Path, capitals: Path, others: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    others.unlink() if content is None else others.write_text(content)
    job = make_job(base, capitals, tmp_path / "catalog", evaluate=asking(others))
    with pytest.raises(DataError, match=message):
        train(job, tmp_path / "out")
    assert not list((tmp_path / "catalog").glob("runs/*/*/checkpoint_*"))
