"""The sections that say what is measured, and what that decides about publishing."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from raytune_ft.spec.data import RecordsSpec
from raytune_ft.spec.values import Alias, Location, Name, Section

BOUND = re.compile(r"(>=|<=|>|<)[ ]*([+-]?(?:[0-9]+[.]?[0-9]*|[.][0-9]+)(?:[eE][+-]?[0-9]+)?)")
"""What a gate asks of a score: `>= 0.8`."""


def _check_gate(gate: Any) -> Any:
    """All at once, and by hand, so that a message names the score that has the bad bound."""
    if gate is None:
        return None
    if not isinstance(gate, dict) or not gate:
        raise ValueError("must be a mapping with at least one bound, such as {exact_match: '>= 0.8'}")
    bad = [f"{name} = {bound!r:.60}" for name, bound in gate.items() if not _is_bound(bound)]
    if bad:
        raise ValueError(f"{', '.join(bad)}: must be >=, <=, > or < and a number, in quotes: '>= 0.8'")
    return gate


def _is_bound(bound: Any) -> bool:
    found = BOUND.fullmatch(bound) if isinstance(bound, str) else None
    return found is not None and math.isfinite(float(found[2]))


Metric = Literal["exact_match", "rouge", "bleu", "chrf"]

SCORES: Mapping[Metric, tuple[str, ...]] = MappingProxyType(
    {
        "exact_match": ("exact_match",),
        "rouge": ("rouge1", "rouge2", "rougeL"),
        "bleu": ("bleu",),
        "chrf": ("chrf",),
    }
)
"""The scores that each metric gives."""

TOKEN_LOSS = "token_loss"  # noqa: S105  a score, no secret
FORGETTING = "forgetting"
OTHER_TASKS = "other_tasks/"
"""Begins the names of the scores that are measured for `evaluate.forgetting`."""


class ForgettingSpec(Section):
    sources: Annotated[tuple[RecordsSpec, ...], Field(min_length=1)]
    """Examples of tasks that are not trained on. None is trained on, whatever `data.split` says."""
    max_examples: PositiveInt = 200


class EvaluateSpec(Section):
    metrics: tuple[Metric, ...] = ("exact_match", "rouge", "bleu")
    """Measured on the test split before and after; empty: no evaluation."""
    max_examples: PositiveInt = 200
    max_new_tokens: PositiveInt | Literal["auto"] = "auto"
    """Longest answer. `auto`: as long as the longest held-out answer, at most 512 tokens."""
    batch_sequences: PositiveInt = 32
    """Prompts that are answered at once."""
    forgetting: ForgettingSpec | None = None
    """Measure how much worse the model becomes at other tasks; null: do not."""


class PublishSpec(Section):
    catalog: Location
    adapter: Name | None = None
    """Name in the catalog; the job's name where not given."""
    alias: Alias | None = "candidate"
    """Alias that moves to the new version; null: none."""
    sign: bool = False
    """Sign the record with the ed25519 key that `RAYTUNE_SIGNING_KEY` holds on the driver and the workers."""
    gate: Annotated[dict[str, str] | None, BeforeValidator(_check_gate)] = None
    """What the scores must be for the alias to move, such as `{exact_match: ">= 0.8"}`; null: anything."""

    @model_validator(mode="after")
    def _gate_has_an_alias(self) -> "PublishSpec":
        if self.gate is not None and self.alias is None:
            raise ValueError("gate holds back an alias, and alias is null; name one, or remove gate")
        return self
