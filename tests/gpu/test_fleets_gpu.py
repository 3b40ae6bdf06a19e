"""Several jobs on one base, where their updates are grouped products. Run with `pytest -m gpu`."""

import gc
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from fleets import Found, Plan, run_alone, run_together
from transformers import PreTrainedModel
from updates import grouped, one_by_one

from raytune_ft.errors import Diverged
from raytune_ft.methods.dropout import dropped, feature_keys, module_seed, token_keys
from raytune_ft.methods.grouped import serves
from raytune_ft.models import load_base
from raytune_ft.spec import LoraSpec, ModelSpec, OptimizerSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Continuations, Step
from raytune_ft.train.loop import fit
from raytune_ft.train.probe import can_share_passes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
JOBS = [
    Plan(seed=0, method=LoraSpec(rank=4, alpha=8, dropout=0.1), steps=8),
    Plan(seed=1, method=LoraSpec(rank=16, alpha=4, targets=("q_proj", "down_proj")), steps=10, sequences=2),
    Plan(seed=2, method=LoraSpec(rank=7, alpha=9, targets="attention"), per_forward=2, joins=3),
    Plan(seed=3, method=LoraSpec(rank=64), optimizer=OptimizerSpec(kind="paged_adamw_8bit"), steps=5),
]

STILL = OptimizerSpec(learning_rate=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


def load(folder: Path, bits: int) -> PreTrainedModel:
    return load_base(ModelSpec.model_validate({"path": str(folder), "weight_bits": bits}), device=CUDA)


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ([5], [16]),
        ([1, 2, 3], [8, 8, 8]),
        ([100, 7, 64, 1], [4, 16, None, 1]),
        ([513, 33], [64, 5]),
        ([17] * 32, [8] * 32),
    ],
    ids=str,
)
def test_the_grouped_update_equals_exact_products(sizes: list[int], ranks: list[int | None]) -> None:
    torch.manual_seed(0)
    stops = torch.tensor(sizes).cumsum(0).tolist()
    scales = [0.5 + at % 3 for at in range(len(sizes))]
    x_ND = torch.randn(stops[-1], 128, device=CUDA, dtype=torch.bfloat16)
    y_NO = torch.randn(stops[-1], 192, device=CUDA, dtype=torch.bfloat16)
    if not serves(x_ND, y_NO):
        pytest.skip("the device has no grouped product")
    pairs = [
        None if r is None else (torch.randn(r, 128, device=CUDA), torch.randn(192, r, device=CUDA))
        for r in ranks
    ]
    found = []
    for update, dtype in ((one_by_one, torch.float64), (grouped, torch.bfloat16)):
        x, y = x_ND.to(dtype).requires_grad_(), y_NO.to(dtype).requires_grad_()
        wide = dtype if dtype == torch.float64 else torch.float32
        given = [pair and tuple(w.to(wide).clone().requires_grad_() for w in pair) for pair in pairs]
        updated = update(x, y, stops, scales, given)  # type: ignore[arg-type]
        updated.double().square().sum().backward()
        found.append([updated, x.grad, y.grad, *(w.grad for pair in given if pair for w in pair)])
    for precise, rounded in zip(*found, strict=True):
        assert precise is not None
        assert rounded is not None
        assert float((precise - rounded.double()).norm() / precise.norm()) < 2e-2


def test_masks_are_those_of_the_cpu() -> None:
    seed = module_seed(3, "model.layers.0.mlp.up_proj")
    masks = []
    for device in ("cpu", "cuda"):
        example_N = torch.arange(40, device=device).repeat_interleave(25)
        position_N = torch.arange(25, device=device).repeat(40)
        keys_N = token_keys(11, example_N, position_N)
        masks.append(dropped(seed, keys_N, feature_keys(seed, 300, torch.device(device)), 0.1).cpu())
    assert torch.equal(*masks)


def begun(place: int, step: int, engine: BankEngine) -> None:
    """Adapters that do something from the first step on, and each something else."""
    if step == 0:
        torch.manual_seed(engine.seed)
        with torch.no_grad():
            for name, parameter in engine.parameters.items():
                if name.endswith("lora_B.weight"):
                    start = torch.randn(parameter.shape) * 0.1
                    parameter.copy_(start)
                    engine.masters[name].copy_(start)


def moved(one: Found, other: Found) -> float:
    """How far the weights of two jobs are from each other, where they have the same ones."""
    return math.sqrt(sum(float((one.weights[n] - other.weights[n]).square().sum()) for n in one.weights))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [4, 16, 32])
def test_each_job_follows_its_curve_alone(folder: Path, bits: int, checkpointing: bool) -> None:
    assert can_share_passes(load(folder, bits), max_tokens=64)

    def base() -> PreTrainedModel:
        model = load(folder, bits)
        if checkpointing:
            model.activation_checkpointing_enable()
        return model

    alone = [run_together(base(), [job], tokens_per_pass=0, meddle=begun)[0] for job in JOBS]
    for at, found in enumerate(run_together(base(), JOBS, meddle=begun)):
        assert found.ends == [None]
        assert [r.loss for r in found.reports] == pytest.approx(
            [r.loss for r in alone[at].reports], abs=1e-4 if bits == 32 else 2e-2
        )
        # Not only the losses, which are much alike: the way that the weights went.
        start = run_together(base(), [replace(JOBS[at], steps=1, joins=0, optimizer=STILL)], meddle=begun)[0]
        assert moved(found, alone[at]) < 0.5 * moved(start, alone[at])


def test_jobs_that_come_and_go_leave_no_memory_behind(folder: Path) -> None:
    bank = Bank(load(folder, 4).requires_grad_(False), tokens_per_pass=1024, paged=False)
    layout = JOBS[0].layout(Continuations())
    held = []
    for turn in range(50):
        engines = [bank.enter(job.method, job.optimizer, seed=turn) for job in JOBS]
        for engine, job in zip(engines, JOBS, strict=True):
            step = Step(layout.batches(job.examples(turn)), job.sequences, "", 2)
            fit(engine, [step], start=0, learning_rate=lambda _: 1e-3, report=lambda _: None)
        for engine in engines:
            bank.leave(engine)
        del engines, engine
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert max(held[5:]) <= held[4]


def test_on_a_bank_that_does_not_page_the_paged_kinds_are_the_plain_ones(folder: Path) -> None:
    spec = OptimizerSpec(kind="paged_adamw_8bit")
    for paged in (True, False):
        bank = Bank(load(folder, 16).requires_grad_(False), paged=paged)
        assert bank.enter(LoraSpec(rank=4), spec).optimizer.is_paged is paged


def test_a_device_that_answers_no_more_is_told_from_a_job_that_fails() -> None:
    program = """
import torch
from raytune_ft.errors import DeviceFailed
from raytune_ft.train.faults import fault_of_device

table = torch.zeros(8, 4, device="cuda")
assert fault_of_device(ValueError("a job's")) is None
try:
    torch.nn.functional.embedding(torch.tensor([99], device="cuda"), table).sum().item()
except Exception as error:
    assert isinstance(fault_of_device(error), DeviceFailed), error
    assert isinstance(fault_of_device(ValueError("the next one's")), DeviceFailed)
    print("told")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "told\n", done.stderr


@pytest.mark.parametrize("bits", [4, 32])
def test_weights_that_are_not_finite_end_their_job_alone(folder: Path, bits: int) -> None:
    jobs = [replace(job, joins=0, steps=6) for job in JOBS[:3]]

    def poison(place: int, step: int, engine: BankEngine) -> None:
        if (place, step) == (1, 2):
            with torch.no_grad():
                for parameter in engine.parameters.values():
                    parameter.fill_(math.nan)

    found = run_together(load(folder, bits), jobs, meddle=poison)
    assert isinstance(found[1].ends[0], Diverged)
    for at in (0, 2):
        alone = run_alone(load(folder, bits), jobs[at])
        assert [r.loss for r in found[at].reports] == pytest.approx(
            [r.loss for r in alone.reports], abs=1e-4 if bits == 32 else 2e-2
        )
