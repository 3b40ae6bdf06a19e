"""Raw records: what stands in a file before anything is known of its meaning."""

import json
from dataclasses import dataclass
from typing import Any

KEPT_CHARACTERS = 2000
"""How much of a bad record is shown."""


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as its file holds it; an object unless the file is wrong."""

    value: Any
    position: str
    """Place within the file: `line 3`, `byte 1048700`, `record 12`."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be trained on, and why."""

    uri: str
    position: str
    reason: str
    record: str
    """Its beginning, as text."""

    @property
    def place(self) -> str:
        """File and position in one."""
        return f"{self.uri}:{self.position}"

    @classmethod
    def of(cls, uri: str, raw: RawRecord, reason: str) -> "BadRecord":
        """The bad record for a raw one."""
        text = json.dumps(raw.value, ensure_ascii=False, default=str)
        return cls(uri, raw.position, printable(reason), printable(text))


def printable(text: str) -> str:
    """The beginning of a text, in characters that every file and terminal can hold."""
    return text[:KEPT_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")
