"""`raytune-ft catalog` promote, rollback, history: which version an alias means."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from raytune_ft.catalog import AliasEntry, Catalog, alias_history, roll_back
from raytune_ft.cli.catalog.base import (
    AdapterName,
    AliasName,
    AsJson,
    CatalogOption,
    Reference,
    app,
    open_catalog,
    plain,
    print_json,
)
from raytune_ft.errors import CatalogError
from raytune_ft.spec.values import VERSION


@app.command()
def promote(
    reference: Reference,
    alias: AliasName,
    catalog: CatalogOption,
    expect: Annotated[
        str | None,
        typer.Option(metavar="vN|none", help="Move it only if it means this now: of several one wins."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let an alias mean a version."""
    expected = None if expect is None else _expected(expect)
    store = open_to_write(catalog)
    record = store.resolve(reference)
    entry = store.set_alias(record.adapter, alias, record.version, expect=expected)
    _print_move(record.adapter, alias, entry, as_json)


@app.command()
def rollback(name: AdapterName, alias: AliasName, catalog: CatalogOption, as_json: AsJson = False) -> None:
    """Let an alias mean what it meant before its last move; again, and it goes further back."""
    _print_move(name, alias, roll_back(open_to_write(catalog), name, alias), as_json)


@app.command()
def history(name: AdapterName, alias: AliasName, catalog: CatalogOption, as_json: AsJson = False) -> None:
    """Show all moves of an alias, the last one first."""
    moves = alias_history(open_catalog(catalog), name, alias)
    if as_json:
        print_json([{"move": number, **_move(name, alias, entry)} for number, entry in moves.items()])
        return
    table = Table("move", "to", "from", "when", "by", "")
    for number, entry in moves.items():
        undone = f"rollback to move {entry.restores}" if entry.restores else ""
        cells = (str(number), f"v{entry.version}", _from(entry), entry.created_at, entry.moved_by, undone)
        table.add_row(*map(plain, cells))
    Console().print(table)


def open_to_write(uri: str) -> Catalog:
    """A catalog that is there, in a store on whose conditional writes all that moves or removes rests."""
    catalog = open_catalog(uri)
    catalog.check_there()
    catalog.check()
    return catalog


def _expected(text: str) -> int:
    if text == "none":
        return 0
    number = VERSION.fullmatch(text)
    if not number or len(text) > 63 or not int(number[1]):
        raise CatalogError(f"--expect {text!r:.100}: write a version such as v2, or none")
    return int(number[1])


def _move(adapter: str, alias: str, entry: AliasEntry) -> dict[str, object]:
    shown = {"adapter": adapter, "alias": alias, **entry.model_dump()}
    return {
        name: value for name, value in shown.items() if name not in ("token", "schema_version", "highest")
    }


def _from(entry: AliasEntry) -> str:
    return f"v{entry.previous}" if entry.previous else "-"


def _print_move(adapter: str, alias: str, entry: AliasEntry, as_json: bool) -> None:
    if as_json:
        print_json(_move(adapter, alias, entry))
    else:
        before = f"; before it meant {_from(entry)}" if entry.previous else ""
        Console(soft_wrap=True).print(plain(f"{adapter}@{alias} means v{entry.version}{before}"))
