"""From tokenised examples to the tensors of a forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from raytune_ft.data.pack import balanced_capacity, pack_first_fit
from raytune_ft.data.tokenise import answer_start
from raytune_ft.errors import DataError
from raytune_ft.models import question_ids, unknown_token

LEAST_ROWS = 16
"""Of a product of matrices. For fewer, BLAS has other kernels, which round otherwise: with AVX-512 those of
up to 15 rows where the inner dimension is 512 or more. From here on a row is what it is beside any others, on
the CPUs that were tried."""

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Token ids of one example, or of a part of it."""


@dataclass(frozen=True)
class Tokens:
    """One tokenised example: its token ids, and for each whether it is learned."""

    input_ids: Ids
    learned: np.ndarray[tuple[int], np.dtype[np.bool_]]
    source: int = 0
    """Place in `data.sources` of where it comes from."""
    number: int = 0
    """Place in its step, over all workers: dropout is drawn from it."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass. B rows, T tokens per row, N learned positions (or rows, of a classifier).

    Positions restart at 0 with each example and count nowhere else, which is how the model keeps examples of
    a row apart. A padding token is an example of its own.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    predictor_N: Tensor
    """Flat index b·T + t of the hidden state that predicts each learned token; of the decoder's, where there
    is one; of a classifier, which has one state in a row, the row b."""
    labels_N: Tensor
    """The learned tokens, or classes."""
    group_N: Tensor
    """Whose loss each learned token counts in: the source of its example."""
    example_BX: Tensor
    """Number of each token's example within the step: (B, T), or (B, 1) where a row is one example."""
    tokens: int
    """Tokens without padding."""
    decoder_ids_BS: Tensor | None = None
    """What a decoder reads beside the rows, S tokens each."""
    plain: bool = False
    """Whether each row is known to be one example, without padding."""

    @property
    def learned_tokens(self) -> int:
        """Number of tokens that the loss sums over."""
        return self.labels_N.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """(B, T): 1 for the tokens of a row that holds one example, 0 for its padding."""
        mask_BT = (self.position_ids_BT > 0).long()
        mask_BT[:, 0] = 1
        return mask_BT

    def unknown_token(self, vocabulary: int) -> DataError | None:
        """Why a base with embeddings for so many tokens cannot compute the batch, which is on the CPU."""
        least, most = torch.cat([self.input_ids_BT.flatten(), self.labels_N]).aminmax()
        return unknown_token(int(least), int(most), vocabulary)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        there: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **there)


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


class Arrangement(Protocol):
    """What a row of a model is made of."""

    @property
    def packs(self) -> bool:
        """Whether several examples may share a row."""
        ...

    def length(self, example: Tokens) -> int:
        """Tokens that an example takes in a row."""
        ...

    def batch(self, rows: Sequence[Sequence[Tokens]], pad_token_id: int) -> Batch:
        """Tensors for rows of examples; each row holds at least one."""
        ...


@dataclass(frozen=True)
class Continuations:
    """Rows of a causal language model: whole examples, which may share a row."""

    packs = True

    def length(self, example: Tokens) -> int:
        """See `Arrangement.length`."""
        return len(example.input_ids)

    def batch(self, rows: Sequence[Sequence[Tokens]], pad_token_id: int) -> Batch:
        """See `Arrangement.batch`."""
        return assemble(rows, pad_token_id)


@dataclass(frozen=True)
class Pairs:
    """Rows of an encoder and its decoder (Raffel et al. 2020): the encoder reads what stands before the last
    answer of an example, the decoder learns that answer. Earlier answers of a chat are read, not learned."""

    eos_id: int
    """Ends what the encoder reads."""
    start_id: int
    """Stands before the answer, for the decoder to begin with."""
    packs = False

    def length(self, example: Tokens) -> int:
        """See `Arrangement.length`; of both rows together."""
        question, answer = _last_answer(example)
        return len(question_ids(question, self.eos_id)) + len(answer)

    def batch(self, rows: Sequence[Sequence[Tokens]], pad_token_id: int) -> Batch:
        """See `Arrangement.batch`."""
        examples = [example for row in rows for example in row]
        pairs = [_last_answer(example) for example in examples]
        batch = _padded([question_ids(question, self.eos_id) for question, _ in pairs], pad_token_id)
        answers = [answer for _, answer in pairs]
        lengths = [len(answer) for answer in answers]
        decoder_ids = np.full((len(answers), max(lengths)), pad_token_id, dtype=np.int64)
        for row, answer in enumerate(answers):
            decoder_ids[row, : len(answer)] = [self.start_id, *answer[:-1]]
        predictors = [np.arange(length) + row * max(lengths) for row, length in enumerate(lengths)]
        return replace(
            batch,
            predictor_N=torch.from_numpy(np.concatenate(predictors)),
            labels_N=torch.from_numpy(np.concatenate(answers)),
            group_N=torch.from_numpy(np.repeat([example.source for example in examples], lengths)),
            example_BX=_numbers(examples),
            tokens=batch.tokens + sum(lengths),
            decoder_ids_BS=torch.from_numpy(decoder_ids),
        )


@dataclass(frozen=True)
class Classes:
    """Rows of a classifier: what stands before the last answer of an example, which names the row's class."""

    eos_id: int
    """Ends a row."""
    class_of: Callable[[Ids], int]
    """Number of the class that an answer names."""
    packs = False

    def length(self, example: Tokens) -> int:
        """See `Arrangement.length`."""
        return len(question_ids(_last_answer(example)[0], self.eos_id))

    def batch(self, rows: Sequence[Sequence[Tokens]], pad_token_id: int) -> Batch:
        """See `Arrangement.batch`.

        Raises:
            DataError: an answer names no class.
        """
        examples = [example for row in rows for example in row]
        pairs = [_last_answer(example) for example in examples]
        batch = _padded([question_ids(question, self.eos_id) for question, _ in pairs], pad_token_id)
        return replace(
            batch,
            predictor_N=torch.arange(len(examples)),
            labels_N=torch.tensor([self.class_of(answer) for _, answer in pairs]),
            group_N=torch.tensor([example.source for example in examples]),
            example_BX=_numbers(examples),
        )


def _last_answer(example: Tokens) -> tuple[Ids, Ids]:
    """What stands before the last run of learned tokens, and that run."""
    start = answer_start(example.learned.tolist())
    end = int(np.flatnonzero(example.learned)[-1]) + 1
    return example.input_ids[:start], example.input_ids[start:end]


def _padded(rows: Sequence[Ids], pad_token_id: int) -> Batch:
    """Rows side by side, of which nothing is learned yet."""
    width = max(map(len, rows))
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    for at, row in enumerate(rows):
        input_ids[at, : len(row)] = row
        position_ids[at, : len(row)] = np.arange(len(row))
    none_N = torch.zeros(0, dtype=torch.long)
    ids_BT, positions_BT = torch.from_numpy(input_ids), torch.from_numpy(position_ids)
    return Batch(ids_BT, positions_BT, none_N, none_N, none_N, positions_BT[:, :1], sum(map(len, rows)))


@dataclass(frozen=True)
class Layout:
    """How the examples of a step share rows and forward passes. It changes a result by rounding only."""

    packing: bool
    """Let examples share a row of at most `max_tokens`, where the arrangement can."""
    max_tokens: int
    pad_token_id: int
    sequences_per_forward: int | None
    """Examples per pass; None: as many rows as stay within `tokens_per_forward` padded tokens."""
    tokens_per_forward: int
    arrangement: Arrangement = Continuations()

    def batches(self, examples: Sequence[Tokens]) -> list[Batch]:
        """The forward passes of one optimizer step; none without examples."""
        size = self.sequences_per_forward or max(1, len(examples))
        limit = None if self.sequences_per_forward else self.tokens_per_forward
        batches = []
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            lengths = [self.arrangement.length(example) for example in part]
            rows = (
                pack_first_fit(lengths, balanced_capacity(lengths, self.max_tokens))
                if self.packing and self.arrangement.packs
                else [[index] for index in range(len(part))]
            )
            for group in _passes(rows, lengths, limit):
                chosen = [[part[index] for index in row] for row in group]
                batches.append(self.arrangement.batch(chosen, self.pad_token_id))
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
    """Tensors for rows of examples; each row holds at least one, and each example a token."""
    examples = [example for row in rows for example in row]
    lengths = np.array([len(example.input_ids) for example in examples])
    firsts = np.cumsum(lengths) - lengths
    row_starts = firsts[np.cumsum([0, *(len(row) for row in rows[:-1])])]
    tokens = int(lengths.sum())
    row_lengths = np.diff(row_starts, append=tokens)
    width = max(int(row_lengths.max()), -(-LEAST_ROWS // len(rows)))
    # Where each token of the examples, one after the other, stands in the rows, one after the other.
    places = np.arange(tokens) + np.repeat(np.arange(len(rows)) * width - row_starts, row_lengths)
    flat_ids = np.concatenate([example.input_ids for example in examples])
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    position_ids, numbers = np.zeros_like(input_ids), np.full_like(input_ids, -1)
    input_ids.reshape(-1)[places] = flat_ids
    position_ids.reshape(-1)[places] = np.arange(tokens) - np.repeat(firsts, lengths)
    numbers.reshape(-1)[places] = np.repeat([example.number for example in examples], lengths)
    learned = np.concatenate([example.learned for example in examples])
    # The first token of an example has nothing before it that could predict it.
    learned[firsts] = False
    labels = np.flatnonzero(learned)
    groups = np.repeat([example.source for example in examples], lengths)
    arrays = (input_ids, position_ids, places[labels] - 1, flat_ids[labels], groups[labels], numbers)
    ids_BT, positions_BT, predictor_N, labels_N, group_N, numbers_BT = map(torch.from_numpy, arrays)
    plain = bool((row_lengths == width).all()) and len(examples) == len(rows)
    return Batch(ids_BT, positions_BT, predictor_N, labels_N, group_N, numbers_BT, tokens, plain=plain)


def _numbers(examples: Sequence[Tokens]) -> Tensor:
    """(B, 1), of rows that are one example each."""
    return torch.tensor([[example.number] for example in examples])
