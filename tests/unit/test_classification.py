"""Classifiers, on tiny BERTs: the same losses, training and adapters as transformers', and their labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from fleets import train_alone
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, BertForSequenceClassification

from raytune_ft.data.cache import cache_key
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import tokenise_window
from raytune_ft.data.index import divide
from raytune_ft.data.sources import DataObject, list_objects
from raytune_ft.data.template import Segment
from raytune_ft.data.tokenise import tokenise
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError, ModelError, SpecError
from raytune_ft.evaluate.generate import answer
from raytune_ft.methods import METHODS
from raytune_ft.methods.lora import add_lora, load_lora, save_lora
from raytune_ft.models import head_paths, load_base, load_tokenizer
from raytune_ft.spec import DataSpec, FullSpec, LoraSpec, ModelSpec, OptimizerSpec, parse_job
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Classes, Layout, Step, Tokens
from raytune_ft.train.forward import ClassOf, arrangement_of
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.probe import check_isolation

CPU = torch.device("cpu")
LABELS = ("red", "blue", "Dark blue")
CLS, SEP, PAD = 2, 3, 0
RATE = 1e-2
LORA = LoraSpec(rank=4, alpha=8)
VOCABULARY = len(tiny.wordpiece())


def examples(*lengths: int, seed: int = 0) -> list[Tokens]:
    """Random texts; the last token but SEP names the class: its number is the token's rest by three."""
    random = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids = random.integers(4, VOCABULARY, length)
        ids[0], ids[-1] = CLS, SEP
        found.append(Tokens(ids, np.arange(length) >= length - 2))
    return found


def layout(*, sequences: int | None = None) -> Layout:
    return Layout(True, 64, PAD, sequences, 4096, Classes(SEP, lambda ids: int(ids[0]) % 3))


def steps(count: int, how: Layout) -> list[Step]:
    return [Step(how.batches(examples(9, 14, 5, 22, seed=n)), 4, "", 1) for n in range(count)]


def trained(
    model: BertForSequenceClassification, method: LoraSpec | FullSpec, how: Layout, count: int = 6
) -> tuple[BankEngine, list[StepReport]]:
    return train_alone(model, method, steps(count, how), learning_rate=RATE)


def as_transformers_takes(chosen: Sequence[Tokens]) -> dict[str, torch.Tensor]:
    """Text and label, padded as its collator does: written down here, from the lists of tokens."""
    texts = [[*e.input_ids[:-2].tolist(), SEP] for e in chosen]
    width = max(map(len, texts))
    return {
        "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts]),
        "labels": torch.tensor([int(e.input_ids[-2]) % 3 for e in chosen]),
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


def saved(folder: Path, model: Any = None) -> Path:
    return tiny.save_base(folder, model or tiny.bert(), words=tiny.wordpiece())


def spec(folder: Path, labels: Sequence[str] = LABELS, bits: int = 32) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(folder), "labels": labels, "weight_bits": bits})


class TestRows:
    def test_a_row_is_the_text_and_its_label_a_class(self) -> None:
        long = Tokens(np.array([CLS, 10, 11, 12, 8, SEP]), np.array([False] * 4 + [True] * 2))
        short = Tokens(np.array([CLS, 13, 7, SEP]), np.array([False] * 2 + [True] * 2), source=1)
        (batch,) = layout().batches([short, long])
        assert batch.input_ids_BT.tolist() == [[CLS, 10, 11, 12, SEP], [CLS, 13, SEP, PAD, PAD]]
        assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
        assert batch.labels_N.tolist() == [8 % 3, 7 % 3]
        assert batch.predictor_N.tolist() == [0, 1]
        assert batch.group_N.tolist() == [0, 1]
        assert (batch.tokens, batch.learned_tokens) == (8, 2)

    def test_the_text_is_what_the_tokenizer_makes_of_it(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(spec(saved(tmp_path)))
        segments = (Segment("The quick fox:", learned=False), Segment(" Dark blue", learned=True))
        (example,) = tokenise([segments], Encoder.of(tokenizer))
        assert example is not None
        model = load_base(spec(tmp_path), device=CPU)
        how = Layout(True, 64, PAD, None, 4096, arrangement_of(model, tokenizer))
        (batch,) = how.batches([Tokens(np.array(example.input_ids), np.array(example.learned))])
        assert batch.input_ids_BT.tolist() == [tokenizer("The quick fox:")["input_ids"]]
        assert batch.labels_N.tolist() == [2]


class TestLabels:
    def test_tokens_name_a_class(self) -> None:
        tokenizer = tiny.wordpiece()
        class_of = ClassOf(tokenizer, LABELS)
        for at, label in enumerate(LABELS):
            for written in (label, f" {label}", label.upper()):
                ids = tokenizer(written, add_special_tokens=False)["input_ids"]
                assert class_of(np.array(ids)) == at
                assert class_of(np.array([*ids, SEP])) == at

    def test_other_completions_are_refused(self) -> None:
        class_of = ClassOf(tiny.wordpiece(), LABELS)
        with pytest.raises(
            DataError, match=r"a completion is 'g r e e n'|'green', which is none of model.labels"
        ):
            class_of(np.array(tiny.wordpiece()("green", add_special_tokens=False)["input_ids"]))

    def test_the_tokenizer_must_tell_them_apart(self) -> None:
        with pytest.raises(ModelError, match=r"model.labels: 'Red' and 'red' become 'r.*d' in the base's"):
            ClassOf(tiny.wordpiece(), ["Red", "red"])

    @pytest.mark.parametrize(
        ("labels", "complaint"),
        [
            (["red"], r"model.labels = .*: holds 'red' alone"),
            (["red", "red"], r"model.labels = .*: names 'red' twice"),
            (["red", " blue"], r"model.labels = .*: ' blue' is empty, or begins or ends with white space"),
            (["red", ""], r"model.labels = .*: '' is empty"),
        ],
    )
    def test_bad_ones_are_refused_in_the_job_file(self, labels: list[str], complaint: str) -> None:
        values = {
            "name": "colours",
            "model": {"path": "base", "labels": labels},
            "data": {"sources": [{"uri": "data"}]},
            "publish": {"catalog": "catalog"},
        }
        with pytest.raises(SpecError, match=complaint):
            parse_job(values)


class TestRecords:
    RECORDS = (
        {"prompt": "a", "completion": " red"},
        {"prompt": "b", "completion": "green"},
        {"prompt": "c", "completion": "Red"},
        {"text": "raw"},
        {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "Dark blue"}]},
    )

    @pytest.fixture
    def found(self, tmp_path: Path) -> tuple[DataObject, Window, DataSpec]:
        file = tmp_path / "records.jsonl"
        file.write_text("".join(f"{json.dumps(record)}\n" for record in self.RECORDS))
        data = DataSpec.model_validate({"sources": [{"uri": str(file)}], "max_bad_fraction": 1.0})
        (listed,) = list_objects(data)
        (window,) = divide(listed, 0, "auto", None)
        return listed, window, data

    def test_only_those_that_name_a_class_are_kept(self, found: tuple[DataObject, Window, DataSpec]) -> None:
        read = tokenise_window(*found, Encoder.of(tiny.tokenizer()), LABELS)
        assert read.table["references"].to_pylist() == [[" red"], ["Dark blue"]]
        assert [bad.reason.partition(";")[0] for bad in read.report.bad] == [
            "the completion 'green' is none of model.labels (red, blue, Dark blue)",
            "the completion 'Red' is none of model.labels (red, blue, Dark blue)",
            "the record is raw text",
        ]

    def test_what_was_read_for_other_labels_is_read_anew(
        self, found: tuple[DataObject, Window, DataSpec]
    ) -> None:
        encoder = Encoder.of(tiny.tokenizer())
        keys = [cache_key(*found, encoder, labels) for labels in ((), LABELS, LABELS[:2])]
        assert len(set(keys)) == 3
        assert cache_key(*found, encoder, LABELS[::-1]) == keys[1]


class TestBase:
    def test_a_base_without_a_classifier_gets_one_and_always_the_same(self, tmp_path: Path) -> None:
        saved(tmp_path, BertForMaskedLM(tiny.bert().config))
        torch.manual_seed(1)
        first = load_base(spec(tmp_path), device=CPU)
        torch.manual_seed(2)
        second = load_base(spec(tmp_path), device=CPU)
        assert head_paths(first) == ["classifier", "bert.pooler"]
        assert first.config.id2label == dict(enumerate(LABELS))
        assert first.classifier.out_features == 3
        assert first.classifier.weight.abs().sum() > 0
        others = second.state_dict()
        assert all(torch.equal(value, others[name]) for name, value in first.state_dict().items())

    def test_loading_leaves_the_random_numbers_of_others_alone(self, tmp_path: Path) -> None:
        saved(tmp_path)
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        load_base(spec(tmp_path), device=CPU)
        assert torch.equal(torch.rand(1), expected)

    def test_a_base_for_another_number_of_classes_gets_a_new_head(self, tmp_path: Path) -> None:
        saved(tmp_path, tiny.bert(classes=5))
        assert load_base(spec(tmp_path), device=CPU).classifier.out_features == 3

    @pytest.mark.parametrize("classes", [2, 5])
    def test_a_base_for_another_number_of_classes_is_not_divided_while_it_loads(
        self, tmp_path: Path, classes: int
    ) -> None:
        saved(tmp_path, tiny.bert(classes=classes))
        with pytest.raises(ModelError, match=rf"{classes} classes, and model.labels names 3; .* use 1 or 2"):
            load_base(spec(tmp_path), device=None)

    def test_a_missing_weight_of_the_body_is_refused(self, tmp_path: Path) -> None:
        model = tiny.bert()
        kept = {n: v for n, v in model.state_dict().items() if not n.endswith("1.output.dense.weight")}
        saved(tmp_path)
        model.save_pretrained(tmp_path, state_dict=kept)
        with pytest.raises(ModelError, match=r"1 weights are missing, the first bert.encoder.layer.1"):
            load_base(spec(tmp_path), device=CPU)

    def test_a_classifier_of_other_classes_is_refused(self, tmp_path: Path) -> None:
        model = tiny.bert()
        model.config.id2label = {0: "blue", 1: "red", 2: "Dark blue"}
        saved(tmp_path, model)
        with pytest.raises(
            ModelError, match=r"with the classes blue, red, Dark blue, and model.labels names red"
        ):
            load_base(spec(tmp_path), device=CPU)
        assert load_base(spec(tmp_path, ("blue", "red", "Dark blue")), device=CPU)

    def test_without_labels_it_gives_no_text(self, tmp_path: Path) -> None:
        saved(tmp_path)
        with pytest.raises(ModelError, match=r"a BertForSequenceClassification gives no text.*model.labels"):
            load_base(spec(tmp_path, ()), device=CPU)
        with pytest.raises(ModelError, match=r"no EOS token.*name its classes in model.labels"):
            load_tokenizer(spec(tmp_path, ()))


class TestEqualsTransformers:
    def test_loss(self) -> None:
        model = tiny.bert()
        chosen = examples(9, 14, 5, 22, 30)
        bank = BankEngine(Bank(model), dict(model.named_parameters()), OptimizerSpec())
        (batch,) = layout().batches(chosen)
        with torch.no_grad():
            expected = float(model(**as_transformers_takes(chosen)).loss)
        assert bank.evaluate(batch) / len(chosen) == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("sequences", [None, 1, 3], ids=["one pass", "a pass each", "passes of three"])
    def test_full_training(self, sequences: int | None) -> None:
        bank, reports = trained(tiny.bert(), FullSpec(), layout(sequences=sequences))
        plain = tiny.bert()
        losses = plainly_trained(plain, list(plain.parameters()))
        assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-5)
        assert [report.learned_tokens for report in reports] == [4] * 6
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(bank.parameters[name], parameter, rtol=0, atol=1e-4)

    def test_adapters_and_the_head_train_as_in_peft(self, tmp_path: Path) -> None:
        start = tiny.bert().requires_grad_(False)
        add_lora(start, LORA, seed=0)
        save_lora(start, LORA, tmp_path, "base")
        plain = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path, is_trainable=True)
        losses = plainly_trained(plain, [p for p in plain.parameters() if p.requires_grad])
        bank, reports = trained(tiny.bert(), LORA, layout())
        assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-5)
        assert sum(p.numel() for p in plain.parameters() if p.requires_grad) == sum(
            p.numel() for p in bank.parameters.values()
        )

    @pytest.mark.parametrize("targets", ["all-linear", "attention", ("query", "value")])
    def test_a_published_adapter_gives_the_same_logits_in_peft(self, tmp_path: Path, targets: Any) -> None:
        method = LoraSpec(rank=4, alpha=8, targets=targets)
        bank, _ = trained(tiny.bert(), method, layout(), count=3)
        save_lora(bank.model, method, tmp_path, "base")
        inputs = as_transformers_takes(examples(9, 22))
        # A head that is another's is replaced by the published one.
        other = tiny.bert()
        torch.nn.init.normal_(other.classifier.weight)
        loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
        bank.model.eval()
        with torch.no_grad():
            ours, theirs = bank.model(**inputs).logits, loaded(**inputs).logits
            before = tiny.bert()(**inputs).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert (ours - before).abs().max() > 1e-3
        assert peft.PeftConfig.from_pretrained(str(tmp_path)).task_type == "SEQ_CLS"
        again = tiny.bert().requires_grad_(False)
        load_lora(add_lora(again, method, seed=1), tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, ours, rtol=0, atol=1e-6)


class TestTraining:
    def test_a_published_model_loads_in_transformers(self, tmp_path: Path) -> None:
        bank, _ = trained(
            load_base(spec(saved(tmp_path / "base")), device=CPU), FullSpec(), layout(), count=2
        )
        METHODS[FullSpec].save(bank.model, FullSpec(), tmp_path, "base")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert loaded.config.id2label == dict(enumerate(LABELS))
        found = loaded.state_dict()
        assert all(torch.equal(found[name], value) for name, value in bank.model.state_dict().items())

    @pytest.mark.parametrize("bits", [4, 8, 16])
    def test_every_width_trains_and_keeps_its_head_whole(self, tmp_path: Path, bits: int) -> None:
        model = load_base(spec(saved(tmp_path), bits=bits), device=CPU)
        assert {p.dtype for path in head_paths(model) for p in model.get_submodule(path).parameters()} == {
            torch.bfloat16
        }
        check_isolation(model, packed=True)
        bank = BankEngine(Bank(model), add_lora(model, LORA, 0), OptimizerSpec())
        same = [Step(layout().batches(examples(9, 14, 5, 22)), 4, "", 1)] * 12
        reports: list[StepReport] = []
        fit(bank, same, start=0, learning_rate=lambda _: 2e-2, report=reports.append)
        assert reports[-1].loss < 0.7 * reports[0].loss

    def test_a_resumed_engine_goes_on_with_its_head(self, tmp_path: Path) -> None:
        bank, _ = trained(tiny.bert(dropout=0.1), LORA, layout(), count=2)
        tiny.keep(bank, tmp_path)
        fresh, _ = trained(tiny.bert(dropout=0.1), LORA, layout(), count=0)
        fresh.load(tmp_path)
        for engine in (bank, fresh):
            rest = steps(4, layout())[2:]
            fit(engine, rest, start=2, learning_rate=lambda _: RATE, report=lambda _: None)
        others = fresh.model.state_dict()
        assert all(torch.equal(value, others[name]) for name, value in bank.model.state_dict().items())


@pytest.mark.parametrize("size", [1, 2, 8])
def test_answers_are_the_likeliest_classes(tmp_path: Path, size: int) -> None:
    model = load_base(spec(saved(tmp_path, tiny.bert())), device=CPU)
    tokenizer = load_tokenizer(spec(tmp_path))
    prompts = [e.input_ids[:-2].tolist() for e in examples(9, 5, 22, 14, 30)]
    alone = [torch.tensor([[*prompt, SEP]]) for prompt in prompts]
    with torch.no_grad():
        # As it begins, all texts look alike to it: what they have in common is taken away.
        model.classifier.bias -= torch.cat([model(input_ids=ids).logits for ids in alone]).mean(dim=0)
        expected = [LABELS[int(model(input_ids=ids).logits[0].argmax())] for ids in alone]
    found = answer(model, tokenizer, prompts, end_ids=[], max_new_tokens=1, batch_sequences=size)
    assert found == expected
    assert len(set(expected)) > 1
