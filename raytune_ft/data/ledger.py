"""What a run has learned of its data while it read it: counts per window, and what was malformed."""

import threading
from dataclasses import asdict, dataclass, field
from typing import Any

from raytune_ft.data.counts import KEPT_BAD_RECORDS, Counts, WindowReport
from raytune_ft.data.formats import BadRecord
from raytune_ft.errors import DataError


@dataclass
class Ledger:
    """Facts about windows. They are added as windows are read, never changed: a checkpoint may keep more of
    them than its step needs."""

    sources: list[Counts]
    records: int
    """Records of all data, counted or estimated, which the limit of malformed ones refers to."""
    max_bad_fraction: float
    train_counts: dict[int, int] = field(default_factory=dict)
    """Training examples of each window that was read."""
    bad: list[BadRecord] = field(default_factory=list)
    """The first of the malformed records."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """A thread reads ahead while a checkpoint is written."""

    def add(self, window: int, source: int, report: WindowReport) -> None:
        """Note what a window holds, once.

        Raises:
            DataError: it is not what it was, or too many records are malformed.
        """
        with self._lock:
            known = self.train_counts.get(window)
            if known is None:
                self.train_counts[window] = report.counts.train
                self.sources[source].add(report.counts)
                self.bad += report.bad[: KEPT_BAD_RECORDS - len(self.bad)]
        if known not in (None, report.counts.train):
            raise DataError(
                f"window {window} has {report.counts.train} training examples and had {known} when it "
                "was first read: the data changed; put the old data back, or start over with --restart"
            )
        self.check()

    def check(self) -> None:
        """Refuse to go on with too many malformed records.

        Raises:
            DataError: there are more of them than all of the data may have.
        """
        bad = sum(counts.bad for counts in self.sources)
        if bad > self.max_bad_fraction * self.records:
            raise DataError(
                f"data: {bad} records are malformed, of about {self.records:,} in all, and "
                f"data.max_bad_fraction is {self.max_bad_fraction:g}; the first: "
                f"{self.bad[0].place}: {self.bad[0].reason}"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        with self._lock:
            return {
                "sources": [asdict(counts) for counts in self.sources],
                "train_counts": list(self.train_counts.items()),
                "bad": [asdict(record) for record in self.bad],
            }

    def restore(self, kept: dict[str, Any]) -> None:
        """Take over what `to_json` gave.

        Raises:
            DataError: too many records were malformed already.
        """
        self.sources = [Counts(**counts) for counts in kept["sources"]]
        self.train_counts = dict(kept["train_counts"])
        self.bad = [BadRecord(**record) for record in kept["bad"]]
        self.check()
