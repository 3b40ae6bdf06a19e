"""Tiny bases that answer perfectly, with chat templates, and a job's recipe without Ray."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from lanes import CHANNEL, PLACEMENT
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from raytune_ft.data.examples import decode
from raytune_ft.data.prepare import prepare
from raytune_ft.data.survey import content_of
from raytune_ft.model_files import base_identity
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.peers import Peers
from raytune_ft.train.recipe import Recipe
from raytune_ft.train.run import RunState

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(
    template: str = CHATML,
    *,
    plain: Sequence[str] = (),
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose EOS is no end of turn.

    Args:
        template: its chat template.
        plain: added tokens that are not special, and so stand in decoded texts.
        special: added tokens that are.
    """
    words = tiny.tokenizer()
    words.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    words.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    words.chat_template = template
    return words


def chat_base(folder: Path, words: PreTrainedTokenizerFast, model: PreTrainedModel | None = None) -> Path:
    """A Llama with that tokenizer; returns its folder."""
    return tiny.save_base(folder, model or llama_of(words), words=words)


def llama_of(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny Llama with embeddings for all tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).eval()


def job_of(base: Path, folder: Path, records: Sequence[dict[str, Any]], **changes: Any) -> JobSpec:
    """A job on such a base, half of whose examples are for tests."""
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    values: dict[str, Any] = {
        "name": "answers",
        "model": {"path": str(base), "weight_bits": 32},
        "data": {
            "sources": [{"uri": str(folder / "data.jsonl")}],
            "split": {"validation": 0.0, "test": 0.5},
            "max_tokens": 256,
        },
        "method": {"rank": 4},
        "batch": {"sequences": 4},
        "schedule": {"steps": 1},
        "evaluate": {"metrics": ["exact_match", "rouge"]},
        "publish": {"catalog": str(folder / "catalog")},
    }
    return parse_job({**values, **changes})


def teach(model: PreTrainedModel, job: JobSpec, *, steps: int = 150) -> float:
    """Fit all examples of a job, held-out ones too, until the model answers them; returns the last loss."""
    data = prepare(job, tokenizer=load_tokenizer(job.model), cache=False, here=True)
    rows = [row for kept in data.contents.values() for row in decode(content_of(kept)).table.to_pylist()]
    width = max(len(row["input_ids"]) for row in rows)
    ids_BT = torch.tensor([row["input_ids"] + [2] * (width - len(row["input_ids"])) for row in rows])
    learned_BT = torch.tensor([row["learned"] + [False] * (width - len(row["learned"])) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = float("inf")
    for _ in range(steps):
        found_loss = model(input_ids=ids_BT, labels=ids_BT.where(learned_BT, torch.tensor(-100))).loss
        found_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = float(found_loss.detach())
        if loss < 0.005:
            break
    return loss


def recipe_of(job: JobSpec, told: list[str] | None = None) -> tuple[Recipe, Assignment]:
    """The recipe of a job for a single worker in this process; `told` hears of its phases."""
    data = prepare(job, tokenizer=load_tokenizer(job.model), cache=False, here=True)
    state = RunState(1, "attempt", data.fingerprint, base_identity(job.model.path))
    assignment = Assignment(job, state, TrainingData.of(job, data, None), CHANNEL, PLACEMENT)
    hear = (lambda _: None) if told is None else told.append
    return Recipe(assignment, Peers(), hear), assignment
