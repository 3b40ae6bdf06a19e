"""The tokenised examples on the worker, as the Ray Data pass left them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ft.data.order import Mixture
from raytune_ft.train.batch import Tokens


@dataclass(frozen=True)
class Question:
    """A prompt whose answer can be scored."""

    prompt_ids: list[int]
    references: list[str]


class Examples:
    """One split, in the order of the data: by source, then by the record's number in it.

    Token ids stay in the Arrow table; an example costs memory only while it is used.
    """

    def __init__(self, table: pa.Table, split: str) -> None:
        rows = table.filter(pa.compute.equal(table["split"], split))
        self._table = rows.sort_by([("source", "ascending"), ("number", "ascending")]).combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> Tokens:
        ids: np.ndarray[Any, Any] = self._table["input_ids"][number].values.to_numpy(zero_copy_only=False)
        learned = self._table["learned"][number].values.to_numpy(zero_copy_only=False)
        return Tokens(ids.astype(np.int64), learned.astype(np.bool_))

    def mixture(self, weights: Sequence[float]) -> Mixture:
        """How many examples each source has, with its weight."""
        sizes = np.bincount(self._table["source"].to_numpy(), minlength=len(weights))
        return Mixture(tuple(int(size) for size in sizes), tuple(weights))

    def questions(self, limit: int) -> list[Question]:
        """The first `limit` examples with a prompt and a reference; prompts end before the last answer."""
        found: list[Question] = []
        for number in range(len(self)):
            if len(found) == limit:
                break
            example = self[number]
            references = self._table["references"][number].as_py()
            begins = np.flatnonzero(np.diff(example.learned.astype(np.int8)) == 1)
            if len(begins) and references:
                found.append(Question(example.input_ids[: begins[-1] + 1].tolist(), references))
        return found

    def first(self, limit: int) -> list[Tokens]:
        """The first `limit` examples."""
        return [self[number] for number in range(min(limit, len(self)))]
