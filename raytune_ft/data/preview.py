"""What a person looks at before training: an example of each kind of turn, and the lengths of all."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

from raytune_ft.data.conversation import Conversation, Turn

if TYPE_CHECKING:
    from raytune_ft.data.examples import Observed


_MOST_PIECES = 10
"""Of an example on a terminal."""
_BARS = 20


@dataclass(frozen=True)
class ShownExample:
    """An example as text: its tokens decoded, in runs that are learned or not."""

    source: int
    template: str
    kinds: tuple[str, ...]
    split: str
    tokens: int
    cut_tokens: int
    """Tokens that were cut from the left of its prompt."""
    pieces: tuple[tuple[str, bool], ...]


@dataclass
class Lengths:
    """Lengths of the examples of one template of a source, in tokens."""

    before_limit: Counter[int] = field(default_factory=Counter)
    """How many examples have each length, before `data.max_tokens`."""
    cut: int = 0
    dropped: int = 0
    longest_answer: int = 0
    """The longest last answer of all examples that are kept."""
    longest_reference: int | None = None
    """The longest last answer of those held out: what `evaluate.max_new_tokens` has to leave room for.
    None where none is held out; of several right answers the first counts."""

    def add(self, found: "Observed") -> None:
        """Count an example."""
        self.before_limit[len(found.tokens.input_ids)] += 1
        if found.kept is None:
            self.dropped += 1
            return
        self.cut += len(found.kept.input_ids) < len(found.tokens.input_ids)
        answer = next((run for run in found.kept.runs[::-2] if run), 0)
        self.longest_answer = max(self.longest_answer, answer)
        if found.split != "train":
            self.longest_reference = max(self.longest_reference or 0, answer)

    def to_json(self) -> dict[str, int | None]:
        """Plain numbers, by stable names."""
        return {
            "examples": self.before_limit.total(),
            "median": percentile(self.before_limit, 50),
            "p95": percentile(self.before_limit, 95),
            "longest": max(self.before_limit, default=0),
            "cut": self.cut,
            "dropped": self.dropped,
            "longest_answer": self.longest_answer,
            "longest_reference": self.longest_reference,
        }


class Preview:
    """Gathers what is shown, one example at a time; it keeps those that it will show."""

    def __init__(self, first: int, decode: Callable[[list[int]], str]) -> None:
        self._first = first
        self._decode = decode
        self._taken = Counter[int]()
        self._seen = set[tuple[int, str, str]]()
        self.examples: list[ShownExample] = []
        """The first of each source, and the first of each kind of each template of it."""
        self.lengths: dict[tuple[int, str], Lengths] = {}
        """By source and template."""

    def observe(self, source: int, found: "Observed") -> None:
        """Take one example of a source."""
        self.lengths.setdefault((source, found.template), Lengths()).add(found)
        if found.kept is None:
            return
        kinds = kinds_of(found)
        new = {(source, found.template, kind) for kind in kinds} - self._seen
        if new or self._taken[source] < self._first:
            self._seen |= new
            self.examples.append(self._shown(source, found, kinds))
        self._taken[source] += 1

    def _shown(self, source: int, found: "Observed", kinds: tuple[str, ...]) -> ShownExample:
        assert found.kept is not None  # noqa: S101  dropped examples are not shown
        pieces, start = [], 0
        for run, learned in zip(found.kept.runs, cycle((False, True)), strict=False):
            if run:
                pieces.append((self._decode(list(found.kept.input_ids[start : start + run])), learned))
            start += run
        tokens = len(found.kept.input_ids)
        cut = len(found.tokens.input_ids) - tokens
        return ShownExample(source, found.template, kinds, found.split, tokens, cut, tuple(pieces))


def kinds_of(found: "Observed") -> tuple[str, ...]:
    """Return the kinds of turns that an example shows."""
    limits = ("cut",) if found.kept is not None and found.kept.input_ids != found.tokens.input_ids else ()
    if not isinstance(found.record, Conversation):
        return ("raw text", *limits)
    turns = found.record.turns[: max(found.example.answers, default=-1) + 1]
    learned = [(turns[at - 1] if at else None, turns[at]) for at in found.example.answers]
    holds: Mapping[str, bool] = {
        "prompt and completion": found.record.shape != "chat",
        "context": any(turn.context for turn in turns),
        "several right answers": len(found.record.references) > 1,
        "system text": any(turn.role == "system" for turn in turns),
        "tools": bool(found.record.tools),
        "answer": found.record.shape == "chat" and any(_is_plain(turn) for _, turn in learned),
        "thoughts": any(turn.thoughts for _, turn in learned),
        "tool call": any(turn.calls for _, turn in learned),
        "answer after a tool's result": any(before and before.role == "tool" for before, _ in learned),
        "given answer": any(turn.role == "assistant" and not turn.learned for turn in turns),
        "several answers": len(learned) > 1,
        "divided chat": found.parts > 1 and found.part == 0,
        "divided chat, continued": found.part > 0,
    }
    return (*(kind for kind, is_held in holds.items() if is_held), *limits)


def _is_plain(turn: Turn) -> bool:
    return not turn.calls and not turn.thoughts


def percentile(counts: Mapping[int, int], percent: int) -> int:
    """Return the least value that so many per cent of all are not above; 0 where there are none.

    >>> percentile({3: 1, 5: 2, 900: 1}, 50)
    5
    """
    wanted, reached = -(-sum(counts.values()) * percent // 100), 0
    for value in sorted(counts):
        reached += counts[value]
        if reached >= wanted:
            return value
    return 0


def shorten(pieces: Sequence[tuple[str, bool]], most: int) -> list[tuple[str, bool]]:
    """Pieces of at most about so many characters each; the middle of longer ones, and of many, is counted.

    >>> shorten([("abcdefgh", True)], 4)
    [('ab […4 characters left out…] gh', True)]
    """
    shown = [(_shortened(text, most), learned) for text, learned in pieces]
    if len(shown) <= _MOST_PIECES:
        return shown
    half = _MOST_PIECES // 2
    middle = f"\n[…{len(shown) - 2 * half} more pieces left out…]\n"
    return [*shown[:half], (middle, False), *shown[-half:]]


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters left out…] {text[-half:]}"


def histogram(counts: Mapping[int, int]) -> list[dict[str, int]]:
    """Return how many values lie in each of some equal ranges, as `from`, `to` (inclusive) and `examples`.

    >>> histogram({1: 2, 2: 1, 40: 5})[0], len(histogram({1: 2, 2: 1, 40: 5}))
    ({'from': 1, 'to': 2, 'examples': 3}, 20)
    """
    if not counts:
        return []
    least, most = min(counts), max(counts)
    width = max(1, -(-(most - least + 1) // _BARS))
    bars = [
        {"from": start, "to": start + width - 1, "examples": 0} for start in range(least, most + 1, width)
    ]
    for value, count in counts.items():
        bars[(value - least) // width]["examples"] += count
    return bars


def to_json(preview: Preview) -> dict[str, Any]:
    """The examples and, for each template of each source, the lengths."""
    return {
        "examples": [
            {
                "source": example.source,
                "template": example.template,
                "kinds": list(example.kinds),
                "split": example.split,
                "tokens": example.tokens,
                "cut_tokens": example.cut_tokens,
                "pieces": [{"text": text, "learned": learned} for text, learned in example.pieces],
            }
            for example in preview.examples
        ],
        "templates": [
            {
                "source": source,
                "template": template,
                "lengths": lengths.to_json(),
                "histogram": histogram(lengths.before_limit),
            }
            for (source, template), lengths in sorted(preview.lengths.items())
        ],
    }
