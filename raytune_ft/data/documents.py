"""Records of JSON documents: an array, Natural Instructions, `examples`, an object by id, or one record."""

import json
from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from types import UnionType
from typing import Any, BinaryIO

from raytune_ft.data.borders import MAX_MEMBERS, Range, Structure, json_structure
from raytune_ft.data.raw import BadRecord, RawRecord
from raytune_ft.data.records import CHAT_COLUMNS, COMPLETION_COLUMNS, PROMPT_COLUMNS, SYSTEM_COLUMNS
from raytune_ft.data.text import BOM, parse_line, read_jsonl
from raytune_ft.errors import DataError

WHOLE_LIMIT_BYTES = 256 << 20
"""What cannot be divided is held in memory as a whole, up to this."""
SAMPLED_LINES = 20
_COLUMNS = frozenset((*CHAT_COLUMNS, *PROMPT_COLUMNS, *COMPLETION_COLUMNS, *SYSTEM_COLUMNS, "text"))
"""Names that a record's own columns usually have, and ids of records do not."""
_MAX_NAME_BYTES = 1 << 16
_MAX_DEFINITION_BYTES = 1 << 20


def read_document(
    stream: BinaryIO, uri: str, columns: Collection[str] = ()
) -> Iterator[RawRecord | BadRecord]:
    """Records of a JSON document, or of JSON lines that looked like one.

    Args:
        stream: the document.
        uri: where it is.
        columns: names that records have beside the usual ones, as the job says.

    Raises:
        DataError: it is neither.
    """
    content = _read_whole(stream, uri)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        whole_first = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if whole_first or may_be_lines(content):
            yield from read_jsonl(BytesIO(content), uri)
            return
        raise DataError(f"{uri}: {_problem(error)}") from None
    del content
    yield from _records_of(value, columns)


def read_natural_instructions(stream: BinaryIO, uri: str) -> Iterator[RawRecord]:
    """Instances of a Natural Instructions task, each with the task's definition as its instruction.

    Raises:
        DataError: it is no such task.
    """
    try:
        task = json.loads(_read_whole(stream, uri).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{uri}: {_problem(error)}") from None
    if not isinstance(task, dict) or not _is_natural_instructions(task):
        raise DataError(f"{uri}: no Definition with a list of Instances, and format is natural-instructions")
    yield from _records_of(task)


def read_document_part(content: bytes, uri: str, context: str) -> Iterator[RawRecord | BadRecord]:
    """Records of a part of a document's array.

    Args:
        content: elements with the commas between them.
        uri: where the document is.
        context: as `part_context` gave it.
    """
    shared = json.loads(context)
    before = shared["before"]
    try:
        values = json.loads(b"[" + content + b"]")
        records: list[RawRecord | BadRecord] = [
            RawRecord(value, f"record {number}") for number, value in enumerate(values, before + 1)
        ]
    except (ValueError, RecursionError):
        records = list(_each_by_itself(content, uri, before))
    for record in records:
        if isinstance(record, RawRecord) and "definition" in shared:
            yield RawRecord(_with_definition(shared["definition"], record.value), record.position)
        else:
            yield record


def part_context(before: int, definition: str | None) -> str:
    """What a part of a document needs from elsewhere: the records before it, the JSON of its definition."""
    shared = (
        {"before": before} if definition is None else {"before": before, "definition": json.loads(definition)}
    )
    return json.dumps(shared)


def document_ranges(
    structure: Structure, file: BinaryIO, *, only_tasks: bool
) -> tuple[tuple[Range, ...], str | None] | None:
    """Which parts of a document hold its records.

    Args:
        structure: the document's.
        file: the document, seekable; names and a definition are read from it.
        only_tasks: whether it has to be Natural Instructions.

    Returns:
        The parts and the JSON of the definition that they share, if any; None where it has no such parts.
    """
    if structure.kind == "array":
        return None if only_tasks else (structure.ranges, None)
    members = {}
    for member in structure.members:
        name = json.loads(_json_in(file, member.start, member.colon, _MAX_NAME_BYTES) or "null")
        if not isinstance(name, str):
            return None
        members[name] = member
    instances = members.get("Instances")
    if "Definition" in members and instances is not None and instances.ranges is not None:
        task = members["Definition"]
        definition = _json_in(file, task.colon + 1, task.stop, _MAX_DEFINITION_BYTES)
        return None if definition is None else (instances.ranges, definition)
    examples = members.get("examples")
    if only_tasks or examples is None or examples.ranges is None:
        return None
    return examples.ranges, None


def may_be_lines(content: bytes) -> bool:
    """Whether a broken document is JSON lines whose first is broken, or too long to be told from one."""
    lines = content.split(b"\n", SAMPLED_LINES)[:SAMPLED_LINES]
    return content.removeprefix(BOM).lstrip().startswith(b"{") and any(map(is_json, lines))


def is_json(line: bytes, of: type | UnionType = dict | list) -> bool:
    """Whether a line is JSON of this kind."""
    try:
        return isinstance(json.loads(line), of)
    except (ValueError, RecursionError):
        return False


def _read_whole(stream: BinaryIO, uri: str) -> bytes:
    content = stream.read(WHOLE_LIMIT_BYTES + 1)
    if len(content) > WHOLE_LIMIT_BYTES:
        raise DataError(
            f"{uri}: a JSON document of more than {WHOLE_LIMIT_BYTES:,} bytes is not held in memory at once; "
            "write its records as jsonl or parquet, or in several files"
        )
    return content


def _each_by_itself(content: bytes, uri: str, before: int) -> Iterator[RawRecord | BadRecord]:
    """Elements of a part that is not JSON: one that is malformed must not spoil the others."""
    array = b"[" + content + b"]"
    ranges = json_structure((array,), window_bytes=0).ranges
    for number, (start, stop, _) in enumerate(ranges, before + 1):
        yield parse_line(array[start:stop].strip(), uri, f"record {number}")


def _json_in(file: BinaryIO, start: int, stop: int, limit_bytes: int) -> str | None:
    """The JSON text in a small part of a file; None where it is none, or not small."""
    if stop - start > limit_bytes:
        return None
    file.seek(start)
    try:
        content = file.read(stop - start).decode("utf-8")
        json.loads(content)
    except (ValueError, RecursionError):
        return None
    return content


def _problem(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {error.start + 1}; save it as UTF-8"
        case json.JSONDecodeError():
            return f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}; is it complete?"
        case RecursionError():
            return "JSON nested too deeply to read"
    return f"not JSON: {error}"


def _records_of(value: Any, columns: Collection[str] = ()) -> Iterator[RawRecord]:
    by_id = isinstance(value, dict) and is_by_id(value, columns)
    if isinstance(value, dict) and _is_natural_instructions(value):
        value = [_with_definition(value["Definition"], instance) for instance in value["Instances"]]
    elif isinstance(value, dict) and isinstance(value.get("examples"), list | dict):
        value = value["examples"]
        by_id = isinstance(value, dict) and _has_objects_alone(value)
    if isinstance(value, list):
        yield from (RawRecord(record, f"record {number}") for number, record in enumerate(value, 1))
    elif by_id:
        yield from (RawRecord(record, f"record {json.dumps(key)}") for key, record in value.items())
    elif value != {}:
        yield RawRecord(value, "record 1")


def is_by_id(value: Mapping[str, Any], columns: Collection[str] = ()) -> bool:
    """Whether an object holds records by their ids, and is not a record with nested objects itself.

    All its values are objects. Up to `MAX_MEMBERS` of them might be one record's: then none of their names is
    a usual column's or one of `columns`, and they have a key in common, as records have.

    >>> is_by_id({"q1": {"prompt": "a", "completion": "b"}, "q2": {"prompt": "c", "completion": "d"}})
    True
    >>> is_by_id({"question": {"stem": "2+2?"}, "answer": {"text": "4"}})
    False
    """
    if not _has_objects_alone(value):
        return False
    if len(value) > MAX_MEMBERS:
        return True
    names = [set(record) for record in value.values() if record]
    share = bool(names) and bool(set.intersection(*names))
    return share and not any(name in _COLUMNS or name in columns for name in value)


def _has_objects_alone(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(isinstance(record, dict) for record in value.values())


def _is_natural_instructions(value: dict[str, Any]) -> bool:
    return "Definition" in value and isinstance(value.get("Instances"), list)


def _with_definition(definition: Any, instance: Any) -> Any:
    if not isinstance(instance, dict):
        return instance
    text = "\n".join(map(str, definition)) if isinstance(definition, list) else definition
    return {"instruction": text, **instance}
