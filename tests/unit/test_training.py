"""The training core on tiny real models: packing, loss, engine, loop. No cluster."""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from raytune_ft.errors import Diverged, ModelError
from raytune_ft.evaluate.generate import answer
from raytune_ft.methods import METHODS
from raytune_ft.models import load_base
from raytune_ft.spec import FullSpec, LoraSpec, ModelSpec, OptimizerSpec, ScheduleSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Batch, Layout, Step, Tokens
from raytune_ft.train.engine import Block
from raytune_ft.train.loop import StepReport, fit, mean_loss, source_losses
from raytune_ft.train.loss import chunked_cross_entropy, cross_entropy_sum, sums_by_group
from raytune_ft.train.probe import check_isolation
from raytune_ft.train.schedule import learning_rate

CPU = torch.device("cpu")
FP32 = OptimizerSpec(learning_rate=1e-2)


def tokens(*lengths: int, seed: int = 0, sources: int = 1) -> list[Tokens]:
    """Random examples, the second half of each learned, from one source after the other."""
    random = np.random.default_rng(seed)
    return [
        Tokens(random.integers(3, 320, n), np.arange(n) >= n // 2, at % sources, at)
        for at, n in enumerate(lengths)
    ]


def layout(*, packing: bool = True, sequences: int | None = None, per_forward: int = 4096) -> Layout:
    return Layout(packing, 64, 2, sequences, per_forward)


def engine(
    method: LoraSpec | FullSpec | None = None,
    *,
    model: PreTrainedModel | None = None,
    optimizer: OptimizerSpec = FP32,
    checkpointing: bool = False,
    compiled: bool = False,
    seed: int = 0,
) -> BankEngine:
    base = model or tiny.llama()
    base.requires_grad_(False)
    spec = method or LoraSpec(rank=4, alpha=8)
    parameters = METHODS[type(spec)].add(base, spec, seed)
    bank = Bank(base, gradient_checkpointing=checkpointing, compiled=compiled)
    return BankEngine(bank, parameters, optimizer)


def train(
    bank: BankEngine, steps: Sequence[Sequence[Batch]], *, start: int = 0, rate: float = 1e-2
) -> list[StepReport]:
    reports: list[StepReport] = []
    fit(bank, as_steps(steps), start=start, learning_rate=lambda _: rate, report=reports.append)
    return reports


def as_steps(batches: Sequence[Sequence[Batch]], sources: int = 1) -> list[Step]:
    return [Step(step, examples=5, digest="", sources=sources) for step in batches]


def some_steps(count: int, how: Layout | None = None) -> list[list[Batch]]:
    return [(how or layout()).batches(tokens(9, 14, 5, 22, 7, seed=step)) for step in range(count)]


class TestBatch:
    def test_every_learned_token_has_its_predictor(self) -> None:
        examples = tokens(9, 14, 5)
        for batch in layout().batches(examples):
            flat = batch.input_ids_BT.flatten()
            assert torch.equal(flat[batch.predictor_N + 1], batch.labels_N)
        assert sum(b.learned_tokens for b in layout().batches(examples)) == sum(
            int(e.learned[1:].sum()) for e in examples
        )

    @settings(deadline=None)
    @given(
        st.lists(st.integers(2, 64), min_size=1, max_size=20), st.booleans(), st.none() | st.integers(1, 6)
    )
    def test_no_token_is_lost_however_it_is_laid_out(
        self, lengths: list[int], packing: bool, per: int | None
    ) -> None:
        examples = tokens(*lengths)
        batches = layout(packing=packing, sequences=per, per_forward=128).batches(examples)
        assert sum(batch.tokens for batch in batches) == sum(lengths)
        labels = sorted(label for batch in batches for label in batch.labels_N.tolist())
        assert labels == sorted(int(i) for e in examples for i in e.input_ids[1:][e.learned[1:]])
        assert all(batch.input_ids_BT.shape[1] <= 64 for batch in batches)
        if per is None:
            assert all(batch.input_ids_BT.numel() <= 128 for batch in batches)

    def test_packing_one_full_row_has_no_padding(self) -> None:
        (batch,) = layout().batches(tokens(20, 14, 30))
        assert batch.input_ids_BT.shape == (1, 64)
        assert batch.tokens == 64


class TestPackedAttention:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
    def test_logits_in_a_shared_row_equal_those_alone(self, build: type[PreTrainedModel]) -> None:
        model = build()
        examples = tokens(9, 14, 5)
        (batch,) = layout().batches(examples)
        shared = model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
        ).logits[0]
        order = [1, 0, 2]  # longest first
        for index, logits in zip(order, torch.split(shared, [14, 9, 5]), strict=True):
            alone = model(input_ids=torch.from_numpy(examples[index].input_ids)[None]).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)

    def test_another_example_in_the_row_changes_nothing(self) -> None:
        model = tiny.llama()
        first, second, other = tokens(9)[0], tokens(14)[0], tokens(14, seed=7)[0]
        hidden = []
        for neighbour in (second, other):
            (batch,) = layout().batches([neighbour, first])
            hidden.append(
                model(
                    input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
                ).logits[0, 14:]
            )
        assert torch.equal(hidden[0], hidden[1])

    def test_the_probe_passes_sound_models(self) -> None:
        for model in (tiny.llama(), tiny.gpt2(), tiny.llama().to(torch.bfloat16)):
            check_isolation(model, packed=True)
            check_isolation(model, packed=False)

    def test_the_probe_catches_a_model_that_ignores_borders(self) -> None:
        model = tiny.llama()
        forward = model.base_model.forward

        def leaking(*, position_ids: torch.Tensor | None = None, **rest: object) -> object:
            whole_row = None if position_ids is None else torch.arange(position_ids.shape[1])[None]
            return forward(position_ids=whole_row, **rest)

        model.base_model.forward = leaking
        with pytest.raises(
            ModelError, match=r"LlamaForCausalLM gives other logits .*: set data.packing: false"
        ):
            check_isolation(model, packed=True)


class TestLoss:
    @pytest.mark.parametrize("chunk", [1, 3, 100])
    def test_equals_torch_with_gradients(self, chunk: int) -> None:
        torch.manual_seed(0)
        head = nn.Linear(8, 11)
        hidden = torch.randn(10, 8, requires_grad=True)
        labels = torch.randint(0, 11, (10,))
        group = torch.tensor([0, 2, 0, 0, 2, 2, 0, 2, 2, 0])
        scale = torch.tensor([3.0, 1.0, 0.25])[group]
        losses = F.cross_entropy(head(hidden), labels, reduction="none")
        expected = (losses * scale).sum()
        wanted = torch.autograd.grad(expected, [hidden, *head.parameters()])
        found, each = chunked_cross_entropy(hidden, labels, scale, head, list(head.parameters()), chunk)
        got = torch.autograd.grad(found, [hidden, *head.parameters()])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(each, losses)
        assert not each.requires_grad
        sums = torch.stack([losses[group == g].double().sum() for g in range(3)])
        torch.testing.assert_close(sums_by_group(each, group, 3), sums)
        torch.testing.assert_close(cross_entropy_sum(hidden, labels, head, chunk), losses.sum())

    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 40), st.integers(1, 16), st.lists(st.integers(1, 100), min_size=1, max_size=5))
    def test_a_scale_is_multiplied_in_last(self, count: int, chunk: int, divisors: list[int]) -> None:
        torch.manual_seed(count)
        head = nn.Linear(8, 11).requires_grad_(False)
        hidden = torch.randn(count, 8, requires_grad=True)
        labels = torch.randint(0, 11, (count,))
        plain, _ = chunked_cross_entropy(hidden, labels, torch.ones(count), head, [], chunk)
        (wanted,) = torch.autograd.grad(plain, hidden)
        scale = (1.0 / torch.tensor(divisors, dtype=torch.float32))[torch.arange(count) % len(divisors)]
        objective, _ = chunked_cross_entropy(hidden, labels, scale, head, [], chunk)
        (got,) = torch.autograd.grad(objective, hidden)
        assert torch.equal(got, wanted * scale[:, None])

    @settings(deadline=None, max_examples=20)
    @given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 30))
    def test_a_position_does_not_depend_on_those_beside_it(self, count: int, chunk: int, others: int) -> None:
        torch.manual_seed(count)
        head = nn.Linear(64, 320).requires_grad_(False)
        hidden, labels = torch.randn(count + others, 64), torch.randint(0, 320, (count + others,))
        found = []
        for part in (slice(count), slice(count + others)):
            own = hidden[part].clone().requires_grad_()
            objective, losses = chunked_cross_entropy(
                own, labels[part], torch.ones(len(own)), head, [], chunk
            )
            found.append((torch.autograd.grad(objective, own)[0][:count], losses[:count]))
        assert all(torch.equal(alone, beside) for alone, beside in zip(*found, strict=True))

    def test_what_is_not_finite_stays_where_it_is(self) -> None:
        torch.manual_seed(0)
        head = nn.Linear(8, 11).requires_grad_(False)
        hidden = torch.randn(6, 8)
        labels = torch.randint(0, 11, (6,))
        found = []
        for value in (1.0, math.nan):
            sick = hidden.clone().index_fill_(0, torch.tensor([1, 4]), value).requires_grad_()
            objective, losses = chunked_cross_entropy(sick, labels, torch.ones(6), head, [], 4)
            found.append((torch.autograd.grad(objective, sick)[0], losses))
        well = torch.tensor([0, 2, 3, 5])
        assert all(torch.equal(a[well], b[well]) for a, b in zip(*found, strict=True))
        assert found[1][1].isnan().tolist() == [False, True, False, False, True, False]

    def test_the_gradient_of_a_bfloat16_head_is_rounded_once(self) -> None:
        torch.manual_seed(0)
        hidden, labels = torch.randn(512, 16), torch.randint(0, 32, (512,))
        values = 0.1 * torch.randn(32, 16)

        def gradient(dtype: torch.dtype, chunk: int) -> torch.Tensor:
            weight = nn.Parameter(values.to(dtype))
            scale = torch.full((512,), 1 / 512)
            objective, _ = chunked_cross_entropy(
                hidden.to(dtype), labels, scale, lambda h: h @ weight.T, [weight], chunk
            )
            objective.backward()
            assert weight.grad is not None
            assert weight.grad.dtype == dtype
            return weight.grad.float()

        expected = gradient(torch.float32, 512)
        for chunk in (512, 4):
            error = (gradient(torch.bfloat16, chunk) - expected).norm() / expected.norm()
            assert error < 0.005

    def test_a_frozen_head_gets_no_gradient(self) -> None:
        head = nn.Linear(8, 11).requires_grad_(False)
        hidden = torch.randn(4, 8, requires_grad=True)
        labels = torch.tensor([0, 1, 2, 3])
        objective, _ = chunked_cross_entropy(hidden, labels, torch.ones(4), head, list(head.parameters()), 2)
        objective.backward()
        assert hidden.grad is not None
        assert head.weight.grad is None

    def test_equals_the_models_own_loss(self) -> None:
        bank = engine()
        example = tokens(20)[0]
        labels = torch.from_numpy(np.where(example.learned, example.input_ids, -100))[None]
        own = bank.model(input_ids=torch.from_numpy(example.input_ids)[None], labels=labels).loss
        assert mean_loss(bank, layout().batches([example])) == pytest.approx(own.item(), abs=1e-6)


class TestEngine:
    @pytest.mark.parametrize(
        "method", [LoraSpec(rank=4, alpha=8, dropout=0.2), FullSpec()], ids=["lora", "full"]
    )
    def test_learns_and_repeats_bit_for_bit(self, method: LoraSpec | FullSpec) -> None:
        runs = []
        for _ in range(2):
            bank = engine(method)
            losses = [report.loss for report in train(bank, some_steps(1) * 80)]
            assert losses[-1] < losses[0] * 0.85
            runs.append({name: p.detach().clone() for name, p in bank.parameters.items()})
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])

    @pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
    def test_resumes_bit_for_bit(self, tmp_path: Path, kind: str) -> None:
        optimizer = OptimizerSpec.model_validate({"kind": kind, "learning_rate": 1e-2})
        # Rank 64 × 64 features is large enough for the 8-bit kinds to quantise their state.
        method = LoraSpec(rank=64, dropout=0.1)
        steps = some_steps(6)
        whole = engine(method, optimizer=optimizer)
        train(whole, steps)
        half = engine(method, optimizer=optimizer)
        train(half, steps[:3])
        snapshot = half.snapshot()
        assert snapshot
        train(half, steps[3:])
        snapshot(tmp_path)
        resumed = engine(method, optimizer=optimizer)
        resumed.load(tmp_path)
        train(resumed, steps[3:], start=3)
        assert all(torch.equal(p, resumed.parameters[n]) for n, p in whole.parameters.items())

    @pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt"])
    @pytest.mark.parametrize("kept", [None, 0, 1, 50, -20])
    def test_a_damaged_checkpoint_is_refused(self, tmp_path: Path, name: str, kept: int | None) -> None:
        bank = engine()
        train(bank, some_steps(1))
        tiny.keep(bank, tmp_path)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        if kept is not None:
            (tmp_path / name).write_bytes(data[:kept])
        with pytest.raises(ModelError, match=r"cut short or damaged .*start over with --restart"):
            bank.load(tmp_path)

    def test_a_base_with_dropout_of_its_own_resumes_bit_for_bit(self, tmp_path: Path) -> None:
        def bank() -> BankEngine:
            model = tiny.gpt2()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.1
            return engine(model=model)

        steps = some_steps(6)
        whole, half, resumed = bank(), bank(), bank()
        train(whole, steps)
        train(half, steps[:3])
        tiny.keep(half, tmp_path)
        torch.manual_seed(1234)
        resumed.load(tmp_path)
        train(resumed, steps[3:], start=3)
        assert all(torch.equal(p, resumed.parameters[n]) for n, p in whole.parameters.items())

    @pytest.mark.parametrize(
        "how",
        [
            layout(packing=False),
            layout(sequences=2),
            layout(packing=False, sequences=1),
            layout(per_forward=64),
        ],
        ids=["unpacked", "accumulated", "one by one", "small passes"],
    )
    def test_the_layout_changes_rounding_only(self, how: Layout) -> None:
        # Adam divides by the gradient's own size, so a small epsilon would blow up the rounding of tiny ones.
        steady = OptimizerSpec(learning_rate=1e-3, epsilon=1e-5)
        one, other = engine(optimizer=steady), engine(optimizer=steady)
        first, second = train(one, some_steps(8), rate=1e-3), train(other, some_steps(8, how), rate=1e-3)
        assert [r.loss for r in first] == pytest.approx([r.loss for r in second], abs=1e-5)
        for name, parameter in one.parameters.items():
            torch.testing.assert_close(parameter, other.parameters[name], rtol=0, atol=1e-4)

    def test_gradient_checkpointing_changes_nothing(self) -> None:
        method = LoraSpec(rank=4, dropout=0.3)
        one, other = engine(method), engine(method, checkpointing=True)
        train(one, some_steps(3))
        train(other, some_steps(3))
        assert all(torch.equal(p, other.parameters[n]) for n, p in one.parameters.items())

    @pytest.mark.slow
    # torch's own, while it imports its compiler, and where that meets an autograd function.
    @pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
    def test_compiled_passes_change_rounding_only(self) -> None:
        steady = OptimizerSpec(learning_rate=1e-3, epsilon=1e-5)
        one, other = engine(optimizer=steady), engine(optimizer=steady, compiled=True)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # Three rows of a length that is another one in each step: one program is to do for all of them.
        steps = [layout(packing=False).batches(tokens(*[9 + 7 * at] * 3, seed=at)) for at in range(4)]
        first, second = train(one, steps, rate=1e-3), train(other, steps, rate=1e-3)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1
        assert [r.loss for r in first] == pytest.approx([r.loss for r in second], abs=1e-5)
        for name, parameter in one.parameters.items():
            torch.testing.assert_close(parameter, other.parameters[name], rtol=0, atol=1e-4)

    def test_a_bfloat16_base_trains_through_float32_masters(self) -> None:
        bank = engine(
            FullSpec(), model=tiny.llama().to(torch.bfloat16), optimizer=OptimizerSpec(learning_rate=1e-5)
        )
        before = {n: p.detach().clone() for n, p in bank.masters.items()}
        fit(bank, as_steps(some_steps(1)), start=0, learning_rate=lambda _: 1e-5, report=lambda _: None)
        moved = [n for n, p in bank.masters.items() if not torch.equal(p, before[n])]
        assert len(moved) == len(before)

    def test_clipping_limits_the_step(self) -> None:
        bank = engine(optimizer=OptimizerSpec(learning_rate=1e-2, max_grad_norm=1e-3))
        batches = some_steps(1)[0]
        for forward, batch in enumerate(batches):
            bank.base.accumulate([Block(bank, batch, 0, forward, divisor=10, sources=1)])
        norm = bank.update(0.0)
        free = engine(optimizer=OptimizerSpec(learning_rate=1e-2, max_grad_norm=None))
        for forward, batch in enumerate(batches):
            free.base.accumulate([Block(free, batch, 0, forward, divisor=10, sources=1)])
        assert norm == pytest.approx(free.update(0.0))
        assert norm > 1e-3

    def test_a_loss_that_is_not_finite_stops_at_the_step_and_keeps_the_weights(self) -> None:
        bank = engine()
        train(bank, some_steps(1))
        before = {n: p.detach().clone() for n, p in bank.parameters.items()}
        bank.model.get_input_embeddings().weight.data[5] = math.nan
        steps = [layout().batches([Tokens(np.array([5, 5, 5]), np.ones(3, dtype=np.bool_))])]
        with pytest.raises(
            Diverged, match=r"^step 2: the loss is nan at learning rate 0.01; lower optimizer"
        ):
            train(bank, steps, start=1)
        assert all(torch.equal(p, before[n]) for n, p in bank.parameters.items())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


class TestSources:
    def test_each_source_has_the_loss_of_its_examples(self) -> None:
        examples = tokens(9, 14, 5, 22, 7, sources=3)
        bank = engine()
        alone = [
            bank.evaluate(batch)
            for source in range(3)
            for batch in layout().batches([e for e in examples if e.source == source])
        ]
        reports: list[StepReport] = []
        step = Step(layout(per_forward=32).batches(examples), len(examples), "d1gest", sources=4)
        fit(bank, [step], start=0, learning_rate=lambda _: 1e-2, report=reports.append)
        (report,) = reports
        assert report.source_loss_sums == pytest.approx([*alone, 0.0], abs=1e-4)
        assert report.source_learned_tokens == (16, 11, 3, 0)
        assert report.learned_tokens == 30
        assert report.loss == sum(report.source_loss_sums) / 30
        assert (report.examples, report.tokens, report.batch) == (5, 57, "d1gest")

    def test_the_sources_of_a_step_change_no_bit_of_the_weights(self) -> None:
        weights = []
        for sources in (1, 3):
            bank = engine(LoraSpec(rank=4, dropout=0.1))
            batches = [layout().batches(tokens(9, 14, 5, 22, 7, seed=s, sources=sources)) for s in range(3)]
            fit(
                bank,
                as_steps(batches, sources),
                start=0,
                learning_rate=lambda _: 1e-2,
                report=lambda _: None,
            )
            weights.append(bank.parameters)
        assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())

    def test_the_mean_of_several_steps_is_over_tokens(self) -> None:
        def report(sums: tuple[float, ...], learned: tuple[int, ...]) -> StepReport:
            return StepReport(1, 0.0, 0.0, 0.0, 1, 1, sum(learned), "", sums, learned, 0.0, 0.0)

        reports = [report((2.0, 0.0, 1.0), (1, 0, 4)), report((6.0, 0.0, 0.0), (3, 0, 0))]
        assert source_losses(reports) == [2.0, None, 0.25]
        assert "source_loss_sums" not in reports[0].to_json()


class TestLoading:
    def test_missing_weights_are_refused(self, base: Path, tmp_path: Path) -> None:
        holed = tmp_path / "holed"
        shutil.copytree(base, holed)
        tensors = load_file(holed / "model.safetensors")
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"1 weights are missing, the first model.layers.1.mlp.up_proj"):
            load_base(ModelSpec(path=str(holed)), device=CPU)

    def test_a_broken_file_is_refused(self, base: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(base, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ModelError, match=r"broken: the model does not load: "):
            load_base(ModelSpec(path=str(broken)), device=CPU)


class TestAnswers:
    def ask(self, prompts: list[list[int]], **changes: Any) -> list[str]:
        model = tiny.llama(positions=24)
        for name, value in changes.items():
            setattr(model.generation_config, name, value)
        return answer(model, tiny.tokenizer(), prompts, end_ids=[], max_new_tokens=16, batch_sequences=3)

    def test_a_batch_answers_as_each_prompt_alone(self) -> None:
        prompts = [[5, 6, 7, 8], [9], [10, 11]]
        assert self.ask(prompts) == [self.ask([prompt])[0] for prompt in prompts]

    def test_settings_of_the_base_do_not_count(self) -> None:
        assert self.ask([[5, 6, 7]]) == self.ask([[5, 6, 7]], repetition_penalty=5.0, no_repeat_ngram_size=1)

    def test_an_answer_ends_at_the_last_position(self) -> None:
        assert self.ask([list(range(3, 27))]) == [""]
        assert len(self.ask([list(range(3, 23))])) == 1


class TestQuantised:
    def test_gradients_survive_an_evaluation(self, base: Path) -> None:
        # bitsandbytes' inference path on AVX512-BF16 processors would repack the weights for good.
        def grad_norm(evaluate_first: bool) -> float:
            bank = engine(model=load_base(ModelSpec(path=str(base)), device=CPU))
            batches = some_steps(1)[0]
            if evaluate_first:
                mean_loss(bank, batches)
            bank.base.accumulate([Block(bank, batches[0], step=0, forward=0, divisor=20, sources=1)])
            return bank.update(0.0)

        assert grad_norm(True) == grad_norm(False) > 0

    def test_a_dequantised_base_gives_the_same_bits(self, base: Path) -> None:
        adapters = []
        for dequantised in (False, True):
            model = load_base(ModelSpec(path=str(base)), device=CPU, dequantised=dequantised)
            bank = engine(model=model)
            train(bank, some_steps(4))
            adapters.append(bank.parameters)
        packed, plain = adapters
        assert all(torch.equal(p, plain[n]) for n, p in packed.items())

    @pytest.mark.parametrize("bits", [4, 8, 16, 32])
    def test_every_width_trains(self, base: Path, bits: int) -> None:
        model = load_base(ModelSpec.model_validate({"path": str(base), "weight_bits": bits}), device=CPU)
        check_isolation(model, packed=True)
        losses = [report.loss for report in train(engine(model=model), some_steps(1) * 40)]
        assert losses[-1] < losses[0] * 0.8

    def test_four_bits_are_four_bits(self, base: Path) -> None:
        import bitsandbytes as bnb

        model = load_base(ModelSpec(path=str(base)), device=CPU)
        layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert len(layers) == 2 * 7
        assert all(
            layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
            for layer in layers
        )


class TestSchedule:
    @given(st.integers(1, 500), st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]))
    def test_stays_within_the_peak(self, total: int, warmup: float, decay: str) -> None:
        spec = ScheduleSpec.model_validate({"warmup": warmup, "decay": decay})
        rates = [learning_rate(step, total, spec, 1.0) for step in range(total)]
        assert all(0 < rate <= 1.0 for rate in rates)
        warm = math.ceil(warmup * total)
        assert rates[:warm] == sorted(rates[:warm])
        assert rates[warm:] == sorted(rates[warm:], reverse=True)

    def test_cosine_by_hand(self) -> None:
        spec = ScheduleSpec(warmup=0.2, decay="cosine")
        rates = [learning_rate(step, 10, spec, 2.0) for step in range(10)]
        assert rates[:3] == [1.0, 2.0, 2.0]
        assert rates[6] == pytest.approx(1.0)
