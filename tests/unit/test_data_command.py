"""`raytune-ft data`: what it prints, for people and for programs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from html_page import Page

from raytune_ft.cli.data import data_command, templates_command
from raytune_ft.data.template import TEMPLATES
from raytune_ft.errors import DataError, SpecError
from raytune_ft.spec import JobSpec, parse_job


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"))


def job(base: Path, folder: Path, records: list[Any], **data: Any) -> JobSpec:
    path = folder / "records.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return parse_job(
        {
            "name": "look",
            "model": {"path": str(base)},
            "data": {"sources": [{"uri": str(path)}], **data},
            "publish": {"catalog": str(folder / "catalog")},
        }
    )


RECORDS = [{"prompt": f"[b]{n}[/b] + 1 = ", "completion": str(n + 1)} for n in range(12)]


def test_for_people(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_command(job(base, tmp_path, RECORDS), examples=2, as_json=False)
    printed = capsys.readouterr().out
    assert "[b]0[/b] + 1 = ⟦1</s>⟧" in printed
    assert "[b]1[/b] + 1 = ⟦2</s>⟧" in printed
    assert "[b]2[/b]" not in printed
    assert "Learned tokens are between ⟦ ⟧" in printed
    assert "learned tokens" in printed
    assert "malformed" not in printed


def test_for_programs(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_command(job(base, tmp_path, RECORDS), examples=1, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["total"]["records"] == 12
    assert found["bad"] == []
    (example,) = found["examples"]
    assert example["pieces"] == [
        {"text": "[b]0[/b] + 1 = ", "learned": False},
        {"text": "1</s>", "learned": True},
    ]


def test_data_cannot_steer_the_terminal(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": "\x1b[2J\x07a", "completion": "b\x9b"}, {"\x1b[2J": 1}]
    data_command(job(base, tmp_path, records, max_bad_fraction=0.5), examples=1, as_json=False)
    printed = capsys.readouterr().out
    assert "\\x1b[2J\\x07a⟦b\\x9b</s>⟧" in printed
    assert not set("\x1b\x07\x9b") & set(printed)


def test_what_was_found_is_printed_before_the_data_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="data: 1 of 13 records are malformed"):
        data_command(job(base, tmp_path, [*RECORDS, {"prompt": "a"}]), examples=1, as_json=False)
    printed = capsys.readouterr().out
    assert "⟦1</s>⟧" in printed
    assert "malformed records: the first 1 of 1" in printed
    assert "no completion" in printed


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("raytune_ft.cli.data", {"torch", "ray", "transformers", "pyarrow", "jinja2"}),
        ("raytune_ft.data.prepare", {"torch", "transformers"}),
    ],
)
def test_start_up_stays_light(module: str, heavy: set[str]) -> None:
    """Each task of the data pass imports the second; seconds there are seconds of every run."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not heavy & set(loaded.split())


def test_templates_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    templates_command()
    printed = capsys.readouterr().out
    assert all(name in printed for name in TEMPLATES)
    assert "### Instruction:" in printed
    assert "[INST] PROMPT[/INST] …" in printed


CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
    {
        "messages": [
            {"role": "system", "content": "brief"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    },
    {"text": "once upon a time"},
    {"prompt": "a" * 2000, "completion": "b"},
]


def test_each_kind_of_turn_is_shown_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = {"validation": 0, "test": 0}
    look = job(base, tmp_path, CHATS, max_tokens=64, too_long="cut", split=split)
    data_command(look, examples=0, as_json=True)
    found = json.loads(capsys.readouterr().out)
    kinds = [kind for example in found["examples"] for kind in example["kinds"]]
    for kind in ("answer", "given answer", "raw text", "prompt and completion", "cut", "system text"):
        assert kind in kinds
    assert {"divided chat", "several answers"} & set(kinds)
    (cut,) = [example for example in found["examples"] if "cut" in example["kinds"]]
    assert cut["tokens"] == 64
    assert cut["cut_tokens"] > 0
    total = found["counts"]["total"]
    lengths = [entry["lengths"] for entry in found["templates"]]
    assert sum(each["examples"] for each in lengths) == total["train"]
    assert sum(each["cut"] for each in lengths) == total["cut"] == 1
    assert max(each["longest"] for each in lengths) == cut["tokens"] + cut["cut_tokens"]
    assert {each["longest_reference"] for each in lengths} == {None}


def test_long_examples_are_shortened_for_people_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look = job(base, tmp_path, [*RECORDS, {"prompt": "x" * 1500, "completion": "z"}], max_tokens=4096)
    data_command(look, examples=13, as_json=False)
    printed = capsys.readouterr().out
    assert "1,000 characters left out" in " ".join(printed.replace("│", " ").split())
    assert "⟦z</s>⟧" in printed
    data_command(look, examples=13, as_json=True)
    assert "x" * 1500 in capsys.readouterr().out


def test_text_cannot_turn_the_terminal_around(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_command(job(base, tmp_path, [{"prompt": "a\u202eb", "completion": "c"}] * 3), 1, as_json=False)
    printed = capsys.readouterr().out
    assert "a\\u202eb" in printed
    assert "\u202e" not in printed


def test_nor_can_json(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = "é\x1b[2J\x9b\u202e\u2028"
    data_command(job(base, tmp_path, [{"prompt": attack, "completion": "c"}] * 3), 1, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert json.loads(line)["examples"][0]["pieces"][0]["text"] == attack


def test_the_page_shows_hostile_text_as_text(base: Path, tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script>\x1b[2J\u202e"
    records = [{"prompt": attack, "completion": "b"}, {attack: 1}]
    data_command(job(base, tmp_path, records, max_bad_fraction=0.5), 1, True, tmp_path / "data.html")
    page = Page((tmp_path / "data.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "</pre><script>alert(1)</script>\\x1b[2J\\u202e" in page.text
    assert [tag for tag, _ in page.tags].count("article") == 1
    assert [tag for tag, _ in page.tags].count("mark") == 2
    assert "Malformed records: the first 1 of 1" in page.text


@pytest.mark.parametrize(
    ("place", "reason"), [("missing/data.html", "its folder does not exist"), (".", "is a folder")]
)
def test_a_page_that_cannot_be_written_is_refused_before_the_data_is_read(
    base: Path, tmp_path: Path, place: str, reason: str
) -> None:
    with pytest.raises(SpecError, match=reason):
        data_command(job(base, tmp_path, []), 1, False, tmp_path / place)
