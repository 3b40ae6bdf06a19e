"""Chats with system texts, several turns, tools, thoughts and flags, on every real chat template there is."""

import importlib.util
import json
from collections import Counter
from typing import Any

import pytest
from chat_table import (
    CHATS,
    LEARNED,
    WORD,
    lines,
    outcome,
    peer_templates,
    rendered,
    trl_templates,
    written,
)
from peer_cases import PEERS, needs_peers
from transformers.utils.chat_template_utils import render_jinja_template

from raytune_ft.data.chat_template import ChatTemplate
from raytune_ft.data.conversation import Conversation, Malformed
from raytune_ft.data.coverage import marked, shape_of
from raytune_ft.data.message_forms import messages_in
from raytune_ft.data.records import read_record
from raytune_ft.spec import FieldsSpec

pytestmark = needs_peers
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")

TEMPLATES = {**peer_templates(), **({} if importlib.util.find_spec("trl") is None else trl_templates("*"))}
OWN = {name: template for name, template in TEMPLATES.items() if not name.endswith("_training")}
FORMS = [(kind, form) for kind, forms in CHATS.items() for form in forms]
CALLS, ANSWERS = 73, 272
"""Of the shared set of tool chats."""


@pytest.mark.parametrize("name", OWN)
def test_no_word_of_a_chat_vanishes_in_silence(name: str) -> None:
    """In each cell all words are in the text, learned where they are the assistant's and nowhere else, each
    answer with its end; or what is missing is told by its name; or the template itself refuses the chat."""
    for kind, form in FORMS:
        record = CHATS[kind][form]
        try:
            conversation, found = rendered(OWN[name], record)
        except Malformed:
            continue
        text = " ".join(s.text for example in found.examples for s in example.segments)
        told = {word for part in found.lost for word in WORD.findall(" ".join(part.texts))}
        words = set(WORD.findall(json.dumps(record)))
        assert words - told <= set(WORD.findall(text)), (kind, form)
        if not found.lost:
            check_learned(conversation, found.examples, words)


def check_learned(conversation: Conversation, examples: Any, words: set[str]) -> None:
    taught = [s for example in examples for s in example.segments if s.learned]
    answers = [at for example in examples for at in example.answers]
    assert len(taught) == len(answers)
    learned = set(WORD.findall(" ".join(segment.text for segment in taught)))
    opening = {"OPENWORD"} if len(answers) < len(conversation.learned) else set()
    assert learned == {word for word in words if word.startswith(LEARNED)} - opening
    for example in examples:
        # EOS follows the last answer of an example; every other one has an end of its own.
        assert all(s.ends_turn for s in example.segments[:-1] if s.learned)


def test_the_table_of_the_docs_is_true() -> None:
    assert written().splitlines() == list(lines())


def tool_chats() -> list[dict[str, Any]]:
    path = PEERS.parent / "instruct" / "sharegpt" / "glaive_toolcall_en_head100.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def carries_tools(name: str) -> bool:
    return all(outcome(OWN[name], record) == "✓" for record in CHATS["tools"].values())


@pytest.mark.parametrize(
    "name",
    # Those of TRL are many; a few of them are enough for each day.
    [
        pytest.param(name, marks=[] if name in peer_templates() or "glm" in name else pytest.mark.slow)
        for name in OWN
        if carries_tools(name)
    ],
)
def test_every_call_and_every_answer_of_the_tool_chats_is_learned(name: str) -> None:
    counts = Counter[str]()
    for record in tool_chats():
        try:
            _, found = rendered(OWN[name], record)
        except Malformed:
            # The template of Command R takes no chat without tools.
            assert not json.loads(record["tools"])
            continue
        taught = "".join(s.text for example in found.examples for s in example.segments if s.learned)
        for turn in record["conversations"]:
            if turn["from"] == "function_call":
                counts["calls"] += json.loads(turn["value"])["name"] in taught
            if turn["from"] == "gpt":
                counts["answers"] += turn["value"].strip() in taught
        counts["chats"] += 1
        counts["lost"] += bool(found.lost)
    assert counts["calls"] == CALLS
    assert counts["answers"] == ANSWERS or counts["chats"] < len(tool_chats())
    # Two templates of Gemma 4 write no description of what stands inside a list.
    assert counts["lost"] == (2 if name in ("gemma4_v2", "gemma4_v3") else 0)


def test_templates_that_carry_tools_are_many() -> None:
    assert sum(map(carries_tools, OWN)) >= (30 if len(OWN) > 40 else 12)


def marked_by_transformers(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """What `apply_chat_template(return_assistant_tokens_mask=True)` marks, on which TRL's masks rest."""
    form = template._choice(conversation).form  # the form alone, so that both render the same messages
    texts, spans = render_jinja_template(
        conversations=[messages_in(conversation.turns, form)],
        tools=list(conversation.tools) or None,
        chat_template=template.source,
        return_assistant_tokens_mask=True,
        **template.special_tokens,
    )
    joined: list[str] = []
    stopped = -1
    for start, stop in spans[0]:
        if start == stopped:
            joined[-1] += texts[0][start:stop]
        elif start < stop:
            joined.append(texts[0][start:stop])
        stopped = stop
    return joined


@needs_trl
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if number % 3 == 0 else pytest.mark.slow)
        for number, name in enumerate(name for name in TEMPLATES if name.endswith("_training"))
    ],
)
def test_learned_text_is_that_of_trls_masks(name: str) -> None:
    template = TEMPLATES[name]
    compared = 0
    records = [*(CHATS[kind][form] for kind, form in FORMS if kind != "flags"), *tool_chats()[:12]]
    for record in records:
        try:
            conversation, found = rendered(template, record)
        except Malformed:
            continue
        marked = marked_by_transformers(template, conversation)
        texts = [turn.thoughts for turn in conversation.turns] + [
            turn.text for turn in conversation.turns if turn.role == "assistant"
        ]
        if found.lost or any(text not in "".join(marked) for text in texts):
            # Its mask would drop what the record says.
            continue
        if len(marked) != sum(turn.role == "assistant" for turn in conversation.turns):
            # It marks an answer in pieces, and leaves out what stands between them.
            continue
        assert [s.text for e in found.examples for s in e.segments if s.learned] == marked
        compared += 1
    assert compared >= 10


def test_a_chat_that_several_prompts_share_is_one_example() -> None:
    chat = read_record(CHATS["several turns"]["multi"], FieldsSpec())
    assert isinstance(chat, Conversation)
    assert len(OWN["_base"].render(chat).examples) == 1
    assert len(OWN["Qwen/Qwen3-0.6B"].render(chat).examples) == 2


def test_what_a_chat_becomes_does_not_depend_on_the_chats_before_it() -> None:
    """Windows are read in any order, by any process."""
    records = [record for forms in CHATS.values() for record in forms.values()] + tool_chats()[:20]
    for name in (
        "Qwen/Qwen3-0.6B",
        "HuggingFaceH4/zephyr-7b-gemma-v0.1",
        "mistralai/Mistral-Nemo-Instruct-2407",
    ):
        given = OWN[name]

        def in_order(order: list[dict[str, Any]], given: ChatTemplate = given) -> list[Any]:
            template = ChatTemplate(given.source, given.special_tokens)
            found = []
            for record in order:
                try:
                    found.append(rendered(template, record)[1])
                except Malformed as error:
                    found.append(str(error))
            return found

        assert in_order(records) == in_order(records[::-1])[::-1]


def test_the_marked_chat_depends_on_the_shape_alone() -> None:
    shapes: dict[Any, Conversation] = {}
    for record in tool_chats():
        chat = read_record(record, FieldsSpec())
        assert isinstance(chat, Conversation)
        sample = marked(chat)._replace(columns={}, references=())
        assert shapes.setdefault(shape_of(chat), sample) == sample
    assert len(shapes) < 40
