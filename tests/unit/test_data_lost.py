"""What a template leaves out of a record: found, refused by its name, or counted where the job says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from raytune_ft.data.chat_template import ChatTemplate
from raytune_ft.data.conversation import Conversation
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import TokenisedWindow, decode, encode, tokenise_window
from raytune_ft.data.index import divide
from raytune_ft.data.records import read_record
from raytune_ft.data.sources import list_objects
from raytune_ft.spec import DataSpec, FieldsSpec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
HI = {"role": "user", "content": "Hi 4"}
HELLO = {"role": "assistant", "content": "4"}
TWICE = [HI, HELLO, {"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}]
TOOLS = [{"name": "f", "description": "adds", "parameters": {"properties": {"a": {"description": "left"}}}}]


def encoder(template: str) -> Encoder:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = template
    return Encoder.of(tokenizer)


def window(
    tmp_path: Path, records: list[Any], chat_template: str = CHATML, **settings: Any
) -> TokenisedWindow:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {key: settings.pop(key) for key in ("ignore", "on_lost", "template") if key in settings}
    data = DataSpec.model_validate(
        {"sources": [{"uri": str(path), **source}], "split": {"validation": 0, "test": 0}, **settings}
    )
    (found,) = list_objects(data)
    (only,) = divide(found, 0, "auto", None)
    return tokenise_window(found, only, data, encoder(chat_template))


def reasons(found: TokenisedWindow) -> list[str]:
    return [bad.reason for bad in found.report.bad]


@pytest.mark.parametrize(
    ("record", "lost", "said"),
    [
        ({"messages": [HI, HELLO], "tools": TOOLS}, "tools", "tools of tools ('f')"),
        (
            {"messages": [HI, {**HELLO, "tool_calls": [{"name": "f", "arguments": {"a": 4}}]}]},
            "tool_calls",
            "tool_calls of turn 2 ('f')",
        ),
        ({"messages": [{**HI, "name": "Ann"}, HELLO]}, "name", "name of turn 1 ('Ann')"),
        ({"messages": [HI, {**HELLO, "mood": "calm"}]}, "mood", "mood of turn 2 ('calm')"),
        (
            {"messages": [HI, HELLO], "documents": [{"text": "page"}]},
            "documents",
            "documents of documents ('text')",
        ),
        ({"messages": [HI, HELLO], "note": "Be kind."}, "note", "note of note ('Be kind.')"),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_its_name(
    tmp_path: Path, record: dict[str, Any], lost: str, said: str
) -> None:
    refused = window(tmp_path, [record])
    assert refused.report.counts.bad == 1
    assert reasons(refused) == [
        f"template chat leaves out {said}; choose a template that writes it, name {lost} in the source's "
        "ignore, or set its on_lost: count"
    ]
    for let in ({"ignore": [lost]}, {"on_lost": "count"}):
        trained = window(tmp_path, [record, {"messages": [HI, HELLO]}], **let)
        assert trained.report.counts.bad == 0
        assert trained.report.counts.left_out == {lost: 1}
        assert trained.report.counts.train == 2


def test_thoughts_that_a_template_strips_are_refused_or_counted(tmp_path: Path) -> None:
    record = {"messages": [HI, {**HELLO, "reasoning_content": "4"}]}
    # The thought is also the answer, so its text stands there all the same.
    assert "leaves out thoughts of turn 2 ('4')" in reasons(window(tmp_path, [record], STRIPS))[0]
    counted = window(tmp_path, [record], STRIPS, on_lost="count").report.counts
    assert (counted.left_out, counted.thoughts, counted.answers) == ({"thoughts": 1}, 1, 1)
    kept = window(tmp_path, [record]).report.counts
    assert (kept.left_out, kept.thoughts, kept.learned_thoughts) == ({}, 1, 1)
    dropped = window(tmp_path, [record], STRIPS, thoughts="drop").report.counts
    assert (dropped.left_out, dropped.thoughts, dropped.learned_thoughts) == ({"thoughts": 1}, 1, 0)


def test_columns_that_only_tell_of_a_record_are_counted(tmp_path: Path) -> None:
    records = [{"messages": [HI, HELLO], "id": "r1", "prompt_id": "x", "score": 0.5, "prompt": "Hi 4"}]
    report = window(tmp_path, records).report
    assert report.counts.bad == 0
    assert report.counts.left_out == {"id": 1, "prompt": 1, "prompt_id": 1, "score": 1}


def test_columns_beside_a_pair_are_counted_and_refuse_nothing(tmp_path: Path) -> None:
    report = window(tmp_path, [{"instruction": "a", "output": "b", "rationale": "since"}]).report
    assert (report.counts.bad, report.counts.left_out) == (0, {"rationale": 1})


@pytest.mark.parametrize(
    ("template", "counts"), [("chatml", (0, 1)), ("{{ messages[-1].content }}", (0, 1)), ("vicuna", (0, 1))]
)
def test_other_templates_lose_nothing_in_silence(
    tmp_path: Path, template: str, counts: tuple[int, int]
) -> None:
    system = {"role": "system", "content": "Be kind."}
    fine = window(tmp_path, [{"messages": [HI, HELLO]}], template=template).report.counts
    assert (fine.bad, fine.train) == counts
    tools = window(tmp_path, [{"messages": [HI, HELLO], "tools": TOOLS}], template=template)
    assert "leaves out tools" in reasons(tools)[0]
    with_system = window(tmp_path, [{"messages": [system, HI, HELLO]}], template=template)
    assert bool(reasons(with_system)) == template.startswith("{{")


def test_a_key_that_the_template_reads_is_read(tmp_path: Path) -> None:
    names = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ ' ' + m.name if m.name }}")
    loud = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ '!' if m.loud }}")
    assert (
        window(tmp_path, [{"messages": [{**HI, "name": "Ann"}, HELLO]}], names).report.counts.left_out == {}
    )
    assert window(tmp_path, [{"messages": [{**HI, "loud": True}, HELLO]}], loud).report.counts.bad == 0
    assert window(tmp_path, [{"messages": [{**HI, "loud": True}, HELLO]}]).report.counts.bad == 1


def test_only_the_last_answer_or_every_one(tmp_path: Path) -> None:
    record = {"messages": TWICE}
    every = window(tmp_path, [record]).report.counts
    last = window(tmp_path, [record], turns="last").report.counts
    assert (every.answers, every.learned_answers, every.ends, every.train) == (2, 2, 2, 1)
    assert (last.answers, last.learned_answers, last.ends, last.train) == (2, 1, 1, 1)


def test_a_chat_becomes_several_examples_with_their_own_prompts(tmp_path: Path) -> None:
    rewrites = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}!{% endif %}{{ m.content }}"
    )
    record = {"messages": TWICE}
    found = window(tmp_path, [record, {"messages": [HI, HELLO]}], rewrites)
    counts = found.report.counts
    assert (counts.records, counts.train, counts.divided, counts.learned_answers) == (2, 3, 1, 3)
    assert found.table["record"].to_pylist() == [0, 0, 1]
    assert found.table["references"].to_pylist() == [["!4<|im_end|>"], ["6"], ["4"]]


def test_answers_that_are_given_alone_leave_nothing_to_learn(tmp_path: Path) -> None:
    report = window(tmp_path, [{"messages": [HI, {**HELLO, "weight": 0}]}]).report
    assert [bad.reason for bad in report.bad] == ["no learned tokens"]


def test_a_short_text_is_not_found_by_chance() -> None:
    """Digits stand in the template's own text."""
    source = (
        "Cutoff: December 2023\\n{% for m in messages %}{% if m.role != 'system' %}"
        "[{{ m.content }}]{% endif %}{% endfor %}"
    )
    chat = read_record({"messages": [{"role": "system", "content": "2"}, HI, HELLO]}, FieldsSpec())
    assert isinstance(chat, Conversation)
    assert [part.name for part in ChatTemplate(source, {}).render(chat).lost] == ["system"]


def test_what_a_template_writes_as_json_is_found() -> None:
    source = "{% for m in messages %}[{{ m.content | tojson }}]{% endfor %}"
    messages = [
        {"role": "user", "content": 'Say "é"\n\tnow'},
        {"role": "assistant", "content": "it's <b> & c"},
    ]
    chat = read_record({"messages": messages}, FieldsSpec())
    assert isinstance(chat, Conversation)
    assert ChatTemplate(source, {}).render(chat).lost == ()


def test_what_is_left_out_survives_the_cache(tmp_path: Path) -> None:
    found = window(tmp_path, [{"messages": [HI, {**HELLO, "thinking": "x"}], "id": 1}])
    assert decode(encode(found)).report == found.report
    assert found.report.counts.left_out == {"id": 1}
