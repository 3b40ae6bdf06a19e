"""Low-rank adapters (Hu et al. 2021) on the linear layers of a frozen base, in PEFT's layout on disk."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raytune_ft.errors import ModelError
from raytune_ft.methods.dropout import dropped, feature_keys, module_seed
from raytune_ft.methods.grouped import grouped_update, serves
from raytune_ft.methods.routing import Part, Routed
from raytune_ft.methods.sliced import sliced_update
from raytune_ft.models import Task, head_paths, task_of
from raytune_ft.quantise import whole_shape
from raytune_ft.spec import LoraSpec

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_TASK_TYPES: Mapping[Task, str] = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
}
"""What PEFT calls what a model does."""


class Adapter(nn.Module):
    """One job's update of a frozen linear layer: (alpha / rank) · B·A·dropout(x).

    A (rank, in) and B (out, rank) are float32 whatever the base computes in; a GPU casts them for products.
    """

    def __init__(self, base: nn.Module, spec: LoraSpec, seed: int, name: str) -> None:
        super().__init__()
        in_features, out_features = linear_shape(base)
        device = next(base.parameters()).device
        self._scale = spec.alpha / spec.rank
        self._dropout = spec.dropout
        # Seeded by name, so that the start of one module depends neither on the others nor on their order.
        self._seed = module_seed(seed, name)
        self._feature_key_F = feature_keys(self._seed, in_features if spec.dropout else 0, device)
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), as in the paper's code
        start = torch.rand(spec.rank, in_features, generator=torch.Generator().manual_seed(self._seed))
        self.lora_A = nn.Parameter((start * 2 - 1).mul_(bound).to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, spec.rank, device=device))

    def forward(self, x: Tensor, y: Tensor, part: Part) -> Tensor:
        """y (…, out) of the frozen layer with the update of x (…, in), all tokens of which are this job's."""
        x_ND, y_NO = self.kept(x, part).flatten(0, -2), y.flatten(0, -2)
        weights = (self.lora_A, self.lora_B)
        return sliced_update(x_ND, y_NO, [len(x_ND)], [self.scale], [weights]).view_as(y)

    def kept(self, x: Tensor, part: Part) -> Tensor:
        """What dropout leaves of x (…, in); `scale` makes up for what it takes."""
        if not self.drops:
            return x
        drop_NF = dropped(self._seed, part.keys, self._feature_key_F, self._dropout)
        return x.masked_fill(drop_NF.view_as(x), 0.0)

    @property
    def drops(self) -> bool:
        """Whether anything of its input is dropped."""
        return self.training and self._dropout > 0

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self._scale / (1 - self._dropout) if self.training else self._scale


class LoraLinear(Routed):
    """A frozen linear layer with the updates of any number of jobs, each for its own tokens."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()

    @property
    def weight(self) -> Tensor:
        """That of the frozen layer: T5 asks its layers for their dtype."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # a module may have anything
        return weight

    def adapter(self, slot: int) -> Adapter | None:
        """That of the job in a slot; None where the job leaves this layer as it is."""
        key = str(slot)
        adapter = self.adapters[key] if key in self.adapters else None  # noqa: SIM401  it has no `get`
        return cast(Adapter | None, adapter)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        y: Tensor = self.base(x)
        parts = self.route.parts(x.numel() // x.shape[-1])
        adapters = [self.adapter(part.slot) for part in parts]
        if len(parts) == 1:
            return y if adapters[0] is None else adapters[0](x, y, parts[0])
        if all(adapter is None for adapter in adapters):
            return y
        x_ND, y_NO = x.flatten(0, -2), y.flatten(0, -2)
        kept_ND = _kept(x_ND, parts, adapters)
        scales = tuple(1.0 if adapter is None else adapter.scale for adapter in adapters)
        weights = [None if adapter is None else (adapter.lora_A, adapter.lora_B) for adapter in adapters]
        if serves(x_ND, y_NO):
            groups = self.route.groups(scales, x_ND.device)
            return grouped_update(kept_ND, y_NO, groups, weights).view_as(y)
        return sliced_update(kept_ND, y_NO, [part.stop for part in parts], scales, weights).view_as(y)


def _kept(x_ND: Tensor, parts: Sequence[Part], adapters: Sequence[Adapter | None]) -> Tensor:
    """What dropout leaves of all tokens: where nobody drops no copy, which the backward pass would keep."""
    if not any(adapter is not None and adapter.drops for adapter in adapters):
        return x_ND.contiguous()
    own = torch.split(x_ND, [part.stop - part.start for part in parts])
    pieces = zip(adapters, own, parts, strict=True)
    return torch.cat([x if adapter is None else adapter.kept(x, part) for adapter, x, part in pieces])


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer; transformers' Conv1D keeps its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = whole_shape(module.weight)  # type: ignore[arg-type]  # Conv1D: a parameter of two axes
    return rows, columns


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but those of the head, by its dotted path."""
    head = model.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel
    trained_whole = head_paths(model)
    return {
        path: module
        for path, module in _all_linear(model).items()
        if module is not head
        and not any(path == whole or path.startswith(f"{whole}.") for whole in trained_whole)
    }


def _all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """By path, which stays the same where adapters are around a layer."""
    from transformers.pytorch_utils import Conv1D

    wrapped = {f"{path}.base" for path in _wrapped(model)}
    return {
        path.removesuffix(".base") if path in wrapped else path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _wrapped(model: nn.Module) -> dict[str, LoraLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def target_paths(linear: Iterable[str], targets: str | tuple[str, ...]) -> list[str]:
    """Paths of the layers that `targets` names.

    Raises:
        ModelError: a name that fits no layer; lists those that exist.
    """
    paths = list(linear)
    if targets == "all-linear":
        return paths
    if targets == "attention":
        chosen = [
            p
            for p in paths
            if any("attn" in part or "attention" in part for part in p.lower().split(".")[:-1])
        ]
        if not chosen:
            raise ModelError(f"method.targets = attention: no attention layers; {_existing(paths)}")
        return chosen
    for target in targets:
        if not any(_ends(path, target) for path in paths):
            raise ModelError(f"method.targets: no linear layer is called '{target}'; {_existing(paths)}")
    return [path for path in paths if any(_ends(path, target) for target in targets)]


def _ends(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def _existing(paths: Iterable[str]) -> str:
    return f"the base has {', '.join(sorted({path.rpartition('.')[2] for path in paths}))}"


def shortest_suffixes(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest name suffixes that fit all `chosen` paths and none of the `others`, as PEFT matches them.

    >>> shortest_suffixes(["h.0.attn.c_proj", "h.1.attn.c_proj"], others=["h.0.mlp.c_proj"])
    ['attn.c_proj']
    """
    rest = list(others)
    found: list[str] = []
    for path in chosen:
        if any(_ends(path, suffix) for suffix in found):
            continue
        parts = path.split(".")
        suffixes = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        found.append(next(s for s in suffixes if not any(_ends(other, s) for other in rest)))
    return sorted(found)


def check_lora(model: nn.Module, spec: LoraSpec) -> None:
    """Refuse targets that fit no layer of the model.

    Raises:
        ModelError: names the layers that exist.
    """
    target_paths(linear_modules(model), spec.targets)


def add_lora(model: nn.Module, spec: LoraSpec, seed: int, slot: int = 0) -> dict[str, nn.Parameter]:
    """Put adapters around the target layers in place; return what is trained by its name on disk.

    Those of a classifier's head are among it: it is trained whole.

    Args:
        model: the base, which may have adapters of other jobs.
        spec: the job's method.
        seed: of the job: where its adapters begin, and what dropout takes.
        slot: names the job on this base.

    Raises:
        ModelError: a target fits no layer.
    """
    linear = linear_modules(model)
    parameters: dict[str, nn.Parameter] = {}
    for path in target_paths(linear, spec.targets):
        layer = model.get_submodule(path)
        if not isinstance(layer, LoraLinear):
            parent, _, name = path.rpartition(".")
            layer = LoraLinear(linear[path])
            setattr(model.get_submodule(parent), name, layer)
        adapter = Adapter(layer.base, spec, seed, path)
        layer.adapters[str(slot)] = adapter
        parameters[f"{path}.lora_A.weight"] = adapter.lora_A
        parameters[f"{path}.lora_B.weight"] = adapter.lora_B
    head = _head(model)
    for parameter in head.values():
        parameter.requires_grad_(True)
    return parameters | head


def remove_lora(model: nn.Module, slot: int) -> None:
    """Take the adapters of a job off the base; layers without any are as they were."""
    for path, layer in _wrapped(model).items():
        if str(slot) in layer.adapters:
            del layer.adapters[str(slot)]
        if not layer.adapters:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.base)


def _head(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a classifier has beside its body, by name."""
    return {
        f"{path}.{name}": parameter
        for path in head_paths(model)
        for name, parameter in model.get_submodule(path).named_parameters()
    }


def save_lora(model: nn.Module, spec: LoraSpec, folder: Path, base_path: str, slot: int = 0) -> None:
    """Write a job's adapter as PEFT does, so that PEFT, vLLM and Ray Serve load it unchanged."""
    found = {path: layer.adapter(slot) for path, layer in _wrapped(model).items()}
    adapters = {path: adapter for path, adapter in found.items() if adapter is not None}
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": getattr(adapter, f"lora_{side}")
        .detach()
        .cpu()
        .contiguous()
        for path, adapter in adapters.items()
        for side in "AB"
    }
    for name, parameter in _head(model).items():
        tensors[f"base_model.model.{name}"] = parameter.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    linear = _all_linear(model)
    config = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[task_of(model)],
        "base_model_name_or_path": base_path,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": shortest_suffixes(adapters, [path for path in linear if path not in adapters]),
        "bias": "none",
        "fan_in_fan_out": any(not isinstance(linear[path], nn.Linear) for path in adapters),
        "inference_mode": True,
        "modules_to_save": head_paths(model) or None,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_lora(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Copy a saved adapter into the parameters that `add_lora` gave.

    Raises:
        ModelError: the file's tensors are not those of this base and method.
    """
    tensors = load_file(folder / WEIGHTS_FILE)
    expected = {f"base_model.model.{name}": tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        odd = sorted(set(expected.items()) ^ set(found.items()))[0]
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: not an adapter of this base and method: {odd[0]} {odd[1]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"base_model.model.{name}"])
