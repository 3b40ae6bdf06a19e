"""A run as one HTML page that needs nothing else: no request leaves it, no script runs in it."""

import math
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from raytune_ft.catalog.record import selection_texts
from raytune_ft.chart import Chart, chart
from raytune_ft.evaluate.scores import Scale, is_right, scale_of
from raytune_ft.spec.scores import OTHER_TASKS

if TYPE_CHECKING:
    from jinja2 import Environment

_MOST_SOURCE_CHARTS = 8


@dataclass(frozen=True)
class RunReport:
    """What the page shows; plain JSON values throughout."""

    title: str
    job: dict[str, Any]
    """The resolved job."""
    result: dict[str, Any]
    """The fields of the JSON line that `raytune-ft train --json` prints."""
    history: list[dict[str, Any]]
    """One entry per step: step, loss, learning_rate, grad_norm, tokens, seconds, perhaps validation_loss,
    validation_scores by name, and source_losses: means of each source since the entry before that has them,
    None where it had no token."""
    scores_before: dict[str, float] | None
    scores_after: dict[str, float] | None
    samples: list[dict[str, Any]]
    """Test examples: prompt, references, before, after."""
    data_counts: dict[str, Any]
    """`{"sources": [{"uri": …, "records": …}, …], "total": {…}}`."""
    machine: dict[str, str]
    versions: dict[str, str]
    task_epochs: Sequence[float] = ()
    """How often an epoch passes over each source; empty where that is not known."""


@dataclass(frozen=True)
class SourceRow:
    """One of several sources; figures that are not known are '–'."""

    uri: str
    weight: str
    examples: str
    """In the training split."""
    tokens: str
    passes: str
    """Per epoch."""
    loss: str
    """The last mean."""


@dataclass(frozen=True)
class ScoreRow:
    """A score before and after; widths of its bars in per cent, None where it has no upper end."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None
    bar_before: float | None
    bar_after: float | None
    examples: str = ""
    """How many it was measured on; '' where that is not known."""


def write_report(report: RunReport, path: Path) -> None:
    """Write the page; one that is there is replaced as a whole.

    Args:
        report: what to show.
        path: the HTML file; its folder must exist.
    """
    page = (
        page_templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            headline=headline(report),
            loss=chart("Loss", report.history, "loss", dots="validation_loss"),
            small_charts=[*_small_charts(report.history), *_validation_charts(report.history)],
            sources=source_rows(report),
            source_charts=_source_charts(report),
            scores=score_rows(
                report.scores_before or {}, report.scores_after or {}, examples_of(report.result)
            ),
            samples=[_judged(sample) for sample in report.samples],
            job=yaml.safe_dump(report.job, sort_keys=False, allow_unicode=True),
            outcomes=outcome_texts(report.result),
            commands=usage_commands({**report.result, "catalog": report.job["publish"]["catalog"]}),
            counts=_count_rows(report.data_counts, _READ),
            taught=_count_rows(report.data_counts, _TAUGHT),
            left_out=_left_out(report.data_counts),
            notices=report.data_counts.get("notices", ()),
        )
    )
    write_page(page, path)


def page_templates() -> "Environment":
    """The templates of all pages; what is put into them is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("raytune_ft", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(text: str, path: Path) -> None:
    """Write a text file that appears complete or not at all; its folder must exist.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.new")
    try:
        # JSON may hold half a surrogate pair, which no encoding does.
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def usage_commands(result: Mapping[str, Any]) -> tuple[str, str]:
    """The commands that answer a prompt with what was published, and that fetch its files.

    >>> usage_commands({"adapter": "sums", "version": 3, "catalog": "s3://adapters"})[1]
    'raytune-ft catalog pull sums@v3 --catalog s3://adapters --to sums'
    """
    reference = f"{result['adapter']}@v{result['version']}"
    # Without it both commands look at RAYTUNE_CATALOG.
    catalog = f" --catalog {shlex.quote(result['catalog'])}" if result.get("catalog") else ""
    return (
        f"raytune-ft generate --adapter {reference}{catalog} 'YOUR PROMPT'",
        f"raytune-ft catalog pull {reference}{catalog} --to {result['adapter']}",
    )


def outcome_texts(result: Mapping[str, Any]) -> dict[str, str]:
    """Notices, published step, early stop, forgetting and gate of a result in words, by their titles.

    >>> outcome_texts({"forgetting": 0.0213})
    {'Forgetting': '+0.0213 in the token loss of other tasks'}
    """
    texts = {"Notice": ". ".join(result["notices"])} if result.get("notices") else {}
    texts |= selection_texts(result)
    if result.get("forgetting") is not None:
        texts["Forgetting"] = f"{result['forgetting']:+.4f} in the token loss of other tasks"
    gate = result.get("gate")
    if gate:
        old = gate["alias_version"]
        left = f"{gate['alias']} was not set" if old is None else f"{gate['alias']} was left at v{old}"
        reasons = "; ".join(gate["refused"])
        if not gate["passed"]:
            texts["Gate"] = f"refused, {left}: {reasons}"
        elif reasons:
            texts["Gate"] = f"refused, but {gate['alias']} was moved to v{old} by hand: {reasons}"
        else:
            texts["Gate"] = f"passed; {gate['alias']} means v{old}"
    return texts


def examples_of(result: Mapping[str, Any]) -> Mapping[str, int]:
    """How many examples each score of a result was measured on; older versions did not count them."""
    return result.get("scored_examples") or {}


def duration_text(seconds: float) -> str:
    """A duration as people say it.

    >>> duration_text(4.26), duration_text(83), duration_text(7384)
    ('4.3 s', '1 min 23 s', '2 h 3 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, whole_s = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{whole_s} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {whole_s} s"


def headline(report: RunReport) -> list[tuple[str, str, str]]:
    """The large figures: value, label, and a remark on it."""
    result, figures = report.result, []
    after, before = report.scores_after or {}, report.scores_before or {}
    for name in [name for name in after if not name.startswith(OTHER_TASKS)][:1]:
        scale = scale_of(name)
        was = f"before: {scale.text(before[name])}" if name in before else ""
        examples = examples_of(result).get(name)
        unseen = "unseen examples" if examples is None else f"{examples:,} unseen examples"
        figures.append((scale.text(after[name]), f"{scale.label} on {unseen}", was))
    if result.get("loss") is not None:
        first = f"began at {report.history[0]['loss']:.3f}" if report.history else ""
        figures.append((f"{result['loss']:.3f}", "training loss", first))
    figures.append((f"{result['steps']:,}", "steps", f"{duration_text(result['seconds'])} in all"))
    if result.get("tokens_per_second") is not None:
        figures.append((f"{result['tokens_per_second']:,.0f}", "tokens per second", "while training"))
    if result.get("peak_memory_bytes"):
        figures.append((f"{result['peak_memory_bytes'] / 2**30:.2f} GiB", "peak memory", "of the worker"))
    return figures


def source_rows(report: RunReport) -> list[SourceRow]:
    """A row for each source, where there are several: a single source's loss is the run's."""
    sources = report.job["data"]["sources"]
    if len(sources) < 2:
        return []
    counts = report.data_counts["sources"]
    passes = [f"{each:.2f}" for each in report.task_epochs] or ["–"] * len(sources)
    return [
        SourceRow(
            uri=source["uri"],
            weight=f"{source['weight']:g}",
            examples=f"{count['train']:,}",
            tokens=f"{count['tokens']:,}",
            passes=each,
            loss=f"{curve[-1]['loss']:.4f}" if curve else "–",
        )
        for source, count, each, curve in zip(sources, counts, passes, _source_curves(report), strict=True)
    ]


def score_rows(
    before: Mapping[str, float],
    after: Mapping[str, float],
    examples: Mapping[str, int] = MappingProxyType({}),
) -> list[ScoreRow]:
    """Scores before and after, side by side, in the order of `after`, and what they were measured on."""
    return [
        _score_row(scale_for(name), before.get(name), value, examples.get(name))
        for name, value in after.items()
    ]


def scale_for(name: str) -> Scale:
    """The scale of a score, which may be one of other tasks.

    >>> scale_for("other_tasks/rougeL").label
    'Other tasks: ROUGE-L'
    """
    scale = scale_of(name.removeprefix(OTHER_TASKS))
    return replace(scale, label=f"Other tasks: {scale.label}") if name.startswith(OTHER_TASKS) else scale


def _score_row(scale: Scale, before: float | None, after: float, examples: int | None) -> ScoreRow:
    change, better = "", None
    if before is not None and math.isfinite(after - before):
        sign = "+" if after > before else "−" if after < before else ""
        change = sign + scale.text(abs(after - before)).removesuffix(" %")
        better = None if after == before else (after > before) == (scale.best is not None)
    return ScoreRow(
        label=scale.label,
        before="–" if before is None else scale.text(before),
        after=scale.text(after),
        change=change,
        better=better,
        bar_before=None if scale.best is None or before is None else 100 * before / scale.best,
        bar_after=None if scale.best is None else 100 * after / scale.best,
        examples="" if examples is None else f"{examples:,}",
    )


def _judged(sample: Mapping[str, Any]) -> dict[str, Any]:
    right = {f"{when}_right": is_right(sample[when], sample["references"]) for when in ("before", "after")}
    return {**sample, **right}


_READ = (
    "objects",
    "records",
    "bad",
    "dropped",
    "cut",
    "train",
    "validation",
    "test",
    "tokens",
    "learned_tokens",
)
_TAUGHT = (
    *("answers", "learned_answers", "ends", "calls", "learned_calls", "thoughts", "learned_thoughts"),
    "divided",
)


def _count_rows(counts: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, dict[str, int]]]:
    """A row of counts for each source, and one for all where there are several; records may lack some."""
    rows = [(source["uri"], source) for source in counts["sources"]]
    if len(rows) != 1:
        rows.append(("all", counts["total"]))
    return [(title, {name: row[name] for name in names if name in row}) for title, row in rows]


def _left_out(counts: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Source, name and number of records of all that the model did not see."""
    return [
        (source["uri"], name, records)
        for source in counts["sources"]
        for name, records in source.get("left_out", {}).items()
    ]


def _source_curves(report: RunReport) -> list[list[dict[str, Any]]]:
    """The step and the loss of each source, where it had a learned token."""
    marked = [entry for entry in report.history if "source_losses" in entry]
    return [
        [
            {"step": entry["step"], "loss": entry["source_losses"][at]}
            for entry in marked
            if entry["source_losses"][at] is not None
        ]
        for at in range(len(report.job["data"]["sources"]))
    ]


def _source_charts(report: RunReport) -> list[Chart]:
    """A chart for each source, where there are several, but not too many to look at."""
    sources = report.job["data"]["sources"]
    if not 2 <= len(sources) <= _MOST_SOURCE_CHARTS:
        return []
    curves = zip(sources, _source_curves(report), strict=True)
    return [chart(f"Loss of {source['uri']}", curve, "loss") for source, curve in curves if curve]


def _validation_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each score that was measured on the validation split while training."""
    scored = [
        (entry["step"], entry["validation_scores"]) for entry in history if "validation_scores" in entry
    ]
    names = dict.fromkeys(name for _, scores in scored for name in scores)
    return [
        chart(
            f"{scale_of(name).label} on the validation split",
            [{"step": step, "score": scores[name]} for step, scores in scored if name in scores],
            "score",
        )
        for name in names
    ]


def _small_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    timed = [
        {**entry, "tokens_per_second": entry["tokens"] / entry["seconds"] if entry["seconds"] else math.nan}
        for entry in history
    ]
    titles = {
        "learning_rate": "Learning rate",
        "grad_norm": "Gradient norm",
        "tokens_per_second": "Tokens per second",
    }
    return [chart(title, timed, key) for key, title in titles.items()]
