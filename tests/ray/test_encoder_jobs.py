"""Whole jobs that train a T5 and a BERT: from the file to what PEFT and transformers load."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from conftest import make_job  # type: ignore[import-not-found]  # this folder's
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from raytune_ft.catalog import Catalog
from raytune_ft.errors import DataError
from raytune_ft.evaluate.answer import answer_prompt
from raytune_ft.train.launch import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

LABELS = ["fox", "dog"]


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty records whose prompt says which of two labels is its completion."""
    path = tmp_path_factory.mktemp("data") / "animals.jsonl"
    lines = [
        json.dumps({"prompt": f"{'q' if number % 2 else 'z'} {number}", "completion": LABELS[number % 2]})
        for number in range(60)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def pulled(catalog: Path, reference: str, to: Path) -> Path:
    Catalog.at(str(catalog)).pull(reference, to)
    return to


def sections(base: Path, **model: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(base), "weight_bits": 32, **model},
        "evaluate": {"max_examples": 8, "max_new_tokens": 4, "metrics": ["exact_match"]},
        "schedule": {"steps": 30},
        "checkpoint": {"every_steps": 100},
    }


@pytest.mark.slow
def test_a_t5_learns_to_answer_and_peft_loads_its_adapter(animals: Path, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.t5(dropout=0.1))
    job = make_job(base, animals, tmp_path / "catalog", optimizer={"learning_rate": 2.0e-2}, **sections(base))
    result = train(job, tmp_path / "out")
    assert result["scores_after"]["exact_match"] > 0.9
    assert result["scores_before"]["exact_match"] == 0.0
    folder = pulled(tmp_path / "catalog", "capitals@v1", tmp_path / "pulled")
    model = peft.PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), folder)
    assert type(model).__name__ == "PeftModelForSeq2SeqLM"
    assert "AutoModelForSeq2SeqLM.from_pretrained" in (folder / "README.md").read_text()
    assert answer_prompt(str(tmp_path / "catalog"), "capitals@v1", "q 7", max_new_tokens=4) == "dog"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_bert_learns_to_classify(animals: Path, tmp_path: Path, kind: str) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.bert(classes=2), words=tiny.wordpiece())
    job = make_job(
        base,
        animals,
        tmp_path / "catalog",
        **sections(base, labels=LABELS),
        optimizer={"learning_rate": 1.0e-2},
        method={"kind": kind},
    )
    result = train(job, tmp_path / "out")
    assert result["scores_after"]["exact_match"] == 1.0
    folder = pulled(tmp_path / "catalog", "capitals@v1", tmp_path / "pulled")
    if kind == "lora":
        start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        model = peft.PeftModel.from_pretrained(start, folder).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = tiny.wordpiece()("q 7")["input_ids"]
    with torch.no_grad():
        assert LABELS[int(model(torch.tensor([ids])).logits.argmax())] == "dog"
    catalog = str(tmp_path / "catalog")
    assert answer_prompt(catalog, "capitals@v1", "z 8", max_new_tokens=1) == "fox"


def test_a_completion_that_is_no_label_is_a_malformed_record(animals: Path, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.bert(classes=2), words=tiny.wordpiece())
    job = make_job(base, animals, tmp_path / "catalog", **sections(base, labels=["fox", "cat"]))
    with pytest.raises(DataError, match=r"30 of 60 records are malformed"):
        train(job, tmp_path / "out")
    first, *_ = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert "the completion 'dog' is none of model.labels (fox, cat)" in first
