"""Training the weights of the base, all or some of them; the result is a model folder."""

from pathlib import Path

from torch import nn

from raytune_ft.generation_files import saved_without_settings
from raytune_ft.methods.selective import Unfreezing, selected, unfreezing
from raytune_ft.spec import FullSpec


def check_full(model: nn.Module, spec: FullSpec) -> None:
    """Refuse what `train_only` asks for and the model does not have.

    Raises:
        ModelError: names what it has.
    """
    if spec.train_only is not None:
        selected([name for name, _ in model.named_parameters()], spec.train_only)


def add_full(model: nn.Module, spec: FullSpec, seed: int, slot: int = 0) -> dict[str, nn.Parameter]:  # noqa: ARG001  one table, one signature
    """Unfreeze what the spec trains; return it by name, tied parameters once.

    Raises:
        ModelError: the model does not have what `train_only` asks for.
    """
    parameters = dict(model.named_parameters())
    if spec.train_only is not None:
        names = selected(list(parameters), spec.train_only)
        kept = {*names, *_new_head(model, parameters)}
        parameters = {name: p for name, p in parameters.items() if name in kept}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def _new_head(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Weights that no base brings along: a classifier's own, which have learned nothing yet."""
    if model.get_output_embeddings() is not None:  # type: ignore[operator]  # a PreTrainedModel
        return []
    body = {id(parameter) for parameter in model.base_model.parameters()}  # type: ignore[union-attr]
    return [name for name, parameter in parameters.items() if id(parameter) not in body]


def unfreezing_full(model: nn.Module, spec: FullSpec) -> Unfreezing | None:
    """From which step on the parameters that `add_full` gave are trained; None: all from the first.

    Called after `add_full`.
    """
    if spec.unfreeze is None:
        return None
    named = dict(model.named_parameters())
    trained = (name for name, parameter in named.items() if parameter.requires_grad)
    return unfreezing(list(named), trained, spec.unfreeze.every_steps)


def save_full(model: nn.Module, spec: FullSpec, folder: Path, base_path: str, slot: int = 0) -> None:  # noqa: ARG001
    """Write a Hugging Face model folder, safetensors in shards of at most 5 GB; not yet how it generates."""
    with saved_without_settings(model):
        model.save_pretrained(folder, max_shard_size="5GB")  # type: ignore[operator]  # a PreTrainedModel
