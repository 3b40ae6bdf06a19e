"""Reading a job file: YAML, `--set` overrides, `${NAME}` in uris, and messages about what is wrong.

All problems of a file are reported at once, each with its place, its value, the limit and the remedy.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_ft.errors import SpecError
from raytune_ft.spec.fleet import FleetSpec
from raytune_ft.spec.job import JobSpec
from raytune_ft.spec.problems import dotted, message, problems
from raytune_ft.spec.values import looked_for, uri_mistake
from raytune_ft.spec.yaml_values import parse_yaml

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_URI_PLACES = (
    ("model", "path"),
    ("data", "sources", "*", "uri"),
    ("evaluate", "forgetting", "sources", "*", "uri"),
    ("publish", "catalog"),
)


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read and check a job file.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` each, the value read as YAML; applied in order.

    Raises:
        SpecError: one message with every problem of the file.
    """
    return parse_job(load_yaml(Path(path)), overrides, place=str(path))


def parse_job(values: Any, overrides: Sequence[str] = (), *, place: str = "job") -> JobSpec:
    """Check a job that is already plain values; see `read_job`."""
    if not isinstance(values, dict):
        raise SpecError(
            f"{place}: a job file is a mapping with name, model, data and publish, "
            f"and this one is {'empty' if values is None else f'a {type(values).__name__}'}"
        )
    if marks := fleet_marks(values):
        raise SpecError(
            f"{place}: is a fleet file, for it has {' and '.join(marks)}, and one job is asked for; "
            "raytune-ft plan shows a fleet, and raytune-ft fleet trains it"
        )
    override_all(values, overrides)
    found = check_job(values)
    if isinstance(found, list):
        raise SpecError(message(place, found))
    return found


def check_job(values: dict[str, Any]) -> JobSpec | list[str]:
    """The job, or what is wrong with it. Variables and relative folders are expanded in `values`."""
    missing = expand_variables(values, _URI_PLACES)
    try:
        job = JobSpec.model_validate(values)
    except ValidationError as error:
        return [*missing, *problems(error, JobSpec)]
    return missing or job


def fleet_marks(values: dict[str, Any]) -> list[str]:
    """The fields by which values are those of a fleet."""
    return [name for name in FleetSpec.model_fields if name in values and name not in JobSpec.model_fields]


def load_yaml(path: Path) -> Any:
    """The plain values of a file.

    Raises:
        SpecError: it cannot be read, or `parse_yaml` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file{looked_for(str(path))}") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a folder; name a job file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return parse_yaml(text, str(path))


def override_all(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `dotted.key=value` each, in place and in order.

    Raises:
        SpecError: one of them is malformed, or leads nowhere.
    """
    for override in overrides:
        _override(values, override)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SpecError(f"--set {override}: write key=value, such as --set method.rank=8")
    value = parse_yaml(text, f"--set {override:.200}")
    node: Any = values
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]), override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, path: str, override: str) -> Any:
    child = node[_index(node, part, override)] if isinstance(node, list) else node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise SpecError(f"--set {override}: {path} is {child!r}, not a section")
    return child


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
        raise SpecError(
            f"--set {override}: '{part}' is not a place of the list, which has 0 to {len(node) - 1}"
        )
    return int(part)


def expand_variables(values: dict[str, Any], places: Sequence[Sequence[str]]) -> list[str]:
    """Expand `${NAME}` and relative folders at `places`, in place; a problem for each that is not set."""
    return [problem for location in places for problem in _expand(values, location)]


def _expand(node: Any, location: Sequence[str], path: tuple[str | int, ...] = ()) -> Iterator[str]:
    head, rest = location[0], location[1:]
    children: list[str | int]
    if head == "*":
        children = list(range(len(node))) if isinstance(node, list) else []
    else:
        children = [head] if isinstance(node, dict) and head in node else []
    for child in children:
        here = (*path, child)
        if rest:
            yield from _expand(node[child], rest, here)
        elif isinstance(node[child], str):
            unset = [name for name in _VARIABLE.findall(node[child]) if name not in os.environ]
            yield from (f"{dotted(here)}: environment variable {name} is not set" for name in unset)
            if not unset:
                expanded = _VARIABLE.sub(lambda match: os.environ[match[1]], node[child])
                node[child] = _absolute(expanded, may_be_hub_id=here[0] == "model")


def _absolute(location: str, *, may_be_hub_id: bool) -> str:
    """A folder as it is seen from any working directory; uris and Hub ids as they are."""
    path = Path(location).expanduser()
    is_folder = "://" not in location and location.strip() and not uri_mistake(location)
    if not is_folder or (may_be_hub_id and not path.exists()):
        return location
    return str(path.absolute())
