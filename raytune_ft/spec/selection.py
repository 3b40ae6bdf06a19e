"""The sections that say which checkpoints stay, which one is published, and when training stops early."""

from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from raytune_ft.spec.scores import SCORES
from raytune_ft.spec.values import Section

VALIDATION_LOSS = "validation_loss"
"""Mean loss per learned token on the validation split."""


_METRICS = (VALIDATION_LOSS, *(score for scores in SCORES.values() for score in scores))


def _check_metric(name: str) -> str:
    if name not in _METRICS:
        raise ValueError(f"'{name:.60}' is not measured on the validation split; use {', '.join(_METRICS)}")
    return name


ValidationMetric = Annotated[
    str, AfterValidator(_check_metric), Field(json_schema_extra={"enum": [*_METRICS]})
]
"""`validation_loss`, or a score of greedy answers to the validation split."""


class EarlyStoppingSpec(Section):
    patience: PositiveInt
    """Stop after so many validations in a row that were no better than the best before them."""
    metric: ValidationMetric = VALIDATION_LOSS
    """What has to get better: `validation_loss`, or a score such as `exact_match` or `rougeL`."""
    min_delta: NonNegativeFloat = 0.0
    """A value is better if it is better by more than this."""


class CheckpointSpec(Section):
    every_steps: PositiveInt = 100
    keep: PositiveInt = 2
    """So many stay: the newest, or the best where the best is published."""
    keep_best: bool = False
    """Keep the best checkpoints, and the last one beside them, and publish the best."""
    best_by: ValidationMetric = VALIDATION_LOSS
    """What `keep_best` compares: `validation_loss`, or a score such as `exact_match` or `rougeL`, measured on
    the validation split."""

    @model_validator(mode="after")
    def _best_is_kept(self) -> "CheckpointSpec":
        if self.best_by != VALIDATION_LOSS and not self.keep_best:
            raise ValueError(
                f"best_by = {self.best_by} chooses among what keep_best keeps, and keep_best = false; set "
                "keep_best: true, or remove best_by"
            )
        return self
