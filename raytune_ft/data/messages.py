"""From the messages of a chat record to turns: roles, parts, tool calls, thoughts and flags."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raytune_ft.data.conversation import Malformed, Role, ToolCall, Turn
from raytune_ft.data.values import as_json, is_empty, kind_of, text_of

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What OpenAI, ShareGPT and Open Assistant records call a turn's author."""

THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Where an assistant's message keeps its thoughts, if not in its content."""
_READ_KEYS = frozenset(
    {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name"}
    | {"weight", "train", "masked", *THOUGHT_KEYS}
)
_CALL_KEYS = frozenset({"id", "type", "index", "function", "name", "arguments", "parameters"})
_INLINE_THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)


def read_turns(messages: Any, place: str) -> tuple[Turn, ...]:
    """Read the messages of a chat: a list of objects, or the JSON text of one.

    Args:
        messages: as the record holds them.
        place: the column's name, for messages.

    Raises:
        Malformed: they are no chat that ends with the assistant's turn; says which message, and why.
    """
    if isinstance(messages, str):
        messages = _parsed(messages, of=list, otherwise=messages)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise Malformed(f"{place} is {kind_of(messages)}, not a list of messages")
    found = [_read_turn(message, f"{place}[{at}]") for at, message in enumerate(messages)]
    turns = tuple(turn for turn in found if turn is not None)
    if len(turns) < 2:
        raise Malformed(f"{place} has {len(turns)} message; a prompt and an answer are needed")
    if turns[-1].role != "assistant":
        raise Malformed(f"{place} ends with a {turns[-1].role} turn; the last must be the assistant's")
    if not any(turn.role in ("user", "tool") for turn in turns):
        raise Malformed(f"{place} has no user turn")
    return turns


def read_tools(value: Any, place: str) -> tuple[Any, ...]:
    """Read the schemas of functions: a list or its JSON text, each bare or as `{"type": "function", …}`.

    Raises:
        Malformed: the column holds anything else.
    """
    if isinstance(value, str):
        value = _parsed(value, of=list, otherwise=value)
    if is_empty(value):
        return ()
    if not isinstance(value, list):
        raise Malformed(f"{place} is {kind_of(value)}, not a list of tools or its JSON text")
    tools = []
    for at, tool in enumerate(value):
        tool = _parsed(tool, of=dict, otherwise=tool) if isinstance(tool, str) else tool
        schema = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(schema, dict) or not isinstance(schema.get("name"), str):
            raise Malformed(f"{place}[{at}] is {kind_of(tool)} without the name of a function")
        tools.append({"type": "function", "function": schema} if "function" not in tool else tool)
    return tuple(tools)


def _read_turn(message: Any, place: str) -> Turn | None:
    """A message as a turn; None for a system text that says nothing."""
    if not isinstance(message, dict):
        raise Malformed(f"{place} is {kind_of(message)}, not an object with role and content")
    author = _first(message, "role", "from")
    if not isinstance(author, str) or author.lower() not in ROLES:
        raise Malformed(f"{place}.role is {author!r}; expected system, user, assistant or tool")
    role = ROLES[author.lower()]
    if (plain := _plain_content(message, author)) is not None:
        return Turn(role, text_of(plain, f"{place}.content"))
    content, thoughts = _read_content(_first(message, "content", "value"), role, place)
    calls, other = tuple(_read_calls(message, role, place)), _other_keys(message, role)
    if author.lower() == "function_call" and not calls and (calls := _calls_of_text(content, place)):
        content = ""
    if role == "system" and not content.strip():
        return None
    if not content.strip() and not calls:
        given = _first(message, "content", "value")
        raise Malformed(f"{place} has no content" if given is None else f"{place}.content is empty")
    turn = Turn(
        role,
        content,
        thoughts=thoughts,
        calls=calls,
        learned=_is_learned(message, role, place) or role != "assistant",
        name=_tool_text(message, "name", role, place),
        call_id=_tool_text(message, "tool_call_id", role, place),
        other=other,
    )
    return _with_thoughts(turn, message, place) if role == "assistant" else turn


def _plain_content(message: Mapping[str, Any], author: str) -> str | None:
    """The content of a message that says nothing else, as most do; None of any other."""
    content = message.get("content") if "content" in message else message.get("value")
    if len(message) != 2 or not isinstance(content, str) or not content.strip():
        return None
    return None if "</think>" in content or author.lower() == "function_call" else content


def _first(message: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these keys that is not null."""
    return next((message[name] for name in names if message.get(name) is not None), None)


def _tool_text(message: Mapping[str, Any], key: str, role: Role, place: str) -> str:
    """What a tool turn says of the call that it answers."""
    return text_of(message.get(key), f"{place}.{key}") if role == "tool" else ""


def _read_content(content: Any, role: Role, place: str) -> tuple[str, str]:
    """The text of a content, and the thoughts among its parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        parts = [_read_part(part, f"{place}.content[{at}]") for at, part in enumerate(content)]
        texts, thoughts = ("".join(piece[at] for piece in parts) for at in (0, 1))
        if thoughts and role != "assistant":
            raise Malformed(f"{place}.content holds thoughts of the {role}; only the assistant has thoughts")
        return texts, thoughts
    if role == "tool" and isinstance(content, dict | list):
        return as_json(content), ""
    if isinstance(content, list):
        raise Malformed(
            f"{place}.content[0] is {kind_of(content[0])}; only parts of type 'text' and 'thinking' are read"
        )
    return text_of(content, f"{place}.content"), ""


def _read_part(part: Mapping[str, Any], place: str) -> tuple[str, str]:
    """The text and the thoughts of a part, of which one is empty."""
    match part["type"]:
        case "text" | "output_text" | "input_text":
            return text_of(_first(part, "text", "value", "content"), f"{place}.text"), ""
        case "thinking" | "reasoning" | "thought":
            return "", text_of(
                _first(part, "thinking", "reasoning", "thought", "text", "content"), f"{place}.thinking"
            )
    raise Malformed(f"{place} is {part['type']!r}; only parts of type 'text' and 'thinking' are read")


def _with_thoughts(turn: Turn, message: Mapping[str, Any], place: str) -> Turn:
    """The turn with the thoughts of its own key, or those before `</think>` in its content."""
    kept = [(key, text_of(message[key], f"{place}.{key}").strip()) for key in THOUGHT_KEYS if key in message]
    own = list(dict.fromkeys([turn.thoughts.strip(), *(text for _, text in kept)]) - {"": None}.keys())
    if len(own) > 1:
        keys = " and ".join(key for key, text in kept if text) or "content"
        raise Malformed(f"{place} has different thoughts in {keys}; keep one of them")
    if own:
        return turn._replace(thoughts=own[0])
    inline = _INLINE_THOUGHTS.fullmatch(turn.content)
    if inline is None or not inline[1].strip() or not (inline[2].strip() or turn.calls):
        return turn
    return turn._replace(thoughts=inline[1].strip(), content=inline[2], inline=turn.content)


def _read_calls(message: Mapping[str, Any], role: Role, place: str) -> Iterator[ToolCall]:
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _parsed(calls, of=list, otherwise=calls)
    calls = [] if is_empty(calls) else calls
    if not isinstance(calls, list):
        raise Malformed(f"{place}.tool_calls is {kind_of(calls)}, not a list of calls")
    places = [f"{place}.tool_calls[{at}]" for at in range(len(calls))]
    if not is_empty(message.get("function_call")):
        calls, places = [*calls, message["function_call"]], [*places, f"{place}.function_call"]
    if calls and role != "assistant":
        raise Malformed(f"{places[0]} stands in a {role} turn; only the assistant calls tools")
    for call, where in zip(calls, places, strict=True):
        yield _read_call(call, where)


def _read_call(call: Any, place: str) -> ToolCall:
    if isinstance(call, str):
        call = _parsed(call, of=dict, otherwise=call)
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed(f"{place} is {kind_of(call)} without the name of a function")
    both = {**call, **function}
    unknown = [key for key in both if key not in _CALL_KEYS and not is_empty(both[key])]
    if unknown:
        raise Malformed(f"{place}.{unknown[0]} is not read; remove it")
    arguments = _first(function, "arguments", "parameters")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, of=dict, otherwise=arguments) if arguments.strip() else {}
    return ToolCall(
        function["name"], {} if arguments is None else arguments, text_of(call.get("id"), f"{place}.id")
    )


def _calls_of_text(content: str, place: str) -> tuple[ToolCall, ...]:
    """The calls in the text of a `function_call` turn; none where it is not JSON of calls."""
    parsed = _parsed(content, of=(dict, list), otherwise=None)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return ()
    return tuple(_read_call(call, place) for call in calls)


_FLAGS: Mapping[str, tuple[Mapping[Any, bool], str]] = {
    "weight": ({0: False, 1: True}, "0 or 1"),
    "train": ({False: False, True: True}, "true or false"),
    "masked": ({False: True, True: False}, "true or false"),
}
"""What each flag of a message says about learning it, and what its values are."""


def _is_learned(message: Mapping[str, Any], role: Role, place: str) -> bool:
    learned = True
    for name, (meanings, allowed) in _FLAGS.items():
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in meanings:
            raise Malformed(f"{place}.{name} is {as_json(value):.40}; it must be {allowed}")
        if role != "assistant" and meanings[value] and name != "masked":
            raise Malformed(
                f"{place}.{name} asks to learn a {role} turn, and only the assistant's are learned; "
                "remove it, or name it in the source's ignore"
            )
        learned = learned and meanings[value]
    return learned


def _other_keys(message: Mapping[str, Any], role: Role) -> Mapping[str, Any]:
    """What stands in a message beside the usual keys, and what of these has no meaning in this role."""
    meaningless = {
        "assistant": ("tool_call_id", "name"),
        "tool": THOUGHT_KEYS,
        "user": ("tool_call_id", "name", *THOUGHT_KEYS),
        "system": ("tool_call_id", "name", *THOUGHT_KEYS),
    }[role]
    return {
        key: value
        for key, value in message.items()
        if (key not in _READ_KEYS or key in meaningless) and not is_empty(value)
    }


def _parsed(text: str, *, of: type | tuple[type, ...], otherwise: Any) -> Any:
    """The JSON value of a text, if it is of this kind."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return otherwise
    return value if isinstance(value, of) else otherwise
