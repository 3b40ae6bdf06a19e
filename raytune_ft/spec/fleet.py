"""The fleet file as types: many jobs in one file, and the lanes that train them. No torch, no ray.

`defaults`, `jobs` and `for_each.job` are parts of jobs. They are checked where they are put together, in
`raytune_ft.spec.expand`: a part need not be a job.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from raytune_ft.spec.values import Location, Name, Section

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
PLACEHOLDERS = ("stem", "folder")
"""What a name may take from its object: the file's name without its suffix, and its folder's."""

PartOfJob = dict[str, Any]
"""Any sections and fields of a job file."""


def _check_no_mapping(pattern: Any) -> Any:
    """In YAML braces without quotes are a mapping, which no message about strings would explain."""
    if isinstance(pattern, dict):
        raise ValueError('is a mapping without quotes; write "{stem}"')
    return pattern


def _check_pattern(pattern: str) -> str:
    named = PLACEHOLDER.findall(pattern)
    if unknown := [name for name in named if name not in PLACEHOLDERS]:
        raise ValueError(f"{{{unknown[0]:.40}}} stands for nothing; use {{stem}} or {{folder}}")
    if not named:
        raise ValueError("gives all jobs one name; add {stem}, the object's name, or {folder}, its folder's")
    return pattern


class ForEachSpec(Section):
    """A job for each object."""

    glob: Location
    """A glob such as `s3://datasets/tasks/*.json`, or a folder. Each object is the first source of a job."""
    name: Annotated[str, AfterValidator(_check_pattern), BeforeValidator(_check_no_mapping)] = "{stem}"
    """The job's name. `{stem}` is the object's name without its last suffix, `{folder}` its folder's, both in
    lower case, with `-` for what a name may not hold."""
    job: PartOfJob = Field(default={})
    """Any part of a job, over `defaults`, for these jobs."""

    @model_validator(mode="after")
    def _one_name(self) -> "ForEachSpec":
        if "name" in self.job:
            raise ValueError(
                f"job.name = {self.job['name']!r:.60}: for_each.name names these jobs; remove job.name"
            )
        return self


class LanesSpec(Section):
    """A lane is a worker that holds a base and trains several jobs on it."""

    max: PositiveInt = 1
    """At most so many lanes, each with a GPU where the cluster has one."""
    slots: PositiveInt | Literal["auto"] = "auto"
    """Jobs that a lane trains at once. `auto`: what its memory holds, as long as one more makes it faster."""


class FleetSpec(Section):
    name: Name
    defaults: PartOfJob = Field(default={})
    """Any part of a job, for all jobs."""
    jobs: tuple[PartOfJob, ...] = ()
    """Parts of jobs, each over `defaults`."""
    for_each: ForEachSpec | None = None
    """A job for each object of a folder or bucket; null: only those in `jobs`."""
    lanes: LanesSpec = LanesSpec()
    on_failure: Literal["continue", "stop"] = "continue"
    """When a job fails: go on with the others, or start no more."""

    @model_validator(mode="after")
    def _has_jobs(self) -> "FleetSpec":
        if not self.jobs and self.for_each is None:
            raise ValueError("no jobs: list them in jobs, name their data in for_each.glob, or both")
        return self

    @model_validator(mode="after")
    def _defaults_name_no_job(self) -> "FleetSpec":
        if "name" in self.defaults:
            raise ValueError(
                f"defaults.name = {self.defaults['name']!r:.60} would name every job; name each in jobs, or "
                "by for_each.name"
            )
        return self
