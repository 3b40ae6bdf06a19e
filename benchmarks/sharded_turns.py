"""A step here against a step of the bare DeepSpeed script, taking turns.

Both runs are at work at the same time, on the same passes, and one of them is stopped, with all of its
processes, while the other takes a few steps. So what slows the machine down for a minute slows both down, and
the same step of both can be compared.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import psutil
from page import markdown
from sharded_job import WORKERS, bare, environment_of, last_position, loss_difference, ours, step_times

_LOOK_S = 0.1


@dataclass(frozen=True)
class Turns:
    """The steps of both sides that were not stopped in their middle, in the order of their passes."""

    stage: int
    ours_s: list[float]
    bare_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours to the bare script's, of each step."""
        return [one / other for one, other in zip(self.ours_s, self.bare_s, strict=True)]

    def figures(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"stage": self.stage, "ours_s": self.ours_s, "bare_s": self.bare_s}


class _Side:
    """A command with all of its processes, which can be stopped and go on."""

    def __init__(self, command: Sequence[str], folder: Path, taken: Callable[[Path], int]) -> None:
        """Start it.

        Args:
            command: what to run.
            folder: where.
            taken: how many steps have ended; it is given the file of the command's standard error.
        """
        self._output: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        self._errors: IO[str] = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self._taken = taken
        environment = environment_of(folder)
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self._output, stderr=self._errors
        )
        self._root = psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        if not self._ended():
            self.go_on()
            self._process.terminate()
        self._process.wait()
        self._output.close()
        self._errors.close()

    def take(self, steps: int) -> None:
        """Let it run until so many steps have ended, of all.

        Raises:
            SystemExit: the command failed.
        """
        while self._taken(Path(self._errors.name)) < steps:
            if self._ended():
                raise SystemExit(f"a side ended before step {steps}:\n{self._written()[-3000:]}")
            time.sleep(_LOOK_S)

    def stop(self) -> None:
        """Stop all of its processes, also those that are started meanwhile."""
        stopped: set[int] = set()
        while found := [each for each in self._tree() if each.pid not in stopped]:
            for process in found:
                stopped.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.suspend()

    def go_on(self) -> None:
        """Let all of them go on."""
        for process in reversed(self._tree()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def end(self) -> str:
        """Wait for its end; its standard output.

        Raises:
            SystemExit: the command failed.
        """
        self.go_on()
        if self._process.wait():
            raise SystemExit(f"a side failed:\n{self._written()[-3000:]}")
        self._output.seek(0)
        return self._output.read()

    def _ended(self) -> bool:
        return self._process.poll() is not None

    def _written(self) -> str:
        return Path(self._errors.name).read_text()

    def _tree(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]


def turns_of(folder: Path, stage: int, steps: int, turn_steps: int) -> Turns:
    """Run both sides.

    Args:
        folder: with the job, and the passes of all of its steps.
        stage: of both.
        steps: of the job.
        turn_steps: in a row of one side. The first of each turn does not count, since it began before the
            side was stopped; nor does the first turn, where memory is still being claimed.

    Raises:
        SystemExit: a side failed, or they computed other losses.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    seen: dict[int, float] = {}
    size = -1

    def taken_here(_: Path) -> int:
        # Read where there is something new: a look costs time, which the other side would not lose.
        nonlocal seen, size
        now = sum(path.stat().st_size for path in (folder / "out" / "tensorboard").glob("*"))
        if now != size:
            seen, size = step_times(folder), now
        return max(seen, default=0)

    with ExitStack() as stack:
        sides: list[_Side] = []
        for command, taken in ((ours(folder, stage), taken_here), (bare(folder, stage), _taken_bare)):
            side = stack.enter_context(_Side(command, folder, taken))
            side.take(turn_steps)
            side.stop()
            sides.append(side)
        for end in range(2 * turn_steps, steps, turn_steps):
            for side in sides:
                side.go_on()
                side.take(end)
                side.stop()
        sides[0].end()
        printed = json.loads(sides[1].end().splitlines()[-1])
    history = json.loads(last_position(folder).read_text())["history"]
    loss_difference([[entry["loss"] for entry in history], printed["losses"]])
    count = [step for step in range(turn_steps, steps) if step % turn_steps]
    ours_s, bare_s = [entry["seconds"] for entry in history], printed["step_seconds"]
    found = Turns(stage, [ours_s[step] for step in count], [bare_s[step] for step in count])
    print(f"ZeRO-{stage} in turns: {statistics.median(found.ratios):.3f}", file=sys.stderr)
    return found


def _taken_bare(errors: Path) -> int:
    return errors.read_text().count("step ended") // WORKERS


def table(found: Sequence[Turns]) -> str:
    """Markdown, a row for each stage."""
    head = (
        "in turns",
        "raytune_ft: median step, s",
        "bare DeepSpeed: median step, s",
        "× bare DeepSpeed's step",
    )
    rows = []
    for turns in found:
        low, middle, high = statistics.quantiles(turns.ratios, n=4)
        of_both = (f"{statistics.median(side):.3f}" for side in (turns.ours_s, turns.bare_s))
        ratio = f"**{middle:.3f}**, half of {len(turns.ratios)} steps from {low:.2f} to {high:.2f}"
        rows.append((f"ZeRO-{turns.stage}", *of_both, ratio))
    return markdown(head, rows)
