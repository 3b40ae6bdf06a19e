"""`raytune-ft catalog`: what a catalog holds, where it came from, and its files."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from raytune_ft.catalog import (
    AdapterRecord,
    AliasEntry,
    Catalog,
    Change,
    Filter,
    Lineage,
    alias_history,
    compare_records,
    lineage_of,
    list_catalog,
    roll_back,
    update_serve_dir,
)
from raytune_ft.catalog import verify as verify_catalog
from raytune_ft.errors import CatalogError
from raytune_ft.spec.job import VERSION
from raytune_ft.storage import open_storage

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
_Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.")]
_Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="Such as production.")]

app = typer.Typer(
    help="List, compare, check, pull, promote and serve what was published.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("ls")
def list_adapters(
    catalog: CatalogOption,
    adapter: Annotated[str, typer.Option(metavar="GLOB", help="Names that match, such as 'sum-*'.")] = "*",
    base: Annotated[str, typer.Option(metavar="TEXT", help="Part of the base, or its digest's start.")] = "",
    alias: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="The version that it means, not the newest.")
    ] = None,
    min_score: Annotated[
        list[str], typer.Option(metavar="METRIC=VALUE", help="Least score, such as exact_match=0.7.")
    ] = [],  # noqa: B006  typer copies it
    as_json: _AsJson = False,
) -> None:
    """List the newest version of each adapter, with its aliases and scores."""
    store = _open(catalog)
    only = Filter(adapter, base, alias, dict(map(_least, min_score)))
    listing = list_catalog(store, only)
    _print_notes(f"left out: {message}" for message in listing.damaged)
    if as_json:
        _print_json([_summary(record, of, catalog) for record, of in listing.rows])
    elif listing.rows:
        Console().print(_table(listing.rows))
    elif listing.damaged or store.newest_versions():
        Console().print(Text(f"{store.uri} holds no adapter that passes"))
    else:
        Console().print(Text(f"{store.uri} holds no adapter yet; raytune-ft train JOB.yaml publishes one"))


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


@app.command()
def promote(
    reference: _Reference,
    alias: _Alias,
    catalog: CatalogOption,
    expect: Annotated[
        str | None,
        typer.Option(metavar="vN|none", help="Move it only if it means this now: of several one wins."),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Let an alias mean a version."""
    store = _open(catalog)
    expected = None if expect is None else _expected(expect)
    record = store.resolve(reference)
    entry = store.set_alias(record.adapter, alias, record.version, expect=expected)
    _print_move(record.adapter, alias, entry, as_json)


@app.command()
def rollback(name: _Name, alias: _Alias, catalog: CatalogOption, as_json: _AsJson = False) -> None:
    """Let an alias mean what it meant before its last move; again, and it goes further back."""
    _print_move(name, alias, roll_back(_open(catalog), name, alias), as_json)


@app.command()
def history(name: _Name, alias: _Alias, catalog: CatalogOption, as_json: _AsJson = False) -> None:
    """Show all moves of an alias, the last one first."""
    moves = alias_history(_open(catalog), name, alias)
    if as_json:
        _print_json([{"move": number, **_move(name, alias, entry)} for number, entry in moves.items()])
        return
    table = Table("move", "to", "from", "when", "by", "")
    for number, entry in moves.items():
        undone = f"rollback to move {entry.restores}" if entry.restores else ""
        cells = (str(number), f"v{entry.version}", _from(entry), entry.created_at, entry.moved_by, undone)
        table.add_row(*map(_plain, cells))
    Console().print(table)


@app.command()
def diff(old: _Reference, new: _Reference, catalog: CatalogOption, as_json: _AsJson = False) -> None:
    """Show what differs between two versions: job, data, base, method, scores, libraries."""
    store = _open(catalog)
    records = store.resolve(old), store.resolve(new)
    changes = compare_records(*records)
    names = [record.reference for record in records]
    if as_json:
        _print_json({"old": names[0], "new": names[1], "changes": [asdict(change) for change in changes]})
    elif changes:
        Console().print(_changes(changes, names))
    else:
        Console(soft_wrap=True).print(Text(f"{names[0]} and {names[1]} were made alike, and score alike"))


@app.command()
def lineage(reference: _Reference, catalog: CatalogOption, as_json: _AsJson = False) -> None:
    """Show the versions that training began from, and which aliases meant them when."""
    found = lineage_of(_open(catalog), reference)
    if as_json:
        chain = [
            {
                **_origin(ancestor.record),
                "reference": ancestor.record.reference,
                "parent": ancestor.record.parent,
                "aliases": [asdict(period) for period in ancestor.periods],
            }
            for ancestor in found.chain
        ]
        _print_json({"chain": chain, "broken": found.broken})
    else:
        Console(soft_wrap=True).print(_tree(found))


@app.command()
def verify(
    catalog: CatalogOption,
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME[@ALIAS|@vN]]", help="Everything where not given.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and headers, not every byte.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Check records, aliases and contents. Exit code 2 if anything is wrong."""
    found = verify_catalog(_open(catalog), reference, quick=quick)
    if as_json:
        _print_json(asdict(found))
    else:
        _print_notes(found.notes)
        _print_problems(found.problems)
        if not found.problems:
            looked = f"{found.versions:,} versions, {found.files:,} files, {found.size_bytes:,} bytes"
            Console(soft_wrap=True).print(
                Text(f"{catalog} is sound: {looked}{' (--quick)' if quick else ''}")
            )
    if found.problems:
        raise typer.Exit(CatalogError.exit_code)


@app.command("serve-dir")
def serve_dir(
    catalog: CatalogOption,
    alias: Annotated[str, typer.Option(metavar="ALIAS", help="Which version of each adapter.")],
    to: Annotated[str, typer.Option(metavar="URI", help="A folder, file:// or s3:// uri.")],
    as_json: _AsJson = False,
) -> None:
    """Keep a flat folder in step with an alias, for Ray Serve LLM, vLLM and LoRAX."""
    target = open_storage(to)
    target.check()
    found = update_serve_dir(_open(catalog), alias, target)
    if as_json:
        _print_json(asdict(found))
    else:
        _print_notes(f"skipped: {note}" for note in found.skipped)
        _print_problems(found.problems)
        if not found.problems:
            done = {"copied": found.copied, "unchanged": found.unchanged, "removed": found.removed}
            text = "; ".join(f"{what}: {', '.join(names)}" for what, names in done.items() if names)
            Console(soft_wrap=True).print(Text(f"{to} is in step with {alias}. {text}".rstrip()))
    if found.problems:
        raise typer.Exit(CatalogError.exit_code)


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


def _least(text: str) -> tuple[str, float]:
    metric, _, value = text.partition("=")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if not metric or not math.isfinite(least):
        raise CatalogError(f"--min-score {text!r:.100}: write METRIC=VALUE, such as exact_match=0.7")
    return metric, least


def _expected(text: str) -> int:
    if text == "none":
        return 0
    number = VERSION.fullmatch(text)
    if not number or len(text) > 63:
        raise CatalogError(f"--expect {text!r:.100}: write a version such as v2, or none")
    return int(number[1])


def _move(adapter: str, alias: str, entry: AliasEntry) -> dict[str, object]:
    shown = {"adapter": adapter, "alias": alias, **entry.model_dump()}
    return {name: value for name, value in shown.items() if name not in ("token", "schema_version")}


def _from(entry: AliasEntry) -> str:
    return f"v{entry.previous}" if entry.previous else "-"


def _print_move(adapter: str, alias: str, entry: AliasEntry, as_json: bool) -> None:
    if as_json:
        _print_json(_move(adapter, alias, entry))
    else:
        before = f"; before it meant {_from(entry)}" if entry.previous else ""
        Console(soft_wrap=True).print(Text(f"{adapter}@{alias} means v{entry.version}{before}"))


def _changes(changes: Sequence[Change], names: Sequence[str]) -> Table:
    table = Table("", *names, "difference")
    for change in changes:
        old = "-" if change.only == "new" else _value(change.old)
        new = "-" if change.only == "old" else _value(change.new)
        difference = "" if change.difference is None else f"{change.difference:+.4g}"
        table.add_row(*map(_plain, (change.path, old, new, difference)))
    return table


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _origin(record: AdapterRecord) -> dict[str, str]:
    return {
        "created_at": record.created_at,
        "base": record.base.path,
        "base_digest": record.base.digest,
        "data_fingerprint": str(record.data.get("fingerprint", "-")),
        "publish_id": record.publish_id,
    }


def _tree(found: Lineage) -> Tree:
    root = branch = Tree(_plain(found.chain[0].record.reference))
    for ancestor in found.chain:
        if ancestor is not found.chain[0]:
            branch = branch.add(_plain(f"parent: {ancestor.record.reference}"))
        for name, value in _origin(ancestor.record).items():
            branch.add(_plain(f"{name.replace('_', ' ')}: {value}"))
        for period in ancestor.periods:
            until = f"until {period.until}" if period.until else "until now"
            by = f" (moved by {period.moved_by})" if period.moved_by else ""
            branch.add(_plain(f"alias {period.alias}: from {period.since} {until}{by}"))
    if found.broken is not None:
        branch.add(_plain(f"parent: {found.chain[-1].record.parent}: {found.broken}"))
    return root


def _table(rows: Iterable[tuple[AdapterRecord, Mapping[str, int]]]) -> Table:
    table = Table("adapter", "version", "aliases", "base", "scores", "created")
    for record, of in rows:
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


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        typer.echo(_one_line(f"note: {note}"), err=True)


def _print_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        typer.echo(_one_line(f"raytune-ft: {problem}"), err=True)


def _one_line(text: str) -> str:
    return _plain(text).plain.replace("\n", " ")


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value))
