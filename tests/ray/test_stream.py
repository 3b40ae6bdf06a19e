"""Windows through Ray Data: in order, in bounded memory, from wherever they are asked for."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import raytune_ft.data.stream as stream_module
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import decode
from raytune_ft.data.index import divide
from raytune_ft.data.reader import WindowReader, task_cpus
from raytune_ft.data.sources import list_objects
from raytune_ft.data.stream import stream_windows
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError, TrainingError
from raytune_ft.spec import DataSpec

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ENCODER = Encoder.of(tiny.tokenizer())


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[WindowReader, list[Window]]:
    """Forty windows of one file, four of which a task reads at most."""
    monkeypatch.setattr("raytune_ft.data.index.WINDOW_BYTES", 1500)
    monkeypatch.setattr(stream_module, "_TASK_WINDOWS", 4)
    lines = [json.dumps({"prompt": f"say {n:04}", "completion": str(n)}) for n in range(1500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    data = DataSpec.model_validate({"sources": [{"uri": str(tmp_path / "a.jsonl")}]})
    objects = tuple(list_objects(data))
    found = list(divide(objects[0], 0, "auto", None))
    assert len(found) > 30
    return WindowReader(objects, data, ENCODER, None), found


def taken(stream: Iterator[tuple[int, Any]]) -> list[tuple[int, bytes]]:
    return [(place, bytes(content)) for place, content in stream]


def test_order_is_what_was_asked_for(windows: tuple[WindowReader, list[Window]]) -> None:
    reader, found = windows
    order = [*found[::-1], found[3], found[3], *found[:5]]
    expected = [(place, reader.read(window)) for place, window in enumerate(order)]
    assert taken(stream_windows(order, reader)) == expected


def test_segments_continue_each_other(
    windows: tuple[WindowReader, list[Window]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, found = windows
    monkeypatch.setattr(stream_module, "SEGMENT_WINDOWS", 7)
    expected = [(place, reader.read(window)) for place, window in enumerate(found[:16])]
    assert taken(stream_windows(found[:16], reader)) == expected


def test_nothing_is_asked_for(windows: tuple[WindowReader, list[Window]]) -> None:
    assert taken(stream_windows([], windows[0])) == []


def test_a_failure_arrives_as_itself_after_what_came_before(
    windows: tuple[WindowReader, list[Window]], tmp_path: Path
) -> None:
    _, found = windows
    broken = tmp_path / "broken.json"
    broken.write_bytes(b'[{"prompt": "a", ')
    data = DataSpec.model_validate({"sources": [{"uri": str(tmp_path / "a.jsonl")}, {"uri": str(broken)}]})
    objects = tuple(list_objects(data))
    (unreadable,) = divide(objects[1], 1, "json", None)
    order = [*found[:2], unreadable, *found[2:]]
    stream = stream_windows(order, WindowReader(objects, data, ENCODER, None))
    assert [next(stream)[0], next(stream)[0]] == [0, 1]
    with pytest.raises(DataError) as raised:
        next(stream)
    assert str(raised.value).startswith(f"{broken}: not JSON at line 1, column 18: ")
    assert type(raised.value) is DataError


def test_any_other_failure_is_one_clear_line(windows: tuple[WindowReader, list[Window]]) -> None:
    reader, found = windows
    # It fails as only a program does.
    broken = replace(reader, encoder=replace(ENCODER, backend=len, digest=None))
    with pytest.raises(TrainingError) as raised:
        taken(stream_windows(found, broken))
    assert str(raised.value) == "the data could not be read: TypeError: len() takes no keyword arguments"


def executors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]


def test_closing_early_ends_the_execution(windows: tuple[WindowReader, list[Window]]) -> None:
    reader, found = windows
    stream = stream_windows(found * 20, reader)
    assert next(stream)[0] == 0
    assert executors()
    stream.close()
    deadline = time.monotonic() + 20
    while executors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not executors()


def test_inside_a_placement_group_tasks_run_outside(windows: tuple[WindowReader, list[Window]]) -> None:
    """Its only CPU is the actor's own: a task that had to run inside would wait forever."""
    reader, found = windows

    class Trainer:  # here, since workers cannot import this module
        def take(self, windows: list[Window], reader: WindowReader) -> list[tuple[int, bytes]]:
            assert ray.util.get_current_placement_group() is not None
            return [(place, bytes(content)) for place, content in stream_windows(windows, reader)]

    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    trainer = ray.remote(num_cpus=1, scheduling_strategy=strategy)(Trainer).remote()
    try:
        arrived = ray.get(trainer.take.remote(found, reader), timeout=120)
    finally:
        ray.kill(trainer)
        remove_placement_group(group)
    assert arrived == [(place, reader.read(window)) for place, window in enumerate(found)]


def test_reading_ahead_is_bounded(
    windows: tuple[WindowReader, list[Window]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a consumer that waits, most windows stay unread: what was read is in the cache."""
    reader, found = windows
    monkeypatch.setattr(stream_module, "STREAM_BYTES", 60_000)
    cached = WindowReader(reader.objects, reader.data, reader.encoder, str(tmp_path / "cache"))
    stream = stream_windows(found, cached)
    next(stream)
    count, before = -1, -2
    while count != before:
        time.sleep(1.0)
        count, before = len(list((tmp_path / "cache").rglob("*.arrow"))), count
    stream.close()
    assert 0 < count < len(found)


def test_rows_of_all_windows_are_those_of_the_file(windows: tuple[WindowReader, list[Window]]) -> None:
    reader, found = windows
    streamed = [decode(content).table for _, content in stream_windows(found, reader)]
    assert [text for table in streamed for texts in table["references"].to_pylist() for text in texts] == [
        str(n) for n in range(1500)
    ]


def test_cpus_of_a_task() -> None:
    assert [task_cpus(cpus) for cpus in (1.0, 1.9, 2.0, 64.0)] == [0.25, 0.25, 0.5, 0.5]
