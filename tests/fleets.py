"""Jobs that are trained together on a bank, and the same jobs each by itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raytune_ft.methods import METHODS
from raytune_ft.spec import FullSpec, LoraSpec, OptimizerSpec, ScheduleSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Arrangement, Continuations, Layout, Step, Tokens
from raytune_ft.train.loop import StepReport, Trainee, fit, train
from raytune_ft.train.schedule import learning_rate

Weights = dict[str, Tensor]
METHOD = LoraSpec(rank=4, alpha=8)
OPTIMIZER = OptimizerSpec(learning_rate=5e-3)
SCHEDULE = ScheduleSpec(warmup=0.2)


@dataclass(frozen=True)
class Plan:
    """A job, as far as training knows it."""

    seed: int = 0
    method: LoraSpec = METHOD
    optimizer: OptimizerSpec = OPTIMIZER
    schedule: ScheduleSpec = SCHEDULE
    steps: int = 6
    sequences: int = 4
    """Examples of a step."""
    per_forward: int | None = None
    max_tokens: int = 48
    packing: bool = True
    starts: int = 0
    """The first of its steps: those before were done elsewhere."""
    joins: int = 0
    """Round in which the job joins the others."""
    vocabulary: tuple[int, int] = (6, 60)

    def examples(self, step: int) -> list[Tokens]:
        random = np.random.default_rng([self.seed, step])
        lengths = random.integers(4, self.max_tokens + 1, self.sequences)
        return [
            Tokens(random.integers(*self.vocabulary, n), np.arange(n) >= n - max(2, n // 3), at % 2, at)
            for at, n in enumerate(lengths)
        ]

    def layout(self, arrangement: Arrangement) -> Layout:
        return Layout(self.packing, self.max_tokens, 2, self.per_forward, 96, arrangement)


@dataclass
class Found:
    """What became of a job."""

    reports: list[StepReport] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)
    ends: list[Exception | None] = field(default_factory=list)

    def curve(self) -> list[tuple[float, ...]]:
        return [(r.loss, r.grad_norm, r.learning_rate, *r.source_loss_sums) for r in self.reports]


Meddle = Callable[[int, int, BankEngine], None]
"""(place of the job, step, its engine): called before each step of a job; may raise."""


def run_together(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    *,
    tokens_per_pass: int = 1024,
    arrangement: Arrangement = Continuations(),
    meddle: Meddle = lambda *_: None,
    told: Callable[[int, int], None] = lambda *_: None,
) -> list[Found]:
    """Train jobs on one bank; each joins in its round, and leaves when it is done."""
    model.requires_grad_(False)
    bank = Bank(model, tokens_per_pass=tokens_per_pass)
    found = [Found() for _ in plans]
    rounds = iter(range(1_000_000))

    def trainee(place: int) -> Trainee:
        plan, own = plans[place], found[place]
        engine = bank.enter(plan.method, plan.optimizer, seed=plan.seed)

        def steps() -> Iterator[Step]:
            for number in range(plan.starts, plan.steps):
                meddle(place, number, engine)
                examples = plan.examples(number)
                yield Step(plan.layout(arrangement).batches(examples), len(examples), "", 2)

        def leave(reason: Exception | None) -> None:
            own.ends.append(reason)
            own.weights = {name: p.detach().clone() for name, p in engine.masters.items()}
            bank.leave(engine)

        def rate(step: int) -> float:
            return learning_rate(step, plan.steps, plan.schedule, plan.optimizer.learning_rate)

        def report(step: StepReport) -> None:
            told(place, step.step)
            own.reports.append(step)

        return Trainee(engine, steps(), plan.starts, rate, report, leave)

    waiting = sorted(range(len(plans)), key=lambda place: plans[place].joins, reverse=True)

    def offer(training: int) -> Iterator[Trainee]:
        now = next(rounds)
        # Nobody waits for a round that does not come.
        while waiting and (plans[waiting[-1]].joins <= now or not training):
            training += 1
            yield trainee(waiting.pop())

    train(bank, offer)
    return found


def run_alone(model: PreTrainedModel, plan: Plan, *, arrangement: Arrangement = Continuations()) -> Found:
    """Train a job by itself."""
    (found,) = run_together(model, [plan], tokens_per_pass=0, arrangement=arrangement)
    assert found.ends == [None]
    return found


def apart(one: Found, other: Found) -> float:
    """Largest difference of a weight."""
    assert one.weights.keys() == other.weights.keys()
    return max(float((one.weights[n] - other.weights[n]).abs().max()) for n in one.weights)


def same_bits(one: Found, other: Found) -> bool:
    """Whether two jobs have the same weights, and had the same losses and norms on the way."""
    return (
        one.weights.keys() == other.weights.keys()
        and all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
        and one.curve() == other.curve()
    )


def train_alone(
    model: PreTrainedModel, method: LoraSpec | FullSpec, steps: Sequence[Step], *, learning_rate: float
) -> tuple[BankEngine, list[StepReport]]:
    """A job by itself, of any kind of model, at one rate; its engine and the reports of its steps."""
    model.requires_grad_(False)
    parameters = METHODS[type(method)].add(model, method, 0)
    bank = BankEngine(Bank(model), parameters, OptimizerSpec(learning_rate=learning_rate))
    reports: list[StepReport] = []
    fit(bank, steps, start=0, learning_rate=lambda _: learning_rate, report=reports.append)
    return bank, reports
