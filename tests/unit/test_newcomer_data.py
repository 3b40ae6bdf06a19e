"""Data as people bring it: `raytune-ft data` gives the right values, or one message with the remedy."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
from pyarrow import parquet

from raytune_ft.cli.data import data_command
from raytune_ft.errors import DataError
from raytune_ft.spec import parse_job

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"))


def look(base: Path, uri: Path, **source: Any) -> None:
    job = {
        "name": "look",
        "model": {"path": str(base)},
        "data": {"sources": [{"uri": str(uri), **source}], "split": {"validation": 0, "test": 0}},
        "publish": {"catalog": str(base / "catalog")},
    }
    data_command(parse_job(job), examples=9, as_json=True)


def learned(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = json.loads(capsys.readouterr().out)["examples"]
    return [piece["text"] for example in shown for piece in example["pieces"] if piece["learned"]]


def lines(*records: Any) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"prompt": ["x"], "completion": pa.array([0.1], pa.float32())}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("content", "fields", "answers"),
    [
        (b'prompt;completion\n"a;b";c\nd;e\n', {}, ["c", "e"]),
        (lines(*[CHAT] * 3), {}, ["yo"] * 3),
        (as_parquet(), {}, ["0.1"]),
        (
            lines({"question": {"stem": "2+2?"}, "answer": {"text": "4"}}),
            {"prompt": "question.stem", "completion": "answer.text"},
            ["4"],
        ),
        (lines({"the_q": "a", "the_a": "b"}), {"prompt": "the_q", "completion": "the_a"}, ["b"]),
        (b"\xef\xbb\xbf".join([b"", *[lines({"prompt": "a", "completion": "b"})] * 2]), {}, ["b", "b"]),
    ],
)
def test_right_values(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    fields: dict[str, str],
    answers: list[str],
) -> None:
    path = tmp_path / "records"
    path.write_bytes(content)
    look(base, path, fields=fields)
    assert [text.removesuffix("</s>") for text in learned(capsys)] == answers


def test_what_is_left_out_of_a_folder_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = tmp_path / "clone"
    (clone / ".git").mkdir(parents=True)
    for name in (".git/HEAD", "README.md", "LICENSE"):
        (clone / name).write_text("text")
    (clone / "train.jsonl").write_bytes(lines({"prompt": "a", "completion": "b"}))
    look(base, clone)
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts["total"]["records"] == 1
    left_out = "3 left out that by their names hold no records: .git/, LICENSE, README.md"
    assert counts["notices"] == [f"data.sources[0] ({clone}): {left_out}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines({"question_text": "a", "the_answer": "b"}), r"question_text, the_answer.*fields\.completion"),
        (lines({"prompt": "a", "completion": "b"}) + b'{"prompt": "c" "d"}\n', r"line 2: not JSON at column"),
        (b"", "no records; the file is empty"),
        (b'[{"instruction": "a", "output": "b"},', "not JSON at line 1, column 38: .*is it complete"),
        (lines({"messages": CHAT["messages"][:1]}), "record 1: messages has 1 message"),
        (lines({"prompt": "a", "completion": "b", "response": "c"}), "choose with the source's"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "the text is UTF-16; save it as UTF-8, as iconv"),
    ],
)
def test_one_message(base: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "records"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        look(base, path)
