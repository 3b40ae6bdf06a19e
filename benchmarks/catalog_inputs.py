"""What both sides of the catalog's benchmark publish, do and print; needs nothing but Python."""

import argparse
import json
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ALIAS = "production"
WEIGHTS_BYTES = 100_000
LATEST, BY_ALIAS, EXACT, LIST, PUBLISH = "latest", "alias", "exact version", "list", "publish, set alias"


@dataclass(frozen=True)
class Operation:
    """One thing that people and servers do with a catalog."""

    name: str
    repeats: int
    act: Callable[[int], object]
    """Takes the number of the repetition."""
    before: Callable[[], object] | None = None
    """Not part of the time."""


@dataclass(frozen=True)
class Timed:
    """What an operation took."""

    seconds: tuple[float, ...]
    requests: int
    """Of one repetition: to the server, to the folder, or SQL statements."""


def adapter_name(number: int) -> str:
    """Name of the n-th adapter."""
    return f"adapter-{number:05d}"


def some_adapters(adapters: int, repeats: int) -> Sequence[str]:
    """Names drawn alike on both sides."""
    draw = random.Random(0)
    return [adapter_name(draw.randrange(adapters)) for _ in range(repeats)]


def write_files(folder: Path, seed: int) -> dict[str, Path]:
    """The four files of a version: new weights for each seed, the rest always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    size = (WEIGHTS_BYTES - 120) // 4
    header = json.dumps(
        {"base.lora_A.weight": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    ).encode()
    contents = {
        "adapter_model.safetensors": len(header).to_bytes(8, "little")
        + header
        + random.Random(seed).randbytes(4 * size),
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32}).encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}).encode(),
        "README.md": b"# An adapter\n" + b"What it was trained on, and how good it is.\n" * 20,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


def carry_out(operations: Sequence[Operation]) -> dict[str, tuple[float, ...]]:
    """Seconds of each repetition of each operation."""
    taken: dict[str, tuple[float, ...]] = {}
    for operation in operations:
        seconds = []
        for number in range(operation.repeats):
            if operation.before is not None:
                operation.before()
            began = time.perf_counter()
            operation.act(number)
            seconds.append(time.perf_counter() - began)
        taken[operation.name] = tuple(seconds)
    return taken


def count_requests(operations: Sequence[Operation], requests: Callable[[], int]) -> dict[str, int]:
    """Requests of one more repetition of each operation.

    Args:
        operations: which.
        requests: how many there have been so far.
    """
    counts = {}
    for operation in operations:
        if operation.before is not None:
            operation.before()
        begun = requests()
        operation.act(operation.repeats)
        counts[operation.name] = requests() - begun
    return counts


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(seconds: dict[str, tuple[float, ...]], requests: dict[str, int], memory_bytes: int) -> None:
    """Print all as one line for the program that compares."""
    timed = {name: asdict(Timed(of, requests[name])) for name, of in seconds.items()}
    print(json.dumps({"operations": timed, "peak_bytes": memory_bytes}))


def parser(description: str | None, place: str, help_text: str) -> argparse.ArgumentParser:
    """Options that both sides share: fill a catalog further, or operate on it."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("what", choices=("fill", "operate"))
    options.add_argument(place, required=True, help=help_text)
    options.add_argument("--files", type=Path, required=True, help="folder for what is published")
    options.add_argument("--start", type=int, default=0, help="adapters that are there already")
    options.add_argument("--adapters", type=int, required=True, help="adapters in all")
    options.add_argument("--repeats", type=int, default=30)
    return options
