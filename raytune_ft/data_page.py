"""What a job's records become, as one HTML page that needs nothing else: no request, no script."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytune_ft.errors import DataError
from raytune_ft.report import page_templates, write_page
from raytune_ft.storage import disk_errors

_COUNTS = ("records", "bad", "dropped", "cut", "train", "validation", "test", "tokens", "learned_tokens")
_TURNS = ("answers", "learned_answers", "ends", "calls", "learned_calls", "thoughts", "learned_thoughts")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def write_data_page(title: str, found: Mapping[str, Any], path: Path) -> None:
    """Write the page; one that is there is replaced as a whole.

    Args:
        title: the job's name.
        found: what `raytune-ft data --json` prints.
        path: the HTML file; its folder must exist.

    Raises:
        DataError: the path is a folder's.
        StorageError: the file cannot be written.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it, such as data.html")
    environment = page_templates()
    environment.filters["visible"] = visible
    page = environment.get_template("data_page.html.j2").render(
        title=title, found=found, count_names=_COUNTS, turn_names=(*_TURNS, "divided")
    )
    with disk_errors(str(path)):
        write_page(page, path)


def visible(text: str) -> str:
    r"""Return a text with its control characters written out.

    >>> visible("a\x07")
    'a\\x07'
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
