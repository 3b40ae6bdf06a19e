"""Raw records to conversations: the usual shapes, the job's own field names, and what is refused and why."""

from typing import Any

import pytest

from raytune_ft.data.conversation import Conversation, Malformed, PlainText, Turn
from raytune_ft.data.records import read_record
from raytune_ft.spec import FieldsSpec

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = Turn("system", "Be kind.")
HI = Turn("user", "Hi")
HELLO = Turn("assistant", "Hello")
PAIR = {"prompt": "q", "completion": "a"}


def read(value: Any, **fields: str) -> Conversation:
    record = read_record(value, FieldsSpec(**fields))
    assert isinstance(record, Conversation)
    return record


@pytest.mark.parametrize(
    ("value", "turns", "shape"),
    [
        ({"instruction": "Hi", "output": "Hello"}, (HI, HELLO), "instruction"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, (HI, HELLO), "instruction"),
        ({"instruction": "", "input": "Hi", "output": "Hello"}, (HI, HELLO), "instruction"),
        (
            {"instruction": "Hi", "input": "x", "output": "Hello"},
            (Turn("user", "Hi", "x"), HELLO),
            "instruction",
        ),
        ({"instruction": "Hi", "output": "Hello", "text": "Hi Hello"}, (HI, HELLO), "instruction"),
        (
            {"instruction": "Hi", "context": "x", "response": "Hello"},
            (Turn("user", "Hi", "x"), HELLO),
            "instruction",
        ),
        ({"prompt": "Hi", "completion": "Hello"}, (HI, HELLO), "prompt"),
        ({"prompt": "Hi", "response": "Hello"}, (HI, HELLO), "prompt"),
        ({"prompt": "Hi", "completion": "Hello", "response": None}, (HI, HELLO), "prompt"),
        ({"question": "Hi", "answer": "Hello"}, (HI, HELLO), "instruction"),
        ({"input": "Hi", "target": "Hello"}, (HI, HELLO), "instruction"),
        ({"context": "Hi", "continuation": "Hello"}, (HI, HELLO), "instruction"),
        ({"system": "Be kind.", "prompt": "Hi", "completion": "Hello"}, (SYSTEM, HI, HELLO), "prompt"),
        ({"system_prompt": "", "prompt": "Hi", "completion": "Hello"}, (HI, HELLO), "prompt"),
        ({"messages": [USER, ASSISTANT]}, (HI, HELLO), "chat"),
        ({"messages": [USER, ASSISTANT], "system": "Be kind."}, (SYSTEM, HI, HELLO), "chat"),
        (
            {"messages": [{"role": "Developer", "content": "Be kind."}, USER, ASSISTANT]},
            (SYSTEM, HI, HELLO),
            "chat",
        ),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, (HI, HELLO, HI, HELLO), "chat"),
        (
            {"messages": [{**USER, "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]},
            (HI, HELLO),
            "chat",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            (HI, HELLO),
            "chat",
        ),
        ({"prompt": [USER], "completion": [ASSISTANT]}, (HI, HELLO), "chat"),
        ({"prompt": 1, "completion": 2.5}, (Turn("user", "1"), Turn("assistant", "2.5")), "prompt"),
        ({"prompt": "Hi", "completion": True}, (HI, Turn("assistant", "true")), "prompt"),
    ],
)
def test_shapes(value: dict[str, Any], turns: tuple[Turn, ...], shape: str) -> None:
    conversation = read(value)
    assert (conversation.turns, conversation.shape) == (turns, shape)
    assert conversation.references == (turns[-1].content,)


def test_several_references_of_which_the_first_is_learned() -> None:
    conversation = read({"instruction": "Hi", "output": ["Hello", "Hey"]})
    assert conversation.turns[-1] == HELLO
    assert conversation.references == ("Hello", "Hey")


def test_raw_text() -> None:
    assert read_record({"text": "Once", "id": 3}, FieldsSpec()) == PlainText("Once")


@pytest.mark.parametrize(
    ("value", "fields", "turns"),
    [
        ({"q": "Hi", "a": "Hello"}, PAIR, (HI, HELLO)),
        ({"q": "Hi", "a": "Hello", "s": "Be kind."}, PAIR | {"system": "s"}, (SYSTEM, HI, HELLO)),
        ({"x": {"q": "Hi"}, "a": ["no", "Hello"]}, {"prompt": "x.q", "completion": "a.1"}, (HI, HELLO)),
        ({"x.q": "Hi", "a": "Hello"}, {"prompt": "x.q", "completion": "a"}, (HI, HELLO)),
        ({"question": "Hi", "rationale": "Hello", "answer": "B"}, {"completion": "rationale"}, (HI, HELLO)),
        ({"chat": {"turns": [USER, ASSISTANT]}}, {"messages": "chat.turns"}, (HI, HELLO)),
        ({"prompt": "Hi", "completion": "a", "response": "Hello"}, {"completion": "response"}, (HI, HELLO)),
    ],
)
def test_fields_of_the_job(value: dict[str, Any], fields: dict[str, str], turns: tuple[Turn, ...]) -> None:
    assert read(value, **fields).turns == turns


def test_field_for_raw_text() -> None:
    assert read_record({"body": {"en": "Once"}, "output": "x"}, FieldsSpec(text="body.en")) == PlainText(
        "Once"
    )


def test_an_inline_template_does_not_see_the_completion() -> None:
    assert read({"question": "Hi", "choices": [1], "answer": "B"}).columns == {
        "question": "Hi",
        "choices": [1],
    }
    assert read({"meta": {"answer": "B"}, "q": "Hi"}, completion="meta.answer", prompt="q").columns == {
        "q": "Hi"
    }
    assert read({"messages": [USER, ASSISTANT], "topic": "x"}).columns == {"topic": "x"}


def test_input_text_is_all_before_the_first_answer() -> None:
    assert read({"instruction": "Hi", "input": "x", "output": "Hello"}).input_text == "Hi\nx"
    assert read({"messages": [USER, USER, ASSISTANT, USER, ASSISTANT]}).input_text == "Hi\nHi"
    assert PlainText("Once").input_text == "Once"


def test_a_greeting_is_no_answer() -> None:
    """It stands before many different questions, which must not all fall into one split."""
    assert read({"messages": [ASSISTANT, USER, ASSISTANT, USER, ASSISTANT]}).input_text == "Hello\nHi"


NO_COMPLETION = (
    "no completion: none of completion, response, output, answer, target, continuation, messages, "
    "conversations or text among its fields ({}); name it with the source's fields.completion"
)


@pytest.mark.parametrize(
    ("value", "fields", "reason"),
    [
        (["x"], {}, "the record is a list, not an object with fields"),
        ("x", {}, "the record is a text, not an object with fields"),
        (5, {}, "the record is a number, not an object with fields"),
        (None, {}, "the record is null, not an object with fields"),
        ({}, {}, NO_COMPLETION.format("")),
        ({"prompt": "Hi", "label": 1}, {}, NO_COMPLETION.format("prompt, label")),
        (
            {"response": "Hello", "extra": "x"},
            {},
            "no prompt: none of prompt, instruction, question, input, context; "
            "name it with the source's fields.prompt",
        ),
        (
            {"prompt": "Hi", "response": "a", "completion": "b"},
            {},
            "completion and response could each be the completion; "
            "choose with the source's fields.completion",
        ),
        ({"prompt": "Hi", "completion": " "}, {}, "completion is empty"),
        ({"prompt": "Hi", "completion": None}, {}, "completion is empty"),
        ({"prompt": "Hi", "completion": ["a", ""]}, {}, "completion[1] is empty"),
        ({"prompt": "Hi", "completion": []}, {}, "completion is a list, not text"),
        ({"prompt": "Hi", "completion": {"a": 1}}, {}, "completion is an object, not text"),
        ({"prompt": "Hi", "completion": float("nan")}, {}, "completion is a number, not text"),
        ({"prompt": "Hi", "completion": b"x"}, {}, "completion is a bytes, not text"),
        ({"prompt": " ", "completion": "x"}, {}, "prompt is empty"),
        (
            {"prompt": "a\ud800", "completion": "x"},
            {},
            "prompt holds half of a surrogate pair at character 2",
        ),
        ({"text": ""}, {}, "text is empty"),
        ({"a": "x"}, {"prompt": "q", "completion": "a"}, "no field q"),
        ({"a": [1]}, {"text": "a.b"}, "no field a.b"),
        ({"messages": "Hi"}, {}, "messages is a text, not a list of messages"),
        ({"messages": []}, {}, "messages has 0 message; a prompt and an answer are needed"),
        ({"messages": [ASSISTANT]}, {}, "messages has 1 message; a prompt and an answer are needed"),
        ({"messages": [USER, USER]}, {}, "messages ends with a user turn; the last must be the assistant's"),
        ({"messages": [ASSISTANT, ASSISTANT]}, {}, "messages has no user turn"),
        ({"messages": [USER, "Hello"]}, {}, "messages[1] is a text, not an object with role and content"),
        (
            {"messages": [USER, {"role": "narrator", "content": "x"}]},
            {},
            "messages[1].role is 'narrator'; expected system, user, assistant or tool",
        ),
        (
            {"messages": [{"content": "x"}, ASSISTANT]},
            {},
            "messages[0].role is None; expected system, user, assistant or tool",
        ),
        ({"messages": [{"role": "user"}, ASSISTANT]}, {}, "messages[0] has no content"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
            {},
            "messages[1] has no content",
        ),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, {}, "messages[1].content is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
            {},
            "messages[0].content[0] is 'image_url'; only parts of type 'text' and 'thinking' are read",
        ),
    ],
)
def test_malformed(value: Any, fields: dict[str, str], reason: str) -> None:
    with pytest.raises(Malformed) as raised:
        read_record(value, FieldsSpec(**fields))
    assert str(raised.value) == reason
