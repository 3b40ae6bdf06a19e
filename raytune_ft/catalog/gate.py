"""A gate on an alias: what the scores of a version must be for the alias to move to it."""

import operator
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.record import AdapterRecord
from raytune_ft.errors import SpecError
from raytune_ft.spec.scores import BOUND, FORGETTING

_HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Bound:
    """What is asked of one score."""

    sign: str
    limit: float
    text: str
    """As it was written."""

    @classmethod
    def parse(cls, text: str) -> "Bound":
        """Read a bound such as `>= 0.8`.

        Raises:
            SpecError: it is none.
        """
        found = BOUND.fullmatch(text)
        if found is None:
            raise SpecError(f"{text!r:.60}: is no bound; write >=, <=, > or < and a number, such as '>= 0.8'")
        return cls(found[1], float(found[2]), text)

    def holds(self, value: float) -> bool:
        """Whether a score is within the bound; nan never is."""
        return _HOLDS[self.sign](value, self.limit)

    def refusal(self, name: str, value: float | None) -> str | None:
        """Why a score is not within the bound, or None where it is. What was not measured is not."""
        if value is None:
            return f"{name} was not measured, and the gate asks for {self.text}"
        if self.holds(value):
            return None
        short = f"{value:.4g}"
        # Rounded it could look as if it were within.
        shown = repr(value) if self.holds(float(short)) else short
        return f"{name} = {shown}, and the gate asks for {self.text}"


def refusals(gate: Mapping[str, str], record: AdapterRecord) -> list[str]:
    """Hold the scores of a version against a gate.

    It sees nothing but the record, so that every retry of a publish comes to the same answer.

    Args:
        gate: bound by the score's name; `forgetting` is the record's field of that name.
        record: the version's.

    Returns:
        A reason for each bound that does not hold; empty where the alias may move.

    Raises:
        SpecError: a bound is none.
    """
    measured: dict[str, float | None] = {**(record.scores_after or {}), FORGETTING: record.forgetting}
    reasons = (Bound.parse(bound).refusal(name, measured.get(name)) for name, bound in gate.items())
    return [reason for reason in reasons if reason is not None]


def verdict(alias: str, refused: Sequence[str], version: int, alias_version: int | None) -> dict[str, Any]:
    """What a result says of its gate.

    Args:
        alias: that the gate holds back.
        refused: the reasons of `refusals`.
        version: the one that was measured.
        alias_version: what the alias means now, None for nothing.

    Returns:
        `alias`, whether the version `passed`, the reasons why the gate `refused` it, and the `alias_version`.
        Whoever moves the alias by hand decides against the gate, so that a version which the alias means has
        passed, whatever the reasons.
    """
    passed = not refused or alias_version == version
    return {"alias": alias, "passed": passed, "refused": list(refused), "alias_version": alias_version}


def as_of_now(result: dict[str, Any], catalog: CatalogView) -> dict[str, Any]:
    """A result of an earlier run; where it has a gate, with what its alias means by now.

    Raises:
        StorageError: the catalog cannot be read.
    """
    gate = result.get("gate")
    if gate is None:
        return result
    _, entry = catalog.newest_alias_entry(result["adapter"], gate["alias"])
    means = None if entry is None else entry.version
    return {**result, "gate": verdict(gate["alias"], gate["refused"], result["version"], means)}


def refusal_message(result: Mapping[str, Any], catalog: str) -> str | None:
    """What to tell of a run whose gate refused; None where there is no gate, or it let the alias move.

    Args:
        result: of the run, with `adapter`, `version` and `gate`.
        catalog: its uri.
    """
    gate = result.get("gate")
    if gate is None or gate["passed"]:
        return None
    adapter, alias, old = result["adapter"], gate["alias"], gate["alias_version"]
    reference = f"{adapter}@v{result['version']}"
    at = f"--catalog {shlex.quote(catalog)}"
    if old is None:
        left, look = f"{alias} was not set", f"catalog show {reference} {at}"
    else:
        left, look = f"{alias} was left at v{old}", f"catalog diff {adapter}@v{old} {reference} {at}"
    return (
        f"published {reference}, but {left}: {'; '.join(gate['refused'])}; look at it with "
        f"raytune-ft {look}, or move the alias by hand: raytune-ft catalog promote {reference} {alias} {at}"
    )
