"""Rendering against other projects: chat templates, prompt formats, where an answer begins and ends."""

from dataclasses import replace
from typing import Any

import pytest
from peer_cases import all_cases, cases, needs_peers

from raytune_ft.data.records import ROLES, Conversation, Malformed, Turn
from raytune_ft.data.template import TEMPLATES, ChatTemplate, Segment, render_chat

pytestmark = needs_peers

OLLAMA = {
    "alpaca": "instruction",
    "chatml": "chatml",
    "gemma-instruct": "gemma",
    "llama3-instruct": "llama3",
    "mistral-instruct": "mistral",
    "phi-3": "phi3",
    "vicuna": "vicuna",
    "zephyr": "zephyr",
}
EMPTY_THOUGHT = 'test_reasoning_encode_oneturn*false, "enable_thinking": null}'
REFUSED = {
    "blenderbot": "after its own prompt",
    "blenderbot_small": "after its own prompt",
    "codellama/CodeLlama-70b-Instruct-hf": "after its own prompt",
    "meta-llama/Llama-Guard-3-11B-Vision": "after its own prompt",
    "CohereForAI/c4ai-command-r-v01": "refuses it",
    "CohereForAI/c4ai-command-r-v01 (JSON Schema)": "refuses it",
}
"""Templates that cannot be trained with: a prompt is not how a whole chat begins, or tools are required."""
TRAINABLE = [
    key for key in all_cases() if key.startswith("hf_jinja/") and key.partition("::")[2] not in REFUSED
]
QWEN_SYSTEM = Turn("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")


def turns(messages: list[dict[str, Any]]) -> tuple[Turn, ...]:
    return tuple(Turn(ROLES[message["role"]], message["content"]) for message in messages)


def conversation(messages: list[dict[str, Any]], *before: Turn) -> Conversation:
    return Conversation((*before, *turns(messages)), (messages[-1]["content"],), "chat")


def text(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


@cases("hf_jinja/chat_templates.json")
def test_chat_template_text(case: dict[str, Any]) -> None:
    variables = dict(case["data"])
    assert render_chat(case["chat_template"], variables.pop("messages"), **variables) == case["expected"]


@cases("axolotl/chat_template_snapshots.json")
def test_chat_template_snapshot(case: dict[str, Any]) -> None:
    assert render_chat(case["chat_template"], case["messages"], **case["render_kwargs"]) == case["expected"]


@cases("ollama/rendered_prompts.json", but=["gemma-instruct/system-*"])
def test_prompt_for_generation(case: dict[str, Any]) -> None:
    template = replace(TEMPLATES[OLLAMA[case["id"].partition("/")[0]]], eos="</s>")
    assert text(template.open_answer(turns(case["messages"]))) == case["expected"]


@cases("llmfoundry/chat_slicing.json")
def test_chat_is_cut_into_prompts_and_responses(case: dict[str, Any]) -> None:
    system = (
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers."
    )
    source = (
        "{{ '<|im_start|>system\n" + system + "\n' }}{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
        "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    segments = ChatTemplate(source, {}).render(conversation(case["input"]["messages"]))
    expected = [piece for turn in case["expected"] for piece in (turn["prompt"], turn["response"])]
    assert [segment.text for segment in segments] == expected
    assert [segment.learned for segment in segments] == [False, True] * len(case["expected"])


@cases("llamafactory/template_strings.json", "test_encode_oneturn test_llama3_template")
def test_llama3_last_turn(case: dict[str, Any]) -> None:
    *before, answer = TEMPLATES["llama3"].render(conversation(case["messages"]))
    expected = case["turns"][-1]
    # BOS is a token of the tokenizer's here, not a text of the template's.
    assert text(tuple(before)) == expected["prompt"].removeprefix("<|begin_of_text|>")
    assert answer.text == expected["answer"]


@cases("llamafactory/template_strings.json", "test_gemma_template")
def test_gemma_last_turn(case: dict[str, Any]) -> None:
    *before, answer = TEMPLATES["gemma"].render(conversation(case["messages"]))
    expected = case["turns"][-1]
    assert text(tuple(before)) == expected["prompt"].removeprefix("<bos>")
    # The newline after the marker is not learned: generation stops at the marker.
    assert answer.text == expected["answer"].removesuffix("\n")


@cases("llamafactory/template_strings.json", "test_qwen2_5_template")
def test_qwen_last_turn(case: dict[str, Any]) -> None:
    *before, answer = TEMPLATES["chatml"].render(conversation(case["messages"], QWEN_SYSTEM))
    expected = case["turns"][-1]
    assert text(tuple(before)) == expected["prompt"]
    assert answer.text == expected["answer"].removesuffix("\n")


@cases(
    "llamafactory/template_strings.json",
    'test_reasoning_encode_oneturn*"enable_thinking":?null}'
    ' test_reasoning_encode_oneturn*"enable_thinking":?true} test_qwen3_template*',
    but=[EMPTY_THOUGHT],
)
def test_template_that_rewrites_history_learns_the_last_turn(case: dict[str, Any]) -> None:
    source = all_cases()["hf_jinja/chat_templates.json::Qwen/Qwen3-0.6B"]["chat_template"]
    prompt, answer = ChatTemplate(source, {}).render(conversation(case["messages"]))
    expected = case["turns"][-1]
    assert (prompt.text, answer.text) == (expected["prompt"], expected["answer"].removesuffix("\n"))
    assert (prompt.learned, answer.learned) == (False, True)


ASKED = (Turn("user", "1 + 1?"), Turn("assistant", "Two."), Turn("user", "2 + 2?"))
CHAT = Conversation((*ASKED, Turn("assistant", "Four.")), ("Four.",), "chat")


def chat_template(key: str) -> ChatTemplate:
    case = all_cases()[key]
    special = {name: case["data"].get(name, f"<{name}>") for name in ("bos_token", "eos_token")}
    return ChatTemplate(case["chat_template"], special)


@pytest.mark.parametrize("key", TRAINABLE)
def test_answers_of_a_chat_template_are_found(key: str) -> None:
    """Segments are the rendered text, up to what follows the last end-of-turn marker."""
    template = chat_template(key)
    segments = template.render(CHAT)
    whole = template.text(CHAT.turns, opening=False)
    assert whole.startswith(text(segments))
    assert whole.removeprefix(text(segments)).strip() == ""
    *_, asked, answer = segments
    assert (asked.learned, answer.learned) == (False, True)
    assert "2 + 2?" in asked.text
    assert "Four." in answer.text
    assert whole.startswith(text(template.open_answer(ASKED)))


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_chat_template_that_hides_its_answers_is_refused(name: str, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        chat_template(f"hf_jinja/chat_templates.json::{name}").render(CHAT)
