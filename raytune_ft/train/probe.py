"""A check of the loaded base before the first step: what packing and the head assume must hold."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, distributed

from raytune_ft.errors import ModelError
from raytune_ft.methods.lora import add_lora, remove_lora
from raytune_ft.methods.routing import Route, Share, set_route
from raytune_ft.models import decoder_start_id, task_of
from raytune_ft.quantise import is_divided
from raytune_ft.spec import LoraSpec
from raytune_ft.train.batch import (
    LEAST_ROWS,
    Arrangement,
    Batch,
    Classes,
    Continuations,
    Pairs,
    Tokens,
    assemble,
)
from raytune_ft.train.forward import forward_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LENGTHS = [7, 5, LEAST_ROWS + 1]
"""Of the examples; the last one is a row without padding by itself."""
_GIVEN = [1, 3, 4]
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of a logit, as a share of the largest logit: rounding of the type, with room."""


@torch.no_grad()
def check_isolation(model: "PreTrainedModel", *, packed: bool) -> None:
    """Compare the logits of three examples in one row with those that the model gives each of them alone.

    Architectures differ in how they take positions and what they do to logits; one that lets examples see
    each other, or whose head is more than its module, would otherwise train on something else in silence.
    Encoders have one example in a row, beside padding that it must not see.

    Raises:
        ModelError: they differ by more than rounding.
    """
    model.eval()
    device = next(model.parameters()).device
    arrangement = _arrangement(model)
    packed = packed and arrangement.packs
    forward, pad_id = forward_of(model), model.config.get_text_config().pad_token_id or 0
    examples = _examples(model.config.get_text_config().vocab_size)
    each = [arrangement.batch([[example]], pad_id).to(device) for example in examples]
    alone = [_plain_logits(model, batch) for batch in each]
    rows = [examples] if packed else [[example] for example in examples]
    try:
        logits_NV = forward.project(forward.learned(arrangement.batch(rows, pad_id).to(device)))
    except ValueError as error:
        if is_divided(model) and not distributed.is_initialized():
            # Another worker was lost, and Ray took the group away.
            raise
        raise ModelError(f"{type(model).__name__} takes no rows side by side: {error}") from None
    together = torch.split(logits_NV, [len(logits) for logits in alone])
    largest = max(float(logits.abs().max()) for logits in alone)
    apart = max(float((a.float() - b.float()).abs().max()) for a, b in zip(alone, together, strict=True))
    limit = _TOLERANCE.get(alone[0].dtype, 6e-2) * largest
    if not apart <= limit:
        remedy = "set data.packing: false" if packed else "this architecture cannot be trained here"
        raise ModelError(
            f"{type(model).__name__} gives other logits in a shared row than alone (by {apart:.3g}; "
            f"rounding explains {limit:.3g}): {remedy}"
        )


@torch.no_grad()
def can_share_passes(model: "PreTrainedModel", *, max_tokens: int) -> bool:
    """Whether a pass may hold the blocks of several jobs, each of which computes what it does alone.

    Not where a base has dropout of its own, which is drawn for a pass as a whole; nor in 8 bits, where all
    tokens of a pass choose what is kept in 16 bits; nor where positions are read from a pass as a whole; nor
    where the architecture keeps blocks apart otherwise than by its attention, such as encoders and recurrent
    layers.

    Args:
        model: without adapters.
        max_tokens: of the longest row.
    """
    if task_of(model) != "causal" or getattr(model, "is_loaded_in_8bit", False) or _drops(model):
        return False
    if _looks_at_whole_passes(model.config.get_text_config(), max_tokens):
        return False
    model.eval()
    pad_id = model.config.get_text_config().pad_token_id or 0
    device = next(model.parameters()).device
    # All tokens are learned, since what comes from a neighbour may not reach far.
    first, second, third = _examples(model.config.get_text_config().vocab_size, given=[1, 1, 1])
    batches = [assemble(rows, pad_id).to(device) for rows in ([[first, second], [third]], [[third]])]
    try:
        return all(_is_well_beside(model, batches, well) for well in range(len(batches)))
    except Exception:  # noqa: BLE001  code of any architecture; that it fails is the answer
        return False


def _is_well_beside(model: "PreTrainedModel", batches: Sequence[Batch], well: int) -> bool:
    """Whether one job gives what it gives alone, beside others all of whose numbers are NaN.

    Numbers alone would not tell: what a recurrent layer or an expert takes from a neighbour may be little.
    """
    forward = forward_of(model)
    alone_ND = forward.learned(batches[well])
    slots = range(len(batches))
    try:
        for slot in slots:
            for name, parameter in add_lora(model, LoraSpec(rank=1), 0, slot).items():
                if slot != well and name.endswith("lora_B.weight"):
                    parameter.fill_(torch.nan)
        given = zip(slots, batches, strict=True)
        set_route(model, Route([Share(slot, 0, one.example_BX, one.position_ids_BT) for slot, one in given]))
        together = torch.split(forward.learned(*batches), [batch.learned_tokens for batch in batches])
    finally:
        for slot in slots:
            remove_lora(model, slot)
    limit = _TOLERANCE.get(alone_ND.dtype, 6e-2) * float(alone_ND.abs().max())
    return float((alone_ND.float() - together[well].float()).abs().max()) <= limit


def _looks_at_whole_passes(config: "PreTrainedConfig", max_tokens: int) -> bool:
    """Whether the longest row of a pass, or its number of tokens, counts for all of its tokens."""
    # Llama 4 counts the tokens of a row, and not their positions.
    if getattr(config, "attn_temperature_tuning", False):
        return True
    given = getattr(config, "rope_parameters", None) or {}
    # Some have one for each kind of layer.
    kinds = [given, *(kind for kind in given.values() if isinstance(kind, dict))]
    return any(
        kind.get("rope_type") == "longrope" and max_tokens > kind.get("original_max_position_embeddings", 0)
        for kind in kinds
    )


def _drops(model: "PreTrainedModel") -> bool:
    """Whether the base has dropout of its own: then it gives different numbers from different seeds."""
    forward, pad_id = forward_of(model), model.config.get_text_config().pad_token_id or 0
    rows = [[example] for example in _examples(model.config.get_text_config().vocab_size)]
    batch = assemble(rows, pad_id).to(next(model.parameters()).device)
    model.train()
    with torch.random.fork_rng():
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(forward.learned(batch))
    model.eval()
    return not torch.equal(*found)


def _arrangement(model: "PreTrainedModel") -> Arrangement:
    """That of the model, without a tokenizer: tokens are random here, and so is the class."""
    eos_id = model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 0
    match task_of(model):
        case "classification":
            return Classes(eos_id, lambda _: 0)
        case "seq2seq":
            return Pairs(eos_id, decoder_start_id(model))
        case "causal":
            return Continuations()


def _examples(vocabulary: int, given: Sequence[int] = _GIVEN) -> list[Tokens]:
    """Of each so many tokens are given, and the others are learned."""
    generator = np.random.default_rng(0)
    return [
        Tokens(generator.integers(0, vocabulary, length), np.arange(length) >= begun)
        for length, begun in zip(_LENGTHS, given, strict=True)
    ]


def _plain_logits(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """Logits (N, V) of the learned positions of a batch of one example, by the model's own forward."""
    decoder = {} if batch.decoder_ids_BS is None else {"decoder_input_ids": batch.decoder_ids_BS}
    logits: Tensor = model(input_ids=batch.input_ids_BT, **decoder).logits
    return logits.flatten(0, -2).index_select(0, batch.predictor_N)
