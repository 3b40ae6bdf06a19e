"""What every benchmark writes: a table into the page of figures, and the raw results as JSON."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def machine(packages: Sequence[str], what: str) -> str:
    """What it ran on, when, and with which versions."""
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / 2**30
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {cores} cores ({platform.machine()}, {_processor()}), "
        f"{memory:.0f} GiB, no GPU; {what}; "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + "."
    )


def write(name: str, text: str, page: Path | None, results: Path | None, raw: Any) -> None:
    """Print the text, put it between the page's marks of that name, and keep the raw results.

    Args:
        name: of the benchmark: the page has `<!-- name: begin -->` and `<!-- name: end -->`.
        text: what stands between them from now on.
        page: None writes none.
        results: folder for `name.json`; None keeps nothing.
        raw: all figures of all runs.
    """
    print(text)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.json").write_text(json.dumps({"table": text, "runs": raw}, indent=2) + "\n")
    if page is not None:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = page.read_text().split(begin)
        page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
