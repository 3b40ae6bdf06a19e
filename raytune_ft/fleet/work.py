"""What a job takes: its steps and tokens, estimated from the size of its data, and seconds of a lane."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ft.planner import ModelFacts
from raytune_ft.spec import JobSpec, ModelSpec

BYTES_PER_TOKEN = 4.0
"""Of data, keys and punctuation included."""
TOKENS_PER_EXAMPLE = 128
"""Or `data.max_tokens`, where that is less."""
ROUND_S_PER_LAYER = 2.6e-3
JOB_S_PER_LAYER = 2.0e-3
"""Per layer of the model, what a round costs beside its tokens: once, and for each job that takes part.
Fitted to a 61M Llama of 12 layers on two CPU cores, with 1 and 8 jobs of 2 and 8 examples a step."""
CPU_FLOPS = 0.27e12
"""Sustained by those two cores."""
GPU_FLOPS = 40e12
"""Sustained in 16 bits with rows of some hundred tokens, where nobody says better."""
_FLOPS_PER_WEIGHT = 4
"""Of a token: 2 forward, 2 backward. The base is frozen, so it has no gradients of weights."""
_RECOMPUTED = 2
_LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Work:
    """A job's training, as long as nothing has been read."""

    steps: int
    tokens: int
    """Of all steps together."""

    @property
    def tokens_per_step(self) -> float:
        """On average."""
        return self.tokens / self.steps


def estimate(job: JobSpec, source_bytes: Sequence[int]) -> Work:
    """Steps and tokens of a job from the bytes of its data, at `BYTES_PER_TOKEN` and `TOKENS_PER_EXAMPLE`.

    Args:
        job: the job.
        source_bytes: of all objects of each source.
    """
    per_example = min(TOKENS_PER_EXAMPLE, job.data.max_tokens)
    per_step = per_example * job.batch.sequences
    if job.schedule.steps is not None:
        return Work(job.schedule.steps, job.schedule.steps * per_step)
    held_out = job.data.split.validation + job.data.split.test
    weighted = sum(size * source.weight for size, source in zip(source_bytes, job.data.sources, strict=True))
    tokens = math.ceil((job.schedule.epochs or 1) * (1 - held_out) * weighted / BYTES_PER_TOKEN)
    return Work(max(1, -(-tokens // per_step)), max(1, tokens))


@dataclass(frozen=True)
class LaneSpeed:
    """How long a round takes, in which every job of a lane makes one step."""

    round_s: float
    """Once, whoever takes part."""
    job_s: float
    """For each job that takes part."""
    token_s: float

    def seconds(self, jobs: int, tokens: float) -> float:
        """Of a round.

        Args:
            jobs: that take part.
            tokens: of all of them together.
        """
        return self.round_s + jobs * self.job_s + tokens * self.token_s

    def alone(self, work: Work) -> float:
        """Seconds of a job that has the lane to itself."""
        return work.steps * self.seconds(1, work.tokens_per_step)

    def useful_slots(self, tokens_per_step: float) -> int:
        """How many jobs take part until what they share is 5% of a round: more would gain little.

        >>> LaneSpeed(round_s=0.1, job_s=0.05, token_s=0.001).useful_slots(tokens_per_step=50)
        19
        """
        own_s = self.job_s + tokens_per_step * self.token_s
        return max(1, math.ceil(round(self.round_s * (1 / _LEAST_GAIN - 1) / own_s, 6)))


def speed_of(facts: ModelFacts, model: ModelSpec, flops_per_s: float) -> LaneSpeed:
    """Speed of a lane that holds a base.

    Args:
        facts: of the base.
        model: how it is trained on.
        flops_per_s: what the lane's device sustains.
    """
    # A head of its own is multiplied with, an input embedding only looked up.
    weights = facts.parameters - (0 if facts.tied else facts.vocabulary * facts.hidden)
    per_weight = _FLOPS_PER_WEIGHT + (_RECOMPUTED if model.gradient_checkpointing else 0)
    return LaneSpeed(
        round_s=facts.layers * ROUND_S_PER_LAYER,
        job_s=facts.layers * JOB_S_PER_LAYER,
        token_s=per_weight * weights / flops_per_s,
    )
