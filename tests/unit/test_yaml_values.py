"""YAML from anybody: what is refused, by one message with the line."""

import time
from pathlib import Path

import pytest

from raytune_ft.errors import SpecError
from raytune_ft.spec import parse_job, read_fleet, read_job
from raytune_ft.spec.yaml_values import MOST_LEVELS, MOST_REPEATED, parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]\n" for at in range(1, 10)
)


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "x.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_all_repeated_keys_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nmodel: {path: b, path: c}\nname: b\ndata:\n  seed: 1\n  seed: 1\n")
    for read in (read_job, read_fleet):
        with pytest.raises(SpecError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path} has 3 problems:\n  'path' is given 2 times, on lines 2 and 2; keep one\n"
            "  'seed' is given 2 times, on lines 5 and 6; keep one\n"
            "  'name' is given 2 times, on lines 1 and 3; keep one"
        )


def test_a_key_may_say_otherwise_than_what_is_merged() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [{x: 1}, {x: 1}]\n"
    assert parse_yaml(text, "x.yaml")["b"] == {"x": 3, "y": 2}


def test_a_bomb_is_refused_at_once() -> None:
    began = time.monotonic()
    assert refusal(BOMB) == (
        f"x.yaml, line 6: aliases repeat more than {MOST_REPEATED:,} values; write out what is meant"
    )
    merged = "a0: &a0 {x: 1}\n" + "".join(
        f"a{at}: &a{at} {{<<: [{', '.join([f'*a{at - 1}'] * 10)}]}}\n" for at in range(1, 10)
    )
    assert "aliases repeat more than" in refusal(merged)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("text", ["[" * 5000, "{" * 500, "- " * 5000, "[a, " * 100, "a: " + "{b: " * 200])
def test_depth_has_a_limit(text: str) -> None:
    began = time.monotonic()
    assert refusal(text) == (
        f"x.yaml, line 1: mappings and lists stand more than {MOST_LEVELS} deep; write it flatter"
    )
    assert time.monotonic() - began < 5  # A fraction of a second on an idle machine.


def test_what_is_within_the_limits_is_read() -> None:
    deepest = MOST_LEVELS - 1
    assert parse_yaml("[" * deepest + "]" * deepest, "x.yaml")
    assert len(parse_yaml("a: &a [1, 2]\nb: [" + "*a, " * 1000 + "]", "x.yaml")["b"]) == 1000
    assert parse_yaml("a: 2026-01-31", "x.yaml")["a"].year == 2026
    assert parse_yaml(f"a: {2**63 - 1}", "x.yaml") == {"a": 2**63 - 1}
    assert parse_yaml("", "x.yaml") is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2024-99-99", "2024-99-99 cannot be read as timestamp (month must be in 1..12); quote it where a"),
        ("!!timestamp abc", "abc cannot be read as timestamp; quote it where a text is meant"),
        ("9" * 5000, f"{'9' * 40}… cannot be read as int (Exceeds the limit (4300 digits) for integer"),
        ("9" * 4000, f"{'9' * 40}… has more than 63 bits; write a smaller number"),
        ("0x" + "f" * 9000, f"0x{'f' * 38}… has more than 63 bits; write a smaller number"),
        ('!!int ""', "'' cannot be read as int; quote it where a text is meant"),
        ("!!bool perhaps", "perhaps cannot be read as bool; quote it where a text is meant"),
        ("1:" * 3000 + "1.0", "cannot be read as float; quote it where a text is meant"),
        ('"\\ud800"', r"'\ud800' is half a character; write the character itself"),
        ('"\\UFFFFFFFF"', "not YAML: Python int too large"),
        ("\x01", "not YAML: the character 0x1"),
        ("&a [*a]", "an alias stands within what it names; write it out"),
    ],
)
def test_a_value_that_cannot_be_read_is_one_message_with_its_line(value: str, reason: str) -> None:
    message = refusal(f"name: x\nseed: {value}\n")
    assert message.startswith("x.yaml, line 2: ")
    assert reason in message
    assert len(message) < 250
    with pytest.raises(SpecError, match=r"^--set seed="):
        parse_job({"name": "x"}, [f"seed={value}"])


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [id]", "!!python/name:os.system x", "!x y"])
def test_no_tag_runs_code(tag: str) -> None:
    assert refusal(f"name: x\nseed: {tag}\n").startswith(
        "x.yaml, line 2, column 7: not YAML: could not determine a constructor for the tag"
    )
