"""What differs between two versions: the job, the data, the base, the method, scores and libraries."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ft.catalog.record import AdapterRecord


@dataclass(frozen=True)
class Change:
    """One value that two versions do not share."""

    path: str
    """Dotted, beginning with its part of the record: `method.rank`, `job.data.sources[0].uri`."""
    old: Any
    """None where there is none; see `only`."""
    new: Any
    only: str | None
    """`old` or `new` where the value is in that version alone."""
    difference: float | None
    """New less old, of two numbers."""


def compare_records(old: AdapterRecord, new: AdapterRecord) -> list[Change]:
    """All that differs in how two versions were made and in their scores, in the order of the record."""
    before, after = dict(_leaves(_compared(old))), dict(_leaves(_compared(new)))
    return [
        _change(path, before, after)
        for path in dict.fromkeys((*before, *after))
        if (path in before) != (path in after) or not _same(before[path], after[path])
    ]


def _compared(record: AdapterRecord) -> dict[str, Any]:
    # The record's method is the job's, resolved: once is enough.
    job = {name: value for name, value in record.job.items() if name != "method"}
    return {
        "base": record.base.model_dump(exclude_none=True),
        "method": record.method,
        "job": job,
        "data": record.data,
        "seed": record.seed,
        "steps": record.steps,
        "published_step": record.published_step,
        "tokens": record.tokens,
        "learned_tokens": record.learned_tokens,
        "loss": record.loss,
        "scores_before": record.scores_before or {},
        "scores_after": record.scores_after or {},
        "scored_examples": record.scored_examples or {},
        "max_new_tokens": record.max_new_tokens or {},
        "forgetting": record.forgetting,
        "code_version": record.code_version,
        "library_versions": record.library_versions,
        "machine": record.machine,
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of all that holds nothing further. What is empty is a leaf below the first level."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple) and value:
        for at, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{at}]")
    elif value or not isinstance(value, Mapping) or "." in path:
        yield path, value


def _same(old: Any, new: Any) -> bool:
    # 1, 1.0 and True are equal in Python, and only the first two are in a job.
    return bool(old == new) and isinstance(old, bool) == isinstance(new, bool)


def _change(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    old, new = before.get(path), after.get(path)
    only = "new" if path not in before else "old" if path not in after else None
    return Change(path, old, new, only, _difference(old, new))


def _difference(old: Any, new: Any) -> float | None:
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (old, new)):
        return None
    try:
        return float(new - old)
    except OverflowError:  # JSON has integers of any size.
        return None
