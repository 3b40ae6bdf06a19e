"""`raytune-ft data`: what a job's records become, with the learned tokens marked, and the counts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from raytune_ft.spec import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raytune_ft.data.counts import DataCounts, Survey, WindowReport
    from raytune_ft.data.formats import BadRecord
    from raytune_ft.data.windows import Window

_LEARNED_STYLE = "bold green"
_SHOWN_BAD_RECORDS = 10
_PLAIN_WIDTH = 140


@dataclass(frozen=True)
class ShownExample:
    """An example as text: its tokens decoded, in runs that are learned or not."""

    source: int
    split: str
    tokens: int
    pieces: tuple[tuple[str, bool], ...]


def data_command(job: JobSpec, examples: int, as_json: bool) -> None:
    """Print the first rendered examples of each source, the malformed records and the counts.

    Reads all windows in this process, without Ray: the same code as the data pass of a training run, for a
    look at the data before a cluster is there.

    Args:
        job: the job.
        examples: how many of each source to show.
        as_json: print one JSON object instead.

    Raises:
        DataError: training would refuse this data; raised after what was found is printed.
        ModelError: the tokenizer does not load.
        StorageError: the store failed.
    """
    from raytune_ft.data.checks import check_counts, counted
    from raytune_ft.models import load_tokenizer

    tokenizer = load_tokenizer(job.model)
    shown, survey = _read_all(job, tokenizer, examples)
    counts = counted(survey, job.data)
    bad = [record for report in survey.read() for record in report.bad][:_SHOWN_BAD_RECORDS]
    if as_json:
        # The one place where standard output is a machine's to read.
        print(json.dumps(_as_json(shown, counts, bad), ensure_ascii=False))  # noqa: T201
    else:
        console = Console()
        # A file or pipe has no width of its own; the counts need this much.
        _print(console if console.is_terminal else Console(width=_PLAIN_WIDTH), job, shown, counts, bad)
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


def _read_all(
    job: JobSpec, tokenizer: "PreTrainedTokenizerBase", limit: int
) -> tuple[list[ShownExample], "Survey"]:
    from raytune_ft.data.counts import Survey
    from raytune_ft.data.encoder import Encoder
    from raytune_ft.data.examples import tokenise_window
    from raytune_ft.data.index import divide
    from raytune_ft.data.sources import list_sources, listing_notices
    from raytune_ft.data.template import check_templates

    encoder = Encoder.of(tokenizer)
    check_templates((source.template for source in job.data.sources), encoder)
    shown: list[ShownExample] = []
    windows: list[Window] = []
    reports: dict[int, WindowReport] = {}
    listings = list_sources(job.data)
    for number, found in enumerate(found for listing in listings for found in listing.objects):
        for window in divide(found, number, job.data.sources[found.source].format, None):
            tokenised = tokenise_window(found, window, job.data, encoder, job.model.labels)
            reports[len(windows)] = tokenised.report
            windows.append(window)
            missing = limit - sum(example.source == found.source for example in shown)
            rows = tokenised.table.slice(0, max(0, missing)).to_pylist()
            shown += [_show(row, found.source, tokenizer) for row in rows]
    return shown, Survey(windows, reports, tuple(listing_notices(job.data, listings)))


def _show(row: dict[str, Any], source: int, tokenizer: "PreTrainedTokenizerBase") -> ShownExample:
    runs = groupby(zip(row["input_ids"], row["learned"], strict=True), key=lambda token: token[1])
    pieces = tuple((_decode([token for token, _ in run], tokenizer), learned) for learned, run in runs)
    return ShownExample(source, row["split"], len(row["input_ids"]), pieces)


def _decode(token_ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


def _as_json(
    shown: Sequence[ShownExample], counts: "DataCounts", bad: Sequence["BadRecord"]
) -> dict[str, Any]:
    return {
        "counts": counts.to_json(),
        "bad": [{"place": record.place, "reason": record.reason} for record in bad],
        "examples": [
            {
                "source": example.source,
                "split": example.split,
                "tokens": example.tokens,
                "pieces": [{"text": text, "learned": learned} for text, learned in example.pieces],
            }
            for example in shown
        ],
    }


def _print(
    console: Console,
    job: JobSpec,
    shown: Sequence[ShownExample],
    counts: "DataCounts",
    bad: Sequence["BadRecord"],
) -> None:
    for example in shown:
        title = f"source {example.source} · {example.split} · {example.tokens} tokens"
        console.print(Panel(_highlight(example, colour=console.is_terminal), title=title, title_align="left"))
    how = f"[{_LEARNED_STYLE}]green[/]" if console.is_terminal else "between ⟦ ⟧"
    console.print(f"Learned tokens are {how}; the rest is what the model is given.\n", highlight=False)
    console.print(_counts_table(job, counts))
    if bad:
        lines = [Text(_harmless(f"{record.place}: {record.reason}")) for record in bad]
        title = f"malformed records: the first {len(bad)} of {counts.total.bad}"
        console.print(Panel(Group(*lines), title=title, title_align="left"))


def _highlight(example: ShownExample, *, colour: bool) -> Text:
    text = Text()
    for piece, learned in ((_harmless(piece), learned) for piece, learned in example.pieces):
        if colour:
            text.append(piece, style=_LEARNED_STYLE if learned else "")
        else:
            text.append(f"⟦{piece}⟧" if learned else piece)
    return text


def _harmless(text: str) -> str:
    """Control characters made visible: data must not steer the terminal that it is shown on."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _counts_table(job: JobSpec, counts: "DataCounts") -> Table:
    table = Table(title="counts", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("source", overflow="fold", min_width=16)
    names = ("records", "bad", "dropped", "cut", "train", "validation", "test", "tokens", "learned_tokens")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    rows = [(source.uri, found) for source, found in zip(job.data.sources, counts.sources, strict=True)]
    for label, found in [*rows, ("total", counts.total)]:
        table.add_row(escape(label), *(f"{getattr(found, name):,}" for name in names))
    return table
