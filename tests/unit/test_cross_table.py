"""The demo's table of adapters and tasks: it sees what each has learned, and mixed-up adapters."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import stores
import tiny
import torch
import yaml
from rich.console import Console

from raytune_ft.catalog import BaseModelRef, Catalog
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.model_files import base_digest
from raytune_ft.spec import JobSpec, LoraSpec, expand, read_fleet

SCRIPT = Path(__file__).parents[2] / "jobs" / "demo" / "cross_table.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_cross_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cross_table = _load()


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    """Two tasks, and for each a published adapter whose weights are random."""
    base = tiny.save_base(tmp_path / "base")
    for name in ("one", "other"):
        lines = [json.dumps({"prompt": f"{name} {n} =", "completion": str(n)}) for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    values = {
        "name": "fleet",
        "defaults": {
            "model": {"path": str(base), "weight_bits": 32},
            "data": {"split": {"validation": 0.0, "test": 0.2}, "max_tokens": 64},
            "evaluate": {"max_new_tokens": 4},
            "publish": {"catalog": str(tmp_path / "catalog")},
        },
        "jobs": [
            {"name": name, "data": {"sources": [{"uri": str(tmp_path / f"{name}.jsonl")}]}}
            for name in ("one", "other")
        ],
    }
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump(values))
    for job in expand(read_fleet(file)):
        _publish(job, tmp_path / f"{job.name}-files")
    return file


def _publish(job: JobSpec, folder: Path) -> None:
    assert isinstance(job.method, LoraSpec)
    model = tiny.llama()
    torch.manual_seed(job.name == "one")
    for parameter in add_lora(model, job.method, seed=0).values():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    save_lora(model, job.method, folder, job.model.path)
    draft = stores.draft(
        adapter=job.name, base=BaseModelRef(path=job.model.path, digest=base_digest(Path(job.model.path)))
    )
    files = {file.name: file for file in folder.iterdir()}
    Catalog.at(job.publish.catalog).publish(draft, files, publish_id=job.name)


def test_each_adapter_answers_the_held_out_questions_of_each_task(
    fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = expand(read_fleet(fleet_file))
    scores = cross_table.cross_scores(jobs, 5)
    assert list(scores) == ["the base", "one", "other"]
    assert all(list(of_adapter) == ["one", "other"] for of_adapter in scores.values())
    assert all(0 <= score <= 1 for of_adapter in scores.values() for score in of_adapter.values())
    # Nothing was learned.
    assert cross_table.main([str(fleet_file), "--examples", "5"]) == 1
    printed = capsys.readouterr()
    assert "the base" in printed.out
    assert "one: 0 % right at its own task, and 80 % are asked for" in printed.err


def test_held_out_questions_are_not_trained_on(fleet_file: Path) -> None:
    from raytune_ft.models import load_tokenizer

    (job, _) = expand(read_fleet(fleet_file))
    tokenizer = load_tokenizer(job.model)
    asked = cross_table.held_out(job, tokenizer, 1000)
    assert 5 <= len(asked) <= 20
    assert len(cross_table.held_out(job, tokenizer, 5)) == 5
    for question in asked:
        prompt = tokenizer.decode(question.prompt_ids)
        assert prompt.split()[-2] == question.references[0].strip()


def test_mixed_up_adapters_are_found() -> None:
    good = {
        "the base": {"sum": 0.0, "diff": 0.1},
        "sum": {"sum": 0.9, "diff": 0.0},
        "diff": {"sum": 0.2, "diff": 1.0},
    }
    assert cross_table.problems(good, 0.8) == []
    mixed = {**good, "sum": good["diff"], "diff": good["sum"]}
    assert cross_table.problems(mixed, 0.8) == [
        "sum: 20 % right at its own task, and 80 % are asked for",
        "sum: diff is better at its task",
        "diff: 0 % right at its own task, and 80 % are asked for",
        "diff: the base is better at its task",
        "diff: sum is better at its task",
    ]


def test_the_table_has_a_row_for_each_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"the base": {"sum": 0.0, "diff": 0.1}, "sum": {"sum": 0.9, "diff": 0.0}}
    Console(width=60).print(cross_table.table_of(scores, ["sum", "diff"]))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[1] == "adapter \\ task sum diff"
    assert lines[-2:] == ["the base 0 % 10 %", "sum 90 % 0 %"]
