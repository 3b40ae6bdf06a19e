"""From raw records to conversations: which of the usual shapes a record has, and what is wrong with it."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from raytune_ft.spec import FieldsSpec

Role = Literal["system", "user", "assistant", "tool"]

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

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input", "context")
"""The first that a record has is its prompt."""
CONTEXT_COLUMNS = ("context", "input")
"""What stands beside a prompt: Alpaca's `input`, Dolly's `context`."""
COMPLETION_COLUMNS = ("completion", "response", "output", "answer", "target", "continuation")
SYSTEM_COLUMNS = ("system", "system_prompt")


class Malformed(Exception):
    """A record that cannot be trained on; the message is the reason. Never leaves the data package."""


class Turn(NamedTuple):
    """What one side says."""

    role: Role
    content: str
    context: str = ""
    """Text that the content is about, where the record keeps it apart."""

    @property
    def text(self) -> str:
        """Content and context together."""
        return f"{self.content}\n{self.context}" if self.context else self.content


class Conversation(NamedTuple):
    """Turns of which the last is the assistant's. Every assistant turn is learned."""

    turns: tuple[Turn, ...]
    references: tuple[str, ...]
    """Texts that the last turn may equally be; the first is the one that is learned."""
    shape: Literal["chat", "prompt", "instruction"]
    columns: Mapping[str, Any] = MappingProxyType({})
    """The record's own columns without the completion: what an inline template sees."""

    @property
    def input_text(self) -> str:
        """Everything before the first answer to a user or tool: what decides on the split.

        All answers are learned, so whatever begins with the same question has to stand on the same side:
        a question of the test split must not be the beginning of a longer chat in training.
        """
        said: list[str] = []
        asked = False
        for turn in self.turns:
            if asked and turn.role == "assistant":
                break
            asked = asked or turn.role in ("user", "tool")
            said.append(turn.text)
        return "\n".join(said)


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is learned from its first token to its last."""

    text: str

    @property
    def input_text(self) -> str:
        """The text itself decides on the split."""
        return self.text


def check_label(record: Conversation | PlainText, labels: Collection[str]) -> None:
    """Refuse what a classifier cannot learn from.

    Raises:
        Malformed: the completion is none of the labels, or there is none.
    """
    if isinstance(record, PlainText):
        raise Malformed("the record is raw text; a classifier needs a prompt, and a completion as its label")
    said = record.turns[-1].text.strip()
    if said not in labels:
        raise Malformed(
            f"the completion '{said:.60}' is none of model.labels ({', '.join(labels):.200}); "
            "add it there, or correct the record"
        )


def read_record(value: Any, fields: FieldsSpec) -> Conversation | PlainText:
    """Find the shape of a raw record.

    Args:
        value: the record as its file holds it.
        fields: which columns hold what, where the job says so; the usual names otherwise.

    Raises:
        Malformed: it has none of the shapes; says what is missing.
    """
    if not isinstance(value, dict):
        raise Malformed(f"the record is {_kind(value)}, not an object with fields")
    if fields.text is not None:
        return PlainText(_required_text(_reach(value, fields.text), fields.text))
    usual = _usual_columns(tuple(value))
    chat = fields.messages or usual.chat
    if chat is not None and fields.completion is None:
        return _read_chat(value, chat, usual, fields)
    completion = fields.completion or _completion_column(value, usual)
    if completion is not None:
        return _read_pair(value, completion, usual, fields)
    if "text" in value:
        return PlainText(_required_text(value["text"], "text"))
    raise Malformed(
        f"no completion: none of {', '.join(COMPLETION_COLUMNS)}, messages, conversations or text among its "
        f"fields ({', '.join(map(str, list(value)[:12]))}); name it with the source's fields.completion"
    )


@dataclass(frozen=True, slots=True)
class _UsualColumns:
    """Columns of a record that have a usual name."""

    chat: str | None
    system: str | None
    prompts: tuple[str, ...]
    contexts: tuple[str, ...]
    completions: tuple[str, ...]


@lru_cache(maxsize=1024)
def _usual_columns(names: tuple[str, ...]) -> _UsualColumns:
    """Found once for all records with the same columns."""

    def present(known: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in known if name in names)

    chats, systems = present(CHAT_COLUMNS), present(SYSTEM_COLUMNS)
    return _UsualColumns(
        chats[0] if chats else None,
        systems[0] if systems else None,
        present(PROMPT_COLUMNS),
        present(CONTEXT_COLUMNS),
        present(COMPLETION_COLUMNS),
    )


def _read_pair(
    value: dict[str, Any], completion: str, usual: _UsualColumns, fields: FieldsSpec
) -> Conversation:
    """A prompt and its completion, each a text or, as TRL writes them, a list of messages."""
    prompt = fields.prompt
    if prompt is None:
        prompt = next((name for name in usual.prompts if name != completion), None)
    if prompt is None:
        raise Malformed(
            f"no prompt: none of {', '.join(PROMPT_COLUMNS)}; name it with the source's fields.prompt"
        )
    asked = value[prompt] if prompt in value else _reach(value, prompt)
    answered = value[completion] if completion in value else _reach(value, completion)
    columns = {name: column for name, column in value.items() if name != completion.partition(".")[0]}
    if _is_messages(asked) and _is_messages(answered):
        turns = _read_turns([*asked, *answered], f"{prompt} + {completion}")
        return Conversation(turns, (turns[-1].content,), "chat", columns)
    references = _read_references(answered, completion)
    content = _text(asked, prompt)
    context = "" if fields.prompt else _read_context(value, usual, prompt, completion)
    if not content.strip():
        content, context = context, ""
    if not content.strip():
        raise Malformed(f"{prompt} is empty")
    turns = (
        *_read_system(value, usual, fields),
        Turn("user", content, context),
        Turn("assistant", references[0]),
    )
    return Conversation(turns, references, "prompt" if prompt == "prompt" else "instruction", columns)


def _read_chat(value: dict[str, Any], column: str, usual: _UsualColumns, fields: FieldsSpec) -> Conversation:
    messages = _reach(value, column)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise Malformed(f"{column} is {_kind(messages)}, not a list of messages")
    turns = _read_turns(messages, column)
    if turns[0].role != "system":
        turns = (*_read_system(value, usual, fields), *turns)
    columns = {name: content for name, content in value.items() if name != column.partition(".")[0]}
    return Conversation(turns, (turns[-1].content,), "chat", columns)


def _read_turns(messages: Sequence[Any], place: str) -> tuple[Turn, ...]:
    turns = tuple(_read_turn(message, f"{place}[{at}]") for at, message in enumerate(messages))
    if len(turns) < 2:
        raise Malformed(f"{place} has {len(turns)} message; a prompt and an answer are needed")
    if turns[-1].role != "assistant":
        raise Malformed(f"{place} ends with a {turns[-1].role} turn; the last must be the assistant's")
    if not any(turn.role in ("user", "tool") for turn in turns):
        raise Malformed(f"{place} has no user turn")
    return turns


def _read_turn(message: Any, place: str) -> Turn:
    if not isinstance(message, dict):
        raise Malformed(f"{place} is {_kind(message)}, not an object with role and content")
    author = message.get("role", message.get("from"))
    if not isinstance(author, str) or author.lower() not in ROLES:
        raise Malformed(f"{place}.role is {author!r}; expected system, user, assistant or tool")
    content = message.get("content", message.get("value"))
    if content is None:
        raise Malformed(
            f"{place} has no content" + ("; tool calls are not read" if "tool_calls" in message else "")
        )
    if isinstance(content, list):
        content = "".join(_read_part(part, f"{place}.content[{at}]") for at, part in enumerate(content))
    text = _text(content, f"{place}.content")
    if not text.strip():
        raise Malformed(f"{place}.content is empty")
    return Turn(ROLES[author.lower()], text)


def _read_part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return _text(part.get("text", part.get("value")), f"{place}.text")
    kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
    raise Malformed(f"{place} is {kind}; only parts of type 'text' are read")


def _read_system(value: dict[str, Any], usual: _UsualColumns, fields: FieldsSpec) -> tuple[Turn, ...]:
    column = fields.system or usual.system
    if column is None:
        return ()
    content = _text(_reach(value, column), column)
    return (Turn("system", content),) if content.strip() else ()


def _read_context(value: dict[str, Any], usual: _UsualColumns, prompt: str, completion: str) -> str:
    names = [name for name in usual.contexts if name not in (prompt, completion)]
    if not names:
        return ""
    return "\n".join(text for name in names if (text := _text(value[name], name)).strip())


def _read_references(answered: Any, column: str) -> tuple[str, ...]:
    """The completion, or several that are equally right."""
    if isinstance(answered, list) and answered and all(isinstance(text, str) for text in answered):
        return tuple(_required_text(text, f"{column}[{at}]") for at, text in enumerate(answered))
    return (_required_text(answered, column),)


def _completion_column(value: dict[str, Any], usual: _UsualColumns) -> str | None:
    prompt = usual.prompts[0] if usual.prompts else None
    found = [name for name in usual.completions if value[name] is not None and name != prompt]
    if len(found) > 1:
        raise Malformed(
            f"{' and '.join(found)} could each be the completion; choose with the source's fields.completion"
        )
    # A column of nulls is still the completion, so that the message is about the missing text.
    return found[0] if found else next(iter(usual.completions), None)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _reach(value: Any, path: str) -> Any:
    """The value at a dotted path; a column whose own name holds dots comes first.

    >>> _reach({"meta": {"answers": ["a", "b"]}}, "meta.answers.1")
    'b'
    """
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise Malformed(f"no field {path}")
    return value


def _required_text(value: Any, place: str) -> str:
    text = _text(value, place)
    if not text.strip():
        raise Malformed(f"{place} is empty")
    return text


def _text(value: Any, place: str) -> str:
    """A field as text: null is empty, numbers are written as JSON writes them."""
    if not isinstance(value, str):
        return _plain_value(value, place)
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed(f"{place} holds half of a surrogate pair at character {error.start + 1}") from None
    return value


def _plain_value(value: Any, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise Malformed(f"{place} is {_kind(value)}, not text")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )
