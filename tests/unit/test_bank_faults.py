"""What goes wrong on a bank: whose fault it is, and what it leaves behind."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fleets import Plan, run_alone, run_together, same_bits
from safetensors.torch import load_file
from transformers import PreTrainedModel

from raytune_ft.errors import DataError, OutOfMemory
from raytune_ft.methods.lora import LoraLinear, save_lora
from raytune_ft.spec import LoraSpec, OptimizerSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout, Step
from raytune_ft.train.faults import fault_of_device
from raytune_ft.train.loop import Trainee, mean_loss, train

JOBS = [Plan(seed=0), Plan(seed=1, sequences=3), Plan(seed=2, method=LoraSpec(rank=2, targets="attention"))]
LAYOUT = Layout(True, 64, 2, None, 512)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def take_all_memory(*_: Any) -> None:
    """As a pass does that is too large."""
    torch.empty(1 << 50)


def seen(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Shapes of the token ids of all passes from now on."""
    found: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: found.append(tuple(given[0].shape))
    )
    return found


def in_the_data(engine: BankEngine) -> None:
    take_all_memory()


def in_the_forward_pass(engine: BankEngine) -> None:
    layer = next(module for module in engine.model.modules() if isinstance(module, LoraLinear))
    layer.register_forward_pre_hook(take_all_memory)


def in_the_backward_pass(engine: BankEngine) -> None:
    next(iter(engine.parameters.values())).register_hook(take_all_memory)


def in_the_update(engine: BankEngine) -> None:
    engine.optimizer.register_step_pre_hook(take_all_memory)


class TestMemory:
    @pytest.mark.parametrize("where", [in_the_data, in_the_forward_pass, in_the_backward_pass, in_the_update])
    def test_that_is_full_is_no_fault_of_a_job(self, where: Callable[[BankEngine], None]) -> None:
        def fill(place: int, step: int, engine: BankEngine) -> None:
            if (place, step) == (1, 2):
                where(engine)

        with pytest.raises(OutOfMemory, match=r"memory|do not fit the device"):
            run_together(tiny.llama(), JOBS, meddle=fill)

    def test_that_is_full_while_a_job_is_reported_or_leaves(self) -> None:
        with pytest.raises(OutOfMemory, match="the device's memory is full"):
            run_together(tiny.llama(), JOBS, told=take_all_memory)
        bank = Bank(tiny.llama().requires_grad_(False))
        job = bank.enter(LoraSpec(rank=2), OptimizerSpec())
        waiting = [Trainee(job, [], 0, lambda _: 1e-3, lambda _: None, take_all_memory)]
        with pytest.raises(OutOfMemory, match="the device's memory is full"):
            train(bank, lambda _: [waiting.pop()] if waiting else [])

    def test_of_a_pass_is_free_once_its_error_is_caught(self) -> None:
        found: list[weakref.ref[torch.Tensor]] = []

        def compute(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            activation = given[0] * 2
            found.append(weakref.ref(activation))
            take_all_memory()

        model = tiny.llama()
        model.model.layers[1].register_forward_pre_hook(compute)
        with pytest.raises(OutOfMemory) as caught:
            run_together(model, JOBS)
        # As a lane does that goes on with fewer jobs.
        error = caught.value
        error.__traceback__ = None
        del caught
        gc.collect()
        assert [reference() for reference in found] == [None]


class TestFaults:
    def test_what_is_no_fault_of_the_device(self) -> None:
        assert fault_of_device(ValueError("no such layer")) is None
        assert fault_of_device(DataError("bad")) is None
        known = OutOfMemory("full")
        assert fault_of_device(known) is known

    def test_tokens_that_the_base_does_not_know(self) -> None:
        jobs = list(JOBS)
        jobs[1] = replace(jobs[1], vocabulary=(320, 330))
        model, others = tiny.llama(), tiny.llama()
        passes, of_others = seen(model), seen(others)
        first, sick, third = run_together(model, jobs)
        (end,) = sick.ends
        assert isinstance(end, DataError)
        assert "and the base has embeddings for 0 to 319; give the base the tokenizer" in str(end)
        for job, found in ((jobs[0], first), (jobs[2], third)):
            assert same_bits(found, run_alone(tiny.llama(), job))
        # The others were not computed one by one for that.
        run_together(others, [jobs[0], jobs[2]])
        assert passes == of_others

    def test_tokens_that_the_base_does_not_know_in_an_evaluation(self) -> None:
        bank = Bank(tiny.llama().requires_grad_(False))
        job = bank.enter(LoraSpec(rank=2), OptimizerSpec())
        with pytest.raises(DataError, match=r"the tokenizer makes token 32\d"):
            mean_loss(job, LAYOUT.batches(Plan(vocabulary=(320, 330)).examples(0)))

    def test_a_backward_pass_of_one_job_that_fails_ends_that_job(self) -> None:
        def fail(place: int, step: int, engine: BankEngine) -> None:
            if (place, step) == (1, 2):
                next(iter(engine.parameters.values())).register_hook(lambda gradient: gradient[0])

        first, sick, third = run_together(tiny.llama(), JOBS, tokens_per_pass=0, meddle=fail)
        assert isinstance(sick.ends[0], RuntimeError)
        for job, found in ((JOBS[0], first), (JOBS[2], third)):
            assert same_bits(found, run_alone(tiny.llama(), job))


class TestSharedPasses:
    def test_jobs_share_passes(self) -> None:
        model = tiny.llama()
        passes = seen(model)
        run_together(model, JOBS)
        first = [job.layout(LAYOUT.arrangement).batches(job.examples(0))[0] for job in JOBS]
        assert passes[0] == (1, sum(batch.input_ids_BT.numel() for batch in first))

    def test_a_base_that_computes_no_shared_pass_says_so_and_jobs_take_turns(self) -> None:
        model = tiny.llama()
        passes = []

        def refuse(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows, width = given[0].shape[:2]
            passes.append(width)
            if rows == 1 and width > 60:
                raise ValueError("a row is too long")

        model.model.layers[0].register_forward_pre_hook(refuse)
        jobs = [replace(job, packing=False) for job in JOBS]
        with pytest.warns(RuntimeWarning, match="LlamaForCausalLM does not compute several jobs") as told:
            together = run_together(model, jobs)
        assert len(told) == 1
        assert sum(width > 60 for width in passes) == 1
        for job, found in zip(jobs, together, strict=True):
            assert same_bits(found, run_alone(tiny.llama(), job))


class TestEntry:
    def test_one_that_fails_half_way_leaves_nothing_behind(self, tmp_path: Path) -> None:
        model = tiny.llama().requires_grad_(False)
        hollow = model.model.layers[1].self_attn.q_proj
        weight = hollow.weight
        hollow.register_parameter("weight", None)
        before = dict(model.named_modules())
        bank = Bank(model)
        with pytest.raises(StopIteration):
            bank.enter(LoraSpec(rank=2), OptimizerSpec())
        assert dict(model.named_modules()) == before
        hollow.register_parameter("weight", weight)
        spec = LoraSpec(rank=2, targets=("v_proj",))
        job = bank.enter(spec, OptimizerSpec())
        assert job.slot == 0
        save_lora(model, spec, tmp_path, "base", job.slot)
        assert all(".v_proj." in name for name in load_file(tmp_path / "adapter_model.safetensors"))

    def test_one_without_an_optimizer_leaves_nothing_behind(self) -> None:
        model = tiny.llama().requires_grad_(False)
        before = dict(model.named_modules())
        bank = Bank(model)
        unfit = OptimizerSpec.model_construct(**{**dict(OptimizerSpec()), "learning_rate": -1.0})
        with pytest.raises(ValueError, match="learning rate"):
            bank.enter(LoraSpec(rank=2), unfit)
        assert dict(model.named_modules()) == before
        assert bank.enter(LoraSpec(rank=2), OptimizerSpec()).slot == 0

    def test_a_job_that_left_is_held_no_longer(self) -> None:
        bank = Bank(tiny.llama().requires_grad_(False))
        job = bank.enter(LoraSpec(rank=2), OptimizerSpec())
        batches = LAYOUT.batches(Plan().examples(0))
        step = Step(batches, 4, "", 2)
        waiting = [Trainee(job, [step], 0, lambda _: 1e-3, lambda _: None, lambda _: None)]
        train(bank, lambda _: [waiting.pop()] if waiting else [])
        mean_loss(job, batches)
        bank.leave(job)
        left = weakref.ref(job)
        del job
        gc.collect()
        assert left() is None
