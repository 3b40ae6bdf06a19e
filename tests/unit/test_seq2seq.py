"""Encoders with a decoder, on tiny T5s: the same losses, training, adapters and answers as transformers'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from fleets import train_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, T5ForConditionalGeneration

from raytune_ft.errors import ModelError
from raytune_ft.evaluate.generate import answer
from raytune_ft.methods import METHODS
from raytune_ft.methods.lora import add_lora, load_lora, save_lora
from raytune_ft.models import load_base, task_of
from raytune_ft.spec import FullSpec, LoraSpec, ModelSpec, OptimizerSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Batch, Layout, Pairs, Step, Tokens
from raytune_ft.train.engine import Block
from raytune_ft.train.forward import arrangement_of
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.probe import check_isolation

CPU = torch.device("cpu")
TOKENIZER = tiny.tokenizer()
EOS, PAD = 1, 2
START = PAD
RATE = 1e-2
LORA = LoraSpec(rank=4, alpha=8)
KINDS = [{}, {"tied": False, "gated": True}]
KIND_NAMES = ["T5", "T5 v1.1"]


def examples(*lengths: int, seed: int = 0) -> list[Tokens]:
    """Random examples; the last third of each is its answer, which ends with EOS."""
    random = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids = random.integers(3, 320, length)
        ids[-1] = EOS
        found.append(Tokens(ids, np.arange(length) >= length - max(1, length // 3)))
    return found


def layout(*, sequences: int | None = None, per_forward: int = 4096) -> Layout:
    return Layout(True, 64, PAD, sequences, per_forward, Pairs(EOS, START))


def steps(count: int, how: Layout) -> list[Step]:
    return [Step(how.batches(examples(9, 14, 5, 22, seed=n)), 4, "", 1) for n in range(count)]


def trained(
    model: T5ForConditionalGeneration, method: LoraSpec | FullSpec, how: Layout, count: int = 6
) -> tuple[BankEngine, list[StepReport]]:
    return train_alone(model, method, steps(count, how), learning_rate=RATE)


def as_transformers_takes(chosen: Sequence[Tokens]) -> dict[str, torch.Tensor]:
    """Question and labels, padded as its collator does: written down here, from the lists of tokens."""
    questions = [[*e.input_ids[~e.learned].tolist(), EOS] for e in chosen]
    answers = [e.input_ids[e.learned].tolist() for e in chosen]
    width, longest = max(map(len, questions)), max(map(len, answers))
    return {
        "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids in questions]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in questions]),
        "labels": torch.tensor([ids + [-100] * (longest - len(ids)) for ids in answers]),
    }


def plainly_trained(model: Any, parameters: Sequence[torch.Tensor], count: int = 6) -> list[float]:
    """The usual loop: transformers' own loss, clipping, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses = []
    for number in range(count):
        loss = model(**as_transformers_takes(examples(9, 14, 5, 22, seed=number))).loss
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


class TestRows:
    def test_the_encoder_reads_the_question_and_the_decoder_learns_the_answer(self) -> None:
        long = Tokens(np.array([10, 11, 12, 20, EOS]), np.array([False] * 3 + [True] * 2))
        short = Tokens(np.array([13, 21, 22, EOS]), np.array([False] + [True] * 3), source=1)
        (batch,) = layout().batches([long, short])
        assert batch.input_ids_BT.tolist() == [[10, 11, 12, EOS], [13, EOS, PAD, PAD]]
        assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch.decoder_ids_BS is not None
        assert batch.decoder_ids_BS.tolist() == [[START, 20, PAD], [START, 21, 22]]
        assert batch.labels_N.tolist() == [20, EOS, 21, 22, EOS]
        assert batch.predictor_N.tolist() == [0, 1, 3, 4, 5]
        assert batch.group_N.tolist() == [0, 0, 1, 1, 1]
        assert batch.tokens == 6 + 5

    def test_of_a_chat_the_last_answer_is_learned_and_the_others_are_read(self) -> None:
        chat = Tokens(
            np.array([10, 20, EOS, 11, 21, EOS, 12]), np.array([False, True, True, False, True, True, False])
        )
        (batch,) = layout().batches([chat])
        assert batch.input_ids_BT.tolist() == [[10, 20, EOS, 11, EOS]]
        assert batch.labels_N.tolist() == [21, EOS]

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(2, 64), min_size=1, max_size=12), st.none() | st.integers(1, 5))
    def test_no_answer_is_lost_however_it_is_laid_out(self, lengths: list[int], per: int | None) -> None:
        chosen = examples(*lengths)
        batches = layout(sequences=per, per_forward=128).batches(chosen)
        learned = sorted(label for batch in batches for label in batch.labels_N.tolist())
        assert learned == sorted(int(i) for e in chosen for i in e.input_ids[e.learned])
        assert sum(len(batch.input_ids_BT) for batch in batches) == len(chosen)
        assert all(batch.input_ids_BT.shape[1] <= 64 for batch in batches)

    def test_a_model_that_does_not_say_how_answers_begin(self) -> None:
        model = tiny.t5()
        model.config.decoder_start_token_id = None
        with pytest.raises(ModelError, match=r"config.json has no decoder_start_token_id.*pad_token_id"):
            arrangement_of(model, TOKENIZER)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
class TestEqualsTransformers:
    def test_loss(self, kind: dict[str, bool]) -> None:
        model = tiny.t5(**kind)
        chosen = examples(9, 14, 5, 22, 30)
        bank = BankEngine(Bank(model), dict(model.named_parameters()), OptimizerSpec())
        (batch,) = layout().batches(chosen)
        with torch.no_grad():
            expected = float(model(**as_transformers_takes(chosen)).loss)
        assert bank.evaluate(batch) / batch.learned_tokens == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("sequences", [None, 1, 3], ids=["one pass", "a pass each", "passes of three"])
    def test_full_training(self, kind: dict[str, bool], sequences: int | None) -> None:
        bank, reports = trained(tiny.t5(**kind), FullSpec(), layout(sequences=sequences))
        plain = tiny.t5(**kind)
        losses = plainly_trained(plain, list(plain.parameters()))
        assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-5)
        assert losses[-1] < losses[0]
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(bank.parameters[name], parameter, rtol=0, atol=1e-4)

    def test_adapters_train_as_in_peft(self, kind: dict[str, bool], tmp_path: Path) -> None:
        start = tiny.t5(**kind).requires_grad_(False)
        add_lora(start, LORA, seed=0)
        save_lora(start, LORA, tmp_path, "base")
        plain = peft.PeftModel.from_pretrained(tiny.t5(**kind), tmp_path, is_trainable=True)
        losses = plainly_trained(plain, [p for p in plain.parameters() if p.requires_grad])
        _, reports = trained(tiny.t5(**kind), LORA, layout())
        assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-5)

    def test_a_published_adapter_gives_the_same_logits_in_peft(
        self, kind: dict[str, bool], tmp_path: Path
    ) -> None:
        bank, _ = trained(tiny.t5(**kind), LORA, layout(), count=3)
        save_lora(bank.model, LORA, tmp_path, "base")
        inputs = as_transformers_takes(examples(9, 22))
        loaded = peft.PeftModel.from_pretrained(tiny.t5(**kind), tmp_path).eval()
        bank.model.eval()
        with torch.no_grad():
            ours, theirs = bank.model(**inputs).logits, loaded(**inputs).logits
            before = tiny.t5(**kind)(**inputs).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert (ours - before).abs().max() > 1e-3
        assert peft.PeftConfig.from_pretrained(str(tmp_path)).task_type == "SEQ_2_SEQ_LM"
        again = tiny.t5(**kind).requires_grad_(False)
        load_lora(add_lora(again, LORA, seed=1), tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, ours, rtol=0, atol=1e-6)


class TestTraining:
    def test_a_published_model_loads_in_transformers(self, tmp_path: Path) -> None:
        bank, _ = trained(tiny.t5(), FullSpec(), layout(), count=2)
        METHODS[FullSpec].save(bank.model, FullSpec(), tmp_path, "base")
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in bank.model.state_dict().items())

    def test_attention_and_the_feed_forward_layers_can_be_chosen(self) -> None:
        attention = add_lora(tiny.t5(), LoraSpec(rank=2, targets="attention"), 0)
        assert {name.split(".")[-3] for name in attention} == {"q", "k", "v", "o"}
        chosen = add_lora(tiny.t5(gated=True), LoraSpec(rank=2, targets=("wi_0", "wi_1", "wo")), 0)
        assert len(chosen) == 2 * 3 * (2 + 2)

    def test_gradient_checkpointing_changes_nothing(self) -> None:
        found = []
        for checkpointing in (False, True):
            model = tiny.t5(dropout=0.1).requires_grad_(False)
            bank = BankEngine(
                Bank(model, gradient_checkpointing=checkpointing), add_lora(model, LORA, 0), OptimizerSpec()
            )
            (batch,) = layout().batches(examples(9, 14))
            block = Block(bank, batch, step=0, forward=0, divisor=batch.learned_tokens, sources=1)
            (loss,) = bank.base.accumulate([block])
            found.append((loss, bank.update(0.0)))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
        assert found[0][1] > 0

    @pytest.mark.parametrize("bits", [4, 8, 16])
    def test_every_width_trains(self, tmp_path: Path, bits: int) -> None:
        base = tiny.save_base(tmp_path / "base", tiny.t5())
        model = load_base(ModelSpec.model_validate({"path": str(base), "weight_bits": bits}), device=CPU)
        assert task_of(model) == "seq2seq"
        check_isolation(model, packed=True)
        bank = BankEngine(Bank(model), add_lora(model, LORA, 0), OptimizerSpec())
        batches = layout().batches(examples(9, 14, 5))
        same = [Step(batches, 3, "", 1)] * 8
        reports: list[StepReport] = []
        fit(bank, same, start=0, learning_rate=lambda _: 2e-2, report=reports.append)
        assert reports[-1].loss < 0.9 * reports[0].loss

    def test_the_probe_notices_a_head_that_is_more_than_its_module(self) -> None:
        model = tiny.t5()
        model.lm_head.register_forward_hook(lambda _, given, logits: logits * len(given[0]))
        with pytest.raises(ModelError, match="T5ForConditionalGeneration gives other logits"):
            check_isolation(model, packed=True)


PROMPTS = ([10, 11, 12], [13], [14, 15, 16, 17, 18, 19, 20], [21, 22])


@pytest.fixture(scope="module")
def taught() -> T5ForConditionalGeneration:
    """A T5 that learned four answers of one to four tokens."""
    model = tiny.t5()
    bank = BankEngine(Bank(model), dict(model.named_parameters()), OptimizerSpec())
    lessons = [
        Tokens(
            np.array([*prompt, *range(100, 101 + at), EOS]), np.arange(len(prompt) + at + 2) >= len(prompt)
        )
        for at, prompt in enumerate(PROMPTS)
    ]
    same = [Step(layout().batches(lessons), 4, "", 1)] * 40
    fit(bank, same, start=0, learning_rate=lambda _: 2e-2, report=lambda _: None)
    return model


class TestAnswers:
    def said(self, model: T5ForConditionalGeneration, size: int, longest: int = 8) -> list[str]:
        return answer(model, TOKENIZER, PROMPTS, end_ids=[], max_new_tokens=longest, batch_sequences=size)

    @pytest.mark.parametrize("size", [1, 3, 8])
    def test_it_says_what_it_was_taught_and_stops(
        self, taught: T5ForConditionalGeneration, size: int
    ) -> None:
        expected = [TOKENIZER.decode(list(range(100, 101 + at))).strip() for at in range(4)]
        assert self.said(taught, size) == expected

    def test_it_is_what_transformers_generates(self, taught: T5ForConditionalGeneration) -> None:
        for prompt, ours in zip(PROMPTS, self.said(taught, 8, longest=2), strict=True):
            out = taught.generate(
                input_ids=torch.tensor([[*prompt, EOS]]),
                generation_config=GenerationConfig(
                    max_new_tokens=2, decoder_start_token_id=START, eos_token_id=EOS, pad_token_id=PAD
                ),
            )
            assert TOKENIZER.decode(out[0], skip_special_tokens=True).strip() == ours


def test_a_batch_moves_whole() -> None:
    (batch,) = layout().batches(examples(9))
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert moved.decoder_ids_BS is not None
    assert moved.decoder_ids_BS.device.type == "meta"
