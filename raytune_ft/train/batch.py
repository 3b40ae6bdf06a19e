"""From tokenised examples to the tensors of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytune_ft.data.pack import balanced_capacity, pack_first_fit


@dataclass(frozen=True)
class Tokens:
    """One tokenised example: its token ids, and for each whether it is learned."""

    input_ids: np.ndarray[tuple[int], np.dtype[np.int64]]
    learned: np.ndarray[tuple[int], np.dtype[np.bool_]]
    source: int = 0
    """Place in `data.sources` of where it comes from."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass. B rows, T tokens per row, N learned positions.

    Positions restart at 0 with each example and count nowhere else, which is how the model keeps examples of
    a row apart. A padding token is an example of its own.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    predictor_N: Tensor
    """Flat index b·T + t of the hidden state that predicts each learned token."""
    labels_N: Tensor
    group_N: Tensor
    """Whose loss each learned token counts in: the source of its example."""
    tokens: int
    """Tokens without padding."""

    @property
    def learned_tokens(self) -> int:
        """Number of tokens that the loss sums over."""
        return self.labels_N.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        tensors = (self.input_ids_BT, self.position_ids_BT, self.predictor_N, self.labels_N, self.group_N)
        ids, positions, predictor, labels, group = (t.to(device, non_blocking=True) for t in tensors)
        return Batch(ids, positions, predictor, labels, group, self.tokens)


@dataclass(frozen=True)
class Step:
    """What one worker computes of an optimizer step, and what all workers know of the whole of it."""

    batches: Sequence[Batch]
    """This worker's passes; none where it has no example of the step."""
    examples: int
    """Of the whole step, over all workers."""
    digest: str
    """Names the examples of the whole step and their order."""
    sources: int
    """Length of `data.sources`: `Batch.group_N` stays below it."""


@dataclass(frozen=True)
class Layout:
    """How the examples of a step share rows and forward passes. It changes a result by rounding only,
    but for dropout: its masks are drawn for a pass as it is laid out."""

    packing: bool
    """Let examples share a row of at most `max_tokens`."""
    max_tokens: int
    pad_token_id: int
    sequences_per_forward: int | None
    """Examples per pass; None: as many rows as stay within `tokens_per_forward` padded tokens."""
    tokens_per_forward: int

    def batches(self, examples: Sequence[Tokens]) -> list[Batch]:
        """The forward passes of one optimizer step; none without examples."""
        size = self.sequences_per_forward or max(1, len(examples))
        limit = None if self.sequences_per_forward else self.tokens_per_forward
        batches = []
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            lengths = [len(example.input_ids) for example in part]
            rows = (
                pack_first_fit(lengths, balanced_capacity(lengths, self.max_tokens))
                if self.packing
                else [[index] for index in range(len(part))]
            )
            for group in _passes(rows, lengths, limit):
                batches.append(assemble([[part[index] for index in row] for row in group], self.pad_token_id))
        return batches


def _passes(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], tokens_per_forward: int | None
) -> list[list[Sequence[int]]]:
    """Divide rows, longest first, into passes of at most `tokens_per_forward` padded tokens each."""
    groups: list[list[Sequence[int]]] = [[]]
    width = 0
    for row in sorted(rows, key=lambda r: -sum(lengths[i] for i in r)):
        used = sum(lengths[i] for i in row)
        if groups[-1] and tokens_per_forward and (len(groups[-1]) + 1) * width > tokens_per_forward:
            groups.append([])
        if not groups[-1]:
            width = used
        groups[-1].append(row)
    return groups


def assemble(rows: Sequence[Sequence[Tokens]], pad_token_id: int) -> Batch:
    """Tensors for rows of examples; each row holds at least one."""
    width = max(sum(len(example.input_ids) for example in row) for row in rows)
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    predictors, labels, groups = [], [], []
    tokens = 0
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            length = len(example.input_ids)
            input_ids[r, start : start + length] = example.input_ids
            position_ids[r, start : start + length] = np.arange(length)
            # The first token of an example has nothing before it that could predict it.
            learned = np.flatnonzero(example.learned[1:])
            predictors.append(learned + (r * width + start))
            labels.append(example.input_ids[learned + 1])
            groups.append(np.full(len(learned), example.source))
            start += length
        tokens += start
    arrays = (input_ids, position_ids, *(np.concatenate(parts) for parts in (predictors, labels, groups)))
    ids_BT, positions_BT, predictor_N, labels_N, group_N = (torch.from_numpy(array) for array in arrays)
    return Batch(ids_BT, positions_BT, predictor_N, labels_N, group_N, tokens)
