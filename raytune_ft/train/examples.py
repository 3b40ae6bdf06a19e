"""The held-out examples: those of the surveyed windows that are not for training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ft.data.survey import spread
from raytune_ft.data.tokenise import answer_start
from raytune_ft.train.batch import Tokens


@dataclass(frozen=True)
class Question:
    """A prompt whose answer can be scored."""

    prompt_ids: list[int]
    references: list[str]
    """Texts that are equally right; the first is the one that is taught."""
    answer_ids: list[int]
    """The learned answer, with the end that generation stops at."""


class Examples:
    """One split of the surveyed windows, in the order of the data.

    Token ids stay in the Arrow table; an example costs memory only while it is used.
    """

    def __init__(self, tables: Sequence[pa.Table], split: str) -> None:
        rows = [table.filter(pa.compute.equal(table["split"], split)) for table in tables]
        self._table = pa.concat_tables(rows).combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> Tokens:
        ids: np.ndarray[Any, Any] = self._table["input_ids"][number].values.to_numpy(zero_copy_only=False)
        learned = self._table["learned"][number].values.to_numpy(zero_copy_only=False)
        return Tokens(ids.astype(np.int64), learned.astype(np.bool_))

    def spread(self, limit: int) -> list[int]:
        """At most `limit` example numbers, evenly over the split, so that each source has its share."""
        return spread(len(self), limit)

    def sample(self, limit: int) -> list[Tokens]:
        """At most `limit` examples, evenly over the split."""
        return [self[number] for number in self.spread(limit)]

    def questions(self, limit: int) -> list[Question]:
        """Those of a sample that have a prompt and a reference; prompts end before the last answer.

        References are those of the records, which may be less than a template teaches.
        """
        found: list[Question] = []
        for number in self.spread(limit):
            example = self[number]
            references = self._table["references"][number].as_py()
            start = answer_start(example.learned.tolist())
            if start and references:
                end = int(np.flatnonzero(example.learned)[-1]) + 1
                prompt, taught = example.input_ids[:start], example.input_ids[start:end]
                found.append(Question(prompt.tolist(), references, taught.tolist()))
        return found
