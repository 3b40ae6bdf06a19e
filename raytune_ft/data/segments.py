"""What a template gives: pieces of text, learned or not, and what it left out."""

from collections.abc import Iterable
from typing import NamedTuple

from raytune_ft.data.coverage import Part


class Segment(NamedTuple):
    """A piece of text, tokenised by itself."""

    text: str
    learned: bool
    ends_turn: bool = False
    """The template itself wrote the end of the answer, such as `<|im_end|>`."""
    continues: bool = False
    """It is one text with the segment before it, as a chat is; a prompt and its completion are two."""


def one_text(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Return the segments that hold text, each a continuation of the one before it."""
    filled = (segment for segment in segments if segment.text)
    return tuple(segment._replace(continues=at > 0) for at, segment in enumerate(filled))


class Example(NamedTuple):
    """What is trained on as one sequence."""

    segments: tuple[Segment, ...]
    answers: tuple[int, ...] = ()
    """Places of the conversation's turns that are learned in it."""


class Rendered(NamedTuple):
    """A record as text: one example, or several where an answer's own prefix is none of the whole chat's."""

    examples: tuple[Example, ...]
    lost: tuple[Part, ...] = ()
    """What the record says and no example holds."""
