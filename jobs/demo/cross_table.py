"""Every adapter of a fleet at every task of it: which has learned what, and that none was mixed up.

    python jobs/demo/cross_table.py FLEET.yaml [--examples 100] [--least 0.8]

Prints the share of the held-out questions of each task that the base and each adapter answer exactly right.
Ends with exit code 1 where an adapter is right less often than `--least` at its own task, or where another is
better at it. All jobs are QLoRA or LoRA jobs of one base.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raytune_ft.spec import JobSpec
    from raytune_ft.train.examples import Question

BASE = "the base"

Scores = Mapping[str, Mapping[str, float]]
"""Exact match by adapter and task, 0 to 1."""


def cross_scores(jobs: "Sequence[JobSpec]", examples: int) -> Scores:
    """Exact match of the base and of the newest version of each job's adapter at each job's task.

    Args:
        jobs: LoRA jobs of one base, whose adapters are published.
        examples: held-out examples of each task.
    """
    import torch

    from raytune_ft.catalog import Catalog
    from raytune_ft.methods.lora import add_lora, load_lora, remove_lora
    from raytune_ft.models import load_base, load_tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_base(jobs[0].model, device=device), load_tokenizer(jobs[0].model)
    questions = {job.name: held_out(job, tokenizer, examples) for job in jobs}
    scores = {BASE: _scores(model, tokenizer, questions, jobs[0])}
    for job in jobs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "pulled"
            Catalog.at(job.publish.catalog).pull(job.adapter_name, folder)
            load_lora(add_lora(model, job.method, job.data.seed), folder)
        scores[job.name] = _scores(model, tokenizer, questions, job)
        remove_lora(model, 0)
    return scores


def held_out(job: "JobSpec", tokenizer: Any, limit: int) -> "list[Question]":
    """At most `limit` questions of a job's test split."""
    from raytune_ft.data.encoder import Encoder
    from raytune_ft.data.examples import tokenise_window
    from raytune_ft.data.index import divide
    from raytune_ft.data.sources import list_objects
    from raytune_ft.train.examples import Examples

    encoder = Encoder.of(tokenizer)
    tables = [
        tokenise_window(found, window, job.data, encoder).table
        for number, found in enumerate(list_objects(job.data))
        for window in divide(found, number, job.data.sources[found.source].format, None)
    ]
    return Examples(tables, "test").questions(limit)


def _scores(
    model: "PreTrainedModel", tokenizer: Any, questions: "Mapping[str, list[Question]]", job: "JobSpec"
) -> dict[str, float]:
    from raytune_ft.evaluate.generate import answer
    from raytune_ft.evaluate.scores import score

    longest = job.evaluate.max_new_tokens
    found = {}
    for task, asked in questions.items():
        answers = answer(
            model,
            tokenizer,
            [question.prompt_ids for question in asked],
            end_ids=[],
            max_new_tokens=max(len(each.answer_ids) for each in asked) if longest == "auto" else longest,
            batch_sequences=job.evaluate.batch_sequences,
        )
        found[task] = score(["exact_match"], answers, [question.references for question in asked])[
            "exact_match"
        ]
    return found


def problems(scores: Scores, least: float) -> list[str]:
    """What a table says against its adapters; nothing if each is good at its own task, and the best at it.

    >>> problems({"sum": {"sum": 0.7, "diff": 0.1}, "diff": {"sum": 0.9, "diff": 1.0}}, least=0.8)
    ['sum: 70 % right at its own task, and 80 % are asked for', 'sum: diff is better at its task']
    """
    found = []
    for task in next(iter(scores.values())):
        own = scores[task][task]
        if own < least:
            asked = f"{100 * least:.0f} % are asked for"
            found.append(f"{task}: {100 * own:.0f} % right at its own task, and {asked}")
        found += [
            f"{task}: {other} is better at its task"
            for other, of_other in scores.items()
            if other != task and of_other[task] >= own
        ]
    return found


def table_of(scores: Scores, tasks: Iterable[str]) -> Table:
    """Rows of adapters, columns of tasks; what an adapter was trained for stands out."""
    table = Table(title="Exact match", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter \\ task")
    names = list(tasks)
    for name in names:
        table.add_column(name, justify="right")
    for adapter, of_adapter in scores.items():
        cells = [f"{100 * of_adapter[task]:.0f} %" for task in names]
        own = [
            f"[bold green]{cell}[/]" if task == adapter else cell
            for task, cell in zip(names, cells, strict=True)
        ]
        table.add_row(adapter, *own)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code."""
    from raytune_ft.spec import expand, read_fleet

    parser = argparse.ArgumentParser(description="Exact match of every adapter of a fleet at every task.")
    parser.add_argument("fleet", type=Path, metavar="FLEET.yaml")
    parser.add_argument("--examples", type=int, default=100, help="held-out examples of each task")
    parser.add_argument("--least", type=float, default=0.8, help="exact match at the own task")
    options = parser.parse_args(arguments)
    jobs = expand(read_fleet(options.fleet), place=str(options.fleet))
    scores = cross_scores(jobs, options.examples)
    Console().print(table_of(scores, [job.name for job in jobs]))
    found = problems(scores, options.least)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
