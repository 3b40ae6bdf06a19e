"""Rendering against other projects: chat templates, prompt formats, where an answer begins and ends."""

from dataclasses import replace
from typing import Any

import pytest
from peer_cases import all_cases, cases, needs_peers

from raytune_ft.data.chat_template import ChatTemplate, render_chat
from raytune_ft.data.conversation import Conversation, Malformed, Turn
from raytune_ft.data.message_forms import FIRST_FORM
from raytune_ft.data.messages import ROLES
from raytune_ft.data.segments import Rendered, Segment
from raytune_ft.data.template import TEMPLATES

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
    "CohereForAI/c4ai-command-r-v01": "refuses it",
    "CohereForAI/c4ai-command-r-v01 (JSON Schema)": "refuses it",
}
"""Templates that cannot be trained with on these chats: they require tools."""
TRAINABLE = [
    key for key in all_cases() if key.startswith("hf_jinja/") and key.partition("::")[2] not in REFUSED
]
ANSWER_INSIDE = (
    "codellama/CodeLlama-70b-Instruct-hf",
    "meta-llama/Llama-Guard-3-11B-Vision",
    "blenderbot",
    "TheBloke/deepseek-coder-33B-instruct-AWQ",
    "CohereLabs/c4ai-command-a-03-2025",
)
"""Templates whose prompts are not how the chat with its answer begins, or that always open an answer."""
QWEN_SYSTEM = Turn("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")


def turns(messages: list[dict[str, Any]]) -> tuple[Turn, ...]:
    return tuple(Turn(ROLES[message["role"]], message["content"]) for message in messages)


def conversation(messages: list[dict[str, Any]], *before: Turn) -> Conversation:
    return Conversation((*before, *turns(messages)), (messages[-1]["content"],), "chat")


def last(rendered: Rendered) -> tuple[Segment, ...]:
    """Segments of the last answer's example."""
    assert rendered.lost == ()
    return rendered.examples[-1].segments


def text(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


@cases("hf_jinja/chat_templates.json")
def test_chat_template_text(case: dict[str, Any]) -> None:
    variables = dict(case["data"])
    assert render_chat(case["chat_template"], variables.pop("messages"), **variables)[0] == case["expected"]


@cases("axolotl/chat_template_snapshots.json")
def test_chat_template_snapshot(case: dict[str, Any]) -> None:
    assert (
        render_chat(case["chat_template"], case["messages"], **case["render_kwargs"])[0] == case["expected"]
    )


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
    segments = last(ChatTemplate(source, {}).render(conversation(case["input"]["messages"])))
    expected = [piece for turn in case["expected"] for piece in (turn["prompt"], turn["response"])]
    assert [segment.text for segment in segments] == expected
    assert [segment.learned for segment in segments] == [False, True] * len(case["expected"])


@cases("llamafactory/template_strings.json", "test_encode_oneturn test_llama3_template")
def test_llama3_last_turn(case: dict[str, Any]) -> None:
    *before, answer = last(TEMPLATES["llama3"].render(conversation(case["messages"])))
    expected = case["turns"][-1]
    # BOS is a token of the tokenizer's here, not a text of the template's.
    assert text(tuple(before)) == expected["prompt"].removeprefix("<|begin_of_text|>")
    assert answer.text == expected["answer"]


@cases("llamafactory/template_strings.json", "test_gemma_template")
def test_gemma_last_turn(case: dict[str, Any]) -> None:
    *before, answer = last(TEMPLATES["gemma"].render(conversation(case["messages"])))
    expected = case["turns"][-1]
    assert text(tuple(before)) == expected["prompt"].removeprefix("<bos>")
    # The newline after the marker is not learned: generation stops at the marker.
    assert answer.text == expected["answer"].removesuffix("\n")


@cases("llamafactory/template_strings.json", "test_qwen2_5_template")
def test_qwen_last_turn(case: dict[str, Any]) -> None:
    *before, answer = last(TEMPLATES["chatml"].render(conversation(case["messages"], QWEN_SYSTEM)))
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
    prompt, answer = last(ChatTemplate(source, {}).render(conversation(case["messages"])))
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
    """Each answer follows what the template gives to generation there, and is learned up to its end."""
    template = chat_template(key)
    rendered = template.render(CHAT)
    segments = last(rendered)
    whole = template.text(CHAT, len(CHAT.turns), FIRST_FORM, opening=False)
    if not key.partition("::")[2].startswith(ANSWER_INSIDE):
        assert whole.startswith(text(segments))
        assert whole.removeprefix(text(segments)).strip() == ""
    *_, asked, answer = segments
    assert (asked.learned, answer.learned) == (False, True)
    assert "2 + 2?" in asked.text
    assert "Four." in answer.text
    assert text(segments[:-1]) == text(template.open_answer(ASKED))
    assert [at for example in rendered.examples for at in example.answers] == [1, 3]


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_chat_template_that_requires_tools_is_refused(name: str, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        chat_template(f"hf_jinja/chat_templates.json::{name}").render(CHAT)
