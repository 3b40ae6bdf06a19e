"""A catalog as one HTML page that needs nothing else: no request leaves it, and its script is its own."""

import base64
import hashlib
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_ft.catalog.listing import Histories, History
from raytune_ft.catalog.record import AdapterRecord
from raytune_ft.chart import MOST_POINTS, Tick, can_be_drawn, chart
from raytune_ft.errors import CatalogError
from raytune_ft.report import ScoreRow, page_templates, scale_for, score_rows, write_page
from raytune_ft.storage import disk_errors

_MOST_COLUMNS = 3
"""Metrics in the table."""
_MOST_METRICS = 20
"""Of one adapter, in its details."""
_MOST_CHARTED = 1_000
"""Adapters up to which the details have charts."""
_MOST_LINKS = 20
_DIGEST_CHARACTERS = 16


@dataclass(frozen=True)
class CatalogPage:
    """What the page shows."""

    uri: str
    histories: Histories
    made_at: str
    """ISO time in UTC."""
    made_by: str
    """Name and version of the program."""


@dataclass(frozen=True)
class Score:
    """A score after training."""

    value: float
    row: ScoreRow


@dataclass(frozen=True)
class Link:
    """A reference to a version; `anchor` is '' where the page does not show it."""

    text: str
    anchor: str


@dataclass(frozen=True)
class VersionRow:
    """One version of an adapter."""

    reference: str
    version: int
    created: str
    aliases: str
    scores: Mapping[str, Score]
    size_bytes: int
    size: str
    steps: str


@dataclass(frozen=True)
class MetricChart:
    """A score over the versions; places are per cent of the box from its upper left corner."""

    title: str
    lines: tuple[str, ...]
    """SVG path data."""
    points: tuple[tuple[float, float, str], ...]
    """Left and top of each version, and what is said of it."""
    versions: tuple[Tick, ...]
    values: tuple[Tick, ...]


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: its newest version, and what opens below it."""

    name: str
    aliases: tuple[str, ...]
    base: str
    versions: tuple[VersionRow, ...]
    """The newest first; at least one."""
    left_out: int
    """Versions that are not among them."""
    metrics: tuple[str, ...]
    """Of all these versions, the newest one's first; the first `_MOST_METRICS`."""
    charts: tuple[MetricChart, ...]
    facts: tuple[tuple[str, str], ...]
    lineage: tuple[tuple[str, tuple[Link, ...]], ...]
    command: str


def write_catalog_page(page: CatalogPage, path: Path) -> None:
    """Write the page; one that is there is replaced as a whole.

    Args:
        page: what to show.
        path: the HTML file; its folder must exist.

    Raises:
        CatalogError: the path is a folder's.
        StorageError: the file cannot be written.
    """
    with disk_errors(str(path)):
        if path.is_dir():
            raise CatalogError(f"{path}: is a folder; name a file in it, such as catalog.html")
    environment = page_templates()
    environment.filters["csp_source"] = _csp_source
    environment.filters["label"] = lambda metric: scale_for(metric).label
    rows = adapter_rows(page)
    text = environment.get_template("catalog_page.html.j2").render(
        page=page,
        rows=rows,
        metrics=_columns(rows),
        versions=sum(of.versions for of in page.histories.adapters),
    )
    with disk_errors(str(path)):
        write_page(text, path)


def adapter_rows(page: CatalogPage) -> list[AdapterRow]:
    """A row for each adapter, in the order given."""
    adapters = page.histories.adapters
    links = _Links(record for of in adapters for record in of.records)
    charted = len(adapters) <= _MOST_CHARTED
    return [_adapter_row(of, page.uri, links, charted) for of in adapters]


def size_text(size_bytes: int) -> str:
    """A size in few characters.

    >>> size_text(900), size_text(41_250_000)
    ('900 B', '39.3 MiB')
    """
    if size_bytes < 1024:
        return f"{size_bytes} B"
    power = min(3, (size_bytes.bit_length() - 1) // 10)
    return f"{size_bytes / 1024**power:,.1f} {'BKMG'[power]}iB"


class _Links:
    """Which versions the page shows, and what was made from which."""

    def __init__(self, records: Iterable[AdapterRecord]) -> None:
        self._shown: set[str] = set()
        self._names: set[str] = set()
        self._children: dict[str, list[str]] = defaultdict(list)
        for record in records:
            self._shown.add(record.reference)
            self._names.add(record.adapter)
            for origin in _origins(record):
                self._children[_name_of(origin)].append(record.reference)

    def to(self, references: Iterable[str]) -> tuple[Link, ...]:
        """A link to each version, or to its adapter where that version is not shown."""
        return tuple(Link(reference, self._anchor(reference)) for reference in references)

    def children(self, adapter: str) -> tuple[Link, ...]:
        """Versions of other adapters that were made from one of this adapter."""
        others = [child for child in self._children[adapter] if _name_of(child) != adapter]
        return self.to(others[:_MOST_LINKS])

    def _anchor(self, reference: str) -> str:
        if reference in self._shown:
            return reference
        return _name_of(reference) if _name_of(reference) in self._names else ""


def _origins(record: AdapterRecord) -> tuple[str, ...]:
    return (*([record.parent] if record.parent else []), *record.merged_from)


def _name_of(reference: str) -> str:
    return reference.partition("@")[0]


def _adapter_row(history: History, catalog: str, links: _Links, charted: bool) -> AdapterRow:
    newest, aliases = history.records[0], history.aliases
    named = dict.fromkeys(name for record in history.records for name in record.scores_after or {})
    metrics = tuple(named)[:_MOST_METRICS]
    lineage = {
        "continues": links.to([newest.parent] if newest.parent else []),
        "merged from": links.to(newest.merged_from),
        "went into": links.children(newest.adapter),
    }
    return AdapterRow(
        name=newest.adapter,
        aliases=tuple(f"{alias} → v{version}" for alias, version in aliases.items()),
        base=newest.base.path,
        versions=tuple(_version_row(record, aliases, metrics) for record in history.records),
        left_out=history.versions - len(history.records),
        metrics=metrics,
        charts=tuple(_chart(history.records, metric) for metric in metrics) if charted else (),
        facts=_facts(newest),
        lineage=tuple((name, found) for name, found in lineage.items() if found),
        command=f"raytune-ft catalog pull {newest.reference} --catalog {shlex.quote(catalog)}",
    )


def _version_row(record: AdapterRecord, aliases: Mapping[str, int], metrics: Sequence[str]) -> VersionRow:
    scores = record.scores_after or {}
    after = {name: scores[name] for name in metrics if name in scores}
    rows = score_rows(record.scores_before or {}, after, record.scored_examples or {})
    size_bytes = sum(entry.size_bytes for entry in record.files)
    return VersionRow(
        reference=record.reference,
        version=record.version,
        created=record.created_at[:16].replace("T", " "),
        aliases=", ".join(alias for alias, version in aliases.items() if version == record.version),
        scores={name: Score(value, row) for (name, value), row in zip(after.items(), rows, strict=True)},
        size_bytes=size_bytes,
        size=size_text(size_bytes),
        steps=f"{record.steps:,}",
    )


def _facts(record: AdapterRecord) -> tuple[tuple[str, str], ...]:
    method = ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in record.method.items()
    )
    facts = {
        "kind": record.kind,
        "base": f"{record.base.path} ({record.base.digest[:_DIGEST_CHARACTERS]})",
        "method": method or "–",
        "data": str(record.data.get("fingerprint", "–"))[:_DIGEST_CHARACTERS],
        "training": f"{record.steps:,} steps, {record.tokens:,} tokens, seed {record.seed}",
        "loss": "–" if record.loss is None else f"{record.loss:.4f}",
        "forgetting": "" if record.forgetting is None else f"{record.forgetting:.4g}",
        "notices": "; ".join(record.notices),
        "files": ", ".join(f"{entry.name} ({size_text(entry.size_bytes)})" for entry in record.files),
    }
    return tuple((name, value) for name, value in facts.items() if value)


def _chart(records: Sequence[AdapterRecord], metric: str) -> MetricChart:
    scale = scale_for(metric)
    history = [
        {"step": record.version, "score": score}
        for record in reversed(records)
        if (score := (record.scores_after or {}).get(metric)) is not None and can_be_drawn(score)
    ][-MOST_POINTS:]
    drawn = chart(scale.label, history, "score", dots="score")
    points = zip(drawn.dots, history, strict=True)
    return MetricChart(
        title=scale.label,
        lines=drawn.lines,
        points=tuple(
            (dot.left, dot.top, f"v{entry['step']}: {scale.text(entry['score'])}") for dot, entry in points
        ),
        versions=tuple(Tick(at.percent, f"v{at.text}") for at in drawn.steps),
        values=drawn.values,
    )


def _columns(rows: Iterable[AdapterRow]) -> list[str]:
    """The metrics that most adapters' newest versions have."""
    counts = Counter(metric for row in rows for metric in row.versions[0].scores)
    return [metric for metric, _ in counts.most_common(_MOST_COLUMNS)]


def _csp_source(text: str) -> str:
    """How a content security policy names an inline script or style."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
