"""What is wrong with a file, in words: each wrong place with its value, the limit and the remedy."""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from raytune_ft.spec.job import JobSpec


def message(place: str, problems: Sequence[str]) -> str:
    """All problems of a file as one message."""
    unique = list(dict.fromkeys(problems))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    return "\n".join([f"{place} has {count}:", *(f"  {problem}" for problem in unique)])


def dotted(path: Sequence[str | int]) -> str:
    """A place as people write it.

    >>> dotted(["data", "sources", 0, "uri"])
    'data.sources[0].uri'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line per wrong place; a union reports one error per branch, which are alternatives of one line.

    Args:
        error: of the validation.
        root: what was validated.
    """
    lines: dict[str, list[str]] = {}
    for detail in error.errors():
        path, sections = _walk(detail["loc"], root)
        subject, complaint = _complaint(dotted(path), path, sections, detail, root)
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
    place: str,
    path: Sequence[str | int],
    sections: Sequence[type[BaseModel]],
    detail: Mapping[str, Any],
    root: type[BaseModel],
) -> tuple[str, str]:
    """What a line is about, and what is wrong with it."""
    given = detail["input"]
    subject = place if isinstance(given, dict) else f"{place} = {given!r}"
    match detail["type"]:
        case "extra_forbidden":
            return place, f"no such field; {_suggest(path, sections[-1], root)}"
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
            return subject, f"must be a mapping, such as {{{_example_field(path, sections)}: …}}"
        case "too_short":
            return subject, f"must have at least {detail['ctx']['min_length']} element"
    return subject, f"{detail['msg'][0].lower()}{detail['msg'][1:]}".replace("input should be", "must be")


def _example_field(path: Sequence[str | int], sections: Sequence[type[BaseModel]]) -> str:
    """A field that the mapping could have. A part of a job is one that its author leaves open."""
    part_of_a_job = path[0] in ("defaults", "jobs") or path[-1] == "job"
    return next(iter((JobSpec if part_of_a_job else sections[-1]).model_fields))


def _walk(
    location: Sequence[str | int], root: type[BaseModel]
) -> tuple[list[str | int], list[type[BaseModel]]]:
    """Real keys of an error's location (pydantic mixes in union branches), and the sections they pass."""
    path: list[str | int] = []
    sections: list[type[BaseModel]] = [root]
    candidates: list[type[BaseModel]] = [root]
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


def _suggest(path: Sequence[str | int], section: type[BaseModel], root: type[BaseModel]) -> str:
    here = list(section.model_fields)
    close = difflib.get_close_matches(str(path[-1]), here, n=1, cutoff=0.5)
    if close:
        return f"did you mean {dotted([*path[:-1], close[0]])}?"
    elsewhere = [found for found in _all_fields(root) if found.rpartition(".")[2] == path[-1]]
    if root is not JobSpec:
        # What all jobs of a fleet share stands in its defaults.
        elsewhere += [f"defaults.{f}" for f in _all_fields(JobSpec) if f.rpartition(".")[2] == path[-1]]
    if elsewhere and elsewhere[0] != dotted(path):
        return f"did you mean {elsewhere[0]}?"
    return f"the fields here are {', '.join(here)}"


def _all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _models(field.annotation):
            yield from _all_fields(section, f"{prefix}{name}.")
