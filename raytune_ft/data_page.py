"""What a job's records become, as one HTML page that needs nothing else: no request, no script."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytune_ft.errors import SpecError
from raytune_ft.report import page_templates, write_page
from raytune_ft.storage import disk_errors
from raytune_ft.terminal import visible

_COUNTS = ("records", "bad", "dropped", "cut", "train", "validation", "test", "tokens", "learned_tokens")
_TURNS = (
    *("answers", "learned_answers", "ends", "calls", "learned_calls", "thoughts", "learned_thoughts"),
    "divided",
)
_LENGTHS = ("examples", "median", "p95", "longest", "cut", "dropped", "longest_answer", "longest_reference")


def check_page(path: Path) -> None:
    """Refuse a path that cannot be a page, before the data is read.

    Raises:
        SpecError: it is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise SpecError(f"--report {path}: is a folder; name a file in it, such as {path / 'data.html'}")
    if not path.absolute().parent.is_dir():
        raise SpecError(f"--report {path}: its folder does not exist; make it, or name another file")


def write_data_page(title: str, found: Mapping[str, Any], path: Path) -> None:
    """Write the page; one that is there is replaced as a whole.

    Args:
        title: the job's name.
        found: what `raytune-ft data --json` prints.
        path: the HTML file; its folder must exist.

    Raises:
        StorageError: the file cannot be written.
    """
    environment = page_templates()
    environment.filters["visible"] = visible
    page = environment.get_template("data_page.html.j2").render(
        title=title, found=found, count_names=_COUNTS, turn_names=_TURNS, length_names=_LENGTHS
    )
    with disk_errors(str(path)):
        write_page(page, path)
