"""Bytes of one worker, term by term."""

from dataclasses import asdict, dataclass, replace

from raytune_ft.planner.facts import ModelFacts
from raytune_ft.planner.sharding import Sharding, bucket_elements, zero_states
from raytune_ft.spec import FullSpec, JobSpec, LoraSpec, ModelSpec, OptimizerSpec

NF4_BYTES_PER_WEIGHT = 4.127 / 8
"""NF4 with double quantisation (Dettmers et al. 2023, section 3): 4 bits and 0.127 for the constants."""
LOGITS_CHUNK_TOKENS = 1024
"""Learned positions whose logits exist at the same time."""
_MASTER_BYTES = 4
"""Of a float32 copy of a weight, or of a gradient that is added up in float32."""
_LIVE_PARAMETERS = 10**9
"""Weights that DeepSpeed's stage 3 keeps gathered at a time, unless what it needs at once is more."""
_BUCKETS = 3
"""Gathered, on their way, and being filled."""
_SUM_BYTES = 64 << 20
"""Gradients that unsharded workers add up at once."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker: on its device, and beside it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int = 0
    """What comes and goes: buckets of communication, gathered or dequantised weights, a head's gradient; or
    what a base that is loaded whole needs above all of these."""
    host: int = 0
    """In the host's memory instead of the device's."""

    @property
    def terms(self) -> dict[str, int]:
        """The bytes on the device by name."""
        return {name: size for name, size in asdict(self).items() if name != "host"}

    @property
    def total(self) -> int:
        """Sum of the terms on the device, in bytes."""
        return sum(self.terms.values())


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
    """Parameters that the method trains; of `patterns` only the model itself could tell, so all count."""
    match job.method:
        case LoraSpec(rank=rank):
            # q, k, v, o: a side of `hidden` and one of the heads each (fewer for grouped keys and values);
            # up, gate, down: one of `hidden`, one of `intermediate`.
            sides = 4 * (facts.hidden + facts.attention) + 3 * (facts.hidden + facts.intermediate)
            return facts.layers * rank * sides
        case FullSpec(train_only=only) if only is not None and only.last_layers is not None:
            per_layer = (facts.parameters - facts.embedding_parameters) // facts.layers
            head = 0 if facts.tied else facts.vocabulary * facts.hidden
            return min(only.last_layers, facts.layers) * per_layer + head
        case FullSpec(train_only=only) if only is not None and only.biases:
            # Two norms; q, k, v and o; up, gate and down.
            return facts.layers * (4 * facts.hidden + 3 * facts.attention + 2 * facts.intermediate)
        case FullSpec():
            return facts.parameters


def logits_bytes(facts: ModelFacts, tokens_per_forward: int) -> int:
    """Bytes of the logits of a chunk, and of what the loss makes of them."""
    return 3 * 4 * facts.vocabulary * min(LOGITS_CHUNK_TOKENS, tokens_per_forward)


def optimizer_bytes(parameters: int, spec: OptimizerSpec) -> int:
    """Bytes of the two moments of AdamW; the 8-bit kinds keep one byte each (Dettmers et al. 2022)."""
    return parameters * (2 if spec.kind in ("adamw_8bit", "paged_adamw_8bit") else 8)


def memory_plan(facts: ModelFacts, job: JobSpec, *, resident: str, tokens_per_forward: int) -> MemoryPlan:
    """Predict the peak of one worker, in steps of several passes: gradients and activations stand together.

    Activations per token and layer follow Korthikanti et al. 2022 (section 4.1) without the attention scores,
    which fused attention never stores: at most 14 values of `hidden` and 4 of `intermediate`. With gradient
    checkpointing one value of `hidden` per layer stays, and one layer is recomputed at a time.

    Args:
        facts: of the model.
        job: the job.
        resident: how a 4-bit base is held: `packed` or `dequantised`.
        tokens_per_forward: tokens of a forward pass, padding included.
    """
    sharding = Sharding.of(job)
    size = compute_bytes(job.model)
    per_layer = (14 * facts.hidden + 4 * facts.intermediate) * size + _dropped_bytes(facts, job, size)
    layers = _differentiated_layers(facts, job)
    kept = (
        facts.hidden * size * layers + per_layer if job.model.gradient_checkpointing else per_layer * layers
    )
    weights, gradients, optimizer, host = (
        _sharded_states(facts, job, sharding, resident)
        if sharding.stage
        else _whole_states(facts, job, resident)
    )
    training = MemoryPlan(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept * tokens_per_forward,
        logits=logits_bytes(facts, tokens_per_forward),
        workspace=_workspace(facts, job, sharding, resident),
        host=host,
    )
    # A quantised base is loaded whole and then divided: before there is anything else on the device.
    loading = weight_bytes(facts, job.model, resident) if job.model.weight_bits < 16 else 0
    return replace(training, workspace=training.workspace + max(0, loading - training.total))


def _dropped_bytes(facts: ModelFacts, job: JobSpec, size: int) -> int:
    """Bytes that dropout keeps per token and layer: a mask and a copy of each input of an adapter."""
    if not isinstance(job.method, LoraSpec) or not job.method.dropout:
        return 0
    # q, k, v, up and gate; o; down.
    return (5 * facts.hidden + facts.attention + facts.intermediate) * (size + 1)


def _whole_states(facts: ModelFacts, job: JobSpec, resident: str) -> tuple[int, int, int, int]:
    """Weights, gradients, optimizer and host, where each worker holds all: the bank."""
    trainable = trainable_parameters(facts, job)
    full = isinstance(job.method, FullSpec)
    # A bfloat16 base that is trained itself needs float32 copies beside it; its gradients are added up there.
    copied = full and compute_bytes(job.model) == 2
    return (
        weight_bytes(facts, job.model, resident) + (0 if full else 4 * trainable),
        (2 + _MASTER_BYTES if copied else 4) * trainable,
        optimizer_bytes(trainable, job.optimizer) + (_MASTER_BYTES * trainable if copied else 0),
        0,
    )


def _sharded_states(
    facts: ModelFacts, job: JobSpec, sharding: Sharding, resident: str
) -> tuple[int, int, int, int]:
    """Weights, gradients, optimizer and host, as DeepSpeed divides them.

    It steps a float32 copy of its part of the weights, also where they are float32 themselves. The gradients
    of bfloat16 weights are added up in float32; stage 1 keeps both.
    """
    trainable = trainable_parameters(facts, job)
    size = compute_bytes(job.model)
    both = sharding.stage == 1 and size == 2
    adapter = 0 if isinstance(job.method, FullSpec) else size * trainable
    weights, gradients, optimizer = zero_states(
        weight_bytes(facts, job.model, resident) + adapter,
        (2 + _MASTER_BYTES if both else 4) * trainable,
        optimizer_bytes(trainable, job.optimizer) + _MASTER_BYTES * trainable,
        stage=sharding.stage,
        workers=sharding.workers,
    )
    match sharding.offload:
        case "none":
            return weights, gradients, optimizer, 0
        case "optimizer":
            return weights, 0, 0, optimizer + gradients
        case "parameters":
            return 0, 0, 0, optimizer + gradients + weights


def _differentiated_layers(facts: ModelFacts, job: JobSpec) -> int:
    """Layers whose activations the backward pass needs: none below the lowest that is trained."""
    only = job.method.train_only if isinstance(job.method, FullSpec) else None
    return min(only.last_layers or facts.layers, facts.layers) if only else facts.layers


def _workspace(facts: ModelFacts, job: JobSpec, sharding: Sharding, resident: str) -> int:
    size = compute_bytes(job.model)
    trainable = trainable_parameters(facts, job)
    # The gradient of the head, added up in float32; a chunk's part of it, or what becomes of it at the end.
    head = (_MASTER_BYTES + size) * facts.vocabulary * facts.hidden if _trains_head(facts, job) else 0
    packed = job.model.weight_bits == 8 or (job.model.weight_bits == 4 and resident == "packed")
    dequantised = facts.hidden * max(facts.intermediate, facts.attention) * size if packed else 0
    if sharding.stage:
        gathered = _gathered_parameters(facts) * size if sharding.stage == 3 else 0
        # Gradients travel in float32.
        return head + dequantised + gathered + _BUCKETS * bucket_elements(trainable) * _MASTER_BYTES
    summed = min(_MASTER_BYTES * trainable, _SUM_BYTES) if sharding.workers > 1 else 0
    return head + dequantised + summed


def _gathered_parameters(facts: ModelFacts) -> int:
    """Weights that stage 3 holds whole at a time: the head, through a pass, and a layer beside it."""
    layer = (facts.parameters - facts.embedding_parameters) // facts.layers
    return min(facts.parameters, max(_LIVE_PARAMETERS, facts.vocabulary * facts.hidden + layer))


def _trains_head(facts: ModelFacts, job: JobSpec) -> bool:
    if not isinstance(job.method, FullSpec):
        return False
    only = job.method.train_only
    if only is None or only.patterns is not None:
        return True
    return only.layers is not None and not facts.tied
