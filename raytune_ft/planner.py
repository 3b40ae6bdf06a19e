"""What a job needs, in bytes, from the model's config alone. Arithmetic only: no torch, no ray.

The terms are upper estimates for one worker; `choose` turns them into the decisions that a job file leaves
to `auto`, and refuses what cannot fit before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from raytune_ft.errors import ModelError
from raytune_ft.spec import FullSpec, JobSpec, LoraSpec, ModelSpec, OptimizerSpec

NF4_BYTES_PER_WEIGHT = 4.127 / 8
"""NF4 with double quantisation (Dettmers et al. 2023, section 3): 4 bits and 0.127 for the constants."""
LOGITS_CHUNK_TOKENS = 1024
"""Learned positions whose logits exist at the same time."""
_UNGATED = frozenset({"gpt_neox", "gpt_neo", "phi", "starcoder2", "nemotron", "persimmon", "arcee"})
"""Families that say `intermediate_size` like the gated ones, but have two matrices per MLP, not three."""
_SMALLEST_OPTIMIZER = OptimizerSpec(kind="adamw_8bit")
_USABLE = 0.85
"""Share of a device's memory that a plan may fill; the rest is for the runtime and fragmentation."""


@dataclass(frozen=True)
class ModelFacts:
    """What memory depends on, read from `config.json` and the sizes of the weight files."""

    parameters: int
    """Weights of the matrices and embeddings; norms and biases are below rounding."""
    hidden: int
    attention: int
    """Width of the queries of all heads: `hidden` in most families."""
    layers: int
    intermediate: int
    vocabulary: int
    tied: bool
    """The head is the input embedding."""
    max_positions: int | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], place: str = "config.json") -> "ModelFacts":
        """Read a Hugging Face config; names differ among families.

        Args:
            config: its content.
            place: where it was read, for the message.

        Raises:
            ModelError: a dimension is missing.
        """
        text: Mapping[str, Any] = config.get("text_config") or config

        def dimension(*names: str) -> int:
            for name in names:
                if isinstance(text.get(name), int):
                    return int(text[name])
            raise ModelError(f"{place} has none of {', '.join(names)}; so this is no causal language model")

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
        attention, key_value = _attention_widths(text, hidden)
        gated = "intermediate_size" in text and text.get("model_type") not in _UNGATED
        mlp = (3 if gated else 2) * hidden * intermediate
        experts = text.get("num_local_experts") or text.get("num_experts")
        if experts:
            mlp = experts * mlp // intermediate * (text.get("moe_intermediate_size") or intermediate)
        per_layer = 2 * hidden * (attention + key_value) + mlp
        parameters = layers * per_layer + vocabulary * hidden * (1 if tied else 2)
        return cls(parameters, hidden, attention, layers, intermediate, vocabulary, tied, positions)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding and of a head of its own, which are never quantised."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def _attention_widths(config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    """Width of all queries, and of all keys: grouped heads share theirs (Ainslie et al. 2023)."""
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 1
    width = config.get("head_dim") or hidden // heads
    # Falcon writes the number of its groups in every config, and means it in its newer architecture alone.
    grouped = config.get("num_kv_heads") if config.get("new_decoder_architecture") else None
    shared = 1 if config.get("multi_query") else heads
    return heads * width, (config.get("num_key_value_heads") or grouped or shared) * width


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
            # q, k, v, o: a side of `hidden` and one of the heads each (fewer for grouped keys and values);
            # up, gate, down: one of `hidden`, one of `intermediate`.
            sides = 4 * (facts.hidden + facts.attention) + 3 * (facts.hidden + facts.intermediate)
            return facts.layers * rank * sides
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
        # Those in bfloat16 are added up in float32.
        gradients=(6 if full and size == 2 else 4) * trainable,
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
    limit = job.batch.sequences * rows
    usable = int(device_bytes * _USABLE)

    def plan(resident: str, tokens: int) -> MemoryPlan:
        return memory_plan(facts, job, resident=resident, tokens_per_forward=tokens)

    resident: Literal["packed", "dequantised"] = "packed"
    if job.model.weight_bits == 4:
        # A dequantised base is only faster; half of the memory stays for what else the step needs.
        affordable = job.model.resident == "auto" and plan("dequantised", rows).total <= usable // 2
        resident = "dequantised" if affordable or job.model.resident == "dequantised" else "packed"
    if plan(resident, rows).total > usable:
        raise ModelError(_refusal(job, plan(resident, rows), usable, resident))
    tokens = rows
    while tokens < limit and plan(resident, min(2 * tokens, limit)).total <= usable // 2:
        tokens = min(2 * tokens, limit)
    return Choice(resident, tokens, plan(resident, tokens))


def _refusal(job: JobSpec, plan: MemoryPlan, usable: int, resident: str) -> str:
    terms = asdict(plan)
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in terms.items())
    largest = max(terms, key=lambda name: terms[name])
    return (
        f"{job.model.path} needs {plan.total / 2**30:.2f} GiB to train on one row of {job.data.max_tokens} "
        f"tokens (GiB: {listed}), and the device can give {usable / 2**30:.2f}; "
        f"{_remedy(job, largest, resident)}"
    )


def _remedy(job: JobSpec, largest: str, resident: str) -> str:
    """What makes the largest term smaller, and is not done yet."""
    full = isinstance(job.method, FullSpec)
    match largest:
        case "weights" if resident == "dequantised":
            return "use model.resident: packed"
        case "weights" if not full and job.model.weight_bits != 4:
            return "use model.weight_bits: 4"
        case "optimizer" if optimizer_bytes(1, job.optimizer) > optimizer_bytes(1, _SMALLEST_OPTIMIZER):
            return "use optimizer.kind: adamw_8bit"
        case "weights" | "gradients" | "optimizer":
            return "use method.kind: lora" if full else "use a larger device, or a smaller base"
        case "activations" if not job.model.gradient_checkpointing:
            return "use model.gradient_checkpointing: true, or a smaller data.max_tokens"
    return "use a smaller data.max_tokens"
