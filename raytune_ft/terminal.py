"""Text from models, data, stores and users as it may stand on a terminal: nothing in it commands."""

import json
import re

_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""C0 and C1 but newline and tab, controls of the direction of writing, other line ends, half characters."""


def visible(text: str) -> str:
    r"""Return a text with its control characters written out: data must not steer what it is shown on.

    >>> visible("a\x07")
    'a\\x07'
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_line(value: object) -> str:
    r"""Return a value as one line of JSON that keeps all letters and has no control character.

    >>> json_line({"é": "a\x9b"})
    '{"é": "a\\u009b"}'
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
