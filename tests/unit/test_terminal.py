"""Text of others on a terminal."""

import doctest
import json
import unicodedata

import pytest
from rich.console import Console

from raytune_ft import terminal
from raytune_ft.cli.progress import ProgressDisplay
from raytune_ft.terminal import json_line, visible

DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(terminal)
    assert (results.attempted, results.failed) == (2, 0)


def test_controls_are_written_out_and_all_else_stays() -> None:
    everything = "".join(map(chr, range(0x11000)))
    shown = visible(everything)
    controls = {letter for letter in shown if unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs")}
    assert controls == {"\t", "\n"}
    assert not set(DIRECTIONS) & set(shown)
    kept = "a\tb\nc é 漢字 שלום \u200d\u200c 👩\u200d👧 \\x1b"
    assert visible(kept) == kept


@pytest.mark.parametrize("text", ["\x1b[2J", "\r", "\x7f", "\x9b", "\ud800", *DIRECTIONS])
def test_each_control_can_be_read(text: str) -> None:
    assert visible(text) == text.encode("unicode_escape").decode()
    line = json_line([text, "é"])
    assert line.isprintable()
    assert "é" in line
    assert json.loads(line) == [text, "é"]


def test_a_notice_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(Console()).update({"notice": "left out: a\x1b[2J\u202e.jsonl"})
    assert capsys.readouterr().out == "Notice: left out: a\\x1b[2J\\u202e.jsonl\n"
