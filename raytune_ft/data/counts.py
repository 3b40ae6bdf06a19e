"""What reading windows of data counted, and what training refuses."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

from pydantic import ConfigDict

from raytune_ft.data.formats import BadRecord
from raytune_ft.data.windows import Window
from raytune_ft.spec import DataSpec

NO_LEARNED_TOKENS = "no learned tokens"
KEPT_BAD_RECORDS = 10_000
"""Bad records that are kept for the quarantine file, of a window and of all; all are counted."""
# What is read back, from a cache that anybody may write to, is as strict as a job file.
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass
class Counts:
    """Counts of one window, of one source, or of all."""

    __pydantic_config__ = _STRICT

    records: int = 0
    """All records, the bad ones too."""
    bad: int = 0
    """Malformed: in quarantine."""
    dropped: int = 0
    """Examples longer than `data.max_tokens`."""
    cut: int = 0
    """Examples longer than `data.max_tokens`, trained with the beginning of the prompt cut off."""
    train: int = 0
    """Examples: a chat may give several."""
    validation: int = 0
    test: int = 0
    tokens: int = 0
    """Of the training split, per epoch at weight 1."""
    learned_tokens: int = 0
    """Of the training split: those that the loss sums over."""
    divided: int = 0
    """Chats that became several examples, since no single text gives each answer its own prompt."""
    answers: int = 0
    """The assistant's turns in records that are not malformed."""
    learned_answers: int = 0
    ends: int = 0
    """Learned answers whose end is learned too."""
    calls: int = 0
    """Calls of tools in records that are not malformed."""
    learned_calls: int = 0
    thoughts: int = 0
    """Answers with thoughts, those that `data.thoughts` drops too."""
    learned_thoughts: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Records of which something did not reach the model, by its name: columns and keys that are ignored or
    that nothing reads, and what a template leaves out."""

    @property
    def examples(self) -> int:
        """All examples, those that are dropped too."""
        return self.train + self.validation + self.test + self.dropped

    def add(self, other: "Counts") -> None:
        """Add another's counts to these."""
        for each in fields(Counts):
            own, added = getattr(self, each.name), getattr(other, each.name)
            if isinstance(own, dict):
                own, added = Counter(own), Counter(added)
            total = own + added
            setattr(self, each.name, dict(sorted(total.items())) if isinstance(total, Counter) else total)

    def scaled(self, factor: Fraction) -> "Counts":
        """Each count times `factor`, rounded."""
        scaled: dict[str, Any] = {}
        for name, count in asdict(self).items():
            if isinstance(count, dict):
                scaled[name] = {key: round(part * factor) for key, part in count.items()}
            else:
                scaled[name] = round(count * factor)
        return Counts(**scaled)


@dataclass(frozen=True)
class DataCounts:
    """Counts of a job's data."""

    sources: tuple[Counts, ...]
    """In the order of `data.sources`."""
    uris: tuple[str, ...]
    objects: tuple[int, ...]
    """How many objects each source has."""
    estimated: bool = False
    """Not all windows were read: what was counted in a sample is scaled up by bytes."""
    notices: tuple[str, ...] = ()
    """What a person should know of this data before it is trained on; see `raytune_ft.data.checks`."""

    @property
    def total(self) -> Counts:
        """All sources together."""
        total = Counts()
        for source in self.sources:
            total.add(source)
        return total

    def to_json(self) -> dict[str, Any]:
        """`{"sources": [{"uri": …, "objects": …, …}, …], "total": {…}, "estimated": …, "notices": […]}`."""
        named = zip(self.uris, self.objects, self.sources, strict=True)
        return {
            "sources": [{"uri": uri, "objects": objects, **asdict(source)} for uri, objects, source in named],
            "total": {"objects": sum(self.objects), **asdict(self.total)},
            "estimated": self.estimated,
            "notices": list(self.notices),
        }


@dataclass(frozen=True)
class WindowReport:
    """What reading one window found, beside its examples."""

    __pydantic_config__ = _STRICT

    counts: Counts
    bad: tuple[BadRecord, ...] = ()
    """The first of them; `counts.bad` counts all."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many records were refused for reasons that a check looks for."""
    templates: dict[str, int] = field(default_factory=dict)
    """How many records each template rendered."""
    end_ids: tuple[int, ...] = ()
    """Tokens that learned answers end with, sorted."""
    longest: int = 0
    """Tokens of the longest example, before any limit."""


@dataclass(frozen=True)
class Survey:
    """The windows of a job's data, and what was found in those that were read."""

    windows: Sequence[Window]
    """All of them, by object and part."""
    reports: Mapping[int, WindowReport]
    """By the window's number among all."""
    notices: tuple[str, ...] = ()
    """What a person should know of how the data was listed."""

    @property
    def complete(self) -> bool:
        """All windows were read."""
        return len(self.reports) == len(self.windows)

    @cached_property
    def numbers(self) -> Mapping[int, Sequence[int]]:
        """The windows of each source."""
        numbers = defaultdict[int, list[int]](list)
        for number, window in enumerate(self.windows):
            numbers[window.source].append(number)
        return numbers

    def read(self, source: int | None = None) -> list[WindowReport]:
        """Reports of a source, or of all, in the order of the windows."""
        return [self.reports[number] for number in self._of(source) if number in self.reports]

    def counts(self, source: int | None = None) -> Counts:
        """What was counted of a source, or of all, in the windows that were read."""
        total = Counts()
        for report in self.read(source):
            total.add(report.counts)
        return total

    def extent(self, source: int | None = None) -> str:
        """What a message says of counts that are not of everything: '' where they are."""
        windows, read = len(self._of(source)), len(self.read(source))
        return "" if read == windows else f" in a sample of {read} of {windows} windows"

    def scale(self, source: int) -> Fraction:
        """The source's bytes, by those of its windows that were read."""
        total = sum(self.windows[number].size_bytes for number in self._of(source))
        read = sum(self.windows[number].size_bytes for number in self._of(source) if number in self.reports)
        return Fraction(total, read) if read else Fraction(1)

    def _of(self, source: int | None) -> Sequence[int]:
        return range(len(self.windows)) if source is None else self.numbers.get(source, ())


def count_sources(survey: Survey, data: DataSpec) -> DataCounts:
    """Counts per source, scaled up by bytes where a survey is not complete."""
    sources = []
    for source in range(len(data.sources)):
        counts = survey.counts(source)
        sources.append(counts if survey.complete else counts.scaled(survey.scale(source)))
    objects = Counter(window.source for window in survey.windows if window.part == 0)
    return DataCounts(
        sources=tuple(sources),
        uris=tuple(source.uri for source in data.sources),
        objects=tuple(objects[source] for source in range(len(sources))),
        estimated=not survey.complete,
    )
