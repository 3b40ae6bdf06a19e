"""From raw records to conversations: which of the usual shapes a record has, and what is wrong with it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raytune_ft.data.conversation import Conversation, Malformed, PlainText, Turn
from raytune_ft.data.messages import read_tools, read_turns
from raytune_ft.data.values import is_empty, kind_of, reach, required_text, text_of
from raytune_ft.spec import FieldsSpec

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input", "context")
"""The first that a record has is its prompt."""
CONTEXT_COLUMNS = ("context", "input")
"""What stands beside a prompt: Alpaca's `input`, Dolly's `context`."""
COMPLETION_COLUMNS = ("completion", "response", "output", "answer", "target", "continuation")
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
HISTORY_COLUMN = "history"
"""Earlier questions and answers of an instruction, as LLaMA-Factory keeps them."""
TEMPLATE_COLUMNS = ("documents", "chat_template_kwargs")
"""What a chat template gets by name."""


def read_record(value: Any, fields: FieldsSpec, ignore: Collection[str] = ()) -> Conversation | PlainText:
    """Find the shape of a raw record.

    Args:
        value: the record as its file holds it.
        fields: which columns hold what, where the job says so; the usual names otherwise.
        ignore: names of columns, and of keys of messages, that are passed over.

    Raises:
        Malformed: it has none of the shapes; says what is missing.
    """
    if not isinstance(value, dict):
        raise Malformed(f"the record is {kind_of(value)}, not an object with fields")
    if ignore:
        value = {name: column for name, column in value.items() if name not in ignore}
    if fields.text is not None:
        return PlainText(required_text(reach(value, fields.text), fields.text))
    usual = _usual_columns(tuple(name for name, column in value.items() if column is not None))
    chat = fields.messages or usual.chat
    if chat is not None and fields.completion is None:
        return _read_chat(value, chat, usual, fields, ignore)
    completion = fields.completion or _completion_column(value, usual)
    if completion is not None:
        return _read_pair(value, completion, usual, fields, ignore)
    if "text" in value:
        return PlainText(required_text(value["text"], "text"))
    raise Malformed(
        f"no completion: none of {', '.join(COMPLETION_COLUMNS)}, messages, conversations or text among its "
        f"fields ({', '.join(map(str, list(value)[:12]))}); name it with the source's fields.completion"
    )


@dataclass(frozen=True, slots=True)
class _UsualColumns:
    """Columns of a record that have a usual name."""

    chat: str | None
    system: str | None
    tools: str | None
    prompts: tuple[str, ...]
    contexts: tuple[str, ...]
    completions: tuple[str, ...]


@lru_cache(maxsize=1024)
def _usual_columns(names: tuple[str, ...]) -> _UsualColumns:
    """Found once for all records with the same columns."""

    def present(known: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in known if name in names)

    def first(known: Sequence[str]) -> str | None:
        return next(iter(present(known)), None)

    return _UsualColumns(
        first(CHAT_COLUMNS),
        first(SYSTEM_COLUMNS),
        first(TOOL_COLUMNS),
        present(PROMPT_COLUMNS),
        present(CONTEXT_COLUMNS),
        present(COMPLETION_COLUMNS),
    )


def _read_pair(
    value: dict[str, Any],
    completion: str,
    usual: _UsualColumns,
    fields: FieldsSpec,
    ignore: Collection[str],
) -> Conversation:
    """A prompt and its completion, each a text or, as TRL writes them, a list of messages."""
    prompt = fields.prompt
    if prompt is None:
        prompt = next((name for name in usual.prompts if name != completion), None)
    if prompt is None:
        prompt = next((name for name in PROMPT_COLUMNS if name in value and name != completion), None)
    if prompt is None:
        raise Malformed(
            f"no prompt: none of {', '.join(PROMPT_COLUMNS)}; name it with the source's fields.prompt"
        )
    asked = value[prompt] if prompt in value else reach(value, prompt)
    answered = value[completion] if completion in value else reach(value, completion)
    if _is_messages(asked) and _is_messages(answered):
        turns = read_turns(_kept([*asked, *answered], ignore), f"{prompt} + {completion}")
        return _chat(value, turns, {prompt, completion}, _without(value, completion), usual, fields)
    references = _read_references(answered, completion)
    content = text_of(asked, prompt)
    context = "" if fields.prompt else _read_context(value, usual, prompt, completion)
    if not content.strip():
        content, context = context, ""
    if not content.strip():
        raise Malformed(f"{prompt} is empty")
    turns = (
        *_read_system(value, usual, fields),
        *_read_history(value),
        Turn("user", content, context),
        Turn("assistant", references[0]),
    )
    columns = _without(value, completion)
    filled = tuple(name for name, column in columns.items() if column is not None)
    unread = _unread_by_pairs(filled, prompt, usual, fields.system)
    return Conversation(
        turns,
        references,
        "prompt" if prompt == "prompt" else "instruction",
        columns,
        unread={name: columns[name] for name in unread},
        tools=() if usual.tools is None else read_tools(value[usual.tools], usual.tools),
    )


@lru_cache(maxsize=1024)
def _unread_by_pairs(
    names: tuple[str, ...], prompt: str, usual: _UsualColumns, system: str | None
) -> tuple[str, ...]:
    """Columns of a prompt and its completion that nothing reads."""
    read = {prompt.partition(".")[0], (system or "").partition(".")[0], usual.system, usual.tools}
    return tuple(name for name in names if name not in {*read, *usual.contexts, HISTORY_COLUMN})


def _read_chat(
    value: dict[str, Any], column: str, usual: _UsualColumns, fields: FieldsSpec, ignore: Collection[str]
) -> Conversation:
    turns = read_turns(_kept(reach(value, column), ignore), column)
    return _chat(value, turns, {column.partition(".")[0]}, _without(value, column), usual, fields)


def _chat(
    value: dict[str, Any],
    turns: tuple[Turn, ...],
    read: set[str],
    columns: Mapping[str, Any],
    usual: _UsualColumns,
    fields: FieldsSpec,
) -> Conversation:
    """A conversation of turns, with what the other columns of its record say."""
    if turns[0].role != "system":
        turns = (*_read_system(value, usual, fields), *turns)
        read = {*read, (fields.system or usual.system or "").partition(".")[0]}
    tools = () if usual.tools is None else read_tools(value[usual.tools], usual.tools)
    variables = {name: value[name] for name in TEMPLATE_COLUMNS if not is_empty(value.get(name))}
    read = {*read, *variables, *([usual.tools] if usual.tools else ())}
    unread = {name: column for name, column in value.items() if name not in read and not is_empty(column)}
    return Conversation(turns, (turns[-1].content,), "chat", columns, tools, variables, unread)


def _without(value: dict[str, Any], column: str) -> dict[str, Any]:
    """The columns that an inline template sees."""
    hidden = column.partition(".")[0]
    return {name: content for name, content in value.items() if name != hidden}


def _kept(messages: Any, ignore: Collection[str]) -> Any:
    """Messages without the keys that the job ignores; what is no list of messages is left as it is."""
    if not ignore or not isinstance(messages, list):
        return messages
    return [
        {key: part for key, part in message.items() if key not in ignore}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _read_system(value: dict[str, Any], usual: _UsualColumns, fields: FieldsSpec) -> tuple[Turn, ...]:
    column = fields.system or usual.system
    if column is None:
        return ()
    content = text_of(reach(value, column), column)
    return (Turn("system", content),) if content.strip() else ()


def _read_history(value: dict[str, Any]) -> tuple[Turn, ...]:
    history = value.get(HISTORY_COLUMN)
    if is_empty(history):
        return ()
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise Malformed(
            f"{HISTORY_COLUMN} is {kind_of(history)}, not a list of [question, answer] pairs; correct it, or "
            "name it in the source's ignore"
        )
    turns: list[Turn] = []
    for at, (asked, answered) in enumerate(history):
        turns.append(Turn("user", required_text(asked, f"{HISTORY_COLUMN}[{at}][0]")))
        turns.append(Turn("assistant", required_text(answered, f"{HISTORY_COLUMN}[{at}][1]")))
    return tuple(turns)


def _read_context(value: dict[str, Any], usual: _UsualColumns, prompt: str, completion: str) -> str:
    names = [name for name in usual.contexts if name not in (prompt, completion)]
    if not names:
        return ""
    return "\n".join(text for name in names if (text := text_of(value[name], name)).strip())


def _read_references(answered: Any, column: str) -> tuple[str, ...]:
    """The completion, or several that are equally right."""
    if isinstance(answered, list) and answered and all(isinstance(text, str) for text in answered):
        return tuple(required_text(text, f"{column}[{at}]") for at, text in enumerate(answered))
    return (required_text(answered, column),)


def _completion_column(value: dict[str, Any], usual: _UsualColumns) -> str | None:
    prompt = usual.prompts[0] if usual.prompts else None
    found = [name for name in usual.completions if name != prompt]
    if len(found) > 1:
        raise Malformed(
            f"{' and '.join(found)} could each be the completion; choose with the source's fields.completion"
        )
    # A column of nulls is still the completion, so that the message is about the missing text.
    return found[0] if found else next((name for name in COMPLETION_COLUMNS if name in value), None)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
