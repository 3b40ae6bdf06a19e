"""What a job needs, in bytes, from the model's config alone. Arithmetic only: no torch, no ray.

The terms are upper estimates for one worker; `choose` turns them into the decisions that a job file leaves
to `auto`, and refuses what cannot fit before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raytune_ft.errors import ModelError
from raytune_ft.spec import FullSpec, JobSpec, LoraSpec, ModelSpec, OptimizerSpec

NF4_BYTES_PER_WEIGHT = 4.127 / 8
"""NF4 with double quantisation (Dettmers et al. 2023, section 3): 4 bits and 0.127 for the constants."""
LOGITS_CHUNK_TOKENS = 1024
"""Learned positions whose logits exist at the same time."""
_USABLE = 0.85
"""Share of a device's memory that a plan may fill; the rest is for the runtime and fragmentation."""


@dataclass(frozen=True)
class ModelFacts:
    """What memory depends on, read from `config.json` and the sizes of the weight files."""

    parameters: int
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    max_positions: int | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelFacts":
        """Read a Hugging Face config; names differ among families.

        Raises:
            ModelError: a dimension is missing.
        """
        text: Mapping[str, Any] = config.get("text_config", config)

        def dimension(*names: str) -> int:
            for name in names:
                if isinstance(text.get(name), int):
                    return int(text[name])
            raise ModelError(
                f"config.json has none of {', '.join(names)}; so this is no causal language model"
            )

        hidden = dimension("hidden_size", "n_embd", "d_model")
        layers = dimension("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        vocabulary = dimension("vocab_size")
        intermediate = next(
            (int(text[n]) for n in ("intermediate_size", "n_inner", "ffn_dim", "d_ff") if text.get(n)),
            4 * hidden,
        )
        positions = next(
            (int(text[n]) for n in ("max_position_embeddings", "n_positions", "n_ctx") if text.get(n)), None
        )
        tied = bool(text.get("tie_word_embeddings", True))
        heads = text.get("num_attention_heads") or text.get("n_head") or 1
        kv_share = (text.get("num_key_value_heads") or heads) / heads
        matrices = 3 if "intermediate_size" in text else 2
        per_layer = round((2 + 2 * kv_share) * hidden**2) + matrices * hidden * intermediate
        embeddings = vocabulary * hidden * (1 if tied else 2)
        return cls(layers * per_layer + embeddings, hidden, layers, intermediate, vocabulary, positions)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding, which is never quantised."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the worker's device, term by term."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of the terms, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Choice:
    """What `auto` became. Kept with the run, so that a resumed run computes in the same order."""

    resident: Literal["packed", "dequantised"]
    tokens_per_forward: int
    memory: MemoryPlan


def compute_bytes(spec: ModelSpec) -> int:
    """Bytes of one activation: float32 for a 32-bit base, else bfloat16."""
    return 4 if spec.weight_bits == 32 else 2


def weight_bytes(facts: ModelFacts, spec: ModelSpec, resident: str) -> int:
    """Bytes of the base as it is held while training."""
    others = facts.embedding_parameters * compute_bytes(spec)
    linear = facts.parameters - facts.embedding_parameters
    if spec.weight_bits == 4 and resident == "packed":
        return others + round(linear * NF4_BYTES_PER_WEIGHT)
    if spec.weight_bits == 8:
        return others + linear
    return others + linear * compute_bytes(spec)


def trainable_parameters(facts: ModelFacts, job: JobSpec) -> int:
    """Parameters that the method trains."""
    match job.method:
        case LoraSpec(rank=rank):
            # q, k, v, o: two sides of `hidden` each; up, gate, down: one of `hidden`, one of `intermediate`.
            return facts.layers * rank * (8 * facts.hidden + 3 * (facts.hidden + facts.intermediate))
        case FullSpec():
            return facts.parameters


def optimizer_bytes(parameters: int, spec: OptimizerSpec) -> int:
    """Bytes of the two moments of AdamW; the 8-bit kinds keep one byte each (Dettmers et al. 2022)."""
    return parameters * (2 if spec.kind in ("adamw_8bit", "paged_adamw_8bit") else 8)


def memory_plan(facts: ModelFacts, job: JobSpec, *, resident: str, tokens_per_forward: int) -> MemoryPlan:
    """Predict the peak of one worker.

    Activations per token and layer follow Korthikanti et al. 2022 (section 4.1) without the attention scores,
    which fused attention never stores: about 16 values of `hidden` and 4 of `intermediate`. With gradient
    checkpointing one value of `hidden` per layer stays, and one layer is recomputed at a time.
    """
    trainable = trainable_parameters(facts, job)
    full = isinstance(job.method, FullSpec)
    size = compute_bytes(job.model)
    per_layer = (16 * facts.hidden + 4 * facts.intermediate) * size
    kept = (
        facts.hidden * size * facts.layers + per_layer
        if job.model.gradient_checkpointing
        else per_layer * facts.layers
    )
    # A bfloat16 base that is trained itself needs float32 master weights beside it.
    master = 4 * trainable if full and size == 2 else 0
    return MemoryPlan(
        weights=weight_bytes(facts, job.model, resident) + (0 if full else 4 * trainable),
        gradients=trainable * (size if full else 4),
        optimizer=optimizer_bytes(trainable, job.optimizer) + master,
        activations=kept * tokens_per_forward,
        logits=3 * 4 * facts.vocabulary * min(LOGITS_CHUNK_TOKENS, tokens_per_forward),
    )


def check_max_tokens(job: JobSpec, facts: ModelFacts) -> None:
    """Refuse rows that are longer than the model's positions.

    Raises:
        ModelError: names both figures.
    """
    if facts.max_positions is not None and job.data.max_tokens > facts.max_positions:
        raise ModelError(
            f"data.max_tokens = {job.data.max_tokens} is above the {facts.max_positions} positions of "
            f"{job.model.path}; set data.max_tokens: {facts.max_positions} or less"
        )


def choose(job: JobSpec, facts: ModelFacts, device_bytes: int) -> Choice:
    """Decide what the job file leaves to `auto`, for a device of `device_bytes`.

    Raises:
        ModelError: not even one row fits the device.
    """
    rows = job.data.max_tokens
    usable = int(device_bytes * _USABLE)
    smallest = memory_plan(facts, job, resident="packed", tokens_per_forward=rows)
    if smallest.total > usable:
        raise ModelError(_refusal(job, smallest, usable))
    # A dequantised base is only faster; half of the memory stays for what else the step needs.
    dequantised = memory_plan(facts, job, resident="dequantised", tokens_per_forward=rows)
    resident: Literal["packed", "dequantised"] = "packed"
    wanted = job.model.resident == "dequantised"
    affordable = job.model.resident == "auto" and dequantised.total <= usable // 2
    if job.model.weight_bits == 4 and (wanted or affordable):
        resident = "dequantised"
    tokens = rows
    limit = job.batch.sequences * rows
    while (
        tokens < limit
        and memory_plan(facts, job, resident=resident, tokens_per_forward=2 * tokens).total <= usable // 2
    ):
        tokens *= 2
    return Choice(
        resident, min(tokens, limit), memory_plan(facts, job, resident=resident, tokens_per_forward=tokens)
    )


def _refusal(job: JobSpec, plan: MemoryPlan, usable: int) -> str:
    terms = {
        name: getattr(plan, name) for name in ("weights", "gradients", "optimizer", "activations", "logits")
    }
    largest = max(terms, key=lambda name: terms[name])
    remedy = {
        "weights": "use model.weight_bits: 4" if job.model.weight_bits != 4 else "use a larger device",
        "gradients": "use method.kind: lora",
        "optimizer": "use optimizer.kind: adamw_8bit",
        "activations": "use model.gradient_checkpointing: true, or a smaller data.max_tokens",
        "logits": "use a smaller data.max_tokens",
    }[largest]
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in terms.items())
    return (
        f"{job.model.path} needs {plan.total / 2**30:.2f} GiB to train on one row of {job.data.max_tokens} "
        f"tokens (GiB: {listed}), and the device can give {usable / 2**30:.2f}; {remedy}"
    )
