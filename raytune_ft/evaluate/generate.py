"""Batched greedy answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from raytune_ft.evaluate.references import answer_text
from raytune_ft.generation_files import stop_token_ids
from raytune_ft.models import decoder_start_id, question_ids, task_of, unknown_token
from raytune_ft.quantise import is_divided, whole_shape

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_sequences: int,
) -> list[str]:
    """The model's greedy answer to each prompt of token ids, as `answer_text` reads it.

    Each answer ends at EOS, or at one of `end_ids`. Prompts are answered in batches of similar length; those
    of a causal model are padded on the left. A classifier answers with the likeliest class.

    Raises:
        DataError: a prompt has a token that the model does not know.
    """
    model.eval()
    task = task_of(model)
    rows: Sequence[Sequence[int]] = prompts
    if task != "causal":
        rows = [question_ids(prompt, tokenizer.eos_token_id).tolist() for prompt in prompts]
    if tokens := [token for row in rows for token in row]:
        vocabulary, _ = whole_shape(model.get_input_embeddings().weight)
        if (failure := unknown_token(min(tokens), max(tokens), vocabulary)) is not None:
            raise failure
    answers = [""] * len(rows)

    def keep(chosen: Sequence[int], texts: Sequence[str]) -> None:
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    if task == "classification":
        for start in range(0, len(order), batch_sequences):
            chosen: Sequence[int] = order[start : start + batch_sequences]
            keep(chosen, _classes(model, _padded(model, tokenizer, [rows[index] for index in chosen])))
        return answers
    ends = stop_token_ids(model, tokenizer, end_ids)
    settings = _greedy(model, tokenizer, ends)
    room = _room(model, rows, max_new_tokens)
    for chosen, new_tokens in _batches(order, room, batch_sequences):
        settings.max_new_tokens = new_tokens
        inputs = _padded(model, tokenizer, [rows[index] for index in chosen])
        with _no_settings_of_its_own(model):
            # A worker whose answers end sooner still gives its part of the weights to the others.
            out_BT = model.generate(
                **inputs, generation_config=settings, synced_gpus=is_divided(model) and _has_peers()
            )
        # A decoder's answer follows its own first token.
        given = inputs["input_ids"].shape[1] if task == "causal" else 1
        keep(chosen, [answer_text(tokenizer, ids, ends) for ids in out_BT[:, given:].tolist()])
    return answers


def _has_peers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _greedy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ends: list[int]
) -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=decoder_start_id(model) if task_of(model) == "seq2seq" else None,
    )


def _room(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Callable[[int], int]:
    """How long the answer to a prompt, named by its place, may become."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return lambda _: max_new_tokens
    # A decoder of its own begins to count anew; its first token takes a place.
    taken = [1] * len(prompts) if task_of(model) == "seq2seq" else [len(prompt) for prompt in prompts]
    return lambda index: max(0, min(max_new_tokens, positions - taken[index]))


def _padded(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Tensors of rows: the answer of a causal model follows its row, so padding stands before it."""
    left = task_of(model) == "causal"
    width = max(map(len, rows))
    ids_BT = torch.full((len(rows), width), int(tokenizer.pad_token_id), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for at, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids_BT[at, place] = torch.as_tensor(row, dtype=torch.long)
        mask_BT[at, place] = 1
    device = next(model.parameters()).device
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}


def _classes(model: "PreTrainedModel", inputs: Mapping[str, torch.Tensor]) -> list[str]:
    """The likeliest class of each row."""
    names: dict[int, str] = model.config.id2label
    return [names[number] for number in model(**inputs).logits.argmax(dim=1).tolist()]


def _batches(
    order: Sequence[int], room: Callable[[int], int], size: int
) -> Iterator[tuple[Sequence[int], int]]:
    """Prompts that are answered at once, with the length of their answers.

    A prompt that nearly fills the positions would cut the answers of those beside it short, so only prompts
    with equal room share a batch. Those without any stay unanswered.
    """
    for new_tokens, group in groupby(order, key=room):
        alike = list(group) if new_tokens else []
        for start in range(0, len(alike), size):
            yield alike[start : start + size], new_tokens


@contextmanager
def _no_settings_of_its_own(model: "PreTrainedModel") -> Iterator[None]:
    """Greedy means greedy: transformers fills what is left open, such as a penalty, from the base."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
