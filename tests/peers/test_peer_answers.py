"""Scores with chat templates of published models: who answers as it was taught is right."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from answerers import chat_base, chat_tokenizer, job_of, llama_of, recipe_of, teach
from peer_cases import all_cases, needs_peers

from raytune_ft.train.peers import Peers
from raytune_ft.train.workbench import set_up

pytestmark = needs_peers

MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("Qwen/Qwen3-0.6B", "<think>\n\n</think>\n\nfox"), ("meta-llama/Llama-3.1-8B-Instruct", "fox")],
)
def test_a_perfect_model_scores_one(name: str, answer: str, tmp_path: Path) -> None:
    template = all_cases()[f"hf_jinja/chat_templates.json::{name}"]["chat_template"]
    words = chat_tokenizer(template, plain=["<think>", "</think>"], special=MARKS)
    model = llama_of(words)
    records = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "fox"}]}
        for n in range(12)
    ]
    job = job_of(chat_base(tmp_path / "base", words, model), tmp_path, records)
    assert teach(model, job) < 0.02
    chat_base(tmp_path / "base", words, model)
    recipe, assignment = recipe_of(job)
    position = recipe.begin(set_up(assignment, None, Peers()), None)
    assert position.before is not None
    assert set(position.before["answers"]) == {answer}
    assert position.before["scores"]["exact_match"] == 1.0
