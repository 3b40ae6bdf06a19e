"""What the model can do on the test split: its loss there, its answers, and their scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_ft.errors import Diverged
from raytune_ft.evaluate.generate import answer
from raytune_ft.evaluate.scores import score
from raytune_ft.spec import EvaluateSpec
from raytune_ft.train.batch import Layout, Tokens
from raytune_ft.train.engine import Engine
from raytune_ft.train.examples import Examples
from raytune_ft.train.loop import REMEDY, mean_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Assessment:
    """Scores on the test split, and the answers they were given for."""

    scores: dict[str, float]
    answers: list[str]


def split_loss(engine: Engine, examples: Sequence[Tokens], layout: Layout, sequences: int) -> float:
    """Mean loss per learned token of `examples`, laid out `sequences` at a time; nan without any."""
    groups = (examples[start : start + sequences] for start in range(0, len(examples), sequences))
    return mean_loss(engine, (batch for group in groups for batch in layout.batches(group)))


def assess(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    engine: Engine,
    test: Examples,
    layout: Layout,
    spec: EvaluateSpec,
    end_ids: Sequence[int],
) -> Assessment:
    """Assess the model as it is.

    Raises:
        Diverged: a score is not finite.
    """
    questions = test.questions(spec.max_examples)
    answers = answer(
        model,
        tokenizer,
        [question.prompt_ids for question in questions],
        end_ids=end_ids,
        max_new_tokens=spec.max_new_tokens,
        batch_sequences=spec.batch_sequences,
    )
    scores = (
        score(spec.metrics, answers, [question.references for question in questions]) if questions else {}
    )
    loss = split_loss(engine, test.sample(spec.max_examples), layout, spec.batch_sequences)
    scores["token_loss"] = loss
    for name, value in scores.items():
        if not math.isfinite(value):
            raise Diverged(
                f"{name} on the test split is {value}: the last steps blew the weights up; {REMEDY}"
            )
    return Assessment(scores, answers)
