"""`raytune-ft data`: what a job's records become, with the learned tokens marked, and the counts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from raytune_ft.data.preview import Preview, ShownExample, shorten, to_json
from raytune_ft.spec import JobSpec
from raytune_ft.terminal import json_line, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raytune_ft.data.counts import DataCounts, Survey, WindowReport
    from raytune_ft.data.formats import BadRecord
    from raytune_ft.data.windows import Window

_LEARNED_STYLE = "bold green"
_SHOWN_BAD_RECORDS = 10
_PLAIN_WIDTH = 140
_SHOWN_CHARACTERS = 500
"""Of one piece of an example; `--json` and `--report` have all of it."""


def data_command(job: JobSpec, examples: int, as_json: bool, report: Path | None = None) -> None:
    """Print the first rendered examples of each source, the malformed records and the counts.

    Reads all windows in this process, without Ray: the same code as the data pass of a training run, for a
    look at the data before a cluster is there.

    Args:
        job: the job.
        examples: how many of each source to show.
        as_json: print one JSON object instead.
        report: an HTML file to write as well, with the examples in full.

    Raises:
        DataError: training would refuse this data; raised after what was found is printed.
        ModelError: the tokenizer does not load.
        StorageError: the store failed.
    """
    from raytune_ft.data.checks import check_counts, counted
    from raytune_ft.data_page import check_page, write_data_page
    from raytune_ft.models import load_tokenizer

    if report is not None:
        check_page(report)
    tokenizer = load_tokenizer(job.model)
    preview, survey = _read_all(job, tokenizer, examples)
    counts = counted(survey, job.data)
    bad = [record for window in survey.read() for record in window.bad][:_SHOWN_BAD_RECORDS]
    listed = [{"place": record.place, "reason": record.reason} for record in bad]
    found = {"counts": counts.to_json(), "bad": listed, **to_json(preview)}
    if report is not None:
        write_data_page(job.name, found, report)
    if as_json:
        # The one place where standard output is a machine's to read.
        print(json_line(found))  # noqa: T201
    else:
        console = Console()
        # A file or pipe has no width of its own; the counts need this much.
        console = console if console.is_terminal else Console(width=_PLAIN_WIDTH)
        _print(console, job, preview, counts, bad)
        if report is not None:
            console.print(
                f"All examples in full: {visible(str(report))}", markup=False, highlight=False, soft_wrap=True
            )
    check_counts(survey, job.data, None)


def templates_command() -> None:
    """Print the built-in templates, each around a prompt and an answer."""
    from raytune_ft.data.conversation import Turn
    from raytune_ft.data.template import TEMPLATES

    table = Table("template", "a prompt, and where its answer begins", show_lines=True)
    for name, template in TEMPLATES.items():
        opened = replace(template, eos="‹EOS›").open_answer((Turn("user", "PROMPT"),))
        table.add_row(name, escape("".join(segment.text for segment in opened) + template.lead) + "…")
    table.add_row("text", "raw text, learned from its beginning")
    table.add_row("chat", "the tokenizer's own chat template")
    table.add_row(
        "auto", "by the record: chat for messages, plain for columns named prompt, else instruction"
    )
    Console().print(table)


def _read_all(job: JobSpec, tokenizer: "PreTrainedTokenizerBase", limit: int) -> tuple[Preview, "Survey"]:
    from raytune_ft.data.counts import Survey
    from raytune_ft.data.encoder import Encoder
    from raytune_ft.data.examples import tokenise_window
    from raytune_ft.data.index import divide
    from raytune_ft.data.sources import list_sources, listing_notices
    from raytune_ft.data.template import check_templates

    encoder = Encoder.of(tokenizer)
    check_templates((source.template for source in job.data.sources), encoder)
    preview = Preview(limit, partial(_decode, tokenizer=tokenizer))
    windows: list[Window] = []
    reports: dict[int, WindowReport] = {}
    listings = list_sources(job.data)
    for number, found in enumerate(found for listing in listings for found in listing.objects):
        for window in divide(found, number, job.data.sources[found.source].format, None):
            tokenised = tokenise_window(
                found, window, job.data, encoder, job.model.labels, partial(preview.observe, found.source)
            )
            reports[len(windows)] = tokenised.report
            windows.append(window)
    return preview, Survey(windows, reports, tuple(listing_notices(job.data, listings)))


def _decode(token_ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


def _print(
    console: Console,
    job: JobSpec,
    preview: Preview,
    counts: "DataCounts",
    bad: Sequence["BadRecord"],
) -> None:
    for example in sorted(preview.examples, key=lambda example: example.source):
        cut = f" · {example.cut_tokens:,} tokens cut" if example.cut_tokens else ""
        title = f"source {example.source} · {example.split} · {example.tokens:,} tokens{cut}"
        body = _highlight(example, colour=console.is_terminal)
        kinds = escape(", ".join(example.kinds))
        console.print(Panel(body, title=title, title_align="left", subtitle=kinds, subtitle_align="left"))
    how = f"[{_LEARNED_STYLE}]green[/]" if console.is_terminal else "between ⟦ ⟧"
    console.print(f"Learned tokens are {how}; the rest is what the model is given.\n", highlight=False)
    console.print(_counts_table(job, counts))
    if counts.total.answers:
        console.print(_turns_table(counts))
    console.print(_lengths_table(preview))
    for notice in counts.notices:
        console.print(Text(visible(f"Notice: {notice}"), style="yellow"))
    if bad:
        lines = [Text(visible(f"{record.place}: {record.reason}")) for record in bad]
        title = f"malformed records: the first {len(bad)} of {counts.total.bad}"
        console.print(Panel(Group(*lines), title=title, title_align="left"))


def _highlight(example: ShownExample, *, colour: bool) -> Text:
    text = Text()
    for piece, learned in (
        (visible(piece), learned) for piece, learned in shorten(example.pieces, _SHOWN_CHARACTERS)
    ):
        if colour:
            text.append(piece, style=_LEARNED_STYLE if learned else "")
        else:
            text.append(f"⟦{piece}⟧" if learned else piece)
    return text


def _counts_table(job: JobSpec, counts: "DataCounts") -> Table:
    table = Table(title="counts", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("source", overflow="fold", min_width=16)
    names = ("records", "bad", "dropped", "cut", "train", "validation", "test", "tokens", "learned_tokens")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    named = enumerate(zip(job.data.sources, counts.sources, strict=True))
    rows = [(_label(at, source.uri, len(job.data.sources)), found) for at, (source, found) in named]
    for label, found in [*rows, ("total", counts.total)]:
        table.add_row(escape(visible(label)), *(f"{getattr(found, name):,}" for name in names))
    return table


def _label(number: int, uri: str, sources: int) -> str:
    """What a source is called: the other tables name it by its number."""
    return uri if sources == 1 else f"{number}: {uri}"


def _turns_table(counts: "DataCounts") -> Table:
    """What of the records is learned; what no record holds has no column."""
    total = counts.total
    parts = [("answers", "learned_answers", "answers"), ("ends of answers", "ends", "learned_answers")]
    parts += [("tool calls", "learned_calls", "calls")] if total.calls else []
    parts += [("thoughts", "learned_thoughts", "thoughts")] if total.thoughts else []
    table = Table(title="learned, of all", title_justify="left", box=SIMPLE_HEAD)
    for name in ("source", *(title for title, _, _ in parts), *(["divided chats"] if total.divided else [])):
        table.add_column(name, justify="right")
    for at, found in enumerate(counts.sources):
        cells = [f"{getattr(found, learned):,} of {getattr(found, all):,}" for _, learned, all in parts]
        table.add_row(str(at), *cells, *([f"{found.divided:,}"] if total.divided else []))
    return table


def _lengths_table(preview: Preview) -> Table:
    names = ("examples", "median", "p95", "longest", "cut", "dropped", "longest_answer", "longest_reference")
    table = Table(title="lengths in tokens, before max_tokens", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("source", justify="right")
    table.add_column("template", max_width=30)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for (source, template), lengths in sorted(preview.lengths.items()):
        figures = lengths.to_json()
        row = ("–" if figures[name] is None else f"{figures[name]:,}" for name in names)
        table.add_row(str(source), Text(visible(" ".join(template.split()))[:60]), *row)
    return table
