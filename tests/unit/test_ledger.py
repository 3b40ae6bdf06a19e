"""What a run has learned of its data while it read it."""

import json

import pytest

from raytune_ft.data.counts import Counts, WindowReport
from raytune_ft.data.formats import BadRecord
from raytune_ft.data.ledger import Ledger
from raytune_ft.errors import DataError


def ledger(records: int = 1000) -> Ledger:
    return Ledger([Counts(), Counts()], records, max_bad_fraction=0.01)


def report(train: int = 5, bad: int = 0) -> WindowReport:
    found = tuple(BadRecord("s3://b/a.jsonl", f"line {n}", "completion is empty", "{}") for n in range(bad))
    return WindowReport(counts=Counts(records=train + bad, train=train, bad=bad), bad=found)


def test_each_window_counts_once() -> None:
    known = ledger()
    for window, source in ((0, 0), (3, 1), (0, 0)):
        known.add(window, source, report())
    assert [counts.train for counts in known.sources] == [5, 5]
    assert known.train_counts == {0: 5, 3: 5}


def test_a_window_that_is_another() -> None:
    known = ledger()
    known.add(4, 0, report(5))
    with pytest.raises(DataError, match="window 4 has 6 training examples and had 5 when it was first read"):
        known.add(4, 0, report(6))


def test_too_many_malformed_records_of_all() -> None:
    known = ledger(records=1000)
    known.add(0, 0, report(bad=6))
    known.add(1, 1, report(bad=4))
    with pytest.raises(DataError) as caught:
        known.add(2, 1, report(bad=1))
    assert str(caught.value) == (
        "data: 11 records are malformed, of about 1,000 in all, and data.max_bad_fraction is 0.01; "
        "the first: s3://b/a.jsonl:line 0: completion is empty"
    )


def test_a_checkpoint_keeps_it() -> None:
    known, resumed = ledger(), ledger()
    known.add(7, 1, report(bad=2))
    resumed.restore(json.loads(json.dumps(known.to_json())))
    assert resumed == known
