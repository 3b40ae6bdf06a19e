"""`raytune-ft plan`: what it prints, what it reads, and how it ends."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Run

from raytune_ft.cli.plan import parse_size
from raytune_ft.errors import SpecError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
STATES = ("weights", "gradients", "optimizer")


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job whose model has a config and no weights, and whose data does not exist."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    values = {
        "name": "plan",
        "model": {"path": str(tmp_path / "base"), "weight_bits": 16, "gradient_checkpointing": True},
        "data": {"sources": [{"uri": "s3://nowhere/data.jsonl"}], "max_tokens": 2048},
        "method": {"kind": "full"},
        "cluster": {"workers": 4},
        "publish": {"catalog": "s3://nowhere"},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run(run: Run, job_file: Path) -> Run:
    """Runs `raytune-ft plan` on the job."""
    return partial(run, "plan", job_file)


def as_json(output: str) -> dict[str, Any]:
    (line,) = output.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_bytes_without_a_device(run: Run) -> None:
    code, out, err = run("--json")
    found = as_json(out)
    assert (code, err) == (0, "")
    assert found["parameters"] == found["trainable_parameters"] == pytest.approx(6.74e9, rel=0.01)
    assert (found["device_bytes"], found["usable_bytes"], found["chosen"]) == (None, None, None)
    for option in found["options"]:
        assert (option["auto"], option["fits"]) == (None, None)
        given = option["given"]
        parts = (*STATES, "activations", "logits", "workspace")
        assert given["total_bytes"] == sum(given[f"{name}_bytes"] for name in parts)
        assert given["tokens_per_forward"] == 2048
    by_stage = [o["given"] for o in found["options"] if o["offload"] == "none"]
    assert [by_stage[n]["optimizer_bytes"] == 3 * found["parameters"] for n in range(4)] == [
        False,
        *[True] * 3,
    ]
    assert by_stage[3]["weights_bytes"] * 4 == by_stage[0]["weights_bytes"]


def test_a_job_that_fits(run: Run) -> None:
    code, out, err = run(
        "--json",
        "--gpu-memory",
        "80GiB",
        "--set",
        "cluster.zero_stage=2",
        "--set",
        "batch.sequences_per_worker=2",
    )
    found = as_json(out)
    assert (code, err) == (0, "")
    assert found["usable_bytes"] == int(80 * 2**30 * 0.85)
    chosen = found["chosen"]
    assert (chosen["zero_stage"], chosen["offload"], chosen["workers"]) == (2, "none", 4)
    assert chosen in found["options"]
    assert chosen["given"]["tokens_per_forward"] == 4096
    assert [(o["zero_stage"], o["fits"]) for o in found["options"]][:3] == [(0, False), (1, False), (2, True)]


def test_a_job_that_does_not_fit(run: Run) -> None:
    code, out, err = run("--gpu-memory", "80GiB")
    assert code == 2
    assert "chosen: cluster.zero_stage: 2;" in out
    (line,) = err.splitlines()
    assert "GiB to train on one row of 2048 tokens" in line
    assert line.endswith("and the device can give 68.00; use cluster.zero_stage: 2")
    code, out, err = run("--gpu-memory", "80GiB", "--json")
    assert code == 2
    assert as_json(out)["chosen"]["zero_stage"] == 2


def test_the_table_is_plain_where_nobody_looks(run: Run) -> None:
    _, out, _ = run("--gpu-memory", "48GB")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 200
    rows = {cells[0]: cells[1:] for line in out.splitlines() if (cells := line.split())}
    assert rows["zero_stage"] == ["0", "1", "2", "3", "2", "3", "3"]
    assert rows["fits"] == ["no", "no", "no", "yes", "yes", "yes", "yes"]
    assert rows["weights"] == ["12.6", "12.6", "12.6", "3.1", "12.6", "3.1", "0.0"]


def test_a_pass_that_is_too_large_is_made_smaller(run: Run) -> None:
    arguments = ("--set", "batch.sequences_per_worker=32", "--set", "cluster.workers=1")
    lora = ("--set", "method.kind=lora", "--gpu-memory", "36GiB")
    code, out, err = run(*arguments, *lora)
    assert (code, err) == (0, "")
    assert "less" in out
    assert "chosen: the job as it is; " in out


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("1.5tib", 3 * 2**39),
        ("1000", 1000),
        ("512MB", 512 * 10**6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "24 apples", "-1GiB", "0", "1e9", "nan", "24GiB!", "9" * 400, f"1.{'0' * 400}1"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_size(text)
    assert str(caught.value) == (
        f"--gpu-memory {text:.60}: write a number above 0 and a unit, such as 24GiB or 80GB"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "model.path=/nowhere"), "model.path = /nowhere: no such folder"),
        (("--set", "data.max_tokens=5000"), "data.max_tokens = 5000 is above the 4096 positions of"),
        (("--gpu-memory", "much"), "--gpu-memory much: write a number above 0 and a unit"),
    ],
)
def test_bad_input(
    run: Run, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"raytune-ft: {message}")


def test_needs_neither_torch_nor_ray(job_file: Path) -> None:
    code = (
        "import sys; from raytune_ft.cli.plan import plan_command; from raytune_ft.spec import read_job; "
        f"plan_command(read_job({str(job_file)!r}), None, True); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "ray", "transformers", "pyarrow"} & set(loaded.split())
