"""An adapter added to the weights of its base: a model that loads without PEFT."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from raytune_ft.catalog import AdapterRecord, Catalog, CatalogView, RecordDraft, Trust
from raytune_ft.catalog.folders import new_folder
from raytune_ft.errors import ModelError
from raytune_ft.generation_files import saved_without_settings, write_generation_config, write_tokenizer
from raytune_ft.merge.lora_files import LoraAdapter, read_adapter
from raytune_ft.merge.result import (
    check_names,
    draft_of,
    end_ids_of,
    job_of,
    publish_id_for,
    publish_written,
    short_digest,
    write_card_and_job,
)
from raytune_ft.methods import saving
from raytune_ft.methods.lora import linear_modules, linear_shape
from raytune_ft.model_files import base_digest, check_tokenizer, is_base, model_folder
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BaseWeights = Literal["quantised", "original"]
_MAX_SHARD = "5GB"


def _is_error(line: logging.LogRecord) -> bool:
    return line.levelno >= logging.ERROR


@dataclass(frozen=True)
class _Merge:
    """An adapter, and the base to merge it into."""

    adapter: LoraAdapter
    base: ModelSpec
    """Where the base stands, and how it is loaded."""
    draft: RecordDraft


def merge_into_folder(
    catalog: CatalogView,
    reference: str,
    to: Path,
    *,
    base: str | None = None,
    base_weights: BaseWeights = "quantised",
    trust_remote_code: bool = False,
    trust: Trust = Trust(),
) -> AdapterRecord:
    """Write the adapter and its base as one model folder, which appears complete or not at all.

    Args:
        catalog: holds the adapter.
        reference: `name`, `name@v3` or `name@alias`.
        to: a new or empty folder.
        base: where the base is now, if not where the record says.
        base_weights: of a base that was trained on in 4 or 8 bits: the values that training saw, or the
            weights as they were before that rounding.
        trust_remote_code: run Python code that comes with the base.
        trust: what is asked of the adapter's signature.

    Returns:
        The adapter's record.

    Raises:
        CatalogError: no such adapter, its signature is refused, it cannot be merged, or `to` is there and not
            empty.
        ModelError: the base is gone, is another one, or has another tokenizer.
        StorageError: the store or the disk failed.
    """
    with new_folder(to) as folder:
        merge = _prepare(catalog, reference, None, base, base_weights, trust_remote_code, trust)
        _write(merge, folder)
    return merge.adapter.record


def publish_merged(
    catalog: Catalog,
    reference: str,
    *,
    name: str,
    alias: str | None = None,
    base: str | None = None,
    base_weights: BaseWeights = "quantised",
    trust_remote_code: bool = False,
    trust: Trust = Trust(),
) -> AdapterRecord:
    """Publish the adapter and its base as one model; see `merge_into_folder`.

    The same call returns the version that it made before.

    Args:
        catalog: holds the adapter, and gets the model.
        reference: of the adapter.
        name: what the model becomes the next version of.
        alias: moves to it, unless it means a newer version.
        base: where the base is now, if not where the record says.
        base_weights: see `merge_into_folder`.
        trust_remote_code: run Python code that comes with the base. The code is not published.
        trust: what is asked of the adapter's signature.

    Raises:
        CatalogError: no such adapter, its signature is refused, or it cannot be merged or published so.
        ModelError: the base is gone, is another one, or has another tokenizer.
        StorageError: the store or the disk failed; nothing of the version is visible.
    """
    check_names(name, alias)
    merge = _prepare(catalog, reference, name, base, base_weights, trust_remote_code, trust)
    publish_id = publish_id_for(name, merge.draft.method, [merge.adapter.record])
    return publish_written(catalog, merge.draft, partial(_write, merge), publish_id=publish_id, alias=alias)


def _prepare(
    catalog: CatalogView,
    reference: str,
    name: str | None,
    base: str | None,
    base_weights: BaseWeights,
    trust_remote_code: bool,
    trust: Trust,
) -> _Merge:
    adapter = read_adapter(catalog, catalog.resolve(reference), trust=trust)
    record = adapter.record
    job = job_of(record)
    quantised = job.model.weight_bits < 16 and base_weights == "quantised"
    changes = {"path": base or record.base.path, "trust_remote_code": trust_remote_code}
    spec = job.model.model_copy(update=changes)
    if not quantised:
        spec = spec.model_copy(update={"weight_bits": max(16, job.model.weight_bits)})
    _check_base(spec, record, given=base is not None)
    # The result is read as it is written: quantising it again would round the update away.
    plain = job.model.model_copy(update={"weight_bits": max(16, job.model.weight_bits)})
    publishing = job.publish.model_copy(update={"adapter": name or record.adapter})
    draft = draft_of(
        [record],
        name=name or record.adapter,
        kind="model",
        job=job.model_copy(update={"model": plain, "publish": publishing}),
        method={**record.method, "merged_into": "quantised" if quantised else "original"},
        data=record.data,
        seed=record.seed,
    )
    return _Merge(adapter, spec, draft)


def _check_base(spec: ModelSpec, record: AdapterRecord, *, given: bool) -> None:
    try:
        folder = model_folder(spec.path)
    except ModelError as error:
        remedy = "" if given else "; name a copy of it with --base"
        raise ModelError(f"{record.reference}: its base is not there: {error}{remedy}") from None
    if not is_base(folder, record.base.digest, earlier=record.base.is_earlier):
        raise ModelError(
            f"{record.reference} was trained on another base than {spec.path} holds now (digest "
            f"{short_digest(record)}, found {base_digest(folder)[:12]}…); name that base with --base"
        )
    check_tokenizer(record.reference, spec.path, record.base.tokenizer_digest)


def _write(merge: _Merge, folder: Path) -> None:
    model = _load_plain(merge.base)
    _add_update(model, merge.adapter)
    tokenizer = load_tokenizer(merge.base)
    # Saving a model imports it where it is installed, and it tells that it has found no GPU.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    try:
        with saving(folder):
            with saved_without_settings(model):
                model.save_pretrained(folder, max_shard_size=_MAX_SHARD)
            write_tokenizer(folder, tokenizer, is_model=True)
            write_generation_config(folder, model, tokenizer, end_ids_of([merge.adapter.record]))
            write_card_and_job(merge.draft, folder)
    except (ValueError, TypeError) as error:
        # Of a base whose own settings contradict each other, which transformers reads and does not write.
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"model.path = {merge.base.path}: cannot be written again: {reason:.300}") from None


def _load_plain(spec: ModelSpec) -> "PreTrainedModel":
    """The base in main memory with plain weights, which of a quantised base are the rounded ones."""
    model = load_base(spec, device=torch.device("cpu"), dequantised=True)
    if spec.weight_bits == 8:
        model = model.dequantize(dtype=torch.bfloat16)
    elif spec.weight_bits == 4:
        # Every layer is plain already, and whoever loads the result must not quantise it again.
        model.hf_quantizer.remove_quantization_config(model)
    return model


@torch.no_grad()
def _add_update(model: "PreTrainedModel", adapter: LoraAdapter) -> None:
    """W + scale · B·A for each layer, summed in float32 and rounded once."""
    layers = linear_modules(model)
    for name, pair in adapter.pairs.items():
        layer = layers.get(name)
        found = None if layer is None else linear_shape(layer)[::-1]
        if layer is None or found != pair.shape:
            raise ModelError(
                f"{adapter.record.reference}: its update of {name} is for a linear layer of "
                f"{list(pair.shape)}, and the base has {'none' if found is None else list(found)}; "
                "the adapter's file was altered or damaged; publish it again"
            )
        update = (pair.B @ pair.A) * adapter.config.scale
        weight: torch.nn.Parameter = layer.weight  # type: ignore[assignment]  # of a linear layer
        if not isinstance(layer, torch.nn.Linear):
            update = update.T
        merged = (weight.float() + update).to(weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ModelError(
                f"{adapter.record.reference}: with its update {name} has weights that are no finite numbers "
                f"in {merged.dtype}; the adapter's file was altered or damaged; publish it again"
            )
        weight.data = merged
