"""Limits of malformed and too long data for each source, and the notices on what is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from raytune_ft.data.checks import check_counts
from raytune_ft.data.counts import DataCounts, Survey, WindowReport
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import tokenise_window
from raytune_ft.data.index import divide
from raytune_ft.data.sources import list_objects
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec

TINY = Encoder.of(tiny.tokenizer())
SPLIT = {"validation": 0, "test": 0}
BAD = {"prompt": "p", "completion": None}


def good(count: int, answer: str = "fox") -> list[dict[str, str]]:
    return [{"prompt": f"the quick brown {number}", "completion": answer} for number in range(count)]


def checked(
    tmp_path: Path, *sources: list[dict[str, Any]], encoder: Encoder = TINY, **data: Any
) -> DataCounts:
    uris = []
    for number, records in enumerate(sources):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        uris.append({"uri": str(path)})
    spec = DataSpec.model_validate({"sources": uris, "split": SPLIT, **data})
    windows: list[Window] = []
    reports: dict[int, WindowReport] = {}
    for number, found in enumerate(list_objects(spec)):
        for window in divide(found, number, "auto", None):
            reports[len(windows)] = tokenise_window(found, window, spec, encoder).report
            windows.append(window)
    return check_counts(Survey(windows, reports), spec, None)


def test_a_small_source_that_is_lost_is_not_hidden_by_a_large_one(tmp_path: Path) -> None:
    """9 of 1,009 records are malformed, which is less than the limit of all data."""
    with pytest.raises(DataError) as raised:
        checked(tmp_path, good(1000), [BAD] * 9)
    message = str(raised.value)
    assert message.startswith(
        f"data.sources[1].uri = {tmp_path}/1.jsonl: 9 of 9 records are malformed (100.00%)"
    )
    assert "completion is empty" in message
    counts = checked(tmp_path, good(1000), [BAD] * 9, max_bad_fraction=1.0)
    assert counts.notices == (
        f"data.sources[1] ({tmp_path}/1.jsonl) gives no training example: of 9 records 9 are malformed, "
        "and 0 examples are longer than data.max_tokens",
    )


@pytest.mark.parametrize(("too_long", "told"), [(40, False), (60, True)])
def test_many_examples_that_are_too_long_are_told_of(tmp_path: Path, too_long: int, told: bool) -> None:
    records = [*good(100 - too_long), *good(too_long, "fox " * 60)]
    counts = checked(tmp_path, records, max_tokens=32)
    assert counts.total.dropped == too_long
    assert bool(counts.notices) is told
    if told:
        (notice,) = counts.notices
        assert (
            "60 of 100 examples are longer than data.max_tokens = 32, and dropped; the longest has " in notice
        )
        assert notice.endswith("raise data.max_tokens, or set data.too_long: cut")


def test_a_source_of_which_nearly_all_is_too_long_stops_the_job(tmp_path: Path) -> None:
    records = [*good(5), *good(95, "fox " * 60)]
    with pytest.raises(
        DataError, match=r"^data\.sources\[1\]\.uri = .*95 of 100 examples are longer than"
    ) as raised:
        checked(tmp_path, good(100), records, max_tokens=32)
    assert str(raised.value).endswith("or raise data.max_too_long_fraction = 0.9")
    moved = checked(tmp_path, good(100), records, max_tokens=32, max_too_long_fraction=0.95)
    assert moved.sources[1].train == 5


def test_a_split_without_an_example_is_told_of(tmp_path: Path) -> None:
    counts = checked(tmp_path, good(3), split={"validation": 0.001, "test": 0.001})
    assert [notice.partition(" leaves none")[0] for notice in counts.notices] == [
        "data.split.validation = 0.001 of 3 examples",
        "data.split.test = 0.001 of 3 examples",
    ]


def test_what_the_model_does_not_see_is_told_of(tmp_path: Path) -> None:
    records = [{**record, "rationale": "r", "id": 7} for record in good(3)]
    (notice,) = checked(tmp_path, records).notices
    assert notice.endswith("the model does not see id (3 records), rationale (3 records)")


def test_answers_without_an_end_are_told_of(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    counts = checked(tmp_path, good(4), encoder=Encoder.of(tokenizer))
    assert (counts.total.learned_answers, counts.total.ends) == (4, 0)
    assert "4 of 4 learned answers have no end: the tokenizer has no EOS token" in counts.notices[0]


def test_fine_data_is_told_nothing_of(tmp_path: Path) -> None:
    assert checked(tmp_path, good(50)).notices == ()
    assert checked(tmp_path, good(50)).to_json()["notices"] == []
