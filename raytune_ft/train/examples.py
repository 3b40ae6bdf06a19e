"""The tokenised examples on the worker, as the Ray Data pass left them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ft.data.order import Mixture
from raytune_ft.data.tokenise import answer_start
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

    def spread(self, limit: int) -> list[int]:
        """At most `limit` example numbers, evenly over the split, so that each source has its share."""
        size = len(self)
        return list(range(size)) if size <= limit else [at * size // limit for at in range(limit)]

    def sample(self, limit: int) -> list[Tokens]:
        """At most `limit` examples, evenly over the split."""
        return [self[number] for number in self.spread(limit)]

    def questions(self, limit: int) -> list[Question]:
        """Those of a sample that have a prompt and a reference; prompts end before the last answer."""
        found: list[Question] = []
        for number in self.spread(limit):
            example = self[number]
            references = self._table["references"][number].as_py()
            start = answer_start(example.learned.tolist())
            if start and references:
                found.append(Question(example.input_ids[:start].tolist(), references))
        return found
