"""Training every weight of the base; the result is a model folder."""

from pathlib import Path

from torch import nn

from raytune_ft.spec import FullSpec


def add_full(model: nn.Module, spec: FullSpec, seed: int) -> dict[str, nn.Parameter]:  # noqa: ARG001  one table, one signature
    """Unfreeze the base; return its parameters, tied ones once."""
    model.requires_grad_(True)
    return dict(model.named_parameters())


def save_full(model: nn.Module, spec: FullSpec, folder: Path, base_path: str) -> None:  # noqa: ARG001
    """Write a Hugging Face model folder, safetensors in shards of at most 5 GB."""
    model.save_pretrained(folder, max_shard_size="5GB")  # type: ignore[operator]  # a PreTrainedModel
