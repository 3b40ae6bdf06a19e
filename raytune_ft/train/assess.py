"""What the model can do on the test split: its loss there, its answers, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_ft.evaluate.generate import answer
from raytune_ft.evaluate.scores import score
from raytune_ft.spec import EvaluateSpec
from raytune_ft.train.batch import Layout, Tokens
from raytune_ft.train.engine import Engine
from raytune_ft.train.examples import Examples
from raytune_ft.train.loop import mean_loss

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
    """Assess the model as it is."""
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
    loss = split_loss(engine, test.first(spec.max_examples), layout, spec.batch_sequences)
    return Assessment({**scores, "token_loss": loss}, answers)
