"""What a record teaches: which answers the job wants learned, what may be left out, and counts of both."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from raytune_ft.data.conversation import Conversation, Malformed, PlainText
from raytune_ft.data.counts import Counts
from raytune_ft.data.coverage import Part
from raytune_ft.data.segments import Example
from raytune_ft.data.values import is_empty
from raytune_ft.spec import DataSpec, RecordsSpec


def as_told(conversation: Conversation, data: DataSpec) -> Conversation:
    """Return a conversation with the answers and thoughts that `data.turns` and `data.thoughts` want."""
    if data.turns == "all" and data.thoughts == "keep":
        return conversation
    turns = list(conversation.turns)
    dropped = sum(bool(turn.thoughts) for turn in turns) if data.thoughts == "drop" else 0
    if data.turns == "last":
        last = max(conversation.learned, default=-1)
        turns = [turn if at == last else turn._replace(learned=False) for at, turn in enumerate(turns)]
    if data.thoughts == "keep":
        return conversation._replace(turns=tuple(turns))
    return conversation._replace(
        turns=tuple(turn._replace(thoughts="", inline="") for turn in turns),
        dropped_thoughts=dropped,
    )


def check_lost(lost: Sequence[Part], source: RecordsSpec, template: str) -> None:
    """Refuse a record of which a template leaves something out, unless the source lets it.

    Raises:
        Malformed: names the template, and what it leaves out.
    """
    if source.on_lost == "count":
        return
    refused = [part for part in lost if part.name not in source.ignore]
    if not refused:
        return
    named = {part.name: part for part in reversed(refused)}
    listed = ", ".join(
        f"{part.name} of {part.place} ({part.texts[0].strip()!r:.60})" for part in named.values()
    )
    raise Malformed(
        f"template {template} leaves out {listed}; choose a template that writes it, name "
        f"{' and '.join(named)} in the source's ignore, or set its on_lost: count"
    )


def left_out(
    value: Any, record: Conversation | PlainText, lost: Sequence[Part], ignore: Collection[str]
) -> set[str]:
    """Return the names of what a record holds and the model does not see."""
    names = {part.name for part in lost}
    if isinstance(record, Conversation):
        names.update(record.unread)
        if record.dropped_thoughts:
            names.add("thoughts")
    return names | {name for name in ignore if _holds(value, name)}


def _holds(value: Mapping[str, Any], name: str) -> bool:
    """Whether a record has a column of this name, or a message with such a key."""
    lists = (column for column in value.values() if isinstance(column, list))
    messages = (message for column in lists for message in column if isinstance(message, dict))
    return not all(is_empty(each.get(name)) for each in (value, *messages))


def count_turns(counts: Counts, record: Conversation | PlainText) -> None:
    """Count what a record holds that could be learned."""
    if isinstance(record, PlainText):
        return
    counts.thoughts += record.dropped_thoughts
    for turn in record.turns:
        if turn.role == "assistant":
            counts.answers += 1
            counts.calls += len(turn.calls)
            counts.thoughts += bool(turn.thoughts)


def count_learned(
    counts: Counts, record: Conversation | PlainText, example: Example, *, has_eos: bool
) -> None:
    """Count what of a record is learned in one of its examples.

    Args:
        counts: to add to.
        record: what the example was made of.
        example: one that is trained on.
        has_eos: the tokenizer has an EOS, which follows a last answer that has no end of its own.
    """
    if isinstance(record, PlainText) or not example.answers:
        return
    turns = [record.turns[at] for at in example.answers]
    counts.learned_answers += len(turns)
    counts.learned_calls += sum(len(turn.calls) for turn in turns)
    counts.learned_thoughts += sum(bool(turn.thoughts) for turn in turns)
    ended = [segment.ends_turn for segment in example.segments if segment.learned]
    counts.ends += sum(ended[:-1]) + (ended[-1] or has_eos)
