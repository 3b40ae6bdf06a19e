"""Record shapes against other projects: what is read, and what is refused."""

from typing import Any

import pytest
from peer_cases import cases, needs_peers

from raytune_ft.data.conversation import Conversation, Malformed, PlainText
from raytune_ft.data.records import read_record
from raytune_ft.spec import FieldsSpec

pytestmark = needs_peers


def read(value: Any) -> Conversation:
    record = read_record(value, FieldsSpec())
    assert isinstance(record, Conversation)
    return record


@cases("llmfoundry/malformed_examples.json")
def test_malformed_records_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        read_record(case["input"], FieldsSpec())


@cases("trl/conversions.json", "maybe_convert_to_chatml.with_conversations_key *.already_chatml")
def test_share_gpt_is_read_as_messages(case: dict[str, Any]) -> None:
    messages = [{"role": turn.role, "content": turn.text} for turn in read(case["input"]).turns]
    assert messages == case["expected"]["messages"]


@cases("trl/conversions.json", "maybe_convert_to_chatml.without_conversations_key")
def test_prompt_and_completion_of_messages(case: dict[str, Any]) -> None:
    messages = [{"role": turn.role, "content": turn.text} for turn in read(case["input"]).turns]
    assert messages == case["expected"]["prompt"] + case["expected"]["completion"]


@cases("trl/conversions.json", "maybe_convert_to_chatml.not_conversional")
def test_raw_text_stays_text(case: dict[str, Any]) -> None:
    assert read_record(case["input"], FieldsSpec()) == PlainText(case["expected"]["text"])


@cases(
    "llamafactory/converters.json", "v1.test_sharegpt_converter v1.test_sharegpt_converter_no_media_unchanged"
)
def test_roles_and_what_is_learned(case: dict[str, Any]) -> None:
    expected = [
        (message["role"], message["content"][0]["value"], message["loss_weight"])
        for message in case["expected"]["messages"]
    ]
    turns = read(case["input"]).turns
    assert [(turn.role, turn.text, float(turn.role == "assistant")) for turn in turns] == expected


@cases("llamafactory/converters.json", "v1.test_alpaca_converter v1.test_sharegpt_converter#2")
def test_alpaca_and_share_gpt(case: dict[str, Any]) -> None:
    *before, answer = read(case["input"]).turns
    expected = case["expected"]
    system = "".join(turn.text for turn in before if turn.role == "system")
    asked = [{"role": turn.role, "content": turn.text} for turn in before if turn.role != "system"]
    assert (system, asked) == (expected["_system"], expected["_prompt"])
    assert [{"role": answer.role, "content": answer.text}] == expected["_response"]
