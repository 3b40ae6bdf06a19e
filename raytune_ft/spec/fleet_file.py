"""Reading a fleet file, and telling it from a job file."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_ft.errors import SpecError
from raytune_ft.spec.expand import check_drafts, collisions, job_drafts, sample_draft
from raytune_ft.spec.fleet import FleetSpec, ForEachSpec
from raytune_ft.spec.job import JobSpec
from raytune_ft.spec.problems import message, problems
from raytune_ft.spec.read import expand_variables, fleet_marks, load_yaml, override_all, parse_job

_URI_PLACES = (("for_each", "glob"),)


def read_fleet(path: str | Path, overrides: Sequence[str] = ()) -> FleetSpec:
    """Read and check a fleet file, and of its jobs what can be known before their data is listed.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` each, the value read as YAML; applied in order.

    Raises:
        SpecError: one message with every problem of the file.
    """
    return parse_fleet(load_yaml(Path(path)), overrides, place=str(path))


def read_job_or_fleet(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec | FleetSpec:
    """Read either; a file is a fleet's if it has one of the fields that only those have.

    Raises:
        SpecError: one message with every problem of the file.
    """
    values = load_yaml(Path(path))
    fleet = isinstance(values, dict) and fleet_marks(values)
    return (parse_fleet if fleet else parse_job)(values, overrides, place=str(path))


def parse_fleet(values: Any, overrides: Sequence[str] = (), *, place: str = "fleet") -> FleetSpec:
    """Check a fleet that is already plain values; see `read_fleet`."""
    if not isinstance(values, dict):
        raise SpecError(
            f"{place}: a fleet file is a mapping with name and jobs or for_each, "
            f"and this one is {'empty' if values is None else f'a {type(values).__name__}'}"
        )
    if not fleet_marks(values) and JobSpec.model_fields.keys() & values.keys() - {"name"}:
        raise SpecError(
            f"{place}: is a job file, for it has neither jobs nor for_each; raytune-ft train trains it"
        )
    override_all(values, overrides)
    found = expand_variables(values, _URI_PLACES)
    fleet = None
    try:
        fleet = FleetSpec.model_validate(values)
    except ValidationError as error:
        found += problems(error, FleetSpec)
    found += _problems_of_jobs(values)
    if fleet is None or found:
        raise SpecError(message(place, found))
    return fleet


def _problems_of_jobs(values: dict[str, Any]) -> list[str]:
    """What is wrong with the jobs of a file, which need not be right in its other parts."""
    defaults, jobs = values.get("defaults", {}), values.get("jobs", [])
    if not isinstance(defaults, dict) or not isinstance(jobs, list):
        return []
    listed = list(job_drafts(defaults, jobs))
    drafts = list(listed)
    with suppress(ValidationError):
        drafts.append(sample_draft(defaults, ForEachSpec.model_validate(values.get("for_each"))))
    found, lines = check_drafts(drafts)
    labels = {draft.label for draft in listed}
    return [*lines, *collisions({label: job for label, job in found.items() if label in labels})]
