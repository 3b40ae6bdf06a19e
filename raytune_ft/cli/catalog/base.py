"""What all commands of `raytune-ft catalog` share: the app, its options, and how results are printed."""

import json
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.text import Text

from raytune_ft.catalog import Catalog

CatalogOption = Annotated[
    str,
    typer.Option(
        "--catalog",
        metavar="URI",
        envvar="RAYTUNE_CATALOG",
        help="A folder, file:// or s3:// uri.",
    ),
]
Reference = Annotated[
    str, typer.Argument(metavar="NAME[@ALIAS|@vN]", help="A bare name means its newest version.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.")]
AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="Such as production.")]

app = typer.Typer(
    help="List, compare, check, pull, promote and serve what was published.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def open_catalog(uri: str) -> Catalog:
    catalog = Catalog.at(uri)
    catalog.storage.check()
    return catalog


def plain(text: str) -> Text:
    """Text of a record without what a terminal would obey: others wrote it."""
    unknown = "\N{REPLACEMENT CHARACTER}"
    return Text("".join(letter if letter.isprintable() or letter == "\n" else unknown for letter in text))


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        typer.echo(_one_line(f"note: {note}"), err=True)


def print_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        typer.echo(_one_line(f"raytune-ft: {problem}"), err=True)


def _one_line(text: str) -> str:
    return plain(text).plain.replace("\n", " ")


def print_json(value: object) -> None:
    typer.echo(json.dumps(value))
