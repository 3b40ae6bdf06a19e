"""`raytune-ft catalog` rm, restore, gc: versions that shall mean nothing any more, and their files."""

import re
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from raytune_ft.catalog import Swept, remove_version, restore_version, sweep
from raytune_ft.cli.catalog.base import (
    AsJson,
    CatalogOption,
    app,
    open_catalog,
    plain,
    print_json,
    print_notes,
)
from raytune_ft.cli.catalog.move import open_to_write
from raytune_ft.errors import CatalogError

_SECONDS = {"m": 60, "h": 3_600, "d": 86_400}
_DURATION = re.compile(r"([0-9]{1,5})([mhd])")

Version = Annotated[str, typer.Argument(metavar="NAME@vN", help="A version by its number.")]


@app.command("rm")
def remove(
    version: Version,
    catalog: CatalogOption,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Told to whoever looks for it later.")] = "",
    as_json: AsJson = False,
) -> None:
    """Remove a version: no name means it any more. Its record stays; gc takes its files later."""
    removal = remove_version(open_to_write(catalog), version, reason)
    if as_json:
        print_json(removal.model_dump(exclude={"schema_version", "token"}))
    else:
        Console(soft_wrap=True).print(plain(f"{version} is removed; until gc it can be restored"))


@app.command()
def restore(version: Version, catalog: CatalogOption, as_json: AsJson = False) -> None:
    """Take the removal of a version back, as long as gc has not taken its files."""
    record = restore_version(open_to_write(catalog), version)
    if as_json:
        print_json({"adapter": record.adapter, "version": record.version})
    else:
        Console(soft_wrap=True).print(plain(f"{record.reference} is restored"))


@app.command()
def gc(
    catalog: CatalogOption,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Such as 90m, 12h or 7d; longer than any upload takes.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Take nothing, print what would be.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take away old files that no version names which is left, and old tokenised data."""
    age_s = _seconds(older_than)
    swept = sweep(open_catalog(catalog), age_s, dry_run=dry_run)
    if as_json:
        kinds = {"contents": swept.contents, "cached": swept.cached}
        told = {kind: [asdict(found) for found in objects] for kind, objects in kinds.items()}
        left = {"unfinished": swept.unfinished, "note": swept.note}
        print_json({**told, **left, "size_bytes": swept.size_bytes, "dry_run": dry_run})
    else:
        _print_swept(swept, catalog, dry_run)


def _seconds(age: str) -> float:
    match = _DURATION.fullmatch(age)
    if not match:
        raise CatalogError(f"--older-than {age!r:.100}: write a number and m, h or d, such as 90m, 12h or 7d")
    return int(match[1]) * _SECONDS[match[2]]


def _print_swept(swept: Swept, catalog: str, dry_run: bool) -> None:
    console = Console(soft_wrap=True)
    for found in (*swept.contents, *swept.cached):
        console.print(plain(f"{found.key}  {found.size_bytes:,} bytes"))
    for place in swept.unfinished:
        console.print(plain(f"{place}  unfinished"))
    if swept.note is not None:
        print_notes([swept.note])
    counted = (
        f"{len(swept.contents):,} contents, {len(swept.cached):,} pieces of tokenised data, "
        f"{len(swept.unfinished):,} unfinished uploads"
    )
    done = "would be removed from" if dry_run else "removed from"
    console.print(plain(f"{done} {catalog}: {counted}, {swept.size_bytes:,} bytes"))
