"""Chats as people bring them, each with what has to be learned of it on a real chat template."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from chat_table import peer_templates
from peer_cases import PEERS, needs_peers

from raytune_ft.data.counts import WindowReport
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import tokenise_window
from raytune_ft.data.index import divide
from raytune_ft.data.sources import list_objects
from raytune_ft.spec import DataSpec

CASES = PEERS.parents[1] / "cases" / "chat"
pytestmark = [needs_peers, pytest.mark.skipif(not CASES.is_dir(), reason=f"the chats are not at {CASES}")]

QWEN3, NEMO, R1 = "Qwen/Qwen3-0.6B", "mistralai/Mistral-Nemo-Instruct-2407", "deepseek-ai/DeepSeek-R1"
LLAMA, ZEPHYR, COMMAND = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "HuggingFaceH4/zephyr-7b-gemma-v0.1",
    "CohereLabs/c4ai-command-a-03-2025",
)
MARKERS = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "[INST]",
        "[/INST]",
    ),
    *("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>"),
)
COMMAND_END = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
EMPTY = "<think>\n\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lima"}}\n</tool_call>'


def read(
    path: Path, chat_template: str | None = None, **source: Any
) -> tuple[WindowReport, list[list[str]], list[str]]:
    """The report, the learned texts of each example, and each example's whole text."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    if chat_template is not None:
        tokenizer.chat_template = peer_templates()[chat_template].source
    data = DataSpec.model_validate(
        {
            "sources": [{"uri": str(path), **source}],
            "split": {"validation": 0, "test": 0},
            "max_tokens": 20_000,
        }
    )
    (found,) = list_objects(data)
    (only,) = divide(found, 0, "auto", None)
    window = tokenise_window(found, only, data, Encoder.of(tokenizer))
    learned, texts = [], []
    for row in window.table.to_pylist():
        texts.append(tokenizer.decode(row["input_ids"]))
        runs: list[list[int]] = [[]]
        for token, is_learned in zip(row["input_ids"], row["learned"], strict=True):
            if is_learned:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        learned.append([tokenizer.decode(run) for run in runs if run])
    return window.report, learned, texts


@pytest.mark.parametrize(
    ("file", "template", "expected"),
    [
        ("sys1", NEMO, [["Arr.</s>"]]),
        ("sysmulti", NEMO, [["Arr.</s>"], ["Arr.</s>"], ["Farewell.</s>"]]),
        ("multi", QWEN3, [[f"{EMPTY}Answer {name}.<|im_end|>"] for name in ("one", "two", "three")]),
        (
            "m2",
            COMMAND,
            [[f"<|START_RESPONSE|>Answer {n}.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for n in ("one", "two")]],
        ),
        ("m2", LLAMA, [["Answer one.<|eot_id|>", "Answer two.<|eot_id|>"]]),
        ("m2", None, [["Answer one.</s>"], ["Answer two.</s>"]]),
        ("toolcalls_null", QWEN3, [[f"{EMPTY}{CALL}<|im_end|>"], [f"{EMPTY}It is 19 C.<|im_end|>"]]),
        (
            "toolcalls_text",
            QWEN3,
            [[f"{EMPTY}Let me look.\n{CALL}<|im_end|>"], [f"{EMPTY}It is 19 C.<|im_end|>"]],
        ),
        (
            "agent",
            QWEN3,
            [
                [f"{EMPTY}{CALL.replace('get_weather', 'w')}<|im_end|>"],
                [f"{EMPTY}It is 19 C.<|im_end|>"],
            ],
        ),
        ("toolturn", ZEPHYR, [["get_weather(Lima)<|im_end|>", "It is 19 C and it rains.<|im_end|>\n</s>"]]),
        ("think", QWEN3, [["<think>\n17*24 = 408\n</think>\n\nIt is 408.<|im_end|>"]]),
        (
            "reasoning",
            QWEN3,
            [[f"<think>\n17*2{n} = {17 * (20 + n)}\n</think>\n\n{17 * (20 + n)}<|im_end|>"] for n in (4, 5)],
        ),
        ("weights", LLAMA, [["It is 4.<|eot_id|>"], ["It is 6.<|eot_id|>"]]),
        ("greet", QWEN3, [["Welcome!<|im_end|>", f"{EMPTY}hello<|im_end|>"]]),
        ("history", QWEN3, [["Lima</s>"], ["Santiago</s>"]]),
        ("es", LLAMA, [["Answer.<|eot_id|>"]] * 3),
        ("jsonstr", LLAMA, [["c<|eot_id|>"]]),
        ("nullchat", LLAMA, [["4</s>"], ["6<|eot_id|>"]]),
        ("nullprompt", LLAMA, [["4</s>"], ["6</s>"]]),
    ],
)
def test_learned_text(file: str, template: str | None, expected: list[list[str]]) -> None:
    report, learned, _ = read(CASES / f"{file}.jsonl", template)
    assert learned == expected
    assert report.bad == ()
    assert report.counts.left_out == {}
    assert report.counts.ends == report.counts.learned_answers == sum(map(len, expected))


@pytest.mark.parametrize(
    ("file", "template", "lost", "ignored"),
    [
        ("think", R1, "thoughts", ["It is 408.<｜end▁of▁sentence｜>"]),
        ("toolcalls_null", R1, "tools", None),
        ("toolcalls_null", ZEPHYR, "tools", None),
        ("toolcalls_text", LLAMA, "content of turn 2 ('Let me look.')", None),
    ],
)
def test_what_the_template_leaves_out(file: str, template: str, lost: str, ignored: list[str] | None) -> None:
    path = CASES / f"{file}.jsonl"
    report, learned, _ = read(path, template)
    assert learned == []
    assert f"template chat leaves out {lost}" in report.bad[0].reason
    report, learned, _ = read(path, template, on_lost="count")
    assert report.bad == ()
    assert lost.split()[0] in report.counts.left_out
    assert ignored is None or learned == [ignored]


def test_the_system_text_stands_in_every_prompt() -> None:
    _, _, texts = read(CASES / "sysmulti.jsonl", NEMO)
    assert all("Answer like a pirate." in text for text in texts)


def test_the_tools_stand_in_every_prompt() -> None:
    _, _, texts = read(CASES / "toolcalls_null.jsonl", QWEN3)
    assert len(texts) == 2
    assert all('"description": "Weather of a city"' in text for text in texts)


def test_a_wrong_answer_is_given_and_not_learned() -> None:
    _, learned, texts = read(CASES / "weights.jsonl", LLAMA)
    assert "It is 5." in texts[0]
    assert not any("It is 5." in text for texts in learned for text in texts)


def test_an_inline_template_writes_json() -> None:
    source = {"fields": {"prompt": "q", "completion": "a"}, "template": "{{ q }} ({{ hint }})\n"}
    _, _, texts = read(CASES / "nullinline.jsonl", **source)
    assert texts == ["2+2? (null)\n4</s>", "3+3? (count)\n6</s>"]
