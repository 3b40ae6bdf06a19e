"""Conversations to segments: built-in, inline and chat templates."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny

from raytune_ft.data.chat_template import ChatTemplate, render_chat
from raytune_ft.data.conversation import Conversation, Malformed, PlainText, Turn
from raytune_ft.data.coverage import Part
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.records import read_record
from raytune_ft.data.segments import Rendered, Segment
from raytune_ft.data.template import (
    TEMPLATES,
    check_templates,
    concrete_name,
    find_template,
    render,
)
from raytune_ft.errors import DataError
from raytune_ft.spec import FieldsSpec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
MESSAGES = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.of(tiny.tokenizer())


@pytest.fixture(scope="module")
def chat_encoder() -> Encoder:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return Encoder.of(tokenizer)


def record(value: Any) -> Conversation | PlainText:
    return read_record(value, FieldsSpec())


def segments_of(rendered: Rendered) -> Sequence[Segment]:
    """Of a record that is one example, and of which nothing is left out."""
    assert rendered.lost == ()
    (example,) = rendered.examples
    return example.segments


def pieces(rendered: Rendered) -> list[tuple[str, bool]]:
    return [(segment.text, segment.learned) for segment in segments_of(rendered)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "instruction",
            [("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", False), ("3", True)],
        ),
        ("plain", [("Add.\n1 2", False), ("3", True)]),
        ("qa", [("Context: 1 2\nQuestion: Add.\nAnswer:", False), (" 3", True)]),
        ("mistral", [("[INST] Add.\n1 2[/INST]", False), (" 3</s>", True)]),
        ("vicuna", [("USER: Add.\n1 2\nASSISTANT:", False), (" 3</s>", True)]),
        ("{{ instruction }} ({{ input }}) = ", [("Add. (1 2) = ", False), ("3", True)]),
        ("{% for n in input.split() %}\n{{ n }}\n{% endfor %}\n", [("1\n2\n", False), ("3", True)]),
    ],
)
def test_instruction_with_input(encoder: Encoder, template: str, expected: list[tuple[str, bool]]) -> None:
    assert pieces(render(template, record(ALPACA), encoder)) == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_is_learned_and_nothing_else(encoder: Encoder, template: str) -> None:
    rendered = render(template, record({"messages": MESSAGES}), encoder)
    assert rendered.lost == ()
    segments = [segment for example in rendered.examples for segment in example.segments]
    learned = [segment.text for segment in segments if segment.learned]
    given = [segment.text for segment in segments if not segment.learned]
    assert len(learned) == len(given) == 2
    assert all(answer in text for answer, text in zip("bd", learned, strict=True))
    assert all(question in text for question, text in zip("ac", given, strict=True))


@pytest.mark.parametrize("template", [*TEMPLATES, "chat"])
def test_generation_is_given_what_stands_before_the_last_answer(chat_encoder: Encoder, template: str) -> None:
    conversation = record({"messages": [{"role": "system", "content": "s"}, *MESSAGES]})
    assert isinstance(conversation, Conversation)
    opened = find_template(template, chat_encoder).open_answer(conversation.turns[:-1])
    *_, last = render(template, conversation, chat_encoder).examples
    assert "".join(s.text for s in opened) == "".join(s.text for s in last.segments[:-1])


def test_braces_in_a_record_are_text(encoder: Encoder) -> None:
    value = {"instruction": "{eos} {content} {0} {{ 1 }}", "output": "{eos}"}
    assert pieces(render("instruction", record(value), encoder)) == [
        ("### Instruction:\n{eos} {content} {0} {{ 1 }}\n\n### Response:\n", False),
        ("{eos}", True),
    ]
    assert pieces(render("{{ instruction }}", record(value), encoder)) == [
        ("{eos} {content} {0} {{ 1 }}", False),
        ("{eos}", True),
    ]


def test_system_goes_into_the_first_user_turn_where_the_format_has_none(encoder: Encoder) -> None:
    chat = record({"messages": [{"role": "system", "content": "s"}, *MESSAGES[:2]]})
    assert segments_of(render("mistral", chat, encoder))[0].text == "[INST] s\n\na[/INST]"


def test_tool_turns(encoder: Encoder) -> None:
    chat = record({"messages": [MESSAGES[0], {"role": "tool", "content": "t"}, MESSAGES[1]]})
    assert "<|im_start|>tool\nt<|im_end|>" in segments_of(render("chatml", chat, encoder))[0].text
    rendered = render("vicuna", chat, encoder)
    assert rendered.lost == (Part("tool", "turn 2", ("t",)),)
    assert [segment.text for segment in rendered.examples[0].segments] == ["USER: a\nASSISTANT:", " b</s>"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": MESSAGES}, "chat"),
        ({"prompt": "a", "completion": "b"}, "plain"),
        (ALPACA, "instruction"),
        ({"text": "x"}, "text"),
    ],
)
def test_auto(encoder: Encoder, chat_encoder: Encoder, value: dict[str, Any], expected: str) -> None:
    assert concrete_name("auto", record(value), chat_encoder) == expected
    assert concrete_name("auto", record(value), encoder) == expected.replace("chat", "instruction")
    assert concrete_name("qa", record(value), encoder) == "qa"


def test_raw_text_is_learned_whole(encoder: Encoder) -> None:
    assert pieces(render("text", PlainText("Once"), encoder)) == [("Once", True)]


def test_shape_that_a_template_does_not_take(encoder: Encoder) -> None:
    with pytest.raises(Malformed) as raised:
        render("qa", PlainText("Once"), encoder)
    assert str(raised.value) == "the record is raw text, which template qa does not take; auto does"
    with pytest.raises(Malformed) as raised:
        render("text", record(ALPACA), encoder)
    assert (
        str(raised.value)
        == "the record is a prompt and a completion, which template text does not take; auto does"
    )


def test_inline_template_sees_earlier_messages(encoder: Encoder) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    assert pieces(render(template, record({"messages": MESSAGES}), encoder)) == [
        ("user: a assistant: b user: c ", False),
        ("d", True),
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ output }}", "'output' is undefined"),
        ("{{ question }}", "'question' is undefined"),
        ("{{ input / 2 }}", "unsupported operand type(s) for /: 'str' and 'int'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ input.__class__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ range(1000000) }}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
        ("{{ input|dictsort }}", "'str' object has no attribute 'items'"),
        (
            "{{ '\\ud800' }}",
            "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
        ),
    ],
)
def test_inline_template_that_does_not_fit_the_record(encoder: Encoder, template: str, reason: str) -> None:
    with pytest.raises(Malformed) as raised:
        render(template, record(ALPACA), encoder)
    expected = f"template {template}: {reason}; besides the completion the record has instruction, input"
    assert str(raised.value) == expected


def test_template_without_end(encoder: Encoder) -> None:
    macro = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"
    with pytest.raises(Malformed, match=r"^template .* maximum recursion depth exceeded.*; besides the comp"):
        render(macro, record(ALPACA), encoder)
    with pytest.raises(
        Malformed, match=r"^the tokenizer's chat template refuses it: maximum recursion depth"
    ):
        find_template("chat", replace(encoder, chat_template=macro)).open_answer((Turn("user", "a"),))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "alpaca",
            "template: alpaca: no such template; take auto, chat, text, instruction, plain, qa, chatml, "
            "llama3, mistral, gemma, phi3, vicuna, zephyr, or inline Jinja2",
        ),
        (
            "chat",
            "template: chat, but the model's tokenizer has no chat template; take one of instruction, plain, "
            "qa, chatml, llama3, mistral, gemma, phi3, vicuna, zephyr",
        ),
        (
            "a\n{{ x",
            "template a {{ x: line 2: unexpected end of template, expected 'end of print statement'.",
        ),
        ("{% if x %}", "template {% if x %}: line 1: Unexpected end of template."),
        (f"{{{{ {'not ' * 5000}x }}}}", "template {{ not not not "),
        (f"{'{% for i in x %}' * 30}{'{% endfor %}' * 30}", "template {% for i in x %}{% for i in x %}"),
    ],
)
def test_template_that_cannot_be_used(encoder: Encoder, template: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        check_templates(["auto", template], encoder)
    assert str(raised.value).startswith(f"data.sources[1].{message}")


def test_chat_template_of_the_tokenizer(chat_encoder: Encoder) -> None:
    assert pieces(render("chat", record({"messages": MESSAGES}), chat_encoder)) == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("b<|im_end|>", True),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("d<|im_end|>", True),
    ]


def test_answer_that_looks_like_the_end_of_a_marker(chat_encoder: Encoder) -> None:
    chat = record({"messages": [MESSAGES[0], {"role": "assistant", "content": ">"}]})
    assert segments_of(render("chat", chat, chat_encoder))[-1] == Segment(
        "><|im_end|>", learned=True, ends_turn=True, continues=True
    )


def test_chat_template_renders_as_the_tokenizer_does() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}" + CHATML + "{{ messages | tojson }}{% generation %}{% endgeneration %}"
    )
    encoder = Encoder.of(tokenizer)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    variables = encoder.special_tokens
    assert encoder.chat_template is not None
    assert (
        render_chat(encoder.chat_template, MESSAGES, add_generation_prompt=True, **variables)[0] == expected
    )


def test_answers_own_white_space_stays() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}|{% endfor %}", {})
    chat = Conversation((Turn("user", "a"), Turn("assistant", "b\n")), ("b\n",), "chat")
    assert pieces(template.render(chat)) == [("a|", False), ("b\n|", True)]
    bare = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert pieces(bare.render(chat)) == [("a", False), ("b\n", True)]


def test_chat_template_that_forgets_earlier_answers() -> None:
    source = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}|{% endif %}{% endfor %}"
    )
    chat = record({"messages": MESSAGES})
    assert isinstance(chat, Conversation)
    examples = ChatTemplate(source, {}).render(chat).examples
    assert [[(s.text, s.learned) for s in example.segments] for example in examples] == [
        [("a|", False), ("b|", True)],
        [("a|c|", False), ("d|", True)],
    ]
    assert [example.answers for example in examples] == [(1,), (3,)]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "{{ raise_exception('no system turns') }}",
            "the tokenizer's chat template refuses it: no system turns",
        ),
        (
            "{{ messages[0].content|dictsort }}",
            "the tokenizer's chat template refuses it: 'str' object has no attribute 'items'",
        ),
        (
            "{{ '\\ud800' }}",
            "the tokenizer's chat template refuses it: 'utf-8' codec can't encode character '\\ud800' "
            "in position 0: surrogates not allowed",
        ),
    ],
)
def test_chat_template_that_cannot_be_sliced(source: str, reason: str) -> None:
    chat = record({"messages": MESSAGES})
    assert isinstance(chat, Conversation)
    with pytest.raises(Malformed) as raised:
        ChatTemplate(source, {}).render(chat)
    assert str(raised.value) == reason


def test_chat_template_that_writes_no_text_of_the_chat() -> None:
    chat = record({"messages": MESSAGES})
    assert isinstance(chat, Conversation)
    lost = ChatTemplate("{{ messages | length }}", {}).render(chat).lost
    assert [(part.name, part.texts) for part in lost] == [
        ("user", ("a",)),
        ("content", ("b",)),
        ("user", ("c",)),
        ("content", ("d",)),
    ]


def test_a_chat_template_that_asks_for_the_date_gets_the_same_each_day() -> None:
    assert render_chat("{{ strftime_now('%d %b %Y') }}", MESSAGES)[0] == "26 Jul 2024"
