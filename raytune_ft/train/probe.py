"""A check of the loaded base before the first step: what packing and the head assume must hold."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from raytune_ft.errors import ModelError
from raytune_ft.train.bank import language_head
from raytune_ft.train.batch import Tokens, assemble

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = [7, 5, 9]
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of a logit, as a share of the largest logit: rounding of the type, with room."""


@torch.no_grad()
def check_isolation(model: "PreTrainedModel", *, packed: bool) -> None:
    """Compare the logits of three examples in one row with those that the model gives each of them alone.

    Architectures differ in how they take positions and what they do to logits; one that lets examples see
    each other, or whose head is more than its module, would otherwise train on something else in silence.

    Raises:
        ModelError: they differ by more than rounding.
    """
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = np.random.default_rng(0)
    examples = [
        Tokens(generator.integers(0, vocabulary, length), np.ones(length, dtype=np.bool_))
        for length in _LENGTHS
    ]
    alone = [
        model(input_ids=torch.from_numpy(e.input_ids)[None].to(device), use_cache=False).logits[0]
        for e in examples
    ]
    rows = [examples] if packed else [[example] for example in examples]
    batch = assemble(rows, pad_token_id=0).to(device)
    hidden = model.base_model(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    )
    project, _ = language_head(model)
    logits_BTV = project(hidden.last_hidden_state)
    together = (
        list(torch.split(logits_BTV[0], _LENGTHS))
        if packed
        else [logits_BTV[row, :length] for row, length in enumerate(_LENGTHS)]
    )
    largest = max(float(logits.abs().max()) for logits in alone)
    apart = max(float((a.float() - b.float()).abs().max()) for a, b in zip(alone, together, strict=True))
    limit = _TOLERANCE.get(alone[0].dtype, 6e-2) * largest
    if not apart <= limit:
        remedy = "set data.packing: false" if packed else "this architecture cannot be trained here"
        raise ModelError(
            f"{type(model).__name__} gives other logits in a shared row than alone (by {apart:.3g}; "
            f"rounding explains {limit:.3g}): {remedy}"
        )
