"""What a record says, part by part, and which parts a rendering does not hold.

A short text may stand in a rendering by chance, so the same conversation is rendered with marks in the place
of its texts as well: what carries no mark there is not rendered, whatever stands in the text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raytune_ft.data.conversation import Conversation, ToolCall, Turn
from raytune_ft.data.values import as_json

TURN_PARTS = {"system": "system", "user": "user", "assistant": "content", "tool": "tool"}
"""What the text of a turn is called, by its role."""
BOOKKEEPING = frozenset(
    {"id", "idx", "index", "uuid", "uid", "key", "hash", "url", "license", "date", "timestamp", "created_at"}
    | {
        "source",
        "dataset",
        "dataset_name",
        "subset",
        "split",
        "lang",
        "language",
        "model",
        "score",
        "quality",
    }
    | {"category", "topic", "tags", "domain", "meta", "metadata"}
)
"""Columns that tell of a record and are not part of what it says; so are those that end with `_id`."""


class Part(NamedTuple):
    """Something that a record says."""

    name: str
    """What it is called in `data.sources[].ignore`: a key, a column, or the kind of a turn."""
    place: str
    texts: tuple[str, ...]
    """All of them have to be found."""


def is_bookkeeping(column: str) -> bool:
    """Return whether a column only tells of its record.

    >>> [is_bookkeeping(name) for name in ("id", "prompt_id", "documents")]
    [True, True, False]
    """
    return column.lower() in BOOKKEEPING or column.lower().endswith(("_id", "_ids"))


def parts_of(conversation: Conversation) -> Iterator[Part]:
    """Yield what a conversation says, up to its last learned answer.

    The thoughts of answers that are not learned are left to the template: many drop them from the history.
    """
    last = max(conversation.learned, default=-1)
    for at, turn in enumerate(conversation.turns[: last + 1]):
        place = f"turn {at + 1}"
        if turn.text.strip():
            yield Part(TURN_PARTS[turn.role], place, (turn.text,))
        if turn.thoughts and turn.learned:
            yield Part("thoughts", place, (turn.thoughts,))
        for call in turn.calls:
            yield Part("tool_calls", place, (call.name, *leaves(call.arguments)))
    for tool in conversation.tools:
        yield Part("tools", "tools", tuple(_schema_texts(tool["function"])))
    for name, value in conversation.variables.items():
        if name != "chat_template_kwargs":
            yield Part(name, name, tuple(leaves(value)))
    # Of other records the columns beside prompt and completion are no part of what is said.
    for name, value in conversation.unread.items() if conversation.shape == "chat" else ():
        texts = tuple(leaf for leaf in leaves(value) if any(map(str.isalpha, leaf)))
        if texts and not is_bookkeeping(name):
            yield Part(name, name, texts)


def keys_of(conversation: Conversation) -> Iterator[Part]:
    """Yield the keys of messages that only a template may know, up to the last learned answer."""
    last = max(conversation.learned, default=-1)
    for at, turn in enumerate(conversation.turns[: last + 1]):
        for key, value in turn.other.items():
            yield Part(key, f"turn {at + 1}", (value if isinstance(value, str) else as_json(value),))


def missing(parts: Iterable[Part], texts: Sequence[str]) -> list[Part]:
    """Return the parts of which a text stands in none of the rendered texts."""
    rendered = "\0".join(texts)
    lost = []
    for part in parts:
        absent = tuple(text for text in part.texts if not _stands_in(text, rendered))
        if absent:
            lost.append(part._replace(texts=absent))
    return lost


def leaves(value: Any) -> Iterator[str]:
    """Yield the texts of a JSON value: names of fields, and what stands in them."""
    match value:
        case str():
            if value.strip():
                yield value
        case Mapping():
            for name, inner in value.items():
                yield str(name)
                yield from leaves(inner)
        case list() | tuple():
            for inner in value:
                yield from leaves(inner)
        case None | bool():
            return
        case _:
            yield as_json(value)


def _schema_texts(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names and descriptions in the schema of a function."""
    for name, value in schema.items():
        if name in ("name", "description", "title") and isinstance(value, str) and value.strip():
            if name != "title":
                yield value
        elif name == "properties" and isinstance(value, Mapping):
            for field, inner in value.items():
                yield str(field)
                if isinstance(inner, Mapping):
                    yield from _schema_texts(inner)
        elif isinstance(value, Mapping):
            yield from _schema_texts(value)


def _stands_in(text: str, rendered: str) -> bool:
    """Whether a text stands there, as it is or as JSON or Python write it inside a string."""
    plain = text.strip()
    if plain in rendered:
        return True
    for written in (json.dumps(plain, ensure_ascii=False)[1:-1], json.dumps(plain)[1:-1], repr(plain)[1:-1]):
        if written in rendered:
            return True
    return " ".join(plain.split()) in re.sub(r"\s+", " ", rendered)


class _Marks:
    """Gives words that stand in no other text, and none in another."""

    def __init__(self) -> None:
        self._given = 0

    def next(self) -> str:
        self._given += 1
        return f"mark{self._given}k"

    def of(self, text: str) -> str:
        return self.next() if text.strip() else text


def marked(conversation: Conversation) -> Conversation:
    """Return a conversation with a mark in the place of each text: the same one for equal shapes."""
    marks = _Marks()
    turns = tuple(_marked_turn(turn, marks) for turn in conversation.turns)
    tools: tuple[Any, ...] = ()
    if conversation.tools:
        field = marks.next()
        properties = {field: {"type": "string", "description": marks.next()}}
        parameters = {"type": "object", "properties": properties, "required": [field]}
        function = {"name": marks.next(), "description": marks.next(), "parameters": parameters}
        tools = ({"type": "function", "function": function},)
    return conversation._replace(turns=turns, tools=tools, unread={})


def _marked_turn(turn: Turn, marks: _Marks) -> Turn:
    return turn._replace(
        content=marks.of(turn.content),
        context=marks.of(turn.context),
        thoughts=marks.of(turn.thoughts),
        calls=tuple(_marked_call(call, marks) for call in turn.calls),
        other={key: _sample_of(value, marks) for key, value in turn.other.items()},
        name="name" if turn.name else "",
        call_id="x" * len(turn.call_id),
        inline="",
    )


def _sample_of(value: Any, marks: _Marks) -> Any:
    """A value of the same kind."""
    match value:
        case bool():
            return value
        case dict():
            return {marks.next(): marks.next()}
        case list():
            return [marks.next()]
        case str():
            return marks.next()
    return 1


def _marked_call(call: ToolCall, marks: _Marks) -> ToolCall:
    arguments = {marks.next(): marks.next()} if isinstance(call.arguments, dict) else marks.next()
    return ToolCall(marks.next(), arguments if call.arguments else call.arguments, "x" * len(call.id))


def shape_of(conversation: Conversation) -> tuple[Any, ...]:
    """Return what decides on which parts a template renders: equal for chats that differ in texts alone."""
    turns = tuple(
        (
            turn.role,
            bool(turn.content.strip()),
            bool(turn.context),
            bool(turn.thoughts),
            tuple((type(call.arguments), bool(call.arguments), len(call.id)) for call in turn.calls),
            turn.learned,
            bool(turn.name),
            len(turn.call_id),
            tuple(
                (key, value if isinstance(value, bool) else type(value)) for key, value in turn.other.items()
            ),
        )
        for turn in conversation.turns
    )
    # What a template does with its variables is not known, so their values count.
    return turns, bool(conversation.tools), as_json(dict(conversation.variables))
