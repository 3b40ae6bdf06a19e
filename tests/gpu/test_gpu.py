"""What only a CUDA device can show. Run with `pytest -m gpu` on a machine that has one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist

from raytune_ft.methods import METHODS
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.planner import ModelFacts, memory_plan
from raytune_ft.spec import ClusterSpec, FullSpec, LoraSpec, ModelSpec, OptimizerSpec, parse_job
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.devices import own_smallest_gpu_bytes
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.probe import check_isolation
from raytune_ft.train.sharded import ShardedEngine, join_group, zero_config

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
    engine = BankEngine(Bank(model, gradient_checkpointing=checkpointing), parameters, optimizer)
    reports: list[StepReport] = []
    fit(engine, steps(20), start=0, learning_rate=lambda _: 5e-3, report=reports.append)
    return engine, reports


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_every_width_and_optimizer_learns(base: Path, bits: int, kind: str) -> None:
    _, reports = train(base, bits=bits, device="cuda", kind=kind)
    assert reports[-1].loss < reports[0].loss * 0.9


def test_float32_follows_the_cpu(base: Path) -> None:
    # Dropout too: its masks are the same on every device.
    losses = []
    for device in ("cpu", "cuda"):
        model = load_base(ModelSpec(path=str(base), weight_bits=32), device=torch.device(device))
        parameters = METHODS[LoraSpec].add(model, LoraSpec(rank=4, dropout=0.1), 0, 0)
        engine = BankEngine(Bank(model), parameters, OptimizerSpec(epsilon=1e-5))
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
    tiny.keep(engine, tmp_path)
    before = engine.evaluate(steps(1)[0].batches[0])
    engine.load(tmp_path)
    assert engine.evaluate(steps(1)[0].batches[0]) == before


def test_the_tokenizer_pads_on_the_device(base: Path) -> None:
    from raytune_ft.evaluate.generate import answer

    model = load_base(ModelSpec(path=str(base)), device=torch.device("cuda"))
    tokenizer = load_tokenizer(ModelSpec(path=str(base)))
    replies = answer(model, tokenizer, [[5, 6], [7]], end_ids=[], max_new_tokens=3, batch_sequences=2)
    assert len(replies) == 2


@pytest.mark.parametrize(
    ("bits", "method"),
    [(32, {"kind": "full"}), (16, {"kind": "full"}), (16, {"kind": "lora", "rank": 16})],
    ids=["full-32", "full-16", "lora-16"],
)
def test_the_planned_peak_is_the_real_one(bits: int, method: dict[str, object], tmp_path: Path) -> None:
    rows, max_tokens = 2, 256
    # Large enough that what the plan leaves out, such as workspaces of the libraries, does not show.
    model = tiny.llama(hidden=1024, layers=12, vocabulary=32000, positions=max_tokens)
    facts = ModelFacts.from_config(model.config.to_dict())
    job = parse_job(
        {
            "name": "plan",
            "model": {"path": str(tiny.save_base(tmp_path / "base", model)), "weight_bits": bits},
            "data": {"sources": [{"uri": "data.jsonl"}], "max_tokens": max_tokens},
            "method": method,
            "publish": {"catalog": "catalog"},
        }
    )
    del model
    planned = memory_plan(facts, job, resident="packed", tokens_per_forward=rows * max_tokens)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    base = load_base(job.model, device=torch.device("cuda"))
    engine = BankEngine(Bank(base), METHODS[type(job.method)].add(base, job.method, 0), job.optimizer)
    random = np.random.default_rng(0)
    layout = Layout(True, max_tokens, 2, None, rows * max_tokens)
    # Two passes a step: the gradients of the first stand beside the activations of the second.
    examples = [
        Tokens(random.integers(3, 32000, max_tokens), np.ones(max_tokens, dtype=np.bool_))
        for _ in range(2 * rows)
    ]
    step = Step(layout.batches(examples), len(examples), "", 1)
    assert len(step.batches) == 2
    fit(engine, [step] * 3, start=0, learning_rate=lambda _: 1e-3, report=lambda _: None)
    assert engine.peak_memory_bytes() - before == pytest.approx(planned.total, rel=0.1)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    """A process group of this process alone."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    join_group(torch.device("cuda"))
    yield Peers.current()
    dist.destroy_process_group()


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters")],
)
def test_every_stage_trains_what_a_whole_model_trains(
    base: Path, group: Peers, stage: int, offload: str, bits: int
) -> None:
    def train_full(sharded: bool) -> list[float]:
        spec = ModelSpec.model_validate({"path": str(base), "weight_bits": bits})
        device = torch.device("cuda", 0)
        model = load_base(spec, device=device)
        parameters = METHODS[FullSpec].add(model, FullSpec(), 0)
        optimizer = OptimizerSpec(learning_rate=1e-3, epsilon=1e-4)
        cluster = ClusterSpec.model_validate({"zero_stage": stage, "offload": offload})
        config = zero_config(cluster, weight_bits=bits, max_grad_norm=1.0, parameters=10**5, hidden=64)
        engine = (
            ShardedEngine(model, parameters, optimizer, config, device=device, peers=group)
            if sharded
            else BankEngine(Bank(model), parameters, optimizer)
        )
        reports: list[StepReport] = []
        fit(engine, steps(20), start=0, learning_rate=lambda _: 1e-3, report=reports.append, peers=group)
        return [report.loss for report in reports]

    assert train_full(True) == pytest.approx(train_full(False), abs=1e-4 if bits == 32 else 2e-2)


@pytest.mark.parametrize("bits", [32, 16])
def test_compiled_passes_train_what_others_train(base: Path, bits: int) -> None:
    losses = []
    for compiled in (False, True):
        spec = ModelSpec.model_validate({"path": str(base), "weight_bits": bits, "compile": compiled})
        model = load_base(spec, device=torch.device("cuda"))
        parameters = METHODS[FullSpec].add(model, FullSpec(), 0)
        engine = BankEngine(Bank(model, compiled=spec.compile), parameters, OptimizerSpec(epsilon=1e-4))
        reports: list[StepReport] = []
        fit(engine, steps(10), start=0, learning_rate=lambda _: 1e-3, report=reports.append)
        losses.append([report.loss for report in reports])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4 if bits == 32 else 2e-2)


def test_the_driver_says_what_torch_finds() -> None:
    smallest = min(
        torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())
    )
    assert own_smallest_gpu_bytes() == pytest.approx(smallest, rel=0.02)
