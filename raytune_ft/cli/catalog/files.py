"""`raytune-ft catalog` pull, verify, serve-dir: the files of versions."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from raytune_ft.catalog import (
    Trust,
    update_serve_dir,
)
from raytune_ft.catalog import verify as verify_catalog
from raytune_ft.cli.catalog.base import (
    AsJson,
    CatalogOption,
    Reference,
    app,
    local_place,
    open_catalog,
    plain,
    print_json,
    print_notes,
    print_problems,
)
from raytune_ft.cli.catalog.trust import RequireSignature, TrustedKeys, trust_of
from raytune_ft.errors import CatalogError
from raytune_ft.storage import open_storage


@app.command()
def pull(
    reference: Reference,
    catalog: CatalogOption,
    to: Annotated[
        Path | None,
        typer.Option(parser=local_place, metavar="PATH", help="New or empty folder; ./NAME where not given."),
    ] = None,
    require_signature: RequireSignature = False,
    trusted_keys: TrustedKeys = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Fetch the files of a version into a folder, each checked against its sha256."""
    folder = to or Path(reference.partition("@")[0])
    trust = trust_of(require_signature, trusted_keys)
    record = open_catalog(catalog).pull(reference, folder, trust=trust)
    if as_json:
        print_json({"adapter": record.adapter, "version": record.version, "to": str(folder.absolute())})
    else:
        size_bytes = sum(entry.size_bytes for entry in record.files)
        counted = f"{len(record.files)} files, {size_bytes:,} bytes"
        Console(soft_wrap=True).print(plain(f"{record.reference} is in {folder} ({counted})"))


@app.command()
def verify(
    catalog: CatalogOption,
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME[@ALIAS|@vN]]", help="Everything where not given.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and headers, not every byte.")] = False,
    require_signature: RequireSignature = False,
    trusted_keys: TrustedKeys = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Check records, signatures, aliases and contents. Exit code 2 if anything is wrong."""
    trust = Trust.load(trusted_keys, required=require_signature)
    found = verify_catalog(open_catalog(catalog), reference, quick=quick, trust=trust)
    if as_json:
        print_json(asdict(found))
    else:
        print_notes(found.notes)
        print_problems(found.problems)
        if not found.problems:
            looked = f"{found.versions:,} versions, {found.files:,} files, {found.size_bytes:,} bytes"
            Console(soft_wrap=True).print(
                plain(f"{catalog} is sound: {looked}{' (--quick)' if quick else ''}")
            )
    if found.problems:
        raise typer.Exit(CatalogError.exit_code)


@app.command("serve-dir")
def serve_dir(
    catalog: CatalogOption,
    alias: Annotated[str, typer.Option(metavar="ALIAS", help="Which version of each adapter.")],
    to: Annotated[str, typer.Option(metavar="URI", help="A folder, file:// or s3:// uri.")],
    require_signature: RequireSignature = False,
    trusted_keys: TrustedKeys = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Keep a flat folder in step with an alias, for Ray Serve LLM, vLLM and LoRAX."""
    trust = trust_of(require_signature, trusted_keys)
    target = open_storage(to)
    target.check()
    found = update_serve_dir(open_catalog(catalog), alias, target, trust=trust)
    if as_json:
        print_json(asdict(found))
    else:
        print_notes((*(f"skipped: {note}" for note in found.skipped), *found.notes))
        print_problems(found.problems)
        if not found.problems:
            done = {"copied": found.copied, "unchanged": found.unchanged, "removed": found.removed}
            text = "; ".join(f"{what}: {', '.join(names)}" for what, names in done.items() if names)
            Console(soft_wrap=True).print(plain(f"{to} is in step with {alias}. {text}".rstrip()))
    if found.problems:
        raise typer.Exit(CatalogError.exit_code)
