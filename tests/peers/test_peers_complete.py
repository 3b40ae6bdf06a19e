"""Every case of the peers is run by a test here, or the README says why not."""

import importlib
import re
from fnmatch import fnmatchcase
from pathlib import Path

from peer_cases import RUN, all_cases, needs_peers

pytestmark = needs_peers

HERE = Path(__file__).parent
ROW = re.compile(r"\| (?P<file>[\w/.]+\.json) \| `(?P<ids>[^|]+)` \| (?P<reason>[^|]+) \|")


def listed() -> list[tuple[str, str, str]]:
    rows = (ROW.fullmatch(line) for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines())
    return [(row["file"], row["ids"], row["reason"]) for row in rows if row]


def keys_of(file: str, ids: str) -> set[str]:
    return {
        key for key in all_cases() if key.startswith(f"{file}::") and fnmatchcase(key.partition("::")[2], ids)
    }


def test_each_case_is_run_or_listed_with_a_reason() -> None:
    for module in sorted(HERE.glob("test_*.py")):
        importlib.import_module(module.stem)
    left_out = set().union(*(keys_of(file, ids) for file, ids, _ in listed()))
    assert len(RUN) > 100
    assert set(all_cases()) >= RUN
    assert not RUN & left_out, "both run and listed as not run"
    assert set(all_cases()) - RUN - left_out == set()


def test_each_row_of_the_list_means_a_case() -> None:
    assert [(file, ids) for file, ids, _ in listed() if not keys_of(file, ids)] == []
