"""Fine-tuning methods: one table from the type of a job's `method` to what the method does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from raytune_ft.methods.full import add_full, save_full
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.spec import FullSpec, LoraSpec, Section


@dataclass(frozen=True)
class Method:
    """What the recipe needs of a method."""

    add: Callable[[nn.Module, Any, int], dict[str, nn.Parameter]]
    """(model, spec, seed) → trainable parameters by name; changes the model in place."""
    save: Callable[[nn.Module, Any, Path, str], None]
    """(model, spec, folder, base path): writes what is published."""
    artifact: Literal["adapter", "model"]


METHODS: Mapping[type[Section], Method] = {
    LoraSpec: Method(add=add_lora, save=save_lora, artifact="adapter"),
    FullSpec: Method(add=add_full, save=save_full, artifact="model"),
}
