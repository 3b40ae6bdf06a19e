"""Many jobs on one base: each ends as it would by itself, whatever the others do."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fleets
import numpy as np
import peft
import pytest
import tiny
import torch
from fleets import Plan, apart, run_alone, run_together, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from raytune_ft.errors import DataError, Diverged, ModelError
from raytune_ft.evaluate.generate import answer
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.models import load_base
from raytune_ft.planner import LOGITS_CHUNK_TOKENS
from raytune_ft.spec import FullSpec, LoraSpec, ModelSpec, OptimizerSpec, ScheduleSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Classes, Layout, Pairs, Step
from raytune_ft.train.loop import fit, mean_loss
from raytune_ft.train.probe import can_share_passes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


methods = st.builds(
    LoraSpec,
    rank=st.sampled_from([1, 2, 5, 8, 16]),
    alpha=st.sampled_from([1.0, 8.0, 24.0]),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    targets=st.sampled_from(["all-linear", "attention", ("q_proj", "v_proj"), ("down_proj",)]),
)
optimizers = st.builds(
    OptimizerSpec,
    kind=st.sampled_from(["adamw", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]),
    learning_rate=st.sampled_from([1e-4, 1e-3, 5e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    max_grad_norm=st.sampled_from([None, 1.0, 0.1]),
)
schedules = st.builds(
    ScheduleSpec,
    warmup=st.sampled_from([0.0, 0.3]),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
)


def plans(steps: int) -> st.SearchStrategy[Plan]:
    """Jobs of up to so many steps, which join and leave at different rounds."""
    return st.builds(
        Plan,
        seed=st.integers(0, 2**31),
        method=methods,
        optimizer=optimizers,
        schedule=schedules,
        steps=st.integers(1, steps),
        sequences=st.integers(1, 6),
        per_forward=st.sampled_from([None, None, 1, 2]),
        max_tokens=st.sampled_from([9, 24, 48]),
        packing=st.booleans(),
        joins=st.integers(0, steps),
    )


class TestEquality:
    @pytest.mark.parametrize("count", [1, 2, 8])
    @settings(deadline=None, max_examples=4, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_each_job_ends_as_by_itself(self, count: int, data: st.DataObject) -> None:
        jobs = data.draw(st.lists(plans(4), min_size=count, max_size=count))
        per_pass = data.draw(st.sampled_from([0, 150, 4096]))
        together = run_together(tiny.llama(layers=1), jobs, tokens_per_pass=per_pass)
        for job, found in zip(jobs, together, strict=True):
            assert found.ends == [None]
            assert same_bits(found, run_alone(tiny.llama(layers=1), job))

    @pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 8])
    def test_fifty_steps(self, count: int) -> None:
        random = np.random.default_rng(count)
        jobs = [
            Plan(
                seed=place,
                method=LoraSpec(
                    rank=int(random.choice([2, 4, 8])),
                    alpha=float(random.choice([4, 16])),
                    dropout=float(random.choice([0.0, 0.1])),
                    targets=("all-linear", "attention", ("q_proj", "up_proj"))[place % 3],
                ),
                optimizer=OptimizerSpec(learning_rate=float(random.choice([1e-3, 5e-3])), weight_decay=0.01),
                schedule=ScheduleSpec(warmup=0.1, decay=("cosine", "linear", "constant")[place % 3]),
                steps=50 - 7 * (place % 4),
                sequences=1 + place % 3,
                max_tokens=24,
                joins=5 * (place % 3),
            )
            for place in range(count)
        ]
        for job, found in zip(jobs, run_together(tiny.llama(layers=1), jobs), strict=True):
            alone = run_alone(tiny.llama(layers=1), job)
            assert apart(found, alone) <= 1e-5
            assert same_bits(found, alone)
            assert len(found.reports) == job.steps

    @pytest.mark.parametrize(("bits", "dequantised"), [(4, False), (4, True), (16, False)])
    def test_on_a_rounded_base(self, base: Path, bits: int, dequantised: bool) -> None:
        def load() -> PreTrainedModel:
            spec = ModelSpec.model_validate({"path": str(base), "weight_bits": bits})
            return load_base(spec, device=CPU, dequantised=dequantised)

        jobs = mixed(3)
        for job, found in zip(jobs, run_together(load(), jobs), strict=True):
            assert same_bits(found, run_alone(load(), job))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_with_threads_and_more_learned_tokens_than_a_chunk_has(self, dtype: torch.dtype) -> None:
        def build() -> PreTrainedModel:
            return tiny.llama(hidden=512, layers=1, vocabulary=8000, positions=512).to(dtype)

        # The logits of each job end and begin within chunks, at other places than alone.
        jobs = [
            Plan(seed=at, steps=1, sequences=9 + at, max_tokens=400, vocabulary=(6, 8000)) for at in range(2)
        ]
        learned = [int(e.learned[1:].sum()) for job in jobs for e in job.examples(0)]
        assert sum(learned) > LOGITS_CHUNK_TOKENS
        torch.set_num_threads(2)
        for job, found in zip(jobs, run_together(build(), jobs, tokens_per_pass=1 << 20), strict=True):
            assert same_bits(found, run_alone(build(), job))

    def test_absolute_positions_and_transposed_weights(self) -> None:
        jobs = [replace(job, method=LoraSpec(rank=4, dropout=0.1)) for job in mixed(3)]
        for job, found in zip(jobs, run_together(tiny.gpt2(), jobs), strict=True):
            assert same_bits(found, run_alone(tiny.gpt2(), job))

    @pytest.mark.parametrize("family", ["t5", "bert", "gpt2 with dropout"])
    def test_jobs_that_cannot_share_passes_take_turns(self, family: str) -> None:
        build, arrangement = {
            "t5": (lambda: tiny.t5(dropout=0.1), Pairs(eos_id=1, start_id=2)),
            "bert": (lambda: tiny.bert(dropout=0.1), Classes(3, lambda ids: int(ids[0]) % 3)),
            "gpt2 with dropout": (gpt2_with_dropout, fleets.Continuations()),
        }[family]
        assert not can_share_passes(build(), max_tokens=64)
        jobs = [replace(job, method=LoraSpec(rank=4, dropout=0.1)) for job in mixed(3)]
        together = run_together(build(), jobs, tokens_per_pass=0, arrangement=arrangement)
        for job, found in zip(jobs, together, strict=True):
            assert same_bits(found, run_alone(build(), job, arrangement=arrangement))

    def test_two_jobs_equal_peft(self, tmp_path: Path) -> None:
        jobs = [
            Plan(seed=1, method=LoraSpec(rank=4, alpha=8), steps=10, sequences=3),
            Plan(seed=2, method=LoraSpec(rank=6, alpha=3, targets="attention"), steps=8, joins=2),
        ]
        for job, found in zip(jobs, run_together(tiny.llama(), jobs), strict=True):
            theirs = trained_by_peft(job, tmp_path / str(job.seed))
            assert {f"base_model.model.{name}" for name in found.weights} == set(theirs)
            for name, weight in found.weights.items():
                torch.testing.assert_close(weight, theirs[f"base_model.model.{name}"], rtol=0, atol=1e-4)


class TestIsolation:
    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
    def test_weights_that_are_not_finite_end_their_job_alone(self, value: float) -> None:
        jobs = mixed(3)

        def poison(place: int, step: int, engine: BankEngine) -> None:
            if (place, step) == (1, 2):
                with torch.no_grad():
                    for parameter in engine.parameters.values():
                        parameter.fill_(value)

        first, sick, third = run_together(tiny.llama(), jobs, meddle=poison)
        assert isinstance(sick.ends[0], Diverged)
        assert str(sick.ends[0]).startswith("step 3: the loss is nan at learning rate")
        assert len(sick.reports) == 2
        for job, found in ((jobs[0], first), (jobs[2], third)):
            assert same_bits(found, run_alone(tiny.llama(), job))

    def test_a_gradient_that_is_not_finite_ends_its_job_with_the_weights_of_the_step_before(self) -> None:
        jobs = mixed(2)
        kept: fleets.Weights = {}

        def poison(place: int, step: int, engine: BankEngine) -> None:
            if (place, step) == (1, 2):
                parameter = next(iter(engine.parameters.values()))
                kept.update({n: p.detach().clone() for n, p in engine.parameters.items()})
                parameter.register_hook(lambda gradient: gradient * math.inf)

        well, sick = run_together(tiny.llama(), jobs, meddle=poison)
        assert str(sick.ends[0]).startswith("step 3: the gradient norm is")
        assert all(torch.equal(weight, kept[name]) for name, weight in sick.weights.items())
        assert same_bits(well, run_alone(tiny.llama(), jobs[0]))

    def test_data_that_fails_ends_its_job_alone(self) -> None:
        jobs = mixed(3)

        def fail(place: int, step: int, engine: BankEngine) -> None:
            if (place, step) == (2, 1):
                raise DataError("tasks/broken.json: 80 of 100 records are malformed")

        *others, broken = run_together(tiny.llama(), jobs, meddle=fail)
        assert [str(end) for end in broken.ends] == ["tasks/broken.json: 80 of 100 records are malformed"]
        for job, found in zip(jobs, others, strict=False):
            assert same_bits(found, run_alone(tiny.llama(), job))

    def test_rows_that_the_base_cannot_take_end_their_job_alone(self) -> None:
        jobs = [replace(job, method=LoraSpec(rank=4)) for job in mixed(3)]
        # More positions than the base has.
        jobs[1] = replace(jobs[1], max_tokens=300, sequences=16, packing=False)
        first, sick, third = run_together(tiny.gpt2(), jobs)
        assert isinstance(sick.ends[0], IndexError)
        for job, found in ((jobs[0], first), (jobs[2], third)):
            assert same_bits(found, run_alone(tiny.gpt2(), job))

    def test_a_report_that_fails_ends_its_job_alone(self) -> None:
        jobs = mixed(2)

        def disk_is_full(place: int, step: int) -> None:
            if (place, step) == (0, 2):
                raise OSError("no space left")

        full, well = run_together(tiny.llama(), jobs, told=disk_is_full)
        assert [str(end) for end in full.ends] == ["no space left"]
        assert same_bits(well, run_alone(tiny.llama(), jobs[1]))


class TestSlots:
    def test_a_job_that_goes_on_beside_others_ends_as_if_it_had_never_stopped(self, tmp_path: Path) -> None:
        kinds = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
        jobs = [
            Plan(
                seed=at,
                method=LoraSpec(rank=64, dropout=0.1),
                optimizer=OptimizerSpec.model_validate({"kind": kind}),
            )
            for at, kind in enumerate(kinds)
        ]
        whole = run_together(tiny.llama(), jobs)

        def keep(place: int, step: int, engine: BankEngine) -> None:
            if step == 3:
                (tmp_path / str(place)).mkdir()
                tiny.keep(engine, tmp_path / str(place))
                raise KeyError("killed")

        run_together(tiny.llama(), jobs, meddle=keep)

        def restore(place: int, step: int, engine: BankEngine) -> None:
            if step == 3:
                engine.load(tmp_path / str(len(jobs) - 1 - place))

        # In another order, at other times, beside others.
        again = [replace(job, starts=3, joins=at) for at, job in enumerate(reversed(jobs))]
        resumed = run_together(tiny.llama(), again, meddle=restore)
        for found, expected in zip(reversed(resumed), whole, strict=True):
            assert all(torch.equal(weight, found.weights[n]) for n, weight in expected.weights.items())
            assert found.curve() == expected.curve()[3:]

    def test_a_free_slot_is_taken_again(self) -> None:
        bank = Bank(tiny.llama().requires_grad_(False))
        one, two, three = (bank.enter(LoraSpec(rank=2), OptimizerSpec(), seed=at) for at in range(3))
        assert [one.slot, two.slot, three.slot] == [0, 1, 2]
        bank.leave(two)
        assert bank.enter(LoraSpec(rank=4), OptimizerSpec()).slot == 1
        assert bank.enter(LoraSpec(rank=4), OptimizerSpec()).slot == 3

    def test_a_classifier_keeps_the_head_of_each_job(self) -> None:
        model = tiny.bert().requires_grad_(False)
        bank = Bank(model)
        before = {name: p.clone() for name, p in model.named_parameters()}
        jobs = [bank.enter(LoraSpec(rank=2), OptimizerSpec(), seed=at) for at in range(2)]
        layout = Layout(True, 64, 2, None, 512, Classes(3, lambda ids: int(ids[0]) % 3))
        examples = Plan(sequences=6).examples(0)
        step = Step(layout.batches(examples), len(examples), "", 2)
        fit(jobs[0], [step] * 4, start=0, learning_rate=lambda _: 1e-2, report=lambda _: None)
        jobs[1].select()
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], before[name]) for name in bank.head)
        jobs[0].select()
        now = dict(model.named_parameters())
        assert not any(torch.equal(now[name], before[name]) for name in bank.head)

    def test_training_the_base_itself_shares_it_with_nobody(self) -> None:
        bank = Bank(tiny.llama().requires_grad_(False))
        job = bank.enter(LoraSpec(rank=2), OptimizerSpec())
        message = "a job that trains weights of the base itself shares it with no other: load the base again"
        with pytest.raises(ModelError, match=message):
            bank.enter(FullSpec(), OptimizerSpec())
        bank.leave(job)
        bank.leave(bank.enter(FullSpec(), OptimizerSpec()))
        with pytest.raises(ModelError, match=message):
            bank.enter(LoraSpec(rank=2), OptimizerSpec())

    def test_a_job_that_does_not_fit_changes_nothing(self) -> None:
        bank = Bank(tiny.llama().requires_grad_(False))
        with pytest.raises(ModelError, match="no linear layer is called 'query'"):
            bank.enter(LoraSpec(targets=("query",)), OptimizerSpec())
        assert bank.enter(LoraSpec(), OptimizerSpec()).slot == 0


class TestAssessing:
    def trained(self) -> tuple[Bank, list[BankEngine]]:
        bank = Bank(tiny.llama().requires_grad_(False), tokens_per_pass=512)
        engines = [bank.enter(LoraSpec(rank=4), OptimizerSpec(), seed=at) for at in range(3)]
        for engine in engines[:2]:
            with torch.no_grad():
                for parameter in engine.parameters.values():
                    nn.init.normal_(parameter, std=0.3)
        return bank, engines

    def test_a_job_is_assessed_by_its_own_weights(self) -> None:
        bank, engines = self.trained()
        plain = tiny.llama()
        batches = Layout(True, 64, 2, None, 512).batches(Plan().examples(0))
        own = BankEngine(Bank(plain), dict(plain.named_parameters()), OptimizerSpec())
        losses = [mean_loss(engine, batches) for engine in engines]
        assert len(set(losses)) == 3
        # B of the third is zero: it computes what the base does.
        assert losses[2] == mean_loss(own, batches)
        prompts = [[5, 6, 7], [9, 10]]
        answers = []
        for engine in engines:
            engine.select()
            answers.append(self.ask(bank.model, prompts))
        assert answers[2] == self.ask(plain, prompts)
        assert answers[0] != answers[2] != answers[1] != answers[0]
        assert [mean_loss(engine, batches) for engine in engines] == losses

    def ask(self, model: PreTrainedModel, prompts: list[list[int]]) -> list[str]:
        return answer(model, tiny.tokenizer(), prompts, end_ids=[], max_new_tokens=8, batch_sequences=2)

    def test_assessing_one_job_changes_no_other(self) -> None:
        jobs = mixed(2)
        batches = Layout(True, 64, 2, None, 512).batches(Plan(seed=9).examples(0))

        def assess(place: int, step: int, engine: BankEngine) -> None:
            mean_loss(engine, batches)
            engine.select()
            self.ask(engine.model, [[5, 6]])

        for job, found in zip(jobs, run_together(tiny.llama(), jobs, meddle=assess), strict=True):
            assert same_bits(found, run_alone(tiny.llama(), job))

    def test_each_adapter_is_saved_by_itself(self, tmp_path: Path) -> None:
        bank = Bank(tiny.llama().requires_grad_(False))
        specs = [LoraSpec(rank=2, targets=("q_proj",)), LoraSpec(rank=3, targets=("down_proj",))]
        jobs = [bank.enter(spec, OptimizerSpec(), seed=at) for at, spec in enumerate(specs)]
        for job, spec in zip(jobs, specs, strict=True):
            folder = tmp_path / str(job.slot)
            folder.mkdir()
            save_lora(bank.model, spec, folder, "base", job.slot)
            loaded = peft.PeftModel.from_pretrained(tiny.llama(), folder)
            theirs = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "lora_" in n}
            assert set(theirs) == {f"base_model.model.{name}" for name in job.parameters}


class TestProbe:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    def test_what_only_attends_across_tokens_can_share_passes(self, build: Any) -> None:
        assert can_share_passes(build(), max_tokens=64)

    def test_attention_that_looks_across_blocks_cannot(self) -> None:
        model = tiny.llama()
        forward = model.base_model.forward

        def leaking(*, input_ids: torch.Tensor, position_ids: torch.Tensor, **rest: Any) -> Any:
            return forward(input_ids=input_ids, position_ids=torch.zeros_like(position_ids), **rest)

        model.base_model.forward = leaking
        assert not can_share_passes(model, max_tokens=64)

    def test_8_bits_are_chosen_for_a_pass_as_a_whole(self, base: Path) -> None:
        rounded = load_base(ModelSpec(path=str(base), weight_bits=8), device=CPU)
        assert not can_share_passes(rounded, max_tokens=64)


def mixed(count: int) -> list[Plan]:
    """Jobs that differ in all that a job can differ in."""
    different: list[dict[str, Any]] = [
        {"method": LoraSpec(rank=4, alpha=8, dropout=0.2), "steps": 5},
        {"method": LoraSpec(rank=2, alpha=1, targets=("q_proj", "down_proj")), "sequences": 2, "joins": 1},
        {
            "method": LoraSpec(rank=64, alpha=9, targets="attention"),
            "optimizer": OptimizerSpec(kind="adamw_8bit", learning_rate=1e-3),
            "per_forward": 2,
            "steps": 4,
        },
    ]
    return [Plan(seed=place, **different[place]) for place in range(count)]


def gpt2_with_dropout() -> PreTrainedModel:
    model = tiny.gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


def trained_by_peft(job: Plan, folder: Path) -> dict[str, nn.Parameter]:
    """A job on its own PEFT model, one example after another, unpacked."""
    folder.mkdir()
    start = tiny.llama().requires_grad_(False)
    add_lora(start, job.method, job.seed)
    save_lora(start, job.method, folder, "base")
    model = peft.PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(job.steps):
        examples = job.examples(step)
        learned = sum(int(example.learned[1:].sum()) for example in examples)
        for example in examples:
            logits = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0, :-1]
            labels = torch.from_numpy(np.where(example.learned, example.input_ids, -100))
            (F.cross_entropy(logits, labels[1:], reduction="sum") / learned).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = fleets.learning_rate(
            step, job.steps, job.schedule, job.optimizer.learning_rate
        )
        optimizer.step()
        optimizer.zero_grad()
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")
