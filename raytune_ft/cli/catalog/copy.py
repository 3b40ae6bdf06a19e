"""`raytune-ft catalog` export, import: versions from one catalog to another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from raytune_ft.catalog import Catalog, Copy, Signer, copy_all_versions, copy_version
from raytune_ft.cli.catalog.base import AsJson, CatalogOption, Reference, app, open_catalog, plain, print_json
from raytune_ft.cli.catalog.trust import RequireSignature, TrustedKeys, trust_of

Alias = Annotated[
    str | None, typer.Option(metavar="ALIAS", help="Moves to the copy, in the catalog that gets it.")
]
AllVersions = Annotated[
    bool, typer.Option("--all-versions", help="Copy every version, the oldest first; write NAME alone.")
]
Sign = Annotated[bool, typer.Option("--sign", help="Sign the copy with the key in RAYTUNE_SIGNING_KEY.")]


@dataclass(frozen=True)
class _Asked:
    """What both commands are asked for."""

    reference: str
    alias: str | None
    all_versions: bool
    sign: bool
    require_signature: bool
    trusted_keys: list[Path]
    as_json: bool


@app.command("export")
def export_version(
    reference: Reference,
    catalog: CatalogOption,
    to: Annotated[str, typer.Option(metavar="URI", help="The catalog that gets the copy.")],
    alias: Alias = None,
    all_versions: AllVersions = False,
    sign: Sign = False,
    require_signature: RequireSignature = False,
    trusted_keys: TrustedKeys = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Copy a version to another catalog; done before, it is the same copy."""
    asked = _Asked(reference, alias, all_versions, sign, require_signature, trusted_keys, as_json)
    _copy(catalog, to, asked)


@app.command("import")
def import_version(
    reference: Reference,
    catalog: CatalogOption,
    from_: Annotated[str, typer.Option("--from", metavar="URI", help="The catalog that has it.")],
    alias: Alias = None,
    all_versions: AllVersions = False,
    sign: Sign = False,
    require_signature: RequireSignature = False,
    trusted_keys: TrustedKeys = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Copy a version from another catalog; done before, it is the same copy."""
    asked = _Asked(reference, alias, all_versions, sign, require_signature, trusted_keys, as_json)
    _copy(from_, catalog, asked)


def _copy(source_uri: str, target_uri: str, asked: _Asked) -> None:
    trust = trust_of(asked.require_signature, asked.trusted_keys)
    signer = Signer.from_environment() if asked.sign else None
    source, target = open_catalog(source_uri), Catalog.at(target_uri)
    copies: Sequence[Copy]
    if asked.all_versions:
        copies = copy_all_versions(
            source, target, asked.reference, alias=asked.alias, signer=signer, trust=trust
        )
    else:
        copies = [
            copy_version(source, target, asked.reference, alias=asked.alias, signer=signer, trust=trust)
        ]
    means = None
    if asked.alias is not None:
        # It stays where it has meant the copy or a newer version.
        means = target.newest_alias_entry(copies[-1].copied.adapter, asked.alias)[1]
    pairs = [(copy.original.reference, copy.copied.reference) for copy in copies]
    if asked.as_json:
        told = [{"original": original, "copy": copied} for original, copied in pairs]
        alias = {"alias": asked.alias, "alias_version": means.version if means else None}
        print_json({"source": source.uri, "target": target.uri, "copies": told, **alias})
        return
    console = Console(soft_wrap=True)
    for original, copied in pairs:
        console.print(plain(f"{original} of {source.uri} is {copied} in {target.uri}"))
    if means is not None:
        console.print(plain(f"{copies[-1].copied.adapter}@{asked.alias} means v{means.version} there"))
