"""The job file as types. No torch, no ray; validators check, they never fill.

A value that is derived from others is a function or a property, so that the resolved job which is kept
beside an adapter says exactly what its author wrote, plus the defaults.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""Job, adapter and alias names: they become keys, folders and submission ids."""

VERSION = re.compile(r"v([0-9]+)")
"""How a reference names a version: `summarise@v3`. No alias may look like it."""

BOUND = re.compile(r"(>=|<=|>|<)[ ]*([+-]?(?:[0-9]+[.]?[0-9]*|[.][0-9]+)(?:[eE][+-]?[0-9]+)?)")
"""What a gate asks of a score: `>= 0.8`."""

SUPPORTED_SCHEMES = ("file", "s3")


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("must be 1 to 63 of a-z, 0-9 and '-', and begin and end with a letter or digit")
    return name


def _check_alias(alias: str) -> str:
    if VERSION.fullmatch(alias):
        raise ValueError("means a version; use a word such as candidate")
    return alias


def _check_layers(layers: str) -> str:
    if not re.fullmatch(r"last-[1-9][0-9]{0,3}", layers):
        raise ValueError("must be last- and a number of layers from 1 to 9999, such as last-4")
    return layers


def _check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(labels) == 1:
        raise ValueError(f"holds '{labels[0]:.60}' alone; a classifier tells two classes apart or more")
    for label in labels:
        if not label or label != label.strip():
            raise ValueError(f"'{label:.60}' is empty, or begins or ends with white space; remove that")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"names '{twice[0]:.60}' twice; name each class once")
    return labels


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return pattern


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


def _check_location(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if not uri.strip():
        raise ValueError("must not be empty")
    if not separator:
        return uri
    # The rest of such a uri may hold a password or a signed query, so it is not repeated.
    if scheme not in SUPPORTED_SCHEMES:
        raise PydanticCustomError(
            "secret", f"scheme '{scheme[:20]}' is not supported; use a folder, file:// or s3://"
        )
    if "@" in rest.partition("/")[0]:
        raise PydanticCustomError(
            "secret", "holds credentials; remove them and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return uri


Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]
Location = Annotated[
    str, AfterValidator(_check_location), Field(json_schema_extra={"format": "uri-reference"})
]
"""A folder, `file://` or `s3://`. The only strings in which `${NAME}` is expanded."""
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
"""A regular expression."""


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


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


class FieldsSpec(Section):
    """Which columns hold what, where the names differ from the usual ones. Dotted paths reach inside."""

    prompt: str | None = None
    completion: str | None = None
    system: str | None = None
    messages: str | None = None
    text: str | None = None


class RecordsSpec(Section):
    """Where records stand, and how they are read."""

    uri: Location
    """A file, a folder or a glob such as `s3://datasets/tasks/*.json`."""
    template: str = "auto"
    """How a record becomes text: a name (`raytune-ft data --templates` lists them), `chat` for the
    tokenizer's own chat template, inline Jinja2, or `auto` by the record's shape."""
    format: Literal["auto", "jsonl", "json", "natural-instructions", "csv", "parquet", "arrow"] = "auto"
    """`auto` finds it by content."""
    fields: FieldsSpec = FieldsSpec()


class SourceSpec(RecordsSpec):
    weight: PositiveFloat = 1.0
    """Each epoch takes `weight` × the source's examples: 0.5 half of them, 2.0 each of them twice."""


class MixtureSpec(Section):
    """How much of each source an epoch takes: weight × min(examples, cap) ^ (1 / temperature), which at the
    defaults is each example once (Raffel et al. 2020, section 3.5.2; Longpre et al. 2023)."""

    cap: PositiveInt | None = None
    """Count no more than this many examples of a source; null: all of them."""
    temperature: Annotated[float, Field(ge=1.0)] = 1.0
    """Above 1, small sources are seen more often and large ones less, for the same length of an epoch."""
    stop: Literal["quota", "first_exhausted", "all_exhausted", "steps"] = "quota"
    """Where an epoch ends. `quota`: when each source has given its share; `first_exhausted`: when the first
    source has been seen once; `all_exhausted`: when all have, the others again; `steps`: never, so that
    `schedule.steps` decides."""


class SplitSpec(Section):
    """Fractions by a hash of each example's input: equal inputs never stand on both sides."""

    validation: Fraction = 0.05
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _leaves_training_data(self) -> "SplitSpec":
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"validation + test = {self.validation + self.test:g} leaves no training data; the limit is 1"
            )
        return self


class DataSpec(Section):
    sources: Annotated[tuple[SourceSpec, ...], Field(min_length=1)]
    mixture: MixtureSpec = MixtureSpec()
    split: SplitSpec = SplitSpec()
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longest example, and longest packed row, in tokens."""
    too_long: Literal["drop", "cut"] = "drop"
    """What happens to an example above `max_tokens`: dropped, or its prompt cut from the left so that all
    learned tokens stay (dropped where they alone do not fit). Both are counted."""
    packing: bool = True
    """Pack the examples of a step into shared rows. Attention never crosses an example, so the result is
    the same to rounding; only padding goes."""
    max_bad_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """More malformed records than this stop the job before any training."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Order of the data, initial adapter weights and dropout."""


class LoraSpec(Section):
    kind: Literal["lora"] = "lora"
    shares_batch: ClassVar[bool] = True
    """Examples of several jobs may go through the base together, each token with its own job's update."""
    rank: PositiveInt = 16
    """Rank r of the update B·A (Hu et al. 2021)."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Probability of zeroing an input of A."""
    targets: Literal["all-linear", "attention"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Modules with an update: all linear layers but the head, the attention projections, or name suffixes."""


class TrainOnlySpec(Section):
    """Which weights are trained, in one of three ways; the others stay those of the base."""

    layers: Annotated[str, AfterValidator(_check_layers)] | None = None
    """`last-4`: the last four layers, and what stands after them: the final norm, and a head of its own."""
    patterns: (
        Annotated[tuple[Annotated[str, AfterValidator(_check_pattern)], ...], Field(min_length=1)] | None
    ) = None
    """Regular expressions; a weight is trained where one of them is found in its name."""
    biases: bool = False
    """All biases, and nothing else (BitFit, Ben Zaken et al. 2022)."""

    @property
    def last_layers(self) -> int | None:
        """How many of the last layers; None where they are chosen otherwise."""
        return None if self.layers is None else int(self.layers.removeprefix("last-"))

    @model_validator(mode="after")
    def _one_way(self) -> "TrainOnlySpec":
        if sum((self.layers is not None, self.patterns is not None, self.biases)) != 1:
            raise ValueError("give one of layers: last-4, patterns: [...] and biases: true")
        return self


class UnfreezeSpec(Section):
    """Gradual unfreezing (Howard and Ruder 2018, section 3.3): the last layer first, then the next."""

    every_steps: PositiveInt
    """Optimizer steps until the next layer down is trained too."""


class FullSpec(Section):
    kind: Literal["full"] = "full"
    shares_batch: ClassVar[bool] = False
    train_only: TrainOnlySpec | None = None
    """Train some of the weights; null: all. The published model is whole in any case."""
    unfreeze: UnfreezeSpec | None = None
    """Begin with the last layer alone; null: train all from the first step."""


def _method_kind(value: Any) -> Any:
    """`kind` may be left out: it is lora by default, like every other field."""
    if isinstance(value, dict):
        return value.get("kind", LoraSpec.model_fields["kind"].default)
    return getattr(value, "kind", None)


MethodSpec = Annotated[
    Annotated[LoraSpec, Tag("lora")] | Annotated[FullSpec, Tag("full")],
    Discriminator(_method_kind),
]


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


class CheckpointSpec(Section):
    every_steps: PositiveInt = 100
    keep: PositiveInt = 2
    """So many stay: the newest, or those that `keep_best` chooses."""
    keep_best: bool = False
    """Keep those with the lowest validation loss, and the last one beside them."""


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
    max_new_tokens: PositiveInt = 32
    batch_sequences: PositiveInt = 32
    """Prompts that are answered at once."""
    forgetting: ForgettingSpec | None = None
    """Measure how much worse the model becomes at other tasks; null: do not."""


class PublishSpec(Section):
    catalog: Location
    adapter: Name | None = None
    """Name in the catalog; the job's name where not given."""
    alias: Annotated[Name, AfterValidator(_check_alias)] | None = "candidate"
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
        if self.checkpoint.keep_best and not self.data.split.validation:
            raise ValueError(
                "checkpoint.keep_best chooses by validation loss, and data.split.validation = 0 measures "
                "none; raise it, or remove keep_best"
            )
        if self.data.mixture.stop == "steps" and self.schedule.steps is None:
            raise ValueError(
                "data.mixture.stop = steps never ends an epoch; set schedule.steps, or choose another stop"
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
