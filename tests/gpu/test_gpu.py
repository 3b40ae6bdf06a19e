"""What only a CUDA device can show. Run with `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from raytune_ft.methods import METHODS
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.spec import LoraSpec, ModelSpec, OptimizerSpec
from raytune_ft.train.bank import BankEngine
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.probe import check_isolation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


def steps(count: int) -> list[Step]:
    layout = Layout(True, 64, 2, None, 4096)
    random = np.random.default_rng(0)
    examples = [Tokens(random.integers(3, 320, n), np.arange(n) >= n // 2) for n in (9, 14, 5, 22)]
    return [Step(layout.batches(examples), 4, "", 1)] * count


def train(
    base: Path,
    *,
    bits: int,
    device: str,
    kind: str = "adamw",
    dequantised: bool = False,
    checkpointing: bool = False,
) -> tuple[BankEngine, list[StepReport]]:
    spec = ModelSpec.model_validate({"path": str(base), "weight_bits": bits})
    model = load_base(spec, device=torch.device(device), dequantised=dequantised)
    check_isolation(model, packed=True)
    parameters = METHODS[LoraSpec].add(model, LoraSpec(rank=64, dropout=0.1), 0)
    optimizer = OptimizerSpec.model_validate({"kind": kind, "learning_rate": 5e-3})
    engine = BankEngine(model, parameters, optimizer, gradient_checkpointing=checkpointing)
    reports: list[StepReport] = []
    fit(engine, steps(20), start=0, learning_rate=lambda _: 5e-3, report=reports.append)
    return engine, reports


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_every_width_and_optimizer_learns(base: Path, bits: int, kind: str) -> None:
    _, reports = train(base, bits=bits, device="cuda", kind=kind)
    assert reports[-1].loss < reports[0].loss * 0.9


def test_float32_follows_the_cpu(base: Path) -> None:
    # Dropout is drawn on the device, so its masks differ; without it the curves agree to rounding.
    losses = []
    for device in ("cpu", "cuda"):
        model = load_base(ModelSpec(path=str(base), weight_bits=32), device=torch.device(device))
        engine = BankEngine(
            model, METHODS[LoraSpec].add(model, LoraSpec(rank=4), 0), OptimizerSpec(epsilon=1e-5)
        )
        reports: list[StepReport] = []
        fit(engine, steps(10), start=0, learning_rate=lambda _: 1e-3, report=reports.append)
        losses.append([report.loss for report in reports])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_dequantised_base_follows_the_packed_one(base: Path) -> None:
    _, packed = train(base, bits=4, device="cuda")
    _, plain = train(base, bits=4, device="cuda", dequantised=True)
    assert [r.loss for r in packed] == pytest.approx([r.loss for r in plain], abs=2e-2)


def test_gradient_checkpointing_needs_less_memory(base: Path) -> None:
    peaks = []
    for checkpointing in (False, True):
        torch.cuda.reset_peak_memory_stats()
        engine, _ = train(base, bits=32, device="cuda", checkpointing=checkpointing)
        peaks.append(engine.peak_memory_bytes())
    assert peaks[1] < peaks[0]


def test_resumes_with_the_same_loss(base: Path, tmp_path: Path) -> None:
    engine, _ = train(base, bits=4, device="cuda", kind="paged_adamw_8bit")
    engine.save(tmp_path)
    before = engine.evaluate(steps(1)[0].batches[0])
    engine.load(tmp_path)
    assert engine.evaluate(steps(1)[0].batches[0]) == before


def test_the_tokenizer_pads_on_the_device(base: Path) -> None:
    from raytune_ft.evaluate.generate import answer

    model = load_base(ModelSpec(path=str(base)), device=torch.device("cuda"))
    tokenizer = load_tokenizer(ModelSpec(path=str(base)))
    replies = answer(model, tokenizer, [[5, 6], [7]], end_ids=[], max_new_tokens=3, batch_sequences=2)
    assert len(replies) == 2
