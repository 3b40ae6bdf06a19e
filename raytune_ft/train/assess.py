"""What the model can do on the test split, and on other tasks: its loss there, its answers, their scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raytune_ft.errors import Diverged
from raytune_ft.evaluate.generate import answer
from raytune_ft.evaluate.references import answer_tokens, taught_references
from raytune_ft.evaluate.scores import score
from raytune_ft.generation_files import stop_token_ids
from raytune_ft.models import task_of
from raytune_ft.spec import EvaluateSpec
from raytune_ft.spec.scores import OTHER_TASKS, TOKEN_LOSS
from raytune_ft.train.batch import Layout, Tokens
from raytune_ft.train.engine import Engine
from raytune_ft.train.examples import Examples, Question
from raytune_ft.train.loop import REMEDY, mean_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LONGEST_ANSWER_TOKENS = 512
"""The most that `evaluate.max_new_tokens: auto` lets a model generate: a base that never ends takes all."""


@dataclass(frozen=True)
class Asked:
    """What a model is asked, before and after training alike."""

    questions: list[Question]
    """With what was taught as their references; those of a classifier are labels."""
    max_new_tokens: int
    """The longest answer; 0 where nothing is generated."""
    cut: int
    """Questions whose reference is longer."""

    def notice(self, spec: EvaluateSpec, of: str) -> str | None:
        """Say that references are longer than any answer may be; None where none is.

        Args:
            spec: how the model is asked.
            of: what the questions are called in messages.
        """
        if not self.cut:
            return None
        automatic = spec.max_new_tokens == "auto"
        limit = f"auto (at most {self.max_new_tokens})" if automatic else str(self.max_new_tokens)
        remedy = "give a higher number" if automatic else "raise it, or set it to auto"
        return (
            f"{self.cut} of {len(self.questions)} references of the {of} are longer than "
            f"evaluate.max_new_tokens = {limit}, so their answers are cut off and never match; {remedy}"
        )


def ask(
    examples: Examples,
    spec: EvaluateSpec,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    end_ids: Sequence[int],
) -> Asked:
    """Choose the questions and the longest answer. It depends on neither weights nor workers.

    Args:
        examples: held-out ones.
        spec: how the model is asked.
        model: the base, or what it became.
        tokenizer: the base's.
        end_ids: tokens that the learned answers end with.
    """
    questions = examples.questions(spec.max_examples) if spec.metrics else []
    if not questions or task_of(model) == "classification":
        return Asked(questions, 0, 0)
    ends = frozenset(stop_token_ids(model, tokenizer, end_ids))
    taught = [
        replace(q, references=taught_references(q.references, q.answer_ids, tokenizer, ends))
        for q in questions
    ]
    lengths = [answer_tokens(question.answer_ids, ends) for question in questions]
    longest = min(max(lengths), LONGEST_ANSWER_TOKENS)
    limit = longest if spec.max_new_tokens == "auto" else spec.max_new_tokens
    return Asked(taught, limit, sum(length > limit for length in lengths))


@dataclass(frozen=True)
class Assessment:
    """Scores of examples, and the answers they were given for."""

    scores: dict[str, float]
    """By name; see `raytune_ft.evaluate.scores`. `token_loss`: mean loss per learned token."""
    answers: list[str]
    examples: dict[str, int]
    """How many each score was measured on, by its name."""


def split_loss(engine: Engine, examples: Sequence[Tokens], layout: Layout, sequences: int) -> float:
    """Mean loss per learned token of `examples`, laid out `sequences` at a time; nan without any."""
    groups = (examples[start : start + sequences] for start in range(0, len(examples), sequences))
    return mean_loss(engine, (batch for group in groups for batch in layout.batches(group)))


def assess(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    engine: Engine,
    examples: Examples,
    asked: Asked,
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
    questions = asked.questions
    engine.select()
    answers = answer(
        model,
        tokenizer,
        [question.prompt_ids for question in questions],
        end_ids=end_ids,
        max_new_tokens=asked.max_new_tokens,
        batch_sequences=spec.batch_sequences,
    )
    scores = (
        score(spec.metrics, answers, [question.references for question in questions]) if questions else {}
    )
    counts = dict.fromkeys(scores, len(questions))
    measured = examples.sample(spec.max_examples)
    scores[TOKEN_LOSS] = split_loss(engine, measured, layout, spec.batch_sequences)
    counts[TOKEN_LOSS] = len(measured)
    for name, value in scores.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} on the {of} is {value}: the last steps blew the weights up; {REMEDY}")
    return Assessment(scores, answers, counts)


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
