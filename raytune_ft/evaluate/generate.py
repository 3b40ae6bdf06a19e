"""Batched greedy answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_token_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", end_ids: Sequence[int]
) -> list[int]:
    """EOS, the ends of turn that were learned, and those that the model's own generation config names."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*listed, *end_ids, tokenizer.eos_token_id] if token is not None})


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
    """The model's greedy answer to each prompt of token ids, without special tokens, stripped.

    Each answer ends at EOS, or at one of `end_ids`. Prompts are answered in batches of similar length,
    padded on the left.
    """
    from transformers import GenerationConfig

    model.eval()
    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=False,
        eos_token_id=stop_token_ids(model, tokenizer, end_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = [""] * len(prompts)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def room(index: int) -> int:
        left = max_new_tokens if positions is None else positions - len(prompts[index])
        return max(0, min(max_new_tokens, left))

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for chosen, new_tokens in _batches(order, room, batch_sequences):
        width = max(len(prompts[index]) for index in chosen)
        ids_BT = torch.full((len(chosen), width), int(tokenizer.pad_token_id), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, index in enumerate(chosen):
            prompt = torch.as_tensor(prompts[index], dtype=torch.long)
            ids_BT[row, width - len(prompt) :] = prompt
            mask_BT[row, width - len(prompt) :] = 1
        settings.max_new_tokens = new_tokens
        with _no_settings_of_its_own(model):
            out_BT = model.generate(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=settings
            )
        texts = tokenizer.batch_decode(out_BT[:, width:], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers


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
