"""The held-out examples as the worker sees them."""

import math
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.examples import SCHEMA
from raytune_ft.train.examples import Examples, Question


def row(source: int, number: int, split: str = "test", **changes: Any) -> dict[str, Any]:
    """An example whose tokens say where it stands: two of prompt, two learned."""
    return {
        "record": number,
        "split": split,
        "input_ids": [100 + source, number % 100, 7, 1],
        "learned": [False, False, True, True],
        "references": [f"answer {source}.{number}"],
        **changes,
    }


def examples(*windows: list[dict[str, Any]], split: str = "test") -> Examples:
    return Examples([pa.Table.from_pylist(rows, schema=SCHEMA) for rows in windows], split)


def places(found: Examples) -> list[tuple[int, int]]:
    return [(int(e.input_ids[0]) - 100, int(e.input_ids[1])) for e in (found[n] for n in range(len(found)))]


class TestOrder:
    def test_that_of_the_windows(self) -> None:
        found = examples([row(1, 3), row(0, 9)], [], [row(0, 2)])
        assert places(found) == [(1, 3), (0, 9), (0, 2)]

    def test_each_split_by_itself(self) -> None:
        rows = [row(0, n, split) for n, split in enumerate(["train", "test", "train", "validation"])]
        found = {split: places(examples(rows, split=split)) for split in ("train", "validation", "test")}
        assert found == {"train": [(0, 0), (0, 2)], "validation": [(0, 3)], "test": [(0, 1)]}

    def test_tokens_and_labels_arrive_as_they_were(self) -> None:
        found = examples(
            [
                row(0, 5, input_ids=[5] * 9, learned=[False] * 9),
                row(0, 6, input_ids=[3, 300_000, 1], learned=[False, True, False]),
            ]
        )
        assert found[1].input_ids.tolist() == [3, 300_000, 1]
        assert found[1].learned.tolist() == [False, True, False]
        assert (found[1].input_ids.dtype, found[1].learned.dtype) == ("int64", "bool")


class TestSample:
    @given(st.integers(0, 60), st.integers(1, 80))
    def test_even_and_within_the_limit(self, size: int, limit: int) -> None:
        chosen = examples([row(0, n) for n in range(size)]).spread(limit)
        assert len(chosen) == min(size, limit)
        assert chosen == sorted(set(chosen))
        steps = {later - earlier for earlier, later in pairwise(chosen)}
        assert steps <= {math.floor(size / limit), math.ceil(size / limit), 1}

    def test_every_source_has_its_share(self) -> None:
        found = examples([row(source, n) for source in range(2) for n in range(50)])
        sources = [int(example.input_ids[0]) - 100 for example in found.sample(10)]
        assert sources == [0] * 5 + [1] * 5


class TestQuestions:
    def test_the_prompt_ends_where_the_answer_begins(self) -> None:
        assert examples([row(0, 4)]).questions(10) == [Question([100, 4], ["answer 0.4"], [7, 1])]

    def test_of_several_turns_the_last_is_asked(self) -> None:
        ids = [10, 11, 50, 51, 12, 13, 52, 53]
        learned = [False, False, True, True, False, False, True, True]
        (question,) = examples([row(0, 0, input_ids=ids, learned=learned)]).questions(1)
        assert question.prompt_ids == [10, 11, 50, 51, 12, 13]
        assert question.answer_ids == [52, 53]

    def test_what_follows_the_answer_is_no_second_one(self) -> None:
        ids, learned = [10, 50, 51, 99], [False, True, True, False]
        (question,) = examples([row(0, 0, input_ids=ids, learned=learned)]).questions(1)
        assert (question.prompt_ids, question.answer_ids) == ([10], [50, 51])

    @pytest.mark.parametrize(
        "changes",
        [{"learned": [True] * 4}, {"references": []}, {"references": None}],
        ids=["raw text", "no reference", "none"],
    )
    def test_what_cannot_be_scored_is_left_out(self, changes: dict[str, Any]) -> None:
        found = examples([row(0, 0, **changes), row(0, 1)]).questions(10)
        assert [question.references for question in found] == [["answer 0.1"]]

    def test_several_references(self) -> None:
        (question,) = examples([row(0, 0, references=["a", "b"])]).questions(1)
        assert question.references == ["a", "b"]

    def test_the_limit(self) -> None:
        found = examples([row(0, n) for n in range(10)])
        assert [question.prompt_ids[1] for question in found.questions(3)] == [0, 3, 6]
        assert len(found.questions(100)) == 10
