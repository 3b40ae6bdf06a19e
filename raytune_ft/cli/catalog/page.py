"""`raytune-ft catalog report`: all adapters as one HTML page."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from raytune_ft import __version__
from raytune_ft.catalog.listing import list_versions
from raytune_ft.cli.catalog.base import (
    AsJson,
    CatalogOption,
    app,
    local_place,
    open_catalog,
    plain,
    print_json,
    print_notes,
)


@app.command()
def report(
    catalog: CatalogOption,
    to: Annotated[Path, typer.Option(parser=local_place, metavar="FILE.html", help="Its folder must exist.")],
    as_json: AsJson = False,
) -> None:
    """Write all adapters as one HTML page that needs no server: search, sort, versions, lineage."""
    from raytune_ft.catalog_page import CatalogPage, write_catalog_page

    store = open_catalog(catalog)
    found = list_versions(store)
    print_notes((*found.notes, *(f"left out: {message}" for message in found.damaged)))
    page = CatalogPage(
        uri=store.uri,
        histories=found,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        made_by=f"raytune-ft {__version__}",
    )
    write_catalog_page(page, to)
    counts = {"adapters": len(found.adapters), "left_out": len(found.damaged)}
    if as_json:
        print_json({"to": str(to.absolute()), **counts})
    else:
        left_out = f", {counts['left_out']:,} left out" if found.damaged else ""
        plural = "" if counts["adapters"] == 1 else "s"
        Console(soft_wrap=True).print(plain(f"{to} shows {counts['adapters']:,} adapter{plural}{left_out}"))
