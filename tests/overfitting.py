"""A job that learns its training data by heart: its validation loss has a minimum before its end."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.train.uploads import Upload


def write_keys(path: Path, examples: int = 24) -> Path:
    """Pairs of random numbers, of which nothing can be learned but the pairs."""
    draw = random.Random(0)
    lines = [
        json.dumps({"prompt": f"key {n} {draw.randrange(10**6)}:", "completion": f" {draw.randrange(10**6)}"})
        for n in range(examples)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def overfitting_job(base: Path, data: Path, catalog: Path | str, /, **sections: Any) -> JobSpec:
    """A job of 16 steps with a checkpoint after every third and after the last; sections are merged."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(base), "weight_bits": 32},
        "data": {
            "sources": [{"uri": str(data)}],
            "max_tokens": 64,
            "split": {"validation": 0.4, "test": 0.2},
        },
        "method": {"kind": "full"},
        "optimizer": {"learning_rate": 0.02},
        "schedule": {"steps": 16, "decay": "constant"},
        "batch": {"sequences": 8},
        "checkpoint": {"every_steps": 3, "keep": 1, "keep_best": True},
        "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 6},
        "publish": {"catalog": str(catalog)},
    }
    merged = {name: {**values.get(name, {}), **section} for name, section in sections.items()}
    return parse_job({"name": "keys", **values, **merged})


class Folders:
    """Keeps every checkpoint in a folder of its own, at once; see `raytune_ft.train.recorder.Keeping`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.needed: list[int] = []

    def send(self, take: Any, metrics: dict[str, Any], *, wait: bool, needed: bool) -> None:
        del wait
        if needed:
            self.needed.append(metrics["step"])
        if (snapshot := take()) is not None:
            to = self.folder / f"{metrics['step']}"
            to.mkdir(parents=True, exist_ok=True)
            snapshot(to)

    def finished(self) -> list[Upload]:
        return []

    def kept(self) -> list[int]:
        return [int(each.name) for each in self.folder.iterdir()]

    @contextmanager
    def fetch(self, step: int) -> Iterator[Path]:
        yield self.folder / f"{step}"
