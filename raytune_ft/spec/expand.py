"""From a fleet file to its jobs: a pure function of the file, the environment and the listed objects."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.errors import SpecError
from raytune_ft.spec.fleet import PLACEHOLDER, FleetSpec, ForEachSpec
from raytune_ft.spec.job import JobSpec
from raytune_ft.spec.method import FullSpec, LoraSpec
from raytune_ft.spec.problems import message
from raytune_ft.spec.read import check_job

_EXCLUSIVE = ("epochs", "steps")
"""Of a schedule: who gives one of them means it instead of the other."""
_SHOWN = 3


@dataclass(frozen=True)
class Draft:
    """A job of a fleet before it is checked."""

    label: str
    """Where it comes from: its place in `jobs`, or its object."""
    values: dict[str, Any]


def expand(fleet: FleetSpec, uris: Iterable[str] = (), *, place: str = "fleet") -> tuple[JobSpec, ...]:
    """All jobs of a fleet, each as if it stood in a file of its own: those of `jobs`, then one for each uri.

    Args:
        fleet: the checked fleet file.
        uris: the objects that `for_each.glob` names, in any order.
        place: the file, for the message.

    Raises:
        SpecError: one message with every problem of every job.
    """
    drafts = list(job_drafts(fleet.defaults, fleet.jobs))
    if fleet.for_each is not None:
        found = sorted(set(uris))
        if not found:
            nothing = "no such file, and no folder or glob with files"
            raise SpecError(message(place, [f"for_each.glob = {fleet.for_each.glob}: {nothing}"]))
        if variables := [uri for uri in found if "${" in uri]:
            # Whoever may write there could have any variable of this environment sent to the store.
            line = f"{variables[0]}: has '${{' in its name, which a job file takes for a variable; rename it"
            raise SpecError(message(place, [f"for_each.glob = {fleet.for_each.glob}: {line}"]))
        drafts += [_draft_of(fleet.defaults, fleet.for_each, uri) for uri in found]
    jobs, problems = check_drafts(drafts)
    problems += collisions(jobs)
    if problems:
        raise SpecError(message(place, problems))
    return tuple(jobs.values())


def check_drafts(drafts: Sequence[Draft]) -> tuple[dict[str, JobSpec], list[str]]:
    """The drafts that are jobs, by label, and the problems of all drafts, equal ones in one line."""
    jobs: dict[str, JobSpec] = {}
    by_complaint: dict[str, list[str]] = {}
    for draft in drafts:
        found = check_job(copy.deepcopy(draft.values))
        complaints = found if isinstance(found, list) else _unfit(found)
        for complaint in dict.fromkeys(complaints):
            by_complaint.setdefault(complaint, []).append(draft.label)
        if isinstance(found, JobSpec):
            jobs[draft.label] = found
    return jobs, [f"{_who(labels, len(drafts))}: {text}" for text, labels in by_complaint.items()]


def job_drafts(defaults: Mapping[str, Any], jobs: Sequence[Any]) -> Iterator[Draft]:
    """The jobs that a fleet file lists, over its defaults; what is no part of a job is left out."""
    for at, part in enumerate(jobs):
        if isinstance(part, dict):
            name = part.get("name")
            label = f"jobs[{at}] ({name:.63})" if isinstance(name, str) else f"jobs[{at}]"
            yield Draft(label, merged(defaults, part))


def sample_draft(defaults: Mapping[str, Any], for_each: ForEachSpec) -> Draft:
    """A job as `for_each` makes them, of no real object: what is wrong with it is wrong with all."""
    return Draft("for_each", _filled(merged(defaults, for_each.job), "sample", "/sample.json"))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of two parts of a job; what both say is said by `above`.

    Sections are merged at every depth, lists and values replaced. A method of another kind replaces the whole
    method, whose fields it does not have, and `schedule.steps` the `epochs` below it, or the other way round.
    """
    found = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = found.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            kept = _kept(key, old, value)
            found[key] = merged(kept, value)
        else:
            found[key] = copy.deepcopy(value)
    return found


def _kept(section: str, below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """What a section keeps of the one below it."""
    if section == "method":
        default = LoraSpec.model_fields["kind"].default
        return below if above.get("kind", below.get("kind", default)) == below.get("kind", default) else {}
    if section == "schedule" and any(above.get(key) is not None for key in _EXCLUSIVE):
        return {key: value for key, value in below.items() if key not in _EXCLUSIVE}
    return below


def job_name(pattern: str, uri: str) -> str:
    """The name that `for_each.name` gives to the job of an object.

    >>> job_name("ni-{stem}", "s3://datasets/tasks/task1146_country_capital.json")
    'ni-task1146-country-capital'
    >>> job_name("{folder}", "s3://datasets/tasks/Active to passive/train.jsonl")
    'active-to-passive'
    """
    *_, folder, file = ["", *uri.split("/")]
    parts = {"stem": file.rpartition(".")[0] or file, "folder": folder}
    return PLACEHOLDER.sub(lambda match: _as_name(parts[match[1]]), pattern)


def _as_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _draft_of(defaults: Mapping[str, Any], for_each: ForEachSpec, uri: str) -> Draft:
    name = job_name(for_each.name, uri)
    return Draft(f"{uri} ({name})", _filled(merged(defaults, for_each.job), name, uri))


def _filled(values: dict[str, Any], name: str, uri: str) -> dict[str, Any]:
    """Name the job and its first source; other sources, and how the first one is read, stay."""
    values["name"] = name
    data = values.setdefault("data", {})
    if isinstance(data, dict):
        sources = data.setdefault("sources", [{}])
        if isinstance(sources, list) and sources and isinstance(sources[0], dict):
            sources[0]["uri"] = uri
    return values


def _unfit(job: JobSpec) -> list[str]:
    """Why a job cannot be one of a fleet."""
    found = []
    cluster = job.cluster
    alone = "train it by itself with raytune-ft train"
    if cluster.elastic is not None or cluster.workers > 1:
        asked = (
            f"workers = {cluster.workers}"
            if cluster.elastic is None
            else f"elastic = {list(cluster.elastic)}"
        )
        found.append(f"cluster.{asked}: a job of a fleet has one worker, its lane's; remove it, or {alone}")
    if cluster.zero_stage:
        found.append(
            f"cluster.zero_stage = {cluster.zero_stage}: a lane divides nothing; set it to 0, or {alone}"
        )
    if job.model.compile:
        found.append(f"model.compile = true: is for one job, and a lane's come and go; remove it, or {alone}")
    if isinstance(job.method, FullSpec):
        found.append(f"method.kind = full: changes the base, which a lane's jobs share; use lora, or {alone}")
    return found


def collisions(jobs: Mapping[str, JobSpec]) -> list[str]:
    """What no two jobs of a fleet may share."""
    names: dict[str, list[str]] = {}
    adapters: dict[tuple[str, str], list[str]] = {}
    for label, job in jobs.items():
        names.setdefault(job.name, []).append(label)
        adapters.setdefault((job.publish.catalog, job.adapter_name), []).append(label)
    same_name = [(name, labels) for name, labels in names.items() if len(labels) > 1]
    twice = {label for _, labels in same_name for label in labels}
    lines = [f"{_who(labels)}: have one name, {name}; give each its own" for name, labels in same_name]
    for (catalog, adapter), labels in adapters.items():
        if len(labels) > 1 and not twice.issuperset(labels):
            lines.append(
                f"{_who(labels)}: publish the same adapter, {adapter} in {catalog}; give each its own "
                "publish.adapter, or leave it out"
            )
    return lines


def _who(labels: Sequence[str], among: int | None = None) -> str:
    """Whom a line is about; `among` all jobs, if it could be every one."""
    if among is not None and len(labels) == among > 1:
        return "every job"
    others = len(labels) - _SHOWN
    if others == 1:
        return ", ".join(labels)
    return ", ".join(labels[:_SHOWN]) + (f" and {others} others" if others > 0 else "")
