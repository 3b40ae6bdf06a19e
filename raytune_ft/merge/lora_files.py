"""An adapter's two files, read from a catalog without trusting either: no other library sees them before."""

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raytune_ft.catalog import AdapterRecord, CatalogView, Trust
from raytune_ft.catalog.record import MAX_RECORD_BYTES
from raytune_ft.errors import CatalogError
from raytune_ft.methods.lora import CONFIG_FILE, WEIGHTS_FILE
from raytune_ft.storage import disk_errors

MAX_RANK = 4096
"""Far above what any server of adapters loads; a rank beyond it is a mistake or an attack on the memory."""
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)
_TENSOR = re.compile(r"base_model\.model\.(?P<module>\w+(\.\w+)*)\.lora_(?P<side>[AB])\.weight", re.ASCII)
_INERT: Mapping[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""Settings that PEFT writes into every config, of features that other settings would have to turn on."""


def _check_module(name: str) -> str:
    if not _MODULE.fullmatch(name):
        raise ValueError("must be the end of a module's dotted name, not a pattern")
    return name


class LoraConfig(BaseModel):
    """What an adapter_config.json may say. A setting that is not known here must be off."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=MAX_RANK)]
    lora_alpha: Annotated[FiniteFloat, Field(gt=0)]
    target_modules: Annotated[tuple[Annotated[str, AfterValidator(_check_module)], ...], Field(min_length=1)]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_version: str | None = None
    lora_dropout: float = 0.0
    bias: Literal["none"] = "none"
    fan_in_fan_out: bool = False
    inference_mode: bool = True
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] | None = True
    use_rslora: bool = False

    @model_validator(mode="after")
    def _nothing_else_is_on(self) -> "LoraConfig":
        for name, value in (self.model_extra or {}).items():
            if value and _INERT.get(name) != value:
                raise ValueError(f"{name!r:.60} = {value!r:.60} is not supported; only plain LoRA is")
        return self

    @property
    def scale(self) -> float:
        """Factor of the update B·A."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True)
class Pair:
    """The update B·A of one linear layer, float32."""

    A: Tensor
    """(rank, in)."""
    B: Tensor
    """(out, rank)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer's weight."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class LoraAdapter:
    """A published adapter, checked."""

    record: AdapterRecord
    config: LoraConfig
    pairs: Mapping[str, Pair]
    """By the dotted path of the layer in the base."""


def read_adapter(catalog: CatalogView, record: AdapterRecord, *, trust: Trust = Trust()) -> LoraAdapter:
    """Fetch an adapter's config and weights.

    Raises:
        CatalogError: its signature is refused, it is no LoRA adapter, or its files are not what one has.
        StorageError: the store or the disk failed.
    """
    trust.check(record)
    check_is_lora(record)
    entries = {entry.name: entry for entry in record.files}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in entries:
            raise CatalogError(f"{record.reference}: has no {name}; publish the adapter again")
    place = f"{record.reference}: {CONFIG_FILE}"
    if entries[CONFIG_FILE].size_bytes > MAX_RECORD_BYTES:
        size_bytes = entries[CONFIG_FILE].size_bytes
        raise CatalogError(f"{place}: {size_bytes:,} bytes; the limit is {MAX_RECORD_BYTES:,}")
    with tempfile.TemporaryDirectory(prefix="raytune-ft-") as temporary:
        folder = Path(temporary)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            catalog.fetch(record, entries[name], folder / name)
        with disk_errors(str(folder)):
            config = _parse_config((folder / CONFIG_FILE).read_bytes(), place)
            pairs = _read_pairs(folder / WEIGHTS_FILE, config, f"{record.reference}: {WEIGHTS_FILE}")
    return LoraAdapter(record, config, pairs)


def check_is_lora(record: AdapterRecord) -> None:
    """Refuse a version that is no LoRA adapter.

    Raises:
        CatalogError: it is a whole model, or of another method.
    """
    if record.kind != "adapter":
        raise CatalogError(f"{record.reference}: a whole model; only adapters can be merged")
    kind = record.method.get("kind")
    if kind != "lora":
        raise CatalogError(f"{record.reference}: method {kind!r:.60}; only lora adapters can be merged")


def _parse_config(content: bytes, place: str) -> LoraConfig:
    try:
        return LoraConfig.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = f"{field}: {first['msg']}" if field else first["msg"]
        raise CatalogError(f"{place}: {reason:.300}; the adapter cannot be merged") from None


def _read_pairs(path: Path, config: LoraConfig, place: str) -> dict[str, Pair]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CatalogError(f"{place}: not safetensors: {error}; publish the adapter again") from None
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if not found:
            raise CatalogError(
                f"{place}: {name!r:.200}: not the A or B of a linear layer; only plain LoRA is"
            )
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    for module, pair in sides.items():
        _check_pair(pair, config, f"{place}: {module}")
    _check_targets(sides, config.target_modules, place)
    return {module: Pair(pair["A"].float(), pair["B"].float()) for module, pair in sides.items()}


def _check_pair(pair: Mapping[str, Tensor], config: LoraConfig, place: str) -> None:
    if len(pair) != 2:
        raise CatalogError(f"{place}: has lora_{next(iter(pair))} alone; publish the adapter again")
    for side, axis in (("A", 0), ("B", 1)):
        tensor = pair[side]
        if tensor.dim() != 2 or tensor.shape[axis] != config.r:
            raise CatalogError(
                f"{place}: lora_{side} has the shape {list(tensor.shape)}, and {CONFIG_FILE} says r = "
                f"{config.r}; publish the adapter again"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CatalogError(f"{place}: lora_{side} has values that are no finite numbers; train it again")


def _check_targets(modules: Iterable[str], targets: Sequence[str], place: str) -> None:
    """What one loader wraps by the config must be what another finds in the file."""
    modules = list(modules)
    fits = {target: [m for m in modules if f".{m}".endswith(f".{target}")] for target in targets}
    odd = [target for target, found in fits.items() if not found]
    odd += sorted(set(modules).difference(*fits.values()))
    if odd:
        raise CatalogError(
            f"{place}: {odd[0]!r:.200} is not in both its tensors and the target_modules of {CONFIG_FILE}; "
            "publish the adapter again"
        )
