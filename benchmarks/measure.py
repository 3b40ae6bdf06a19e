"""Run a command; measure its wall time and the peak memory of all its processes together."""

import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE_INTERVAL_S = 1.0
"""Each look costs the more the more memory is held: some milliseconds for each gigabyte."""


@dataclass(frozen=True)
class Measurement:
    """One run of a command."""

    seconds: float
    peak_bytes: int
    """Sum of the proportional set sizes (PSS) of the command and its descendants, at its highest: shared
    pages are counted once."""
    largest_bytes: int
    """The highest PSS of a single process."""
    stdout: str

    def figures(self) -> dict[str, float]:
        """What was measured, as plain values."""
        return {
            "process_seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "largest_bytes": self.largest_bytes,
        }


def measure(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    interval_s: float = _SAMPLE_INTERVAL_S,
) -> Measurement:
    """Run to the end and measure.

    Args:
        command: what to run.
        cwd: where.
        environment: all of its variables.
        interval_s: from one look at the memory to the next.

    Raises:
        RuntimeError: the command failed; with the end of its output.
    """
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        sampler = _Sampler(process.pid, interval_s)
        sampler.start()
        stdout, _ = process.communicate()
        seconds = time.perf_counter() - began
        sampler.stop()
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    return Measurement(seconds, sampler.peak_bytes, sampler.largest_bytes, stdout)


class _Sampler(threading.Thread):
    """Sums the memory of a process tree, again and again."""

    def __init__(self, pid: int, interval_s: float) -> None:
        super().__init__(daemon=True)
        self._interval_s = interval_s
        self._root = psutil.Process(pid)
        self._done = threading.Event()
        self.peak_bytes = 0
        self.largest_bytes = 0

    def run(self) -> None:
        while not self._done.wait(self._interval_s):
            sizes = [_pss(process) for process in self._tree()]
            self.peak_bytes = max(self.peak_bytes, sum(sizes))
            self.largest_bytes = max([self.largest_bytes, *sizes])

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
