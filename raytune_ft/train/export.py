"""What a sharded run publishes, written without any rank holding the model."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from raytune_ft.methods import saving
from raytune_ft.quantise import whole_shape
from raytune_ft.train.fragments import Fragment, fragments

if TYPE_CHECKING:
    import deepspeed
    from transformers import PreTrainedModel

_LAYER = re.compile(r".*?\.\d+(?=\.)")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def export_full(
    model: "PreTrainedModel", folder: Path, rank: int, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a Hugging Face model folder: config and safetensors, tied weights once; all ranks call it.

    How the model generates is written by `write_generation_config`.

    Weights come in the dtype that the model computes in. ZeRO-3 gathers one layer at a time, so that no rank
    holds more than its partition and that layer, and rank 0, in the host's memory, what goes into one file.

    Args:
        model: its parameters may be divided as ZeRO-3 does; frozen ones are part of the result too.
        folder: exists; rank 0 alone writes to it.
        rank: this process.
        max_shard_bytes: size of a file's tensors, save where one tensor is larger.

    Raises:
        StorageFull: no space is left.
        StorageError: the disk failed otherwise.
    """
    files = _ShardFiles(folder, max_shard_bytes) if rank == 0 else None
    for names in layers(dict(model.named_parameters())):
        tensors = _gathered_layer(model, names, keep=rank == 0)
        if files:
            files.add(_as_published(model, tensors))
    if files:
        if buffers := _saved_buffers(model):
            files.add(_as_published(model, buffers))
        with saving(folder):
            files.finish(sum(torch.Size(whole_shape(p)).numel() for p in model.parameters()))
            _write_configs(model, folder)


def layers(names: Iterable[str]) -> list[list[str]]:
    """Names of parameters by the layer that they are part of, in order; one outside all layers is alone.

    >>> layers(["embed.weight", "h.0.q.weight", "h.0.k.weight", "h.1.q.weight", "norm.weight", "norm.bias"])
    [['embed.weight'], ['h.0.q.weight', 'h.0.k.weight'], ['h.1.q.weight'], ['norm.weight', 'norm.bias']]
    """
    found: dict[str, list[str]] = {}
    for name in names:
        layer = _LAYER.match(name)
        found.setdefault(layer.group() if layer else name.rpartition(".")[0], []).append(name)
    return list(found.values())


def gathered(engine: "deepspeed.DeepSpeedEngine", names: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Master weights of whole parameters on rank 0, nothing elsewhere; all ranks call it.

    For what is small, such as adapters: rank 0 holds all of it.

    Args:
        engine: holds the parameters.
        names: every parameter that the optimizer steps.

    Returns:
        float32 tensors in the host's memory, with the parameters' names and shapes.
    """
    held: dict[str, list[Fragment]] = {name: [] for name in names}
    for fragment in fragments(engine, names):
        held[fragment.name].append(fragment)
    found = {}
    for name, parameter in names.items():
        whole = torch.zeros(whole_shape(parameter), dtype=torch.float32, device=engine.device)
        for fragment in held[name]:
            whole.view(-1).narrow(0, fragment.start, fragment.numel).copy_(fragment.of(fragment.flat))
        # Added as integers, bits stay as they are: every element is zero on all ranks but one.
        dist.reduce(whole.view(torch.int32), dst=0)
        if dist.get_rank() == 0:
            found[name] = whole.cpu()
    return found


def _gathered_layer(model: "PreTrainedModel", names: Iterable[str], *, keep: bool) -> dict[str, Tensor]:
    """Whole parameters in the host's memory where they are to be kept, else nothing."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = {name: model.get_parameter(name) for name in names}
    with GatheredParameters(list(parameters.values())):
        # What ZeRO-3 gathered is gone at the end of the block.
        return {
            name: parameter.detach().to("cpu", copy=hasattr(parameter, "ds_id"))
            for name, parameter in parameters.items()
            if keep
        }


def _saved_buffers(model: "PreTrainedModel") -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved}


def _as_published(model: "PreTrainedModel", tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the model's published files name and divide them: experts are one tensor only in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    return {name: t.contiguous() for name, t in revert_weight_conversion(model, dict(tensors)).items()}


def _write_configs(model: "PreTrainedModel", folder: Path) -> None:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if model._auto_class is not None:
        from transformers.dynamic_module_utils import custom_object_save

        # Its own Python code, without which it does not load; the config then names it.
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)


class _ShardFiles:
    """Writes tensors into numbered files of a limited size as they come."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._total_bytes = 0
        self._written: list[list[str]] = []
        """Names of the tensors in each file."""

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._waiting and self._waiting_bytes + tensor.nbytes > self._max_bytes:
                self._flush()
            self._waiting[name] = tensor
            self._waiting_bytes += tensor.nbytes

    def finish(self, total_parameters: int) -> None:
        """Write what waits, give the files their names, and the index where there are several."""
        self._flush()
        count = len(self._written)
        names = (
            [_SINGLE] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        )
        with saving(self._folder):
            for number, name in enumerate(names):
                self._partial(number).replace(self._folder / name)
            if count > 1:
                index = {
                    "metadata": {"total_parameters": total_parameters, "total_size": self._total_bytes},
                    "weight_map": {
                        tensor: file
                        for file, tensors in zip(names, self._written, strict=True)
                        for tensor in tensors
                    },
                }
                (self._folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        with saving(self._folder):
            save_file(self._waiting, self._partial(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._waiting))
        self._total_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self._folder / f".model-{number}.safetensors"
