"""`raytune-ft plan` of a fleet: what it prints, what it reads, and how it ends."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Run

from raytune_ft.cli import main
from raytune_ft.fleet.work import BYTES_PER_TOKEN

CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SIZES = {"active_to_passive": 40_000, "diff": 10_000, "negation": 20_000, "sum": 10_000}


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    """Four tasks of a folder and one of a second base, neither of which has weights."""
    for name, layers in (("base", 16), ("small", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (tmp_path / "tasks").mkdir()
    for name, size in SIZES.items():
        (tmp_path / "tasks" / f"{name}.json").write_bytes(b"\0" * size)
    (tmp_path / "more.jsonl").write_bytes(b"\0" * 8000)
    values = {
        "name": "tasks",
        "defaults": {
            "model": {"path": str(tmp_path / "base")},
            "data": {"split": {"validation": 0, "test": 0.1}},
            "publish": {"catalog": "s3://nowhere"},
        },
        "for_each": {"glob": str(tmp_path / "tasks" / "*.json")},
        "jobs": [
            {
                "name": "small",
                "model": {"path": str(tmp_path / "small")},
                "data": {"sources": [{"uri": str(tmp_path / "more.jsonl")}]},
            }
        ],
        "lanes": {"max": 2},
    }
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run(run: Run, fleet_file: Path) -> Run:
    """Runs `raytune-ft plan` on the fleet."""
    return partial(run, "plan", fleet_file)


def as_json(output: str) -> dict[str, Any]:
    (line,) = output.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_jobs_tokens_groups_and_slots(run: Run, fleet_file: Path) -> None:
    code, out, err = run("--json", "--gpu-memory", "24GiB")
    found = as_json(out)
    assert (code, err) == (0, "")
    tokens = {job["name"]: job["tokens"] for job in found["jobs"]}
    assert tokens == {
        "small": 1800,
        **{name.replace("_", "-"): 0.9 * size / BYTES_PER_TOKEN for name, size in SIZES.items()},
    }
    assert found["tokens"] == sum(tokens.values())
    large, small = found["groups"]
    assert (large["path"], large["jobs"], large["slots"]) == (str(fleet_file.parent / "base"), 4, 3)
    assert (small["path"], small["jobs"], small["slots"]) == (str(fleet_file.parent / "small"), 1, 1)
    assert large["tokens"] == found["tokens"] - 1800
    assert large["total_bytes"] < found["usable_bytes"] == int(24 * 2**30 * 0.85)
    assert {job["base"] for job in found["jobs"]} == {large["base"], small["base"]}
    forecast = found["forecast"]
    assert (forecast["gpus"], forecast["base_loads"], found["forecasts"]) == (2, 3, [])
    assert forecast["seconds"] >= max(job["seconds"] for job in found["jobs"])


def test_the_tables(run: Run) -> None:
    code, out, err = run("--gpu-memory", "24GiB", "--simulate")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 130
    assert lines[0] == "tasks: 5 jobs, bases: 2, about 19,800 tokens (4 bytes of data each; none was read)"
    assert "memory: 20.4 GiB of a device may be filled" in lines
    (time_line,) = [line for line in lines if line.startswith("time: about ")]
    assert "on lanes: 2; " in time_line
    assert time_line.endswith("idle, at 40 TFLOP/s of a lane (--tflops)")
    counts = [
        line.split()[:2]
        for line in lines[[line.strip() for line in lines].index("Simulated") :]
        if line.strip()[:1].isdigit()
    ]
    assert [gpus for gpus, _ in counts] == ["1", "2", "4", "8", "16", "32", "64"]
    assert counts[0] == ["1", "1"]
    assert int(counts[-1][1]) <= 5


def test_without_a_device_and_with_other_speeds(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert "memory: unchecked, so slots are as many as make a lane faster; give --gpu-memory" in out
    slow, fast = (as_json(run("--json", "--tflops", speed)[1]) for speed in ("0.5", "50"))
    assert slow["forecast"]["seconds"] > fast["forecast"]["seconds"]
    assert (slow["tflops"], slow["usable_bytes"]) == (0.5, None)
    _, out, _ = run("--json", "--set", "defaults.cluster.device=cpu", "--set", "lanes.slots=2")
    found = as_json(out)
    assert found["tflops"] == 0.27
    assert [group["slots"] for group in found["groups"]] == [2, 1]


def test_preemptions_cost_time(run: Run) -> None:
    small = ("--set", "defaults.batch.sequences=1", "--set", "defaults.checkpoint.every_steps=1")
    slow = ("--json", "--simulate", "--tflops", "1", *small)
    calm, stormy = (as_json(run(*slow, *more)[1]) for more in ((), ("--preemptions", "60")))
    assert calm["forecast"]["preemptions"] == 0 < stormy["forecast"]["preemptions"]
    assert calm["forecast"]["seconds"] < stormy["forecast"]["seconds"]
    _, out, _ = run(*slow[1:], "--preemptions", "60")
    assert "preemptions" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "for_each.glob=/nowhere/*"), "for_each.glob = /nowhere/*: no such file, and no folder or"),
        (
            ("--set", "jobs.0.data.sources.0.uri=/nowhere.jsonl"),
            "small: data.sources[0].uri = /nowhere.jsonl: no such file, and no folder or glob with files",
        ),
        (("--set", "jobs.0.method.rank=0"), "jobs[0] (small): method.rank = 0: must be greater than 0"),
        (("--set", "defaults.model.path=/nowhere"), "model.path = /nowhere: no such folder"),
        (("--set", "defaults.data.max_tokens=9000"), "data.max_tokens = 9000 is above the 8192 positions of"),
        (("--gpu-memory", "1GiB"), "GiB to train on one row of 512 tokens"),
        (("--gpu-memory", "6GiB", "--set", "lanes.slots=4"), "lanes.slots = 4: of "),
        (("--gpu-memory", "much"), "--gpu-memory much: write a number above 0 and a unit"),
        (("--tflops", "inf"), "--tflops inf: write a finite number, such as 40"),
        (("--preemptions", "inf"), "--preemptions inf: write a finite number, such as 40"),
    ],
)
def test_bad_input(
    run: Run, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("raytune-ft: ")
    assert message in err


def test_a_folder_of_several_splits_is_refused_as_in_a_job(run: Run, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("{}")
    code, out, err = run("--set", f"jobs.0.data.sources.0.uri={tmp_path}")
    assert (code, out) == (2, "")
    assert f"small: data.sources[0].uri = {tmp_path}: holds the splits test, train; name the one" in err


def test_a_job_file_has_no_lanes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    values = {
        "name": "a",
        "model": {"path": "b"},
        "data": {"sources": [{"uri": "c"}]},
        "publish": {"catalog": "d"},
    }
    path.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["raytune-ft", "plan", str(path), "--simulate"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"are for a fleet, and {path} is a job file" in capfd.readouterr().err


def test_needs_neither_torch_nor_ray(fleet_file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from raytune_ft.cli.plan_fleet import plan_fleet_command; "
        "from raytune_ft.spec import read_fleet; "
        f"file = Path({str(fleet_file)!r}); "
        "plan_fleet_command(read_fleet(file), file, None, None, True, 0.0, True); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "ray", "transformers", "pyarrow"} & set(loaded.split())
