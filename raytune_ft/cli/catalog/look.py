"""`raytune-ft catalog` ls, show, diff, lineage: what a catalog holds, and where it came from."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from raytune_ft.catalog import (
    AdapterRecord,
    Change,
    Filter,
    Lineage,
    Trust,
    check_alias,
    compare_records,
    fingerprint,
    lineage_of,
    list_catalog,
)
from raytune_ft.catalog.record import selection_texts
from raytune_ft.cli.catalog.base import (
    AsJson,
    CatalogOption,
    Reference,
    app,
    open_catalog,
    plain,
    print_json,
    print_notes,
)
from raytune_ft.errors import CatalogError


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
    as_json: AsJson = False,
) -> None:
    """List the newest version of each adapter, with its aliases and scores."""
    if alias is not None:
        check_alias(alias)
    store = open_catalog(catalog)
    only = Filter(adapter, base, alias, dict(map(_least, min_score)))
    listing = list_catalog(store, only)
    print_notes((*listing.notes, *(f"left out: {message}" for message in listing.damaged)))
    if as_json:
        print_json([_summary(record, of, store.uri) for record, of in listing.rows])
    elif listing.rows:
        Console().print(_table(listing.rows))
    elif listing.damaged or store.newest_versions():
        Console().print(plain(f"{store.uri} holds no adapter that passes"))
    else:
        Console().print(plain(f"{store.uri} holds no adapter yet; raytune-ft train JOB.yaml publishes one"))


@app.command()
def show(reference: Reference, catalog: CatalogOption, as_json: AsJson = False) -> None:
    """Show where a version came from: base, method, data, scores, files."""
    store = open_catalog(catalog)
    record = store.resolve(reference)
    aliases = store.aliases(record.adapter)
    if as_json:
        signer = fingerprint(record.signature.public_key) if record.signature else None
        told = {"signer": signer, "signature_problem": Trust().problem(record)}
        print_json({**_summary(record, aliases, store.uri), **record.model_dump(mode="json"), **told})
    else:
        Console().print(_facts(record, aliases, store.uri))


@app.command()
def diff(old: Reference, new: Reference, catalog: CatalogOption, as_json: AsJson = False) -> None:
    """Show what differs between two versions: job, data, base, method, scores, libraries."""
    store = open_catalog(catalog)
    records = store.resolve(old), store.resolve(new)
    changes = compare_records(*records)
    names = [record.reference for record in records]
    if as_json:
        print_json({"old": names[0], "new": names[1], "changes": [asdict(change) for change in changes]})
    elif changes:
        Console().print(_changes(changes, names))
    else:
        Console(soft_wrap=True).print(plain(f"{names[0]} and {names[1]} were made alike, and score alike"))


@app.command()
def lineage(reference: Reference, catalog: CatalogOption, as_json: AsJson = False) -> None:
    """Show the versions that training began from or that were merged, and which aliases meant them when."""
    found = lineage_of(open_catalog(catalog), reference)
    if as_json:
        print_json(_lineage(found))
    else:
        root = Tree(plain(found.chain[0].record.reference))
        _grow(root, found)
        Console(soft_wrap=True).print(root)


def _summary(record: AdapterRecord, aliases: Mapping[str, int], catalog: str) -> dict[str, object]:
    return {
        "adapter": record.adapter,
        "version": record.version,
        "aliases": dict(aliases),
        "uri": record.uri(catalog),
        "base": record.base.path,
        "scores_after": record.scores_after,
        "scored_examples": record.scored_examples,
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


def _changes(changes: Sequence[Change], names: Sequence[str]) -> Table:
    table = Table("", *names, "difference")
    for change in changes:
        old = "-" if change.only == "new" else _value(change.old)
        new = "-" if change.only == "old" else _value(change.new)
        difference = "" if change.difference is None else f"{change.difference:+.4g}"
        table.add_row(*map(plain, (change.path, old, new, difference)))
    return table


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _origin(record: AdapterRecord) -> dict[str, str]:
    return {
        "created_at": record.created_at,
        "base": record.base.path,
        "base_digest": record.base.digest,
        **({} if (told := record.base.tokenizer_digest) is None else {"tokenizer_digest": told}),
        "data_fingerprint": str(record.data.get("fingerprint", "-")),
        "publish_id": record.publish_id,
    }


def _lineage(found: Lineage) -> dict[str, object]:
    chain = [
        {
            **_origin(ancestor.record),
            "reference": ancestor.record.reference,
            "parent": ancestor.record.parent,
            "merged_from": [_lineage(source) for source in ancestor.merged_from],
            "aliases": [asdict(period) for period in ancestor.periods],
        }
        for ancestor in found.chain
    ]
    return {"reference": found.reference, "chain": chain, "broken": found.broken}


def _grow(branch: Tree, found: Lineage) -> None:
    """Add what is known of a version, whose name the branch bears, and of its ancestors."""
    for at, ancestor in enumerate(found.chain):
        if at:
            branch = branch.add(plain(f"parent: {ancestor.record.reference}"))
        for name, value in _origin(ancestor.record).items():
            branch.add(plain(f"{name.replace('_', ' ')}: {value}"))
        for period in ancestor.periods:
            until = f"until {period.until}" if period.until else "until now"
            by = f" (moved by {period.moved_by})" if period.moved_by else ""
            branch.add(plain(f"alias {period.alias}: from {period.since} {until}{by}"))
        for source in ancestor.merged_from:
            if source.chain:
                _grow(branch.add(plain(f"merged from: {source.chain[0].record.reference}")), source)
            else:
                branch.add(plain(f"merged from: {source.reference}: {source.broken}"))
    if found.chain and found.broken is not None:
        branch.add(plain(f"parent: {found.chain[-1].record.parent}: {found.broken}"))


def _table(rows: Iterable[tuple[AdapterRecord, Mapping[str, int]]]) -> Table:
    table = Table("adapter", "version", "aliases", "base", "scores", "created")
    for record, of in rows:
        cells = (
            record.adapter,
            f"v{record.version}",
            _aliases(of),
            record.base.path,
            _scores(record.scores_after, record.scored_examples),
            record.created_at[:16].replace("T", " "),
        )
        table.add_row(*(plain(cell) for cell in cells))
    return table


def _facts(record: AdapterRecord, aliases: Mapping[str, int], catalog: str) -> Table:
    facts = {
        "adapter": f"{record.reference} ({record.kind})",
        "aliases": _aliases(aliases),
        "record": record.uri(catalog),
        "created": f"{record.created_at} by raytune-ft {record.code_version}",
        "base": f"{record.base.path} ({record.base.digest})",
        "tokenizer": record.base.tokenizer_digest or "-",
        "method": json.dumps(record.method),
        "data": f"fingerprint {record.data.get('fingerprint', '-')}",
        "training": f"{record.steps:,} steps, {record.learned_tokens:,} learned of {record.tokens:,} tokens",
        **{title.lower(): text for title, text in selection_texts(record.selection).items()},
        "loss": "-" if record.loss is None else f"{record.loss:.4f}",
        "scores before": _scores(record.scores_before, record.scored_examples),
        "scores after": _scores(record.scores_after, record.scored_examples),
        "notices": "\n".join(record.notices) or "-",
        "forgetting": "-" if record.forgetting is None else f"{record.forgetting:+.4g}",
        "signature": _signature(record),
        "continues": record.parent or "-",
        "merged from": ", ".join(record.merged_from) or "-",
        "copy of": _copied_from(record),
        "libraries": ", ".join(f"{name} {version}" for name, version in record.library_versions.items()),
        "files": "\n".join(f"{entry.name}  {entry.size_bytes:,} bytes" for entry in record.files),
    }
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), plain(value))
    return table


def _signature(record: AdapterRecord) -> str:
    if record.signature is None:
        return "-"
    return Trust().problem(record) or f"valid, by {fingerprint(record.signature.public_key)}"


def _copied_from(record: AdapterRecord) -> str:
    origin = record.origin
    return f"{origin.reference} of {origin.catalog}, created {origin.created_at}" if origin else "-"


def _aliases(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias} → v{version}" for alias, version in aliases.items()) or "-"


def _scores(scores: Mapping[str, float] | None, examples: Mapping[str, int] | None) -> str:
    """Scores with the number of examples that they were measured on, where the record says it."""

    def measured_on(score: tuple[str, float]) -> int | None:
        return (examples or {}).get(score[0])

    texts = []
    for count, alike in groupby((scores or {}).items(), measured_on):
        text = ", ".join(f"{name} {value:.3g}" for name, value in alike)
        texts.append(text if count is None else f"{text} (of {count:,})")
    return ", ".join(texts) or "-"
