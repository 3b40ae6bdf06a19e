"""What the model can do on the test split, and on other tasks: its loss there, its answers, their scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_ft.errors import Diverged
from raytune_ft.evaluate.generate import answer
from raytune_ft.evaluate.scores import score
from raytune_ft.spec import EvaluateSpec
from raytune_ft.spec.scores import OTHER_TASKS, TOKEN_LOSS
from raytune_ft.train.batch import Layout, Tokens
from raytune_ft.train.engine import Engine
from raytune_ft.train.examples import Examples
from raytune_ft.train.loop import REMEDY, mean_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Assessment:
    """Scores of examples, and the answers they were given for."""

    scores: dict[str, float]
    """By name; see `raytune_ft.evaluate.scores`. `token_loss`: mean loss per learned token."""
    answers: list[str]


def split_loss(engine: Engine, examples: Sequence[Tokens], layout: Layout, sequences: int) -> float:
    """Mean loss per learned token of `examples`, laid out `sequences` at a time; nan without any."""
    groups = (examples[start : start + sequences] for start in range(0, len(examples), sequences))
    return mean_loss(engine, (batch for group in groups for batch in layout.batches(group)))


def assess(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    engine: Engine,
    examples: Examples,
    layout: Layout,
    spec: EvaluateSpec,
    end_ids: Sequence[int],
    *,
    of: str,
) -> Assessment:
    """Assess the model as it is on at most `spec.max_examples` examples; `of` names them in messages.

    Raises:
        Diverged: a score is not finite.
    """
    questions = examples.questions(spec.max_examples) if spec.metrics else []
    engine.select()
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
    loss = split_loss(engine, examples.sample(spec.max_examples), layout, spec.batch_sequences)
    scores[TOKEN_LOSS] = loss
    for name, value in scores.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} on the {of} is {value}: the last steps blew the weights up; {REMEDY}")
    return Assessment(scores, answers)


def forgetting(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> float | None:
    """How much worse the model became at other tasks; None where that was not measured.

    The rise of the mean loss per learned token: what Chaudhry et al. 2018 call the forgetting of a
    task, and Lopez-Paz & Ranzato 2017 the negative of backward transfer, with the negative loss for their
    accuracy and the base as the only earlier model. The loss always has something to lose, while a base
    that answers nothing exactly right would seem to forget nothing, whatever becomes of it.
    """
    name = OTHER_TASKS + TOKEN_LOSS
    if not before or not after or name not in before or name not in after:
        return None
    return after[name] - before[name]
