"""Jobs one after another and several at once on one resident base, on a GPU; without Ray.

    python benchmarks/fleet_gpu.py [--device cuda] [--base 61M] [--data DIR]

Needs torch, transformers (with accelerate) and bitsandbytes. The jobs are QLoRA jobs of rank 16 on all linear
layers, 200 examples each, one epoch. With `--data` they are the tasks of instruction induction, without it
made sentences of 13 to 45 tokens. All rows of the table train the same jobs, each with its own examples and
adapter: only how many of them are on the base at once differs.
"""

import argparse
import gc
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from fleet_inputs import EXAMPLES, MOST_TOKENS, TASKS, check_data, gpt2_tokenizer, save_base, task_pairs
from inputs import sentence_pairs
from inputs import tokenizer as sentence_tokenizer
from page import markdown, write
from transformers import PreTrainedTokenizerBase

from raytune_ft.models import load_base
from raytune_ft.spec import LoraSpec, ModelSpec, OptimizerSpec, ScheduleSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.engine import peak_memory_bytes
from raytune_ft.train.loop import StepReport, Trainee, train
from raytune_ft.train.process import keep_freed_memory
from raytune_ft.train.schedule import learning_rate

METHOD, OPTIMIZER, SCHEDULE = LoraSpec(), OptimizerSpec(), ScheduleSpec()
HELD = ("dequantised", "packed")
_TOKENS_PER_FORWARD = 1 << 14
_GIB = 2**30

Examples = Sequence[Tokens]


@dataclass(frozen=True)
class Row:
    """All jobs, with so many of them on the base at once."""

    held: str
    batch: int
    slots: int
    seconds: float
    tokens: int
    peak_bytes: int
    loss: float
    """Of the last steps, over all jobs: rows that trained the same agree in it."""


def encode(pairs: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Prompts that are given, answers and their end that are learned."""
    found = []
    for pair in pairs:
        prompt, answer = (
            tokenizer(pair[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "completion")
        )
        ids = np.array([*prompt, *answer, tokenizer.eos_token_id], dtype=np.int64)
        found.append(Tokens(ids, np.arange(len(ids)) >= len(prompt)))
    return found


def make_jobs(
    data: Path | None, count: int, examples: int, tokenizer: PreTrainedTokenizerBase
) -> list[Examples]:
    """Examples of each job; the tasks come again where there are more jobs."""
    if data is None:
        return [encode(sentence_pairs(examples, seed), tokenizer) for seed in range(count)]
    of_tasks = [encode(task_pairs(data, task, examples), tokenizer) for task in TASKS[:count]]
    return [of_tasks[job % len(of_tasks)] for job in range(count)]


class Lane:
    """A base, and jobs that come to it as slots are free."""

    def __init__(self, folder: Path, device: torch.device, held: str, pad_token_id: int) -> None:
        self._device = device
        self._held = held
        self._layout = Layout(True, MOST_TOKENS, pad_token_id, None, _TOKENS_PER_FORWARD)
        spec = ModelSpec(path=str(folder), weight_bits=4)
        keep_freed_memory(device)
        self._bank = Bank(load_base(spec, device=device, dequantised=held == "dequantised"))

    def run(self, jobs: Sequence[Examples], batch: int, slots: int) -> Row:
        """Train all jobs, with at most `slots` of them at once."""
        self._bank.tokens_per_pass = slots * MOST_TOKENS if slots > 1 else 0
        waiting, last, tokens = list(range(len(jobs)))[::-1], {}, 0

        def trainee(number: int) -> Trainee:
            engine = self._bank.enter(METHOD, OPTIMIZER, seed=number)
            steps = -(-len(jobs[number]) // batch)

            def leave(reason: Exception | None) -> None:
                self._bank.leave(engine)
                if reason is not None:
                    raise SystemExit(f"job {number}: {reason}") from reason

            def report(step: StepReport) -> None:
                nonlocal tokens
                tokens += step.tokens
                last[number] = step.loss

            def rate(step: int) -> float:
                return learning_rate(step, steps, SCHEDULE, OPTIMIZER.learning_rate)

            return Trainee(engine, self._steps(jobs[number], batch), 0, rate, report, leave)

        def offer(training: int) -> list[Trainee]:
            free = min(slots - training, len(waiting))
            return [trainee(waiting.pop()) for _ in range(free)]

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        train(self._bank, offer)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak_bytes = peak_memory_bytes(self._device)
        return Row(self._held, batch, slots, seconds, tokens, peak_bytes, sum(last.values()) / len(jobs))

    def _steps(self, examples: Examples, batch: int) -> Iterator[Step]:
        for start in range(0, len(examples), batch):
            own = [
                Tokens(each.input_ids, each.learned, number=number)
                for number, each in enumerate(examples[start : start + batch])
            ]
            yield Step(self._layout.batches(own), len(own), "", 1)


def table(rows: Sequence[Row]) -> str:
    """Markdown, with ratios against the same jobs one after another."""
    one = {(row.held, row.batch): row for row in rows if row.slots == 1}
    head = (
        "base held",
        "examples a step",
        "jobs at once",
        "training, s",
        "tokens/s",
        "× one after another",
        "peak memory, GiB",
        "last loss",
    )
    cells = [
        (
            row.held,
            str(row.batch),
            str(row.slots),
            f"{row.seconds:.1f}",
            f"{row.tokens / row.seconds:.0f}",
            f"{one[row.held, row.batch].seconds / row.seconds:.2f}" if (row.held, row.batch) in one else "–",
            f"{row.peak_bytes / _GIB:.2f}",
            f"{row.loss:.4f}",
        )
        for row in rows
    ]
    return markdown(head, cells)


def machine(device: torch.device) -> str:
    """What it ran on, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    cores = f"{torch.get_num_threads()} CPU threads"
    packages = ("torch", "transformers", "bitsandbytes")
    return f"{name}, {cores}; " + ", ".join(f"{each} {version(each)}" for each in packages)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all rows and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--base", choices=("61M", "1B", "tiny"), default="61M")
    parser.add_argument("--data", type=Path, help="folder with the tasks; made sentences without")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each job")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--held", choices=HELD, nargs="+", default=HELD, help="how the 4-bit base is held")
    parser.add_argument("--small", action="store_true", help="seconds of work, to see that it runs")
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    parser.add_argument("--results", type=Path, help="folder for fleet_gpu.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not cuda:
        raise SystemExit("--device cuda: torch finds no GPU here; use --device cpu")
    if options.small:
        options.base, options.jobs, options.examples, options.slots, options.batches = (
            "tiny",
            2,
            6,
            [1, 2],
            [2],
        )
    if options.data is not None:
        check_data(options.data)
    device = torch.device(options.device)
    tokenizer = sentence_tokenizer() if options.data is None else gpt2_tokenizer(options.data)
    jobs = make_jobs(options.data, options.jobs, options.examples, tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        save_base(options.base, tokenizer, Path(name))
        for held in options.held:
            lane = Lane(Path(name), device, held, tokenizer.pad_token_id)
            # Libraries choose and load their kernels in the first passes.
            lane.run([job[: 2 * max(options.batches)] for job in jobs[:2]], max(options.batches), 2)
            for batch in options.batches:
                for slots in options.slots:
                    rows.append(lane.run(jobs, batch, slots))
                    print(rows[-1], file=sys.stderr)
            del lane
            # Two bases would count in one peak.
            gc.collect()
    kind = "tasks of instruction induction" if options.data else "made tasks"
    what = f"{options.base} Llama, {options.jobs} jobs ({kind}), {options.examples} examples each"
    text = f"{table(rows)}\n\n{what}; {machine(device)}."
    raw = {"machine": machine(device), "rows": [asdict(row) for row in rows]}
    write("fleet_gpu", text, options.write, options.results, raw)


if __name__ == "__main__":
    main()
