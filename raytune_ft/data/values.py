"""Values of raw records: as text, as JSON, reached by a path, and named for messages."""

import json
import math
from typing import Any

from raytune_ft.data.conversation import Malformed


def reach(value: Any, path: str) -> Any:
    """Return the value at a dotted path; a column whose own name holds dots comes first.

    >>> reach({"meta": {"answers": ["a", "b"]}}, "meta.answers.1")
    'b'

    Raises:
        Malformed: there is none.
    """
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise Malformed(f"no field {path}")
    return value


def required_text(value: Any, place: str) -> str:
    """Return a field as text that says something.

    Raises:
        Malformed: it does not.
    """
    text = text_of(value, place)
    if not text.strip():
        raise Malformed(f"{place} is empty")
    return text


def text_of(value: Any, place: str) -> str:
    """Return a field as text: null is empty, numbers are written as JSON writes them.

    Raises:
        Malformed: the field holds no text.
    """
    if not isinstance(value, str):
        return _plain_value(value, place)
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed(f"{place} holds half of a surrogate pair at character {error.start + 1}") from None
    return value


def _plain_value(value: Any, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise Malformed(f"{place} is {kind_of(value)}, not text")


def as_json(value: Any) -> str:
    """Return a value as JSON text; what JSON does not know, such as a date, as its own text.

    >>> as_json({"city": "Besançon", "open": None})
    '{"city": "Besançon", "open": null}'
    """
    return json.dumps(value, ensure_ascii=False, default=str)


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, and text, lists and objects without content.

    >>> [is_empty(value) for value in (None, " ", [], {}, False, 0)]
    [True, True, True, True, False, False]
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


def kind_of(value: Any) -> str:
    """Return what a value is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )
