"""`raytune-ft catalog merge`: several adapters into one, or an adapter into its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from raytune_ft.catalog import AdapterRecord
from raytune_ft.cli.catalog.base import AsJson, CatalogOption, app, open_catalog, plain, print_json
from raytune_ft.errors import CatalogError


@app.command()
def merge(
    references: Annotated[list[str], typer.Argument(metavar="NAME[@ALIAS|@vN]...")],
    catalog: CatalogOption,
    name: Annotated[
        str | None, typer.Option("--as", "--publish-as", metavar="NAME", help="Publish the result so.")
    ] = None,
    alias: Annotated[str | None, typer.Option(metavar="ALIAS", help="Moves to the result.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="cat (default), linear, ties, dare_linear or dare_ties.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="One for each adapter; equal where not given.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Of ties and dare: share of the values that is kept; 0.5.")
    ] = None,
    majority_sign: Annotated[
        str | None, typer.Option(metavar="total|frequency", help="Of ties: what elects a sign; total.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare: which values are dropped; 0.")] = None,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Merge one adapter into its base: a whole model.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="With --into-base: new or empty folder, instead of --as.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="URI", help="With --into-base: where the base is now.")
    ] = None,
    base_weights: Annotated[
        str | None,
        typer.Option(metavar="quantised|original", help="With --into-base: of a base in 4 or 8 bits."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base.")
    ] = False,
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
    if into_base:
        _into_base(references, catalog, name, alias, to, base, base_weights, trust_remote_code, as_json)
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
    record = combine_adapters(open_catalog(catalog), references, how, name=name, alias=alias)
    _print_published(record, catalog, as_json)


def _into_base(
    references: list[str],
    catalog: str,
    name: str | None,
    alias: str | None,
    to: Path | None,
    base: str | None,
    base_weights: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    if len(references) != 1:
        raise CatalogError(
            f"catalog merge --into-base: {len(references)} adapters; merge them into one first, with --as"
        )
    if (name is None) == (to is None):
        raise CatalogError(
            "catalog merge --into-base: give --to FOLDER or --as NAME, one of them, for where the model goes"
        )
    if alias is not None and name is None:
        raise CatalogError(f"--alias {alias!r:.100}: only what is published with --as can have one")
    from raytune_ft.merge import BaseWeights, merge_into_folder, publish_merged

    kinds: dict[str, BaseWeights] = {kind: kind for kind in get_args(BaseWeights)}
    kind = kinds.get(base_weights or "quantised")
    if kind is None:
        raise CatalogError(f"--base-weights {base_weights!r:.60}: write {' or '.join(kinds)}")
    store = open_catalog(catalog)
    if name is not None:
        record = publish_merged(
            store,
            references[0],
            name=name,
            alias=alias,
            base=base,
            base_weights=kind,
            trust_remote_code=trust_remote_code,
        )
        _print_published(record, catalog, as_json)
    elif to is not None:
        record = merge_into_folder(
            store, references[0], to, base=base, base_weights=kind, trust_remote_code=trust_remote_code
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
