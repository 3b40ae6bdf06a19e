"""What a person sees while a job runs, and when it is done.

On a terminal one live line: phase, step, loss, tokens per second, memory, time left. Elsewhere plain
lines, few enough for a log: one for each phase and one every few seconds of training.
"""

import time
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from raytune_ft.report import duration_text, examples_of, outcome_texts, scale_for, usage_commands
from raytune_ft.terminal import visible

PLAIN_LINE_EVERY_S = 5.0

PHASES = MappingProxyType(
    {
        "check": "Checking the job",
        "data": "Reading the data",
        "start": "Starting the worker",
        "load": "Loading the model",
        "evaluate before": "Scores before",
        "train": "Training",
        "evaluate after": "Scores after",
        "publish": "Publishing",
        "done before": "Nothing to do: this job was done on this data; --restart trains again",
    }
)


class ProgressDisplay:
    """Shows the events of a run; a context manager.

    An event is a mapping with `phase` and, where they are known, `step`, `steps`, `loss`,
    `tokens_per_second` and `memory_bytes`; or with `notice`, a line that stays.

    Args:
        console: where to show them; standard output where not given.
        quiet: keep standard output for the JSON line, and show them on standard error.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or Console(stderr=quiet)
        self._phase: str | None = None
        self._phase_began_s = 0.0
        self._first_step = 0
        self._last_line_s = 0.0
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            if kind is None:
                self._finish_phase()
            self._live.stop()

    def update(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if notice := event.get("notice"):
            self._console.print(
                f"[yellow]Notice:[/] {escape(visible(notice))}", highlight=False, soft_wrap=True
            )
            return
        now_s = time.monotonic()
        changed = event["phase"] != self._phase
        if changed:
            self._finish_phase()
            self._phase, self._phase_began_s = event["phase"], now_s
            # A resumed run begins in the middle: the rate is that of the steps from here.
            self._first_step = event.get("step", 0)
        figures = self._figures(event, now_s)
        if self._live is not None:
            self._show_live(self._live, event, figures)
        elif changed or self._line_is_due(event, now_s):
            self._last_line_s = now_s
            self._console.print(
                "  ".join([_label(event["phase"]), *figures]), markup=False, highlight=False, soft_wrap=True
            )

    def _line_is_due(self, event: Mapping[str, Any], now_s: float) -> bool:
        last = "step" in event and event["step"] == event.get("steps")
        return last or now_s - self._last_line_s >= PLAIN_LINE_EVERY_S

    def _finish_phase(self) -> None:
        """Leave the phase that ends as a line above the live one."""
        if self._live is None or self._phase is None or self._task is None:
            return
        took = duration_text(time.monotonic() - self._phase_began_s)
        self._live.console.print(f"[green]✓[/] {escape(_label(self._phase))} [dim]{took}[/]")
        self._live.remove_task(self._task)
        self._task = None

    def _show_live(self, live: Progress, event: Mapping[str, Any], figures: list[str]) -> None:
        if self._task is None:
            self._task = live.add_task(escape(_label(event["phase"])), total=event.get("steps"), figures="")
        live.update(
            self._task,
            total=event.get("steps"),
            completed=event.get("step", 0),
            figures=escape("  ".join(figures)),
        )

    def _figures(self, event: Mapping[str, Any], now_s: float) -> list[str]:
        figures = []
        step, steps = event.get("step"), event.get("steps")
        if step is not None:
            figures.append(f"step {step}/{steps}" if steps else f"step {step}")
        if event.get("loss") is not None:
            figures.append(f"loss {event['loss']:.4f}")
        if event.get("tokens_per_second") is not None:
            figures.append(f"{event['tokens_per_second']:,.0f} tokens/s")
        if event.get("memory_bytes"):
            figures.append(f"{event['memory_bytes'] / 2**30:.1f} GiB")
        if step and steps and self._first_step < step < steps:
            per_step_s = (now_s - self._phase_began_s) / (step - self._first_step)
            figures.append(f"{duration_text(per_step_s * (steps - step))} left")
        return figures


def _label(phase: str) -> str:
    return PHASES.get(phase, phase)


def print_result(console: Console, result: Mapping[str, Any]) -> None:
    """Print the end of a run: scores before and after, where the adapter is, how to use it.

    Args:
        console: where to.
        result: the fields of the JSON line that `raytune-ft train --json` prints, and `catalog`
            (the catalog's uri) and `report` (path of the page) where there are any.
    """
    before, after = result.get("scores_before") or {}, result.get("scores_after") or {}
    if after:
        examples = examples_of(result)
        headers = ("", "before", "after", *(("examples",) if examples else ()))
        table = Table(*headers, title=None, box=None, pad_edge=False, header_style="dim")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, value in after.items():
            scale = scale_for(name)
            was = scale.text(before[name]) if name in before else "–"
            of = f"{examples[name]:,}" if name in examples else "–"
            table.add_row(scale.label, was, f"[bold]{scale.text(value)}[/]", *((of,) if examples else ()))
        console.print()
        console.print(table)
    console.print()
    lines = [
        ("Adapter", f"{result['adapter']} version {result['version']}, {result['uri']}"),
        ("Trained", _trained(result)),
        *outcome_texts(result).items(),
    ]
    if result.get("report"):
        lines.append(("Report", str(result["report"])))
    lines += [("Use it" if number == 0 else "", line) for number, line in enumerate(usage_commands(result))]
    width = max(8, *(len(title) for title, _ in lines))
    for title, text in lines:
        console.print(f"[dim]{title:{width}}[/] {escape(visible(text))}", soft_wrap=True, highlight=False)


def _trained(result: Mapping[str, Any]) -> str:
    parts = [f"{result['steps']} steps in {duration_text(result['seconds'])}"]
    if result.get("loss") is not None:
        parts.append(f"loss {result['loss']:.4f}")
    if result.get("tokens_per_second") is not None:
        parts.append(f"{result['tokens_per_second']:,.0f} tokens/s")
    if result.get("peak_memory_bytes"):
        parts.append(f"peak {result['peak_memory_bytes'] / 2**30:.1f} GiB")
    return ", ".join(parts)
