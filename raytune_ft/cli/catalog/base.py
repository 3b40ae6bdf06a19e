"""What all commands of `raytune-ft catalog` share: the app, its options, and how results are printed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from raytune_ft.catalog import Catalog
from raytune_ft.errors import BadInput, CatalogError
from raytune_ft.spec.values import uri_mistake
from raytune_ft.storage import FolderStorage
from raytune_ft.terminal import visible

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
    """A catalog that is read: where it is a folder, it has to exist, though it may be empty."""
    catalog = Catalog.at(uri)
    catalog.storage.check()
    if isinstance(catalog.storage, FolderStorage) and not catalog.storage.root.exists():
        raise CatalogError(f"{catalog.uri}: no such folder; name one that holds a catalog")
    return catalog


def local_place(text: str) -> Path:
    """Read an option that names a file or folder of this machine; a Path would make one of any uri."""
    if "://" in text or uri_mistake(text):
        raise BadInput(f"{text}: is not on this machine; name a local file or folder")
    return Path(text)


def plain(text: str) -> Text:
    """Text of a record without what a terminal would obey: others wrote it."""
    return Text(visible(text))


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
