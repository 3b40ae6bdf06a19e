"""Reading a job file: YAML, `--set` overrides, `${NAME}` in uris, and messages about what is wrong.

All problems of a file are reported at once, each with its place, its value, the limit and the remedy.
"""

import difflib
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raytune_ft.errors import SpecError
from raytune_ft.spec.job import JobSpec

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
    return parse_job(_load_yaml(Path(path)), overrides, place=str(path))


def parse_job(values: Any, overrides: Sequence[str] = (), *, place: str = "job") -> JobSpec:
    """Check a job that is already plain values; see `read_job`."""
    if not isinstance(values, dict):
        raise SpecError(
            f"{place}: a job file is a mapping with name, model, data and publish, "
            f"and this one is {'empty' if values is None else f'a {type(values).__name__}'}"
        )
    for override in overrides:
        _override(values, override)
    missing = [problem for location in _URI_PLACES for problem in _expand(values, location)]
    try:
        job = JobSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(_message(place, [*missing, *_problems(error)])) from None
    if missing:
        raise SpecError(_message(place, missing))
    return job


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a folder; name a job file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SpecError(f"--set {override}: write key=value, such as --set method.rank=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"--set {override}: the value is not YAML; quote it") from None
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
    if not part.isdecimal() or int(part) >= len(node):
        raise SpecError(
            f"--set {override}: '{part}' is not a place of the list, which has 0 to {len(node) - 1}"
        )
    return int(part)


def _expand(node: Any, location: Sequence[str], path: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Expand `${NAME}` in place at `location`; yield a problem for each variable that is not set."""
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
            yield from (f"{_dotted(here)}: environment variable {name} is not set" for name in unset)
            if not unset:
                expanded = _VARIABLE.sub(lambda match: os.environ[match[1]], node[child])
                node[child] = _absolute(expanded, may_be_hub_id=here[0] == "model")


def _absolute(location: str, *, may_be_hub_id: bool) -> str:
    """A folder as it is seen from any working directory; uris and Hub ids as they are."""
    path = Path(location).expanduser()
    if "://" in location or not location.strip() or (may_be_hub_id and not path.exists()):
        return location
    return str(path.absolute())


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _message(place: str, problems: Sequence[str]) -> str:
    unique = list(dict.fromkeys(problems))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    return "\n".join([f"{place} has {count}:", *(f"  {problem}" for problem in unique)])


def _problems(error: ValidationError) -> list[str]:
    """One line per wrong place; a union reports one error per branch, which are alternatives of one line."""
    lines: dict[str, list[str]] = {}
    for detail in error.errors():
        path, sections = _walk(detail["loc"])
        subject, complaint = _complaint(_dotted(path), path, sections, detail)
        complaints = lines.setdefault(subject, [])
        if complaint not in complaints:
            complaints.append(complaint)
    # A container that lost a bad element is reported as too short as well: the element's own line says more.
    places = [subject.partition(" = ")[0] for subject in lines]
    inside = {
        place for place in places if any(other.startswith((f"{place}.", f"{place}[")) for other in places)
    }
    return [
        f"{subject}: {', or '.join(complaints)}" if subject else complaints[0]
        for subject, complaints in lines.items()
        if subject.partition(" = ")[0] not in inside
    ]


def _complaint(
    place: str, path: Sequence[str | int], sections: Sequence[type[BaseModel]], detail: Mapping[str, Any]
) -> tuple[str, str]:
    """What a line is about, and what is wrong with it."""
    given = detail["input"]
    subject = place if isinstance(given, dict) else f"{place} = {given!r}"
    match detail["type"]:
        case "extra_forbidden":
            return place, f"no such field; {_suggest(path, sections[-1])}"
        case "missing":
            return place, "required, but not given"
        case "secret":
            return place, str(detail["msg"])
        case "value_error":
            return (subject if place else ""), str(detail["ctx"]["error"])
        case "union_tag_invalid":
            return f"{place}.kind = {given.get('kind')!r}", f"must be one of {detail['ctx']['expected_tags']}"
        case "literal_error":
            return subject, f"must be {detail['ctx']['expected']}"
        case "model_type" | "model_attributes_type" | "dict_type" | "union_tag_not_found":
            return subject, f"must be a mapping, such as {{{next(iter(sections[-1].model_fields))}: …}}"
        case "too_short":
            return subject, f"must have at least {detail['ctx']['min_length']} element"
    return subject, f"{detail['msg'][0].lower()}{detail['msg'][1:]}".replace("input should be", "must be")


def _walk(location: Sequence[str | int]) -> tuple[list[str | int], list[type[BaseModel]]]:
    """Real keys of an error's location (pydantic mixes in union branches), and the sections they pass."""
    path: list[str | int] = []
    sections: list[type[BaseModel]] = [JobSpec]
    candidates: list[type[BaseModel]] = [JobSpec]
    for position, part in enumerate(location):
        fields = [
            c.model_fields[part] for c in candidates if isinstance(part, str) and part in c.model_fields
        ]
        last = position == len(location) - 1
        tagged = [c for c in candidates if isinstance(part, str) and _tag(c) == part]
        if isinstance(part, int) or fields:
            path.append(part)
            if fields:
                candidates = [model for field in fields for model in _models(field.annotation)]
        elif tagged:
            candidates = tagged
        elif last and candidates:
            path.append(part)
        sections += [c for c in candidates if c not in sections]
    return path, [c for c in sections if c in candidates] or sections


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return None if kind is None else str(kind.default)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        return [model for argument in get_args(annotation) for model in _models(argument)]
    return []


def _suggest(path: Sequence[str | int], section: type[BaseModel]) -> str:
    here = list(section.model_fields)
    close = difflib.get_close_matches(str(path[-1]), here, n=1, cutoff=0.5)
    if close:
        return f"did you mean {_dotted([*path[:-1], close[0]])}?"
    elsewhere = [found for found in _all_fields(JobSpec) if found.rpartition(".")[2] == path[-1]]
    if elsewhere and elsewhere[0] != _dotted(path):
        return f"did you mean {elsewhere[0]}?"
    return f"the fields here are {', '.join(here)}"


def _all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _models(field.annotation):
            yield from _all_fields(section, f"{prefix}{name}.")
