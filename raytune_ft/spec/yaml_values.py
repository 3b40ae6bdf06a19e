"""YAML from anybody as plain values: no key twice, no bomb of aliases, no depth without end, no traceback."""

import re
from typing import Any

import yaml

from raytune_ft.errors import SpecError
from raytune_ft.spec.problems import message

MOST_LEVELS = 50
"""Mappings and lists within each other."""
MOST_REPEATED = 1_000_000
"""Values that the aliases of a file may stand for, all together."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_UNREADABLE = (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError)
"""What PyYAML's scanner and constructors raise of a value that is not what its tag or form says."""


def parse_yaml(text: str, place: str) -> Any:
    """Return the plain values of a YAML text.

    Args:
        text: what was read.
        place: the file, for messages.

    Raises:
        SpecError: it is no YAML, repeats a key, passes a limit or has a value that cannot be read. The
            message has the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if loader.repeated:
            raise SpecError(message(place, loader.repeated))
        return None if node is None else loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(f"{place}, line {line}: not YAML: the character {error.character:#x}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{place}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except _Refused as error:
        raise SpecError(f"{place}, line {error.line}: {error}") from None
    except _UNREADABLE as error:
        line = loader.get_mark().line + 1 if loader else 1
        raise SpecError(f"{place}, line {line}: not YAML: {error!s:.100}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Refused(Exception):
    """What is YAML, and not taken."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits; it notes repeated keys, which PyYAML drops in silence."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []
        self._levels = 0
        self._aliased = 0
        self._sizes: dict[int, int] = {}
        """How many values each complete node holds, by its id; those of aliases count each time."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """See yaml.composer.Composer."""
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        if self._levels >= MOST_LEVELS:
            raise _Refused(f"mappings and lists stand more than {MOST_LEVELS} deep; write it flatter", line)
        is_alias = self.check_event(yaml.AliasEvent)
        self._levels += 1
        node = super().compose_node(parent, index)
        self._levels -= 1
        if is_alias:
            self._count_alias(node, line)
        elif node is not None:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
            if isinstance(node, yaml.MappingNode):
                self._note_repeated(node)
        return node

    def _count_alias(self, node: yaml.Node | None, line: int) -> None:
        size = self._sizes.get(id(node))
        if size is None:
            raise _Refused("an alias stands within what it names; write it out", line)
        self._aliased += size
        if self._aliased > MOST_REPEATED:
            raise _Refused(
                f"aliases repeat more than {MOST_REPEATED:,} values; write out what is meant", line
            )

    def _note_repeated(self, node: yaml.MappingNode) -> None:
        lines: dict[tuple[str, str], list[int]] = {}
        for key, _ in node.value:
            # Several merge keys add up, so that none of them is lost.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                lines.setdefault((key.tag, key.value), []).append(key.start_mark.line + 1)
        for (_, name), at in lines.items():
            if len(at) > 1:
                where = " and ".join(map(str, at))
                self.repeated.append(f"{name!r:.100} is given {len(at)} times, on lines {where}; keep one")

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """See yaml.constructor.BaseConstructor."""
        line = node.start_mark.line + 1
        try:
            value = super().construct_object(node, deep)
        except _UNREADABLE as error:
            kind = node.tag.rpartition(":")[2]
            why = f" ({str(error).partition(';')[0]})" if isinstance(error, ValueError) else ""
            reason = f"{_shown(node)} cannot be read as {kind}{why}; quote it where a text is meant"
            raise _Refused(reason, line) from None
        if isinstance(value, int) and value.bit_length() > 63:
            raise _Refused(f"{_shown(node)} has more than 63 bits; write a smaller number", line)
        if isinstance(value, str) and (half := _SURROGATE.search(value)):
            raise _Refused(f"{half[0]!a} is half a character; write the character itself", line)
        return value


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _shown(node: yaml.Node) -> str:
    text = str(node.value) if isinstance(node, yaml.ScalarNode) else "the value"
    return (text if len(text) <= 40 else f"{text[:40]}…") or "''"
