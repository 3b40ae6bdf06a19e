"""The work of `data_ours.py` with other tools; runs in their environments. Prints one line of JSON.

All render the same text, encode prompt and answer apart and end with EOS; examples above the limit are left
out; rows are packed to at most `--max-tokens`. The clock starts after the imports.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

PROMPT = "### Instruction:\n{}\n\n### Response:\n"
EOS = "<|endoftext|>"
SEQUENCES_PER_STEP = 64
_LINES_PER_BATCH = 1000


def encode(tokenizer: Tokenizer, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[Any, Any]]:
    """Prompt and answer ids of each example, the answer's with EOS."""
    eos = tokenizer.token_to_id(EOS)
    texts = [PROMPT.format(prompt) for prompt in prompts]
    found = tokenizer.encode_batch_fast([*texts, *answers], add_special_tokens=False)
    return [
        (given.ids, [*answer.ids, eos])
        for given, answer in zip(found[: len(texts)], found[len(texts) :], strict=True)
    ]


def pack(examples: Sequence[tuple[Any, Any]], limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of ids and labels: each example, longest first, goes to the first row that has room."""
    rows: list[tuple[list[int], list[int]]] = []
    for prompt, answer in sorted(examples, key=lambda e: -len(e[0]) - len(e[1])):
        length = len(prompt) + len(answer)
        if length > limit:
            continue
        row = next((r for r in rows if len(r[0]) + length <= limit), None)
        if row is None:
            rows.append(row := ([], []))
        row[0].extend(prompt)
        row[0].extend(answer)
        row[1].extend([-100] * len(prompt))
        row[1].extend(answer)
    return [(np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)) for ids, labels in rows]


def plain(arguments: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """One loop on one core: lines, json, text, ids, rows. No shuffle, no recovery: what there is to do."""
    began = time.perf_counter()
    rows = tokens = 0
    with arguments.data.open("rb") as file:
        while lines := list(islice(file, _LINES_PER_BATCH)):
            records = [json.loads(line) for line in lines]
            pairs = [(record["instruction"], record["output"]) for record in records]
            examples = encode(tokenizer, [p for p, _ in pairs], [a for _, a in pairs])
            for at in range(0, len(examples), SEQUENCES_PER_STEP):
                packed = pack(examples[at : at + SEQUENCES_PER_STEP], arguments.max_tokens)
                rows += len(packed)
                tokens += sum(len(ids) for ids, _ in packed)
    return {"seconds": time.perf_counter() - began, "packed_rows": rows, "tokens": tokens}


def hugging_face(arguments: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """`datasets`: load, batched map in two processes, TRL's packing, shuffle, read once as numpy."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()

    def ids(batch: dict[str, list[str]]) -> dict[str, Any]:
        pairs = encode(tokenizer, batch["instruction"], batch["output"])
        pairs = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= arguments.max_tokens]
        return {
            "input_ids": [[*prompt, *answer] for prompt, answer in pairs],
            "labels": [[*[-100] * len(prompt), *answer] for prompt, answer in pairs],
        }

    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        data = datasets.load_dataset("json", data_files=str(arguments.data), split="train", cache_dir=cache)
        loaded = time.perf_counter()
        data = data.map(ids, batched=True, num_proc=2, remove_columns=data.column_names)
        mapped = time.perf_counter()
        data = pack_dataset(data, arguments.max_tokens).shuffle(seed=0)
        packed = time.perf_counter()
        tokens = 0
        for batch in data.with_format("numpy").iter(batch_size=8):
            tokens += sum(len(row) for row in batch["input_ids"])
        ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "packed_rows": len(data),
        "tokens": tokens,
        "of_which": {
            "load": loaded - began,
            "map": mapped - loaded,
            "pack": packed - mapped,
            "read": ended - packed,
        },
    }


def streaming(arguments: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """mosaicml-streaming: shards written (timed apart); two workers shuffle, tokenise and pack."""
    _without_vision()
    from streaming.base import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    collate = partial(_collate, tokenizer=tokenizer, limit=arguments.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with MDSWriter(out=folder, columns={"instruction": "str", "output": "str"}) as writer:
            for record in _records(arguments.data):
                writer.write(record)
        written = time.perf_counter()
        data = StreamingDataset(local=folder, shuffle=True, batch_size=SEQUENCES_PER_STEP)
        rows = tokens = 0
        for packed in DataLoader(data, batch_size=SEQUENCES_PER_STEP, num_workers=2, collate_fn=collate):
            rows += len(packed)
            tokens += sum(len(ids) for ids, _ in packed)
        ended = time.perf_counter()
    return {
        "seconds": ended - written,
        "packed_rows": rows,
        "tokens": tokens,
        "of_which": {"writing, not counted": written - began},
    }


def _without_vision() -> None:
    """Let `streaming.base` be imported alone: its package also imports torchvision, for image data sets, and
    that has no build for this torch."""
    import types
    from importlib.metadata import distribution

    package = types.ModuleType("streaming")
    package.__path__ = [str(distribution("mosaicml-streaming").locate_file("streaming"))]
    sys.modules["streaming"] = package


def _records(path: Path) -> Iterator[dict[str, str]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _collate(records: Sequence[dict[str, str]], tokenizer: Tokenizer, limit: int) -> list[Any]:
    examples = encode(tokenizer, [r["instruction"] for r in records], [r["output"] for r in records])
    return pack(examples, limit)


VARIANTS = {"plain": (plain, 1), "datasets": (hugging_face, 2), "streaming": (streaming, 2)}


def main() -> None:
    """Run one variant on as many cores as it may use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--max-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    run, cores = VARIANTS[arguments.variant]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(json.dumps(run(arguments, Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json")))))


if __name__ == "__main__":
    main()
