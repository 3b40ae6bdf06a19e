"""What one listing of a catalog shows of each adapter."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from raytune_ft.catalog.layout import numbers
from raytune_ft.spec.values import NAME, VERSION
from raytune_ft.storage import ObjectInfo

_SETTLED = re.compile(r"[0-9a-f]{64}\.json")


@dataclass
class Listed:
    """What stands under one adapter's name: objects by number, the newest first."""

    versions: dict[int, ObjectInfo] = field(default_factory=dict)
    """Records, those of removed versions too."""
    removed: dict[int, ObjectInfo] = field(default_factory=dict)
    """Notes that versions are removed."""
    moves: dict[str, dict[int, ObjectInfo]] = field(default_factory=lambda: defaultdict(dict))
    """Entries of each alias's log."""

    @cached_property
    def living(self) -> dict[int, ObjectInfo]:
        """The records of the versions that are not removed, the newest first."""
        return {number: info for number, info in self.versions.items() if number not in self.removed}


def by_adapter(objects: Iterable[ObjectInfo]) -> tuple[dict[str, Listed], list[ObjectInfo]]:
    """Sort what a listing shows.

    Args:
        objects: whose keys begin with `adapters/`, as a store lists them.

    Returns:
        What the catalog has put there, by adapter, and what is not the catalog's.
    """
    adapters: dict[str, Listed] = defaultdict(Listed)
    foreign = []
    for info in objects:
        folder, number = next(numbers([info]), (info.key, 0))
        match folder.split("/"):
            case [_, name, "versions", ""] if NAME.fullmatch(name):
                adapters[name].versions[number] = info
            case [_, name, "removed", ""] if NAME.fullmatch(name):
                adapters[name].removed[number] = info
            case [_, name, "aliases", alias, ""] if NAME.fullmatch(name) and _is_alias(alias):
                adapters[name].moves[alias][number] = info
            case [_, name, "settled", ended] if NAME.fullmatch(name) and _SETTLED.fullmatch(ended):
                pass  # How a removal has ended matters to its own restoration and sweep alone.
            case _:
                foreign.append(info)
    return dict(adapters), foreign


def _is_alias(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and not VERSION.fullmatch(name)
