"""Messages to turns: tool calls, thoughts, flags, parts, and what is refused by its place."""

import json
from typing import Any

import pytest

from raytune_ft.data.conversation import Conversation, Malformed, ToolCall, Turn
from raytune_ft.data.messages import read_tools, read_turns
from raytune_ft.data.records import read_record
from raytune_ft.spec import FieldsSpec

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
CALL = ToolCall("f", {"x": 1})


def answer(**message: Any) -> Turn:
    return read_turns([HI, {"role": "assistant", **message}], "messages")[-1]


def read(value: dict[str, Any], *ignore: str) -> Conversation:
    record = read_record(value, FieldsSpec(), ignore)
    assert isinstance(record, Conversation)
    return record


@pytest.mark.parametrize(
    ("message", "calls"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}, (CALL,)),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}, (CALL,)),
        ({"tool_calls": [{"name": "f", "parameters": {"x": 1}}]}, (CALL,)),
        (
            {"tool_calls": [{"id": "c", "type": "function", "index": 0, "function": {"name": "f"}}]},
            (ToolCall("f", {}, "c"),),
        ),
        ({"tool_calls": json.dumps([{"name": "f", "arguments": {"x": 1}}])}, (CALL,)),
        ({"function_call": {"name": "f", "arguments": '{"x": 1}'}}, (CALL,)),
        ({"tool_calls": [{"name": "f", "arguments": "x = 1"}]}, (ToolCall("f", "x = 1"),)),
        ({"tool_calls": [{"name": "f", "arguments": ""}]}, (ToolCall("f", {}),)),
        ({"content": "So.", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}, (CALL,)),
        ({"content": "So.", "tool_calls": None, "function_call": None}, ()),
    ],
)
def test_tool_calls(message: dict[str, Any], calls: tuple[ToolCall, ...]) -> None:
    turn = answer(**message)
    assert turn.calls == calls
    assert turn.content == message.get("content", "")


@pytest.mark.parametrize(
    ("value", "calls", "content"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', (CALL,), ""),
        (
            '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
            (CALL, ToolCall("g", {})),
            "",
        ),
        ("f(1)", (), "f(1)"),
        ('{"city": "Lima"}', (), '{"city": "Lima"}'),
    ],
)
def test_share_gpt_calls(value: str, calls: tuple[ToolCall, ...], content: str) -> None:
    turn = read_turns([HI, {"from": "function_call", "value": value}], "conversations")[-1]
    assert (turn.calls, turn.content) == (calls, content)


def test_results_of_tools_know_their_call() -> None:
    result = {"role": "tool", "name": "f", "tool_call_id": "c", "content": {"celsius": 19}}
    assert read_turns([HI, result, HELLO], "messages")[1] == Turn(
        "tool", '{"celsius": 19}', name="f", call_id="c"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"name": "f"}], ({"type": "function", "function": {"name": "f"}},)),
        ('[{"name": "f"}]', ({"type": "function", "function": {"name": "f"}},)),
        (['{"name": "f"}'], ({"type": "function", "function": {"name": "f"}},)),
        (
            [{"type": "function", "function": {"name": "f"}}],
            ({"type": "function", "function": {"name": "f"}},),
        ),
        ([], ()),
        ("[]", ()),
        (None, ()),
    ],
)
def test_tools(value: Any, expected: tuple[Any, ...]) -> None:
    assert read_tools(value, "tools") == expected


@pytest.mark.parametrize(
    "message",
    [
        {"content": "408", "reasoning_content": "17*24"},
        {"content": "408", "thinking": "17*24"},
        {"content": "408", "reasoning": " 17*24\n"},
        {"content": "408", "reasoning_content": "17*24", "thinking": None},
        {"content": [{"type": "thinking", "thinking": "17*24"}, {"type": "text", "text": "408"}]},
        {"content": [{"type": "reasoning", "text": "17*24"}, {"type": "text", "text": "408"}]},
        {"content": "<think>\n17*24\n</think>\n\n408"},
        {"content": "17*24</think>408"},
    ],
)
def test_thoughts(message: dict[str, Any]) -> None:
    turn = answer(**message)
    assert (turn.thoughts, turn.content) == ("17*24", "408")


@pytest.mark.parametrize("content", ["<think>\n\n</think>\n\n408", "<think>17*24</think>", "a <b> c"])
def test_what_is_no_thought_stays_as_it_is(content: str) -> None:
    assert (answer(content=content).thoughts, answer(content=content).content) == ("", content)


def test_a_thought_in_the_content_is_kept_as_it_was_written() -> None:
    assert answer(content="<think>x</think>y").inline_text == "<think>x</think>y"
    assert answer(content="y", thinking="x").inline_text == "<think>\nx\n</think>\n\ny"


@pytest.mark.parametrize(
    ("flags", "learned"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"train": True, "weight": 0}, False),
        ({"masked": True}, False),
        ({"masked": False, "weight": None}, True),
        ({}, True),
    ],
)
def test_flags(flags: dict[str, Any], learned: bool) -> None:
    assert answer(content="x", **flags).learned is learned


def test_flags_of_what_is_given_anyway() -> None:
    assert read_turns([{**HI, "weight": 0, "train": False, "masked": True}, HELLO], "m")[0] == Turn(
        "user", "Hi"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([HI, {**HELLO, "weight": 0.5}], "m[1].weight is 0.5; it must be 0 or 1"),
        ([HI, {**HELLO, "train": "yes"}], 'm[1].train is "yes"; it must be true or false'),
        (
            [{**HI, "weight": 1}, HELLO],
            "m[0].weight asks to learn a user turn, and only the assistant's are learned; remove it, or name "
            "it in the source's ignore",
        ),
        (
            [HI, {**HELLO, "tool_calls": [{"x": 1}]}],
            "m[1].tool_calls[0] is an object without the name of a function",
        ),
        ([HI, {**HELLO, "tool_calls": "f"}], "m[1].tool_calls is a text, not a list of calls"),
        (
            [{**HI, "tool_calls": [{"name": "f"}]}, HELLO],
            "m[0].tool_calls[0] stands in a user turn; only the assistant calls tools",
        ),
        (
            [HI, {**HELLO, "tool_calls": [{"name": "f", "delay": 3}]}],
            "m[1].tool_calls[0].delay is not read; remove it",
        ),
        (
            [HI, {"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}],
            "m[1] has different thoughts in thinking and reasoning; keep one of them",
        ),
        (
            [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}, HELLO],
            "m[0].content holds thoughts of the user; only the assistant has thoughts",
        ),
        (
            [HI, {"role": "assistant", "content": [1]}],
            "m[1].content[0] is a number; only parts of type 'text' and 'thinking' are read",
        ),
    ],
)
def test_malformed(messages: list[Any], reason: str) -> None:
    with pytest.raises(Malformed) as raised:
        read_turns(messages, "m")
    assert str(raised.value) == reason


def test_keys_that_only_a_template_may_know_are_kept() -> None:
    turns = read_turns([{**HI, "name": "Ann"}, {**HELLO, "mood": "calm", "audio": None, "tags": []}], "m")
    assert [turn.other for turn in turns] == [{"name": "Ann"}, {"mood": "calm"}]


def test_an_empty_system_text_is_no_turn() -> None:
    for content in ("", "  ", None):
        turns = read_turns([{"role": "system", "content": content}, HI, HELLO], "m")
        assert [turn.role for turn in turns] == ["user", "assistant"]


def test_messages_as_json_text() -> None:
    assert read({"messages": json.dumps([HI, HELLO])}).turns == (
        Turn("user", "Hi"),
        Turn("assistant", "Hello"),
    )


@pytest.mark.parametrize(
    ("value", "contents"),
    [
        ({"messages": None, "prompt": "q", "completion": "a"}, ["q", "a"]),
        ({"messages": [HI, HELLO], "prompt": None, "completion": None}, ["Hi", "Hello"]),
        ({"prompt": None, "instruction": "q", "input": "", "output": "a"}, ["q", "a"]),
        ({"prompt": "q", "instruction": None, "input": None, "output": "a"}, ["q", "a"]),
    ],
)
def test_null_fillers_are_no_columns(value: dict[str, Any], contents: list[str]) -> None:
    assert [turn.content for turn in read(value).turns] == contents


def test_history_of_an_instruction() -> None:
    record = read({"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"})
    roles = [(turn.role, turn.content) for turn in record.turns]
    assert roles == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert record.learned == (2, 4)
    with pytest.raises(Malformed, match=r"^history is a list, not a list of \[question, answer\] pairs"):
        read({"instruction": "c", "output": "d", "history": ["a"]})


def test_columns_beside_a_chat() -> None:
    value = {
        "messages": [HI, HELLO],
        "tools": '[{"name": "f"}]',
        "documents": [{"text": "x"}],
        "id": 7,
        "note": "n",
    }
    record = read(value)
    assert [tool["function"]["name"] for tool in record.tools] == ["f"]
    assert dict(record.variables) == {"documents": [{"text": "x"}]}
    assert dict(record.unread) == {"id": 7, "note": "n"}
    assert dict(read(value, "note", "tools").unread) == {"id": 7}
    assert read(value, "tools").tools == ()


def test_keys_of_messages_can_be_ignored() -> None:
    record = read({"messages": [{**HI, "name": "Ann"}, {**HELLO, "weight": 0.5}]}, "name", "weight")
    assert record.turns == (Turn("user", "Hi"), Turn("assistant", "Hello"))
