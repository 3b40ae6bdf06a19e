"""What a data pass counted, and what it refuses to train on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from raytune_ft.data.formats import BadRecord
from raytune_ft.errors import DataError, RaytuneError
from raytune_ft.spec import DataSpec

NO_LEARNED_TOKENS = "no learned tokens"
_SHOWN_PLACES = 3


@dataclass
class Counts:
    """Counts of one source, or of all."""

    objects: int = 0
    records: int = 0
    """All records, the bad ones too."""
    bad: int = 0
    """Malformed: in quarantine."""
    dropped: int = 0
    """Longer than `data.max_tokens`."""
    cut: int = 0
    """Longer than `data.max_tokens`, trained with the beginning of the prompt cut off."""
    train: int = 0
    validation: int = 0
    test: int = 0
    tokens: int = 0
    """Of the training split, per epoch at weight 1."""
    learned_tokens: int = 0
    """Of the training split: those that the loss sums over."""

    def add(self, other: "Counts") -> None:
        """Add another's counts to these."""
        for each in fields(Counts):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True)
class DataCounts:
    """Counts of a job's data."""

    sources: tuple[Counts, ...]
    """In the order of `data.sources`."""
    uris: tuple[str, ...]

    @property
    def total(self) -> Counts:
        """All sources together."""
        total = Counts()
        for source in self.sources:
            total.add(source)
        return total

    def to_json(self) -> dict[str, Any]:
        """`{"sources": [{"uri": …, "records": …, …}, …], "total": {…}}`."""
        named = zip(self.uris, self.sources, strict=True)
        return {
            "sources": [{"uri": uri, **asdict(source)} for uri, source in named],
            "total": asdict(self.total),
        }


@dataclass
class ObjectReport:
    """What reading one object found, beside its examples."""

    index: int
    source: int
    counts: Counts
    bad: list[BadRecord] = field(default_factory=list)
    """The first of them; `counts.bad` counts all."""
    reasons: Counter[str] = field(default_factory=Counter)
    """How many records were refused for reasons that a check looks for."""
    templates: Counter[str] = field(default_factory=Counter)
    """How many records each template rendered."""
    end_ids: set[int] = field(default_factory=set)
    """Tokens that learned answers end with."""
    longest: int = 0
    """Tokens of the longest example, before any limit."""
    digest: str = ""
    """sha256 of the examples in order."""
    failure: RaytuneError | None = None
    """Why the object could not be read as a whole."""


def count_sources(reports: Sequence[ObjectReport], data: DataSpec) -> DataCounts:
    """Counts per source from the reports of its objects."""
    sources = [Counts() for _ in data.sources]
    for report in reports:
        sources[report.source].add(report.counts)
    return DataCounts(tuple(sources), tuple(source.uri for source in data.sources))


def check_counts(reports: Sequence[ObjectReport], data: DataSpec, quarantine: str | None) -> DataCounts:
    """Refuse data that nothing could be learned from, before anything is spent on it.

    Args:
        reports: of all objects.
        data: the job's data section.
        quarantine: where the bad records were written, for the message.

    Raises:
        DataError: a source is empty, too many records are malformed, or no training example is left.
    """
    counts = count_sources(reports, data)
    for at, (source, uri) in enumerate(zip(counts.sources, counts.uris, strict=True)):
        if source.records == 0:
            files = "the file is empty" if source.objects == 1 else f"all {source.objects} files are empty"
            raise DataError(f"data.sources[{at}].uri = {uri}: no records; {files}")
    total = counts.total
    masked = sum(report.reasons[NO_LEARNED_TOKENS] for report in reports)
    if masked == total.records:
        raise DataError(
            f"data: all labels are masked: none of the {masked} records has a learned token; "
            "look at the completions, the template and the tokenizer with `raytune-ft data`"
        )
    if total.bad > data.max_bad_fraction * total.records:
        raise DataError(_too_many_bad(reports, total, data, quarantine))
    if total.train == 0:
        raise DataError(_nothing_left(reports, total, data))
    return counts


def _too_many_bad(
    reports: Sequence[ObjectReport], total: Counts, data: DataSpec, quarantine: str | None
) -> str:
    first = [bad for report in reports for bad in report.bad][:_SHOWN_PLACES]
    lines = [
        f"data: {total.bad} of {total.records} records are malformed ({total.bad / total.records:.2%}), "
        f"and data.max_bad_fraction is {data.max_bad_fraction:g}; the first of them:",
        *(f"  {bad.place}: {bad.reason}" for bad in first),
    ]
    return "\n".join([*lines, f"  all are in {quarantine}"] if quarantine else lines)


def _nothing_left(reports: Sequence[ObjectReport], total: Counts, data: DataSpec) -> str:
    if total.dropped and not total.validation + total.test:
        longest = max(report.longest for report in reports)
        remedy = "raise data.max_tokens" + (", or set data.too_long: cut" if data.too_long == "drop" else "")
        return (
            f"data: no training example is left: {total.dropped} of {total.records} records are longer than "
            f"data.max_tokens = {data.max_tokens}, the longest has {longest} tokens; {remedy}"
        )
    return (
        f"data: no training example is left: of {total.records} records {total.bad} are malformed, "
        f"{total.dropped} longer than data.max_tokens = {data.max_tokens}, {total.validation} in the "
        f"validation split and {total.test} in the test split; give more data or a smaller data.split"
    )
