"""Low-rank adapters (Hu et al. 2021) on the linear layers of a frozen base, in PEFT's layout on disk."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raytune_ft.errors import ModelError
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


class LoraLinear(nn.Module):
    """A frozen linear layer and its update: y = W·x + b + (alpha / rank) · B·A·dropout(x).

    A (rank, in) and B (out, rank) are float32 whatever the base computes in; they are cast for the product.
    """

    def __init__(self, base: nn.Module, spec: LoraSpec, seed: int, name: str) -> None:
        super().__init__()
        in_features, out_features = linear_shape(base)
        device = next(base.parameters()).device
        self.base = base
        self.scale = spec.alpha / spec.rank
        self.dropout = spec.dropout
        # Seeded by name, so that the start of one module depends neither on the others nor on their order.
        self.seed = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "big")
        self.step = 0
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), as in the paper's code
        start = torch.rand(spec.rank, in_features, generator=torch.Generator().manual_seed(self.seed))
        self.lora_A = nn.Parameter((start * 2 - 1).mul_(bound).to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, spec.rank, device=device))

    @property
    def weight(self) -> Tensor:
        """That of the frozen layer: T5 asks its layers for their dtype."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # a module may have anything
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        y: Tensor = self.base(x)
        low = F.linear(self._dropped(x), self.lora_A.to(x.dtype)) * self.scale
        update = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.to(x.dtype).t())
        return update.view_as(y)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        # A mask that is a function of (seed, module, step) comes out the same after a resume, and when
        # gradient checkpointing runs this forward a second time.
        generator = torch.Generator(x.device).manual_seed(self.seed ^ (self.step + 1))
        keep = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
        return x * keep / (1 - self.dropout)


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
    from transformers.pytorch_utils import Conv1D

    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


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


def add_lora(model: nn.Module, spec: LoraSpec, seed: int) -> dict[str, nn.Parameter]:
    """Wrap the target layers in place; return the trainable parameters by their name on disk.

    Those of a classifier's head are among them: it is trained whole.
    """
    linear = linear_modules(model)
    parameters: dict[str, nn.Parameter] = {}
    for path in target_paths(linear, spec.targets):
        parent, _, name = path.rpartition(".")
        wrapped = LoraLinear(linear[path], spec, seed, path)
        setattr(model.get_submodule(parent), name, wrapped)
        parameters[f"{path}.lora_A.weight"] = wrapped.lora_A
        parameters[f"{path}.lora_B.weight"] = wrapped.lora_B
    head = _head(model)
    for parameter in head.values():
        parameter.requires_grad_(True)
    return parameters | head


def _head(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a classifier has beside its body, by name."""
    return {
        f"{path}.{name}": parameter
        for path in head_paths(model)
        for name, parameter in model.get_submodule(path).named_parameters()
    }


def set_step(model: nn.Module, step: int) -> None:
    """Tell the layers which forward pass of the run this is: dropout is drawn from it."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.step = step


def save_lora(model: nn.Module, spec: LoraSpec, folder: Path, base_path: str) -> None:
    """Write the adapter as PEFT does, so that PEFT, vLLM and Ray Serve load it unchanged."""
    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": getattr(module, f"lora_{side}")
        .detach()
        .cpu()
        .contiguous()
        for path, module in wrapped.items()
        for side in "AB"
    }
    for name, parameter in _head(model).items():
        tensors[f"base_model.model.{name}"] = parameter.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    others = [path for path in _all_linear(model) if not path.endswith(".base")]
    config = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[task_of(model)],
        "base_model_name_or_path": base_path,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": shortest_suffixes(wrapped, others),
        "bias": "none",
        "fan_in_fan_out": any(not isinstance(module.base, nn.Linear) for module in wrapped.values()),
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
