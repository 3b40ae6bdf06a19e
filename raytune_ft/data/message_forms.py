"""The ways in which chat templates want their messages: the fields are the same, how they look is not."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from raytune_ft.data.conversation import Conversation, ToolCall, Turn
from raytune_ft.data.values import as_json

Thoughts = Literal["reasoning_content", "thinking", "parts", "inline"]
Arguments = Literal["object", "text"]
Empty = Literal["", None]
Links = Literal["own", "made"]
_THOUGHTS: tuple[Thoughts, ...] = ("reasoning_content", "thinking", "parts", "inline")
_ARGUMENTS: tuple[Arguments, ...] = ("object", "text")
_EMPTY: tuple[Empty, ...] = ("", None)
_LINKS: tuple[Links, ...] = ("own", "made")


class MessageForm(NamedTuple):
    """How a turn becomes a message."""

    thoughts: Thoughts = "reasoning_content"
    """The key that holds them; a part of the content; or `<think>` in the content."""
    arguments: Arguments = "object"
    """Of tool calls: as an object, or as its JSON text."""
    parts: bool = False
    """The content is a list of parts instead of a text."""
    empty: Empty = ""
    """The content of a turn that only calls tools."""
    links: Links = "own"
    """How a result names its call: as the record does, or by the call's name and an id of nine letters and
    digits, as Mistral's templates want it."""
    plan: bool = False
    """What is said beside calls is their `tool_plan`, as Cohere's templates call it."""


FIRST_FORM = MessageForm()


def forms_for(conversation: Conversation) -> Iterator[MessageForm]:
    """Yield the forms that make a difference for a conversation, the most usual first."""
    turns = conversation.turns
    has_calls = any(turn.calls or turn.role == "tool" for turn in turns)
    has_thoughts = any(turn.thoughts for turn in turns)
    is_bare = any(turn.calls and not turn.text.strip() for turn in turns)
    is_planned = any(turn.calls and turn.text.strip() for turn in turns)
    for plan in (False, True) if is_planned else (False,):
        for links in _LINKS if has_calls else _LINKS[:1]:
            for parts in (False, True):
                for empty in _EMPTY if is_bare else _EMPTY[:1]:
                    for arguments in _ARGUMENTS if has_calls else _ARGUMENTS[:1]:
                        for thoughts in _THOUGHTS if has_thoughts else _THOUGHTS[:1]:
                            yield MessageForm(thoughts, arguments, parts, empty, links, plan)


def messages_in(turns: Sequence[Turn], form: MessageForm) -> list[dict[str, Any]]:
    """Return turns as the messages that a chat template gets."""
    messages: list[dict[str, Any]] = []
    open_calls: list[ToolCall] = []
    for turn in turns:
        message = {**turn.other, "role": turn.role, "content": _content(turn, form)}
        if turn.thoughts and form.thoughts in ("reasoning_content", "thinking"):
            message[form.thoughts] = turn.thoughts
        if turn.calls:
            open_calls = [_linked(call, f"{len(messages)}.{at}", form) for at, call in enumerate(turn.calls)]
            message["tool_calls"] = [_call(call, form) for call in open_calls]
            if form.plan and turn.text.strip():
                message["tool_plan"] = turn.text
        if turn.role == "tool":
            message |= _link(turn, open_calls, f"{len(messages)}", form)
        messages.append(message)
    return messages


def _content(turn: Turn, form: MessageForm) -> Any:
    text = turn.inline_text if form.thoughts == "inline" else turn.text
    if not text.strip() and form.empty is None:
        return None
    if form.thoughts == "parts" and turn.thoughts:
        return [{"type": "thinking", "thinking": turn.thoughts}, {"type": "text", "text": text}]
    return [{"type": "text", "text": text}] if form.parts else text


def _call(call: ToolCall, form: MessageForm) -> dict[str, Any]:
    arguments = call.arguments
    if form.arguments == "text" and not isinstance(arguments, str):
        arguments = as_json(arguments)
    function = {"name": call.name, "arguments": arguments}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}


def _linked(call: ToolCall, place: str, form: MessageForm) -> ToolCall:
    """A call with the id that its result names."""
    return call if form.links == "own" else call._replace(id=_made_id(call.id or place))


def _link(turn: Turn, open_calls: list[ToolCall], place: str, form: MessageForm) -> dict[str, str]:
    """What a result says of its call. Results without an id stand in the order of the calls."""
    name, call_id = turn.name, turn.call_id
    if form.links == "made":
        wanted = _made_id(call_id) if call_id else None
        call = next((call for call in open_calls if call.id == wanted), None)
        if call is None and wanted is None and open_calls:
            call = open_calls[0]
        if call is not None:
            open_calls.remove(call)
            name = name or call.name
        call_id = call.id if call is not None else wanted or _made_id(place)
    return {**({"name": name} if name else {}), **({"tool_call_id": call_id} if call_id else {})}


def _made_id(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()[:9]
