"""The sharded engine trains what plain torch trains. Real processes over gloo, on tiny real models."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from pydantic import ValidationError
from sharding import join, run_group
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from raytune_ft.data.pack import share
from raytune_ft.errors import DataError
from raytune_ft.evaluate.generate import answer
from raytune_ft.methods import METHODS
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.planner import bucket_elements
from raytune_ft.spec import ClusterSpec, FullSpec, JobSpec, LoraSpec, ModelSpec, OptimizerSpec, TrainOnlySpec
from raytune_ft.train.batch import Classes, Continuations, Layout, Step, Tokens
from raytune_ft.train.engine import Block
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.sharded import ShardedEngine, divided_while_loading, zero_config

_GOLDEN = importlib.util.spec_from_file_location(
    "golden_losses", Path(__file__).parents[1] / "golden" / "losses.py"
)
assert _GOLDEN is not None
assert _GOLDEN.loader is not None
golden = importlib.util.module_from_spec(_GOLDEN)
_GOLDEN.loader.exec_module(golden)

CPU = torch.device("cpu")
STEPS = 6
KEPT_AT = 3
RATE = 1e-3
# Adam divides by the gradient's own size, so a small epsilon would blow up the rounding of tiny ones.
OPTIMIZER = OptimizerSpec(learning_rate=RATE, epsilon=1e-4, max_grad_norm=1.0, weight_decay=0.1)
LAYOUT = Layout(True, 64, 2, None, 96)


class Case(NamedTuple):
    """What is trained, and how it is divided."""

    stage: int
    method: LoraSpec | FullSpec = FullSpec()
    bits: int = 32
    tied: bool = True
    checkpointing: bool = False
    offload: str = "none"


class Group(NamedTuple):
    """Cases that the same workers train, one after another."""

    workers: int
    cases: dict[str, Case]


LORA = LoraSpec(rank=4, alpha=8)
LAST = FullSpec(train_only=TrainOnlySpec(layers="last-1"))
STAGES = (1, 2, 3)
SMALL = 2.0**-9
"""Lost beside 1 in bfloat16."""
FULL = {f"full-{stage}": Case(stage) for stage in STAGES}
SAMPLE = "sample"
GROUPS = {
    SAMPLE: Group(2, FULL),
    "methods": Group(
        2,
        {
            **{f"untied-{stage}": Case(stage, tied=False, checkpointing=True) for stage in STAGES},
            **{f"last-{stage}": Case(stage, LAST) for stage in STAGES},
            **{f"lora-{stage}": Case(stage, LORA) for stage in STAGES},
            **{f"nf4-{stage}": Case(stage, LORA, bits=4) for stage in STAGES},
            **{f"bf16-{stage}": Case(stage, bits=16) for stage in STAGES},
            "offload-optimizer-2": Case(2, offload="optimizer"),
            "offload-optimizer-3": Case(3, offload="optimizer"),
            "offload-parameters-3": Case(3, offload="parameters"),
        },
    ),
    **{f"workers-{workers}": Group(workers, FULL) for workers in (1, 3, 4)},
}
TOLERANCES = {32: (1e-5, 1e-4), 4: (2e-2, 2e-3), 16: (2e-2, 2e-3)}
"""Of losses and of weights: bfloat16 has 8 bits of mantissa."""


def step_examples(step: int) -> list[Tokens]:
    """Uneven examples of two sources; every third step has one, so that all workers but one have none."""
    random = np.random.default_rng(step)
    lengths = random.integers(4, 40, 1 if step % 3 == 2 else 7)
    return [
        Tokens(random.integers(6, 320, n), np.arange(n) >= n // 2, at % 2) for at, n in enumerate(lengths)
    ]


def own_step(examples: list[Tokens], peers: Peers) -> Step:
    mine = share([len(example.input_ids) for example in examples], peers.count)[peers.rank]
    return Step(LAYOUT.batches([examples[at] for at in mine]), len(examples), "", sources=2)


def new_model(case: Case, base: Path) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    if case.bits == 32:
        model = tiny.llama(hidden=32)
        if not case.tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)
    else:
        spec = ModelSpec.model_validate({"path": str(base), "weight_bits": case.bits})
        model = load_base(spec, device=CPU)
    model.requires_grad_(False)
    return model, METHODS[type(case.method)].add(model, case.method, 0)


def plain(case: Case, base: Path) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and weights of a loop that knows neither packing, nor passes, nor workers."""
    model, parameters = new_model(case, base)
    model.train()
    masters = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    groups = [
        {"params": [p for p in masters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, eps=1e-4)
    losses, norms = [], []
    for step in range(STEPS):
        examples = step_examples(step)
        learned = sum(int(example.learned[1:].sum()) for example in examples)
        total = 0.0
        for example in examples:
            ids_T = torch.from_numpy(example.input_ids)
            logits_TV = model(input_ids=ids_T[None]).logits[0, :-1].float()
            labels_T = ids_T[1:].where(torch.from_numpy(example.learned[1:]), -100)
            loss = F.cross_entropy(logits_TV, labels_T, reduction="sum") / learned
            loss.backward()
            total += loss.item()
        for name, p in parameters.items():
            masters[name].grad, p.grad = p.grad.float(), None
        norms.append(float(nn.utils.clip_grad_norm_(masters.values(), 1.0)))
        optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(masters[name])
        losses.append(total)
    return losses, norms, {name: p.detach() for name, p in masters.items()}


def new_engine(case: Case, base: Path, peers: Peers, optimizer: OptimizerSpec = OPTIMIZER) -> ShardedEngine:
    model, parameters = new_model(case, base)
    cluster = ClusterSpec.model_validate({"zero_stage": case.stage, "offload": case.offload})
    config = zero_config(
        cluster, weight_bits=case.bits, max_grad_norm=1.0, parameters=100_000, hidden=model.config.hidden_size
    )
    # All that is small in a tiny model would stay whole, and one bucket hold it.
    config["zero_optimization"] |= {"reduce_bucket_size": 5000}
    if case.stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 40, "sub_group_size": 8000}
    return ShardedEngine(
        model,
        parameters,
        optimizer,
        config,
        device=CPU,
        gradient_checkpointing=case.checkpointing,
        peers=peers,
    )


def run(engine: ShardedEngine, peers: Peers, start: int, stop: int) -> list[StepReport]:
    reports: list[StepReport] = []
    steps = (own_step(step_examples(step), peers) for step in range(start, stop))
    fit(engine, steps, start=start, learning_rate=lambda _: RATE, report=reports.append, peers=peers)
    return reports


def whole(engine: ShardedEngine) -> dict[str, Tensor]:
    """Master weights on every worker."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.parameters.items()}


def train(case: Case, base: Path, folder: Path, peers: Peers) -> dict[str, Any]:
    """A run, the same again, and one that goes on in the middle from what it saved."""
    found: dict[str, Any] = {}
    engine = new_engine(case, base, peers)
    found["reports"] = run(engine, peers, 0, STEPS)
    found["weights"] = whole(engine)
    found["evaluated"] = sum(engine.evaluate(batch) for batch in LAYOUT.batches(step_examples(0)))
    engine = new_engine(case, base, peers)
    run(engine, peers, 0, KEPT_AT)
    snapshot = engine.snapshot()
    run(engine, peers, KEPT_AT, STEPS)
    snapshot(folder)
    dist.barrier()
    engine = new_engine(case, base, peers)
    engine.load(folder)
    found["resumed"] = run(engine, peers, KEPT_AT, STEPS)
    found["resumed_weights"] = whole(engine)
    return found


def blow_up(stage: int, base: Path, peers: Peers) -> tuple[float, bool]:
    """The norm that is told where one worker's gradient is not finite, and whether the weights stand."""
    engine = new_engine(Case(stage), base, peers)
    unknown = LAYOUT.batches([Tokens(np.array([5, 320]), np.array([False, True]))])[0]
    for refuse in (
        lambda: engine.accumulate([Block(engine, unknown, 1, forward=0, divisor=1, sources=1)]),
        lambda: engine.evaluate(unknown),
    ):
        with pytest.raises(DataError, match="makes token 320, and the base has embeddings for 0 to 319"):
            refuse()
    run(engine, peers, 0, 1)
    before = whole(engine)
    (batch, *_) = LAYOUT.batches(step_examples(0))
    # Not finite on one worker alone: its objective is divided by next to nothing.
    divisor = 1e-45 if peers.rank == 0 else 1
    engine.accumulate([Block(engine, batch, 1, forward=peers.rank, divisor=divisor, sources=2)])
    norm = engine.update(RATE)
    return norm, all(torch.equal(p, before[name]) for name, p in whole(engine).items())


def golden_losses(stage: int, peers: Peers) -> list[float]:
    """Losses of the golden file of the full method, on all workers together."""
    model = tiny.llama()
    optimizer = golden.CASES["full-fp32"][2]
    parameters = METHODS[FullSpec].add(model, FullSpec(), 0)
    config = zero_config(
        ClusterSpec.model_validate({"zero_stage": stage}),
        weight_bits=32,
        max_grad_norm=1.0,
        parameters=100_000,
        hidden=64,
    )
    engine = ShardedEngine(model, parameters, optimizer, config, device=CPU, peers=peers)
    found: list[float] = golden.train(engine, optimizer.learning_rate, peers)
    return found


def summed(stage: int, peers: Peers) -> float:
    """The norm of a gradient whose two workers' parts bfloat16 cannot hold in one number."""
    import deepspeed

    layer = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    cluster = ClusterSpec.model_validate({"zero_stage": stage})
    config = zero_config(cluster, weight_bits=16, max_grad_norm=None, parameters=4, hidden=4)
    optimizer = torch.optim.AdamW(layer.parameters())
    engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=config)
    part = SMALL if peers.rank else 1.0
    # DeepSpeed takes the mean.
    engine.backward(peers.count * engine(torch.full((1, 4), part, dtype=torch.bfloat16)).sum())
    engine.step()
    return float(engine.get_global_grad_norm())


def loaded_divided(path: Path, labels: tuple[str, ...], peers: Peers) -> tuple[set[torch.dtype], list[float]]:
    """Dtypes of adapters on a 16-bit base that stage 3 divided while it was loaded, and their losses."""
    spec = ModelSpec(path=str(path), weight_bits=16, labels=labels)
    cluster = ClusterSpec.model_validate({"zero_stage": 3})
    config = zero_config(cluster, weight_bits=16, max_grad_norm=1.0, parameters=10_000, hidden=3)
    with divided_while_loading(config):
        model = load_base(spec, device=None)
    parameters = METHODS[LoraSpec].add(model, LORA, 0)
    engine = ShardedEngine(model, parameters, OPTIMIZER, config, device=CPU, peers=peers)
    kinds = Classes(3, lambda ids: int(ids[0]) % 3) if labels else Continuations()
    layout = replace(LAYOUT, arrangement=kinds)
    examples = [Tokens(np.arange(6, 6 + n), np.arange(n) >= n - 2) for n in (9, 14, 5, 22)]
    steps = [Step(layout.batches(examples), 4, "", sources=1)] * 3
    reports: list[StepReport] = []
    fit(engine, steps, start=0, learning_rate=lambda _: 1e-2, report=reports.append, peers=peers)
    return {p.dtype for p in parameters.values()}, [report.loss for report in reports]


def answered_unevenly(base: Path, peers: Peers) -> int:
    """Answers where a worker asks for longer ones than another, of weights that they hold together."""
    engine = new_engine(Case(3), base, peers)
    tokenizer = load_tokenizer(ModelSpec(path=str(base)))
    tokens = 2 + 6 * peers.rank
    prompts = [[7, 8, 9]]
    return len(answer(engine.model, tokenizer, prompts, end_ids=[], max_new_tokens=tokens, batch_sequences=1))


def work(rank: int, world: int, folder: str) -> None:
    """One worker: trains all cases of the group that the folder is named for, and writes what it found."""
    join(rank, world, folder)
    peers = Peers.current()
    base = Path(folder).parent / "base"
    group = Path(folder).name
    found: dict[str, Any] = {}
    for name, case in GROUPS[group].cases.items():
        kept = Path(folder) / name
        kept.mkdir(exist_ok=True)
        found[name] = train(case, base, kept, peers)
    if group == SAMPLE:
        found["blown"] = {stage: blow_up(stage, base, peers) for stage in STAGES}
        found["golden"] = {stage: golden_losses(stage, peers) for stage in STAGES}
        found["summed"] = {stage: summed(stage, peers) for stage in STAGES}
        found["divided"] = {
            labels: loaded_divided(base.with_name(name), labels, peers)
            for name, labels in (("base", ()), ("classifier", ("a", "b", "c")))
        }
        found["answered"] = answered_unevenly(base, peers)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


Found = Callable[[str], list[dict[str, Any]]]
"""What each worker of a group found."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    above = tmp_path_factory.mktemp("sharded")
    tiny.save_base(above / "classifier", tiny.bert(), words=tiny.wordpiece())
    return tiny.save_base(above / "base", tiny.llama(hidden=32))


@pytest.fixture(scope="module")
def found(base: Path) -> Found:
    """Trains a group when the first test asks for it."""

    @cache
    def results(group: str) -> list[dict[str, Any]]:
        folder = base.parent / group
        folder.mkdir()
        workers = GROUPS[group].workers
        run_group(work, workers, folder)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(workers)]

    return results


ALL = [
    pytest.param(group, name, marks=() if group == SAMPLE else pytest.mark.slow)
    for group, (_, cases) in GROUPS.items()
    for name in cases
]


@pytest.mark.parametrize(("group", "name"), ALL)
def test_it_trains_what_plain_torch_trains(group: str, name: str, found: Found, base: Path) -> None:
    case = GROUPS[group].cases[name]
    losses, norms, weights = plain(case, base)
    ours = found(group)[0][name]
    loss_tolerance, weight_tolerance = TOLERANCES[case.bits]
    assert [r.loss for r in ours["reports"]] == pytest.approx(losses, abs=loss_tolerance)
    assert [r.grad_norm for r in ours["reports"]] == pytest.approx(norms, rel=10 * loss_tolerance)
    for key, weight in weights.items():
        torch.testing.assert_close(ours["weights"][key], weight, rtol=0, atol=weight_tolerance)


@pytest.mark.parametrize(("group", "name"), ALL)
def test_a_run_that_goes_on_has_the_same_bits(group: str, name: str, found: Found) -> None:
    for worker in found(group):
        ours = worker[name]
        later = ours["reports"][KEPT_AT:]
        assert [(r.loss, r.grad_norm) for r in ours["resumed"]] == [(r.loss, r.grad_norm) for r in later]
        assert all(torch.equal(p, ours["resumed_weights"][key]) for key, p in ours["weights"].items())


@pytest.mark.parametrize(("group", "name"), ALL)
def test_all_workers_tell_the_same(group: str, name: str, found: Found) -> None:
    first, *others = (worker[name] for worker in found(group))
    for other in others:
        assert [(r.loss, r.grad_norm) for r in other["reports"]] == [
            (r.loss, r.grad_norm) for r in first["reports"]
        ]
        assert other["evaluated"] == first["evaluated"]
    assert math.isfinite(first["evaluated"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_leaves_the_weights(stage: int, found: Found) -> None:
    for worker in found(SAMPLE):
        norm, weights_stand = worker["blown"][stage]
        assert not math.isfinite(norm)
        assert weights_stand


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_kept_losses(stage: int, found: Found) -> None:
    assert found(SAMPLE)[0]["golden"][stage] == pytest.approx(golden.read("full-fp32"), abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_bfloat16_weights_add_up_in_float32(stage: int, found: Found) -> None:
    assert found(SAMPLE)[0]["summed"][stage] == pytest.approx(2 * (1 + SMALL), rel=1e-6)


@pytest.mark.parametrize("labels", [(), ("a", "b", "c")], ids=["text", "classes"])
def test_adapters_of_a_base_that_was_divided_while_it_was_loaded(
    labels: tuple[str, ...], found: Found
) -> None:
    dtypes, losses = found(SAMPLE)[0]["divided"][labels]
    assert dtypes == {torch.bfloat16}
    assert losses[-1] < losses[0]


def test_workers_whose_answers_end_sooner_wait_for_the_others(found: Found) -> None:
    assert [worker["answered"] for worker in found(SAMPLE)] == [1, 1]


@pytest.mark.parametrize(("stage", "overlaps"), [(1, False), (2, True), (3, True)])
def test_communication_overlaps_where_deepspeed_allows_it(
    stage: int, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cluster = ClusterSpec.model_validate({"zero_stage": stage})
    config = zero_config(cluster, weight_bits=16, max_grad_norm=1.0, parameters=100, hidden=8)
    assert config["zero_optimization"]["overlap_comm"] is overlaps


@pytest.mark.parametrize(
    ("parameters", "elements"),
    [(1, 1 << 20), (1 << 24, 1 << 20), (1 << 30, 1 << 26), (10**11, 1 << 28)],
)
def test_a_pass_has_several_buckets_that_are_neither_tiny_nor_huge(parameters: int, elements: int) -> None:
    assert bucket_elements(parameters) == elements


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"offload": "optimizer"}, "offload = optimizer needs zero_stage 2 or 3, and zero_stage = 0"),
        ({"offload": "optimizer", "zero_stage": 1}, "needs zero_stage 2 or 3, and zero_stage = 1"),
        ({"offload": "parameters", "zero_stage": 2}, "needs zero_stage 3, and zero_stage = 2"),
    ],
)
def test_offload_without_its_stage_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ClusterSpec.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": {"kind": "adamw_8bit"}}, "optimizer.kind = adamw_8bit keeps it in blocks; use adamw"),
        (
            {
                "method": {"kind": "full", "unfreeze": {"every_steps": 5}},
                "model": {"path": "b", "weight_bits": 32},
            },
            "method.unfreeze adds weights while it trains, and cluster.zero_stage = 3",
        ),
        ({"model": {"path": "b", "weight_bits": 8}}, "use 4, 16 or 32, or zero_stage 1 or 2"),
        ({"model": {"path": "b", "compile": True}}, "use zero_stage 0, 1 or 2, or compile: false"),
        (
            {"model": {"path": "b", "compile": True}, "method": {"dropout": 0.1}, "cluster": {}},
            "method.dropout = 0.1; use dropout: 0, or compile: false",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, Any], said: str) -> None:
    job = {
        "name": "j",
        "model": {"path": "b"},
        "data": {"sources": [{"uri": "d"}]},
        "cluster": {"zero_stage": 3},
        "publish": {"catalog": "c"},
    }
    with pytest.raises(ValidationError, match=said):
        JobSpec.model_validate({**job, **changes})
