"""`raytune-ft catalog`: what a catalog holds, where it came from, and its files."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytune_ft.catalog import AdapterRecord, Catalog

CatalogOption = Annotated[
    str,
    typer.Option(
        "--catalog",
        metavar="URI",
        envvar="RAYTUNE_CATALOG",
        help="A folder, file:// or s3:// uri.",
    ),
]
_Reference = Annotated[
    str, typer.Argument(metavar="NAME[@ALIAS|@vN]", help="A bare name means its newest version.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
_READERS = 8

app = typer.Typer(help="List, show and pull what was published.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def list_adapters(catalog: CatalogOption, as_json: _AsJson = False) -> None:
    """List the newest version of each adapter, with its aliases and scores."""
    store = _open(catalog)
    records = store.list()
    with ThreadPoolExecutor(_READERS) as readers:
        aliases = list(readers.map(lambda record: store.aliases(record.adapter), records))
    if as_json:
        _print_json([_summary(record, of, catalog) for record, of in zip(records, aliases, strict=True)])
    elif not records:
        Console().print(Text(f"{store.uri} holds no adapter yet; raytune-ft train JOB.yaml publishes one"))
    else:
        Console().print(_table(records, aliases))


@app.command()
def show(reference: _Reference, catalog: CatalogOption, as_json: _AsJson = False) -> None:
    """Show where a version came from: base, method, data, scores, files."""
    store = _open(catalog)
    record = store.resolve(reference)
    aliases = store.aliases(record.adapter)
    if as_json:
        _print_json({**_summary(record, aliases, catalog), **record.model_dump(mode="json")})
    else:
        Console().print(_facts(record, aliases, catalog))


@app.command()
def pull(
    reference: _Reference,
    catalog: CatalogOption,
    to: Annotated[Path | None, typer.Option(help="New or empty folder; ./NAME where not given.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Fetch the files of a version into a folder, each checked against its sha256."""
    folder = to or Path(reference.partition("@")[0])
    record = _open(catalog).pull(reference, folder)
    if as_json:
        _print_json({"adapter": record.adapter, "version": record.version, "to": str(folder.absolute())})
    else:
        size_bytes = sum(entry.size_bytes for entry in record.files)
        counted = f"{len(record.files)} files, {size_bytes:,} bytes"
        Console(soft_wrap=True).print(Text(f"{record.reference} is in {folder} ({counted})"))


def _open(uri: str) -> Catalog:
    catalog = Catalog.at(uri)
    catalog.storage.check()
    return catalog


def _summary(record: AdapterRecord, aliases: Mapping[str, int], catalog: str) -> dict[str, object]:
    return {
        "adapter": record.adapter,
        "version": record.version,
        "aliases": dict(aliases),
        "uri": record.uri(catalog),
        "base": record.base.path,
        "scores_after": record.scores_after,
        "created_at": record.created_at,
    }


def _table(records: list[AdapterRecord], aliases: list[dict[str, int]]) -> Table:
    table = Table("adapter", "version", "aliases", "base", "scores", "created")
    for record, of in zip(records, aliases, strict=True):
        cells = (
            record.adapter,
            f"v{record.version}",
            _aliases(of),
            record.base.path,
            _scores(record.scores_after),
            record.created_at[:16].replace("T", " "),
        )
        table.add_row(*(_plain(cell) for cell in cells))
    return table


def _facts(record: AdapterRecord, aliases: Mapping[str, int], catalog: str) -> Table:
    facts = {
        "adapter": f"{record.reference} ({record.kind})",
        "aliases": _aliases(aliases),
        "record": record.uri(catalog),
        "created": f"{record.created_at} by raytune-ft {record.code_version}",
        "base": f"{record.base.path} ({record.base.digest})",
        "method": json.dumps(record.method),
        "data": f"fingerprint {record.data.get('fingerprint', '-')}",
        "training": f"{record.steps:,} steps, {record.learned_tokens:,} learned of {record.tokens:,} tokens",
        "loss": "-" if record.loss is None else f"{record.loss:.4f}",
        "scores before": _scores(record.scores_before),
        "scores after": _scores(record.scores_after),
        "libraries": ", ".join(f"{name} {version}" for name, version in record.library_versions.items()),
        "files": "\n".join(f"{entry.name}  {entry.size_bytes:,} bytes" for entry in record.files),
    }
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), _plain(value))
    return table


def _aliases(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias} → v{version}" for alias, version in aliases.items()) or "-"


def _scores(scores: Mapping[str, float] | None) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in (scores or {}).items()) or "-"


def _plain(text: str) -> Text:
    """Text of a record without what a terminal would obey: others wrote it."""
    unknown = "\N{REPLACEMENT CHARACTER}"
    return Text("".join(letter if letter.isprintable() or letter == "\n" else unknown for letter in text))


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value))
