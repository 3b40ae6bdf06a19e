"""Parts of the base that a job's method names, looked for before any worker starts."""

from collections.abc import Iterable

from raytune_ft.errors import ModelError
from raytune_ft.spec import JobSpec


def missing_parts(jobs: Iterable[JobSpec]) -> dict[str, ModelError]:
    """Of jobs that name layers or weights which their base does not have, by name: what is wrong.

    No weights are loaded. A base with code of its own is left to the workers, which run it anyway.
    """
    naming = [job for job in jobs if job.method.names_parts and not job.model.trust_remote_code]
    if not naming:
        return {}
    # They import torch, which takes seconds, and a driver needs it for nothing else.
    from raytune_ft.methods import METHODS
    from raytune_ft.models import outline

    bases, wrong = {}, {}
    for job in naming:
        try:
            if job.model not in bases:
                bases[job.model] = outline(job.model)
            METHODS[type(job.method)].check(bases[job.model], job.method)
        except ModelError as error:
            wrong[job.name] = error
    return wrong
