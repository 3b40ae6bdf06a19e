"""`raytune-ft catalog merge`: several adapters into one, or an adapter into its base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from raytune_ft.catalog import AdapterRecord, Trust
from raytune_ft.cli.catalog.base import (
    AsJson,
    CatalogOption,
    app,
    local_place,
    open_catalog,
    plain,
    print_json,
)
from raytune_ft.cli.catalog.trust import RequireSignature, TrustedKeys, trust_of
from raytune_ft.errors import CatalogError

Name = Annotated[str | None, typer.Option("--as", metavar="NAME", help="Publish the result so.")]
Alias = Annotated[str | None, typer.Option(metavar="ALIAS", help="Moves to the result.")]
Method = Annotated[
    str | None,
    typer.Option(help="cat (default), linear, ties, dare_linear or dare_ties.", show_default=False),
]
Weights = Annotated[
    str | None, typer.Option(metavar="W,W,...", help="One for each adapter; equal where not given.")
]
Density = Annotated[
    float | None, typer.Option(help="Of ties and dare: share of the values that is kept; 0.5.")
]
MajoritySign = Annotated[
    str | None, typer.Option(metavar="total|frequency", help="Of ties: what elects a sign; total.")
]
Seed = Annotated[int | None, typer.Option(help="Of dare: which values are dropped; 0.")]
IntoBase = Annotated[
    bool, typer.Option("--into-base", help="Merge one adapter into its base: a whole model.")
]
To = Annotated[
    Path | None,
    typer.Option(
        parser=local_place, metavar="PATH", help="With --into-base: new or empty folder, instead of --as."
    ),
]
Base = Annotated[str | None, typer.Option(metavar="URI", help="With --into-base: where the base is now.")]
BaseValues = Annotated[
    str | None,
    typer.Option(metavar="quantised|original", help="With --into-base: of a base in 4 or 8 bits."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base.")
]


@dataclass(frozen=True)
class _IntoBase:
    """What a merge into a base is asked for."""

    references: list[str]
    name: str | None
    alias: str | None
    to: Path | None
    base: str | None
    base_weights: str | None
    trust_remote_code: bool
    trust: Trust


@app.command()
def merge(
    references: Annotated[list[str], typer.Argument(metavar="NAME[@ALIAS|@vN]...")],
    catalog: CatalogOption,
    name: Name = None,
    alias: Alias = None,
    method: Method = None,
    weights: Weights = None,
    density: Density = None,
    majority_sign: MajoritySign = None,
    seed: Seed = None,
    into_base: IntoBase = False,
    to: To = None,
    base: Base = None,
    base_weights: BaseValues = None,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = False,
    trusted_keys: TrustedKeys = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Merge adapters of one base into a new adapter, or one adapter into its base."""
    combining = {
        "--method": method,
        "--weights": weights,
        "--density": density,
        "--majority-sign": majority_sign,
        "--seed": seed,
    }
    whole = {
        "--to": to,
        "--base": base,
        "--base-weights": base_weights,
        "--trust-remote-code": trust_remote_code or None,
    }
    _refuse_any(combining if into_base else whole, "with" if into_base else "without")
    trust = trust_of(require_signature, trusted_keys)
    if into_base:
        asked = _IntoBase(references, name, alias, to, base, base_weights, trust_remote_code, trust)
        _merge_into_base(asked, catalog, as_json)
        return
    if name is None:
        raise CatalogError("catalog merge: --as is missing; name the adapter that the result becomes")
    from raytune_ft.merge import Combination, combine_adapters

    how = Combination.of(
        method or "cat",
        len(references),
        weights=None if weights is None else _numbers(weights),
        density=density,
        majority_sign=majority_sign,
        seed=seed,
    )
    store = open_catalog(catalog)
    record = combine_adapters(store, references, how, name=name, alias=alias, trust=trust)
    _print_published(record, store.uri, as_json)


def _merge_into_base(asked: _IntoBase, catalog: str, as_json: bool) -> None:
    if len(asked.references) != 1:
        raise CatalogError(
            f"catalog merge --into-base: {len(asked.references)} adapters; merge them into one first, with "
            "--as"
        )
    if (asked.name is None) == (asked.to is None):
        raise CatalogError(
            "catalog merge --into-base: give --to FOLDER or --as NAME, one of them, for where the model goes"
        )
    if asked.alias is not None and asked.name is None:
        raise CatalogError(f"--alias {asked.alias!r:.100}: only what is published with --as can have one")
    from raytune_ft.merge import BaseWeights, merge_into_folder, publish_merged

    kinds: dict[str, BaseWeights] = {kind: kind for kind in get_args(BaseWeights)}
    kind = kinds.get(asked.base_weights or "quantised")
    if kind is None:
        raise CatalogError(f"--base-weights {asked.base_weights!r:.60}: write {' or '.join(kinds)}")
    store, (reference,), to = open_catalog(catalog), asked.references, asked.to
    if asked.name is not None:
        record = publish_merged(
            store,
            reference,
            name=asked.name,
            alias=asked.alias,
            base=asked.base,
            base_weights=kind,
            trust_remote_code=asked.trust_remote_code,
            trust=asked.trust,
        )
        _print_published(record, store.uri, as_json)
    elif to is not None:
        record = merge_into_folder(
            store,
            reference,
            to,
            base=asked.base,
            base_weights=kind,
            trust_remote_code=asked.trust_remote_code,
            trust=asked.trust,
        )
        if as_json:
            print_json({"merged_from": [record.reference], "to": str(to.absolute())})
        else:
            Console(soft_wrap=True).print(
                plain(f"{to} is a model: {record.reference} merged into {record.base.path}")
            )


def _refuse_any(options: Mapping[str, object], when: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise CatalogError(f"{option} means nothing {when} --into-base; leave it out")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise CatalogError(f"--weights {text!r:.100}: write numbers such as 0.5,0.5") from None


def _print_published(record: AdapterRecord, catalog: str, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "adapter": record.adapter,
                "version": record.version,
                "kind": record.kind,
                "merged_from": list(record.merged_from),
                "uri": record.uri(catalog),
            }
        )
    else:
        sources = ", ".join(record.merged_from)
        Console(soft_wrap=True).print(plain(f"{record.reference} ({record.kind}) was merged from {sources}"))
