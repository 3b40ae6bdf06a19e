"""Several blocks in one pass: all tokens in one row, and each block's attention by itself.

Every layer but the attention treats each token by itself, so that blocks of different shapes need no common
width and no padding. In the attention each block gets its own shape back: what it computes is what it would
compute alone, and nothing of one block reaches another, not even what is not finite.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raytune_ft.errors import ModelError
from raytune_ft.train.attention import attention
from raytune_ft.train.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "sdpa"
"""What transformers calls the attention that is computed here."""


@dataclass(frozen=True)
class _Block:
    """Rows of one block within the row of all tokens."""

    start: int
    rows: int
    width: int
    plain: bool
    """Whether each row is one example, without padding."""


@dataclass(frozen=True)
class _Masks:
    """What takes the place of an attention mask in a pass of several blocks."""

    blocks: Sequence[_Block]
    masks: Sequence[Tensor | None]
    """Of each block (B, 1, T, T), what is added to the scores; None: a token sees what stands before it."""

    def of_type(self, dtype: torch.dtype) -> Iterator[Tensor | None]:
        """The masks for queries of that type, which need not be the model's."""
        return (None if mask is None else mask.to(dtype) for mask in self.masks)


def attend_here() -> None:
    """Let transformers ask here for the attention of all models in this process.

    It keeps its name, because architectures look at it and compute otherwise under another.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)


def side_by_side(model: "PreTrainedModel", batches: Sequence[Batch]) -> Tensor:
    """Last hidden states (1, N, D) of all tokens of some batches, of one after another.

    Raises:
        ModelError: the model does not compute its attention where it can be told apart.
    """
    if model.config._attn_implementation != _NAME:
        raise ModelError(
            f"{type(model).__name__} computes its attention by '{model.config._attn_implementation}', which "
            "jobs cannot share; train them one after another"
        )
    ids_1N = torch.cat([batch.input_ids_BT.flatten() for batch in batches])[None]
    positions_1N = torch.cat([batch.position_ids_BT.flatten() for batch in batches])[None]
    with _blocks_of(batches):
        output = model.base_model(input_ids=ids_1N, position_ids=positions_1N, use_cache=False)
    hidden_1ND: Tensor = output.last_hidden_state
    return hidden_1ND


@contextmanager
def _blocks_of(batches: Sequence[Batch]) -> Iterator[None]:
    """Within, the model makes the masks of each batch by itself."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    blocks = []
    start = 0
    for batch in batches:
        rows, width = batch.position_ids_BT.shape
        blocks.append(_Block(start, rows, width, batch.plain))
        start += rows * width
    # Here alone: no model is at work in another thread.
    AttentionMaskInterface.register(_NAME, partial(_masks, blocks))
    try:
        yield
    finally:
        AttentionMaskInterface.register(_NAME, sdpa_mask)


def _masks(blocks: Sequence[_Block], **given: Any) -> _Masks:
    """Masks of the blocks, each what the model would make for the block alone.

    Takes what transformers passes to a function that makes a mask. Its `mask_function` says of two places in
    the row of all tokens whether one sees the other; it finds examples by their positions.
    """
    if given.get("use_vmap") or given.get("attention_mask") is not None:
        raise ModelError("the model makes masks of its own, through which jobs cannot share passes")
    window, sees = given.get("local_size"), given["mask_function"]
    return _Masks(
        blocks,
        [
            None
            if block.plain and (window is None or block.width < window)
            else _block_mask(block, sees, given["device"], given["dtype"])
            for block in blocks
        ],
    )


def _block_mask(
    block: _Block, sees: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
) -> Tensor:
    place_BT = torch.arange(block.rows * block.width, device=device).view(block.rows, block.width)
    place_BT = place_BT + block.start
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    sees_B1TT: Tensor = sees(zero, zero, place_BT[:, None, :, None], place_BT[:, None, None, :])
    # torch would make the same of it in each layer, and keep it for the backward pass.
    mask_B1TT = torch.zeros(sees_B1TT.shape, dtype=dtype, device=device)
    mask_B1TT.masked_fill_(~sees_B1TT, -math.inf)
    return mask_B1TT.expand(block.rows, 1, block.width, block.width)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | _Masks | None",
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of each block in its own shape; arguments and result are those of transformers' functions."""
    if not isinstance(attention_mask, _Masks):
        return attention(module, query, key, value, attention_mask, **settings)
    blocks = attention_mask.blocks
    pieces = (_in_blocks(tensor, blocks) for tensor in (query, key, value))
    outputs = [
        attention(module, q, k, v, mask, none_blind=True, **settings)[0].flatten(0, 1)
        for q, k, v, mask in zip(*pieces, attention_mask.of_type(query.dtype), strict=True)
    ]
    return torch.cat(outputs)[None], None


def _in_blocks(tensor_1HND: Tensor, blocks: Sequence[_Block]) -> list[Tensor]:
    """What each block has of it (B, H, T, D)."""
    pieces = torch.split(tensor_1HND[0].transpose(0, 1), [block.rows * block.width for block in blocks])
    return [
        piece.view(block.rows, block.width, *piece.shape[1:]).transpose(1, 2)
        for piece, block in zip(pieces, blocks, strict=True)
    ]
