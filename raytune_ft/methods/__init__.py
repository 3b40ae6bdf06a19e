"""Fine-tuning methods: one table from the type of a job's `method` to what the method does."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import nn

from raytune_ft.errors import StorageError, StorageFull
from raytune_ft.methods.full import add_full, check_full, save_full, unfreezing_full
from raytune_ft.methods.lora import add_lora, check_lora, remove_lora, save_lora
from raytune_ft.methods.selective import Unfreezing
from raytune_ft.spec import FullSpec, LoraSpec, Section
from raytune_ft.storage import disk_errors

_NEARLY_FULL_BYTES = 1 << 20


@dataclass(frozen=True)
class Method:
    """What the recipe needs of a method."""

    check: Callable[[nn.Module, Any], None]
    """(model, spec): refuses a spec that names what the model does not have. No weight is looked at."""
    add: Callable[[nn.Module, Any, int, int], dict[str, nn.Parameter]]
    """(model, spec, seed, slot) → trainable parameters by name; changes the model in place."""
    save: Callable[[nn.Module, Any, Path, str, int], None]
    """(model, spec, folder, base path, slot): writes what is published."""
    remove: Callable[[nn.Module, int], None] | None
    """(model, slot): the base is as it was before `add`. None: it never is again, so that the next job needs
    a base of its own."""
    artifact: Literal["adapter", "model"]
    shares_passes: bool
    """Whether several jobs of it can be computed in one pass, each token with its own job's weights; jobs
    that cannot take turns on the base."""
    unfreezing: Callable[[nn.Module, Any], Unfreezing | None] = lambda *_: None
    """(model, spec) → from which step on each parameter is trained, after `add`; None: all from the first."""


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Tell a disk that fails while weights are written to it from a fault of ours.

    Raises:
        StorageFull: no space is left.
        StorageError: the disk failed otherwise.
    """
    try:
        with disk_errors(str(folder)):
            yield
    except (SafetensorError, RuntimeError) as error:
        # Neither library passes the system's error on; safetensors quotes it, torch only says that it failed.
        if shutil.disk_usage(folder).free < _NEARLY_FULL_BYTES:
            raise StorageFull(f"{folder}: the disk is full; free space and run again") from error
        raise StorageError(f"{folder}: cannot be written: {error}") from error


METHODS: Mapping[type[Section], Method] = {
    LoraSpec: Method(
        check=check_lora,
        add=add_lora,
        save=save_lora,
        remove=remove_lora,
        artifact="adapter",
        shares_passes=True,
    ),
    FullSpec: Method(
        check=check_full,
        add=add_full,
        save=save_full,
        remove=None,
        artifact="model",
        shares_passes=False,
        unfreezing=unfreezing_full,
    ),
}
