"""When the workers keep a checkpoint of a node that goes, beside those that are due."""

from typing import Any, cast

import pytest

from raytune_ft.planner import Choice, MemoryPlan
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.engine import Engine
from raytune_ft.train.loop import StepReport
from raytune_ft.train.peers import Peers
from raytune_ft.train.preemption import Notices
from raytune_ft.train.progress import EventWriter
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.uploads import Upload, Uploads

START = Position(0, "data", "base", Choice("packed", 64, MemoryPlan(1, 2, 3, 4, 5)), threads=1, workers=2)


class Sent:
    """Takes the place of the way to the store."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, bool]] = []

    def send(self, _write: Any, metrics: dict[str, Any], *, wait: bool, needed: bool) -> None:
        assert not needed
        self.steps.append((metrics["step"], wait))

    def finished(self) -> list[Upload]:
        return []


class Announced(Notices):
    """A notice comes after the second step."""

    def new(self, step: int) -> bool:
        return step == 2


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [(1, False), (2, True), (3, False), (4, True)]),
        (2, [(2, True), (4, True)]),
        (3, [(2, True), (3, False), (4, True)]),
    ],
)
def test_a_notice_is_heard_also_where_a_checkpoint_is_due(
    every: int, expected: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.train.recorder.Notices", Announced)
    sent, peers = Sent(), Peers(rank=1, count=2)
    recorder = Recorder(
        cast(Engine, None),
        START,
        4,
        every,
        cast(EventWriter, None),
        dict,
        peers,
        dict,
        cast(Uploads, sent),
    )
    for step in range(1, 5):
        recorder(StepReport(step, 1.0, 1e-3, 1.0, 2, 9, 5, "b", (1.0,), (5,), 0.1, 0.0))
    assert sent.steps == expected
