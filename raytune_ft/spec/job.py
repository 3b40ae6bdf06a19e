"""The job file as types. No torch, no ray; validators check, they never fill.

A value that is derived from others is a function or a property, so that the resolved job which is kept
beside an adapter says exactly what its author wrote, plus the defaults.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from raytune_ft.spec.data import DataSpec
from raytune_ft.spec.method import FullSpec, LoraSpec, MethodSpec
from raytune_ft.spec.scores import FORGETTING, OTHER_TASKS, SCORES, TOKEN_LOSS, EvaluateSpec, PublishSpec
from raytune_ft.spec.selection import CheckpointSpec, EarlyStoppingSpec
from raytune_ft.spec.values import Fraction, Location, Name, Section


def _check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(labels) == 1:
        raise ValueError(f"holds '{labels[0]:.60}' alone; a classifier tells two classes apart or more")
    for label in labels:
        if not label or label != label.strip():
            raise ValueError(f"'{label:.60}' is empty, or begins or ends with white space; remove that")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"names '{twice[0]:.60}' twice; name each class once")
    return labels


class ModelSpec(Section):
    path: Location
    """Base model: a folder, `file://`, `s3://`, or a Hub id such as `meta-llama/Llama-3.2-1B`."""
    weight_bits: Literal[4, 8, 16, 32] = 4
    """4: NF4 with double quantisation; 8: LLM.int8; 16: bfloat16; 32: float32."""
    resident: Literal["auto", "packed", "dequantised"] = "auto"
    """How a 4-bit base is held while training. `dequantised` keeps the bfloat16 values of the quantised
    weights: the same numbers, more memory, no dequantisation in each step. `auto` lets the planner choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Compile the passes of training with `torch.compile`: the first take minutes more, others less time."""
    labels: Annotated[tuple[str, ...], AfterValidator(_check_labels)] = ()
    """The classes that completions name, for a model that classifies, in the order of its outputs; empty: it
    answers with text."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class OptimizerSpec(Section):
    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    learning_rate: PositiveFloat = 2.0e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    epsilon: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm to this; null: never."""


class ScheduleSpec(Section):
    epochs: PositiveInt | None = None
    """Passes over the training split; 1 where neither this nor `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    warmup: Annotated[float, Field(ge=0.0, le=1.0)] = 0.03
    """Fraction of the steps in which the learning rate rises linearly from zero."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    early_stopping: EarlyStoppingSpec | None = None
    """Stop where the validation split no longer gets better, and publish the best; null: take all steps."""

    @model_validator(mode="after")
    def _one_length(self) -> "ScheduleSpec":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class BatchSpec(Section):
    sequences: PositiveInt = 32
    """Examples per optimizer step, over all workers and accumulation steps."""
    sequences_per_worker: PositiveInt | Literal["auto"] = "auto"
    """Examples per forward pass. `auto` takes the most that fits; the result does not depend on it."""


class ClusterSpec(Section):
    workers: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the workers divide among themselves (Rajbhandari et al. 2020): 0: nothing, each holds all; 1: the
    optimizer's state; 2: gradients too; 3: weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in the host's memory instead of the GPU's: the optimizer's state (from stage 2 on), or that
    and the weights (stage 3)."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: a GPU where the cluster has one."""
    max_restarts: NonNegativeInt = 3
    """Lost workers that a run survives. Bad input is never retried."""

    max_preemptions: NonNegativeInt | None = None
    """Announced losses of nodes that a run survives, counted by themselves; null: any number."""
    elastic: tuple[PositiveInt, PositiveInt] | None = None
    """Least and most workers, instead of `workers`: as many as the cluster has room for. The steps stay the
    same; a run that changes its number goes on from its last checkpoint."""

    @property
    def most_workers(self) -> int:
        """Workers that the run may have at a time."""
        return self.elastic[1] if self.elastic else self.workers

    @property
    def least_workers(self) -> int:
        """Workers without which the run waits."""
        return self.elastic[0] if self.elastic else self.workers

    @model_validator(mode="after")
    def _elastic_is_a_range(self) -> "ClusterSpec":
        if self.elastic is None:
            return self
        least, most = self.elastic
        if least > most:
            raise ValueError(f"elastic = [{least}, {most}]: the least comes first; write [{most}, {least}]")
        if self.workers != 1:
            raise ValueError(f"give workers = {self.workers} or elastic = [{least}, {most}], not both")
        return self

    @model_validator(mode="after")
    def _offload_has_its_stage(self) -> "ClusterSpec":
        least = {"none": 0, "optimizer": 2, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload = {self.offload} needs zero_stage {least if least == 3 else '2 or 3'}, and "
                f"zero_stage = {self.zero_stage}; raise it, or set offload: none"
            )
        return self


class JobSpec(Section):
    name: Name
    model: ModelSpec
    data: DataSpec
    method: MethodSpec = LoraSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    batch: BatchSpec = BatchSpec()
    cluster: ClusterSpec = ClusterSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    publish: PublishSpec

    @property
    def adapter_name(self) -> str:
        """Name under which the result stands in the catalog."""
        return self.publish.adapter or self.name

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of all that is measured of the trained model, as a gate may ask for them."""
        scores = (*(name for metric in self.evaluate.metrics for name in SCORES[metric]), TOKEN_LOSS)
        own = scores if self.evaluate.metrics and self.data.split.test else ()
        if self.evaluate.forgetting is None:
            return own
        return (*own, *(OTHER_TASKS + name for name in scores), FORGETTING)

    @property
    def best_by(self) -> str | None:
        """What the published checkpoint is the best by; None: the last one is published."""
        if self.checkpoint.keep_best:
            return self.checkpoint.best_by
        return None if self.schedule.early_stopping is None else self.schedule.early_stopping.metric

    @model_validator(mode="after")
    def _sections_agree(self) -> "JobSpec":
        if self.cluster.most_workers > self.batch.sequences:
            elastic = self.cluster.elastic
            name, value = ("elastic", [*elastic]) if elastic else ("workers", self.cluster.workers)
            raise ValueError(
                f"cluster.{name} = {value} has more workers than a step has examples, batch.sequences = "
                f"{self.batch.sequences}; use {self.batch.sequences} workers or fewer"
            )
        per_worker = self.batch.sequences_per_worker
        if per_worker != "auto" and self.batch.sequences % (per_worker * self.cluster.workers):
            unit = per_worker * self.cluster.workers
            nearest = max(unit, round(self.batch.sequences / unit) * unit)
            raise ValueError(
                f"batch.sequences = {self.batch.sequences} is not a multiple of cluster.workers × "
                f"batch.sequences_per_worker = {unit}; try {nearest}"
            )
        if isinstance(self.method, FullSpec) and self.model.weight_bits < 16:
            raise ValueError(
                f"method.kind = full trains every weight, and model.weight_bits = {self.model.weight_bits} "
                "holds them frozen; use 16 or 32, or method.kind = lora"
            )
        if self.data.mixture.stop == "steps" and self.schedule.steps is None:
            raise ValueError(
                "data.mixture.stop = steps never ends an epoch; set schedule.steps, or choose another stop"
            )
        return self

    @model_validator(mode="after")
    def _choices_are_measured(self) -> "JobSpec":
        if self.data.split.validation:
            return self
        if self.checkpoint.keep_best:
            raise ValueError(
                f"checkpoint.keep_best chooses by {self.checkpoint.best_by}, and data.split.validation = 0 "
                "measures none; raise it, or remove keep_best"
            )
        if (stopping := self.schedule.early_stopping) is not None:
            raise ValueError(
                f"schedule.early_stopping watches {stopping.metric}, and data.split.validation = 0 measures "
                "none; raise it, or remove early_stopping"
            )
        return self

    @model_validator(mode="after")
    def _unfreezing_is_whole(self) -> "JobSpec":
        # DeepSpeed steps all weights of a group as one flat tensor: those that wait would decay too.
        sharded = self.cluster.zero_stage
        if sharded and isinstance(self.method, FullSpec) and self.method.unfreeze is not None:
            raise ValueError(
                f"method.unfreeze adds weights while it trains, and cluster.zero_stage = {sharded} divides "
                "them once; use zero_stage: 0, or remove unfreeze"
            )
        return self

    @model_validator(mode="after")
    def _can_be_compiled(self) -> "JobSpec":
        if not self.model.compile:
            return self
        if self.cluster.zero_stage == 3:
            raise ValueError(
                "model.compile needs weights that stay where they are, and cluster.zero_stage = 3 gathers "
                "and releases them; use zero_stage 0, 1 or 2, or compile: false"
            )
        if isinstance(self.method, LoraSpec) and self.method.dropout:
            raise ValueError(
                f"model.compile cannot draw a mask from the number of the step, and method.dropout = "
                f"{self.method.dropout:g}; use dropout: 0, or compile: false"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> "JobSpec":
        stage = self.cluster.zero_stage
        if not stage:
            return self
        if self.optimizer.kind != "adamw":
            raise ValueError(
                f"cluster.zero_stage = {stage} divides the optimizer's state, and optimizer.kind = "
                f"{self.optimizer.kind} keeps it in blocks; use adamw (cluster.offload saves memory too)"
            )
        if stage == 3 and self.model.weight_bits == 8:
            raise ValueError(
                "cluster.zero_stage = 3 divides weights, and model.weight_bits = 8 keeps them beside the "
                "parameters; use 4, 16 or 32, or zero_stage 1 or 2"
            )
        return self

    @model_validator(mode="after")
    def _gate_is_measured(self) -> "JobSpec":
        unknown = [name for name in self.publish.gate or () if name not in self.measured]
        if not unknown:
            return self
        measured = ", ".join(self.measured) or "nothing"
        others = unknown[0] == FORGETTING or unknown[0].startswith(OTHER_TASKS)
        remedy = "set evaluate.forgetting" if others else "see evaluate.metrics and data.split.test"
        raise ValueError(
            f"publish.gate.{unknown[0]:.60}: is not measured by this job; it measures {measured}; {remedy}"
        )

    def resolved(self) -> dict[str, Any]:
        """The job with all defaults, as plain JSON values."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """sha256 of the resolved job: what was done for one digest is done for all jobs that have it."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()
