"""Cases of other projects, by file and id, and which of them the tests here run."""

import json
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[2].parent / "shared" / "data" / "peers"
TOKENIZERS = PEERS.parent / "tokenizers"
RUN: set[str] = set()
"""`file::id` of each case that some test takes."""

needs_peers = pytest.mark.skipif(not PEERS.is_dir(), reason=f"the peers' cases are not at {PEERS}")


@cache
def all_cases() -> dict[str, dict[str, Any]]:
    """Every case under `PEERS`. A repeated id of a file gets `#2`, `#3`, …"""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(PEERS.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        seen: Counter[str] = Counter()
        for case in content.get("cases", ()):
            seen[case["id"]] += 1
            suffix = f"#{seen[case['id']]}" if seen[case["id"]] > 1 else ""
            found[f"{path.relative_to(PEERS)}::{case['id']}{suffix}"] = case
    return found


def cases(file: str, patterns: str = "*", *, but: Iterable[str] = ()) -> pytest.MarkDecorator:
    """Parametrise a test with the cases of a file whose ids match; the test's argument is `case`.

    Args:
        file: relative to the peers' folder.
        patterns: what ids match, several separated by blanks.
        but: patterns of ids to leave out; the README lists them with the reason.
    """
    chosen = [
        pytest.param(case, id=key.partition("::")[2])
        for key, case in all_cases().items()
        if key.startswith(f"{file}::")
        and any(fnmatchcase(key.partition("::")[2], pattern) for pattern in patterns.split())
        and not any(fnmatchcase(key.partition("::")[2], pattern) for pattern in but)
    ]
    RUN.update(f"{file}::{parameter.id}" for parameter in chosen)
    return pytest.mark.parametrize("case", chosen)
