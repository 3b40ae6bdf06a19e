"""Several adapters of one base into one new adapter. The base itself is not loaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file

from raytune_ft.catalog import AdapterRecord, Catalog, RecordDraft, Trust
from raytune_ft.errors import CatalogError
from raytune_ft.merge.combination import Combination, combine, combined_rank
from raytune_ft.merge.lora_files import LoraAdapter, Pair, check_is_lora, read_adapter
from raytune_ft.merge.result import (
    check_names,
    copy_beside_weights,
    draft_of,
    end_ids_of,
    job_of,
    publish_id_for,
    publish_written,
    short_digest,
    write_card_and_job,
)
from raytune_ft.methods import saving
from raytune_ft.methods.lora import CONFIG_FILE, WEIGHTS_FILE
from raytune_ft.spec import LoraSpec


def combine_adapters(
    catalog: Catalog,
    references: Sequence[str],
    how: Combination,
    *,
    name: str,
    alias: str | None = None,
    trust: Trust = Trust(),
) -> AdapterRecord:
    """Combine LoRA adapters and publish the result. The same call returns the version that it made before.

    The prompt's template, the longest example and what else the job says are those of the first adapter.

    Args:
        catalog: holds the adapters, and gets the result.
        references: at least two.
        how: made for as many.
        name: adapter that the result becomes the next version of.
        alias: moves to it, unless it has meant this or a newer version.
        trust: what is asked of the adapters' signatures.

    Raises:
        CatalogError: an adapter is not there, refused or no LoRA adapter, they are not of one base, or do not
            fit.
        StorageError: the store or the disk failed; nothing of the version is visible.
    """
    check_names(name, alias)
    records = [catalog.resolve(reference) for reference in references]
    _check_alike(records)
    adapters = [read_adapter(catalog, record, trust=trust) for record in records]
    _check_one_layout(adapters)
    pairs = combine(adapters, how)
    rank = combined_rank(adapters, how.method)
    targets = tuple(sorted({target for adapter in adapters for target in adapter.config.target_modules}))
    method = LoraSpec(rank=rank, alpha=rank, targets=targets)
    draft = _draft(records, method, how, name)

    def write(folder: Path) -> None:
        with saving(folder):
            _save(pairs, method, adapters[0], folder)
            copy_beside_weights(catalog, records, folder)
            write_card_and_job(draft, folder)

    publish_id = publish_id_for(name, how.settings(), records)
    return publish_written(catalog, draft, write, publish_id=publish_id, alias=alias)


def _draft(records: Sequence[AdapterRecord], method: LoraSpec, how: Combination, name: str) -> RecordDraft:
    job = job_of(records[0])
    publishing = job.publish.model_copy(update={"adapter": name})
    return draft_of(
        records,
        name=name,
        kind="adapter",
        job=job.model_copy(update={"method": method, "publish": publishing}),
        method={**method.model_dump(mode="json"), "combination": how.settings()},
        data=_data(records),
        seed=how.seed or 0,
    )


def _check_alike(records: Sequence[AdapterRecord]) -> None:
    """Refuse what cannot be combined, as far as the records tell."""
    if len(records) < 2:
        raise CatalogError(
            f"catalog merge: {len(records)} adapter; name at least two, or merge one --into-base"
        )
    seen: set[str] = set()
    for record in records:
        if record.reference in seen:
            raise CatalogError(f"{record.reference}: is named twice; name it once, with a higher weight")
        seen.add(record.reference)
        check_is_lora(record)
    first = records[0]
    others = [record for record in records if record.base.digest != first.base.digest]
    if others:
        listed = ", ".join(f"{record.reference} ({short_digest(record)})" for record in others)
        raise CatalogError(
            f"{first.reference} was trained on the base {short_digest(first)}, and {listed} on another; "
            "only adapters of the same base can be merged"
        )
    _check_one_tokenizer(records)


def _check_one_tokenizer(records: Sequence[AdapterRecord]) -> None:
    told = [record for record in records if record.base.tokenizer_digest is not None]
    others = [record for record in told if record.base.tokenizer_digest != told[0].base.tokenizer_digest]
    if others:
        listed = ", ".join(f"{record.reference} ({record.base.tokenizer_digest:.12}…)" for record in others)
        raise CatalogError(
            f"{told[0].reference} was trained with the tokenizer {told[0].base.tokenizer_digest:.12}…, and "
            f"{listed} with another; only adapters of the same tokenizer can be merged"
        )


def _check_one_layout(adapters: Sequence[LoraAdapter]) -> None:
    if len({adapter.config.fan_in_fan_out for adapter in adapters}) > 1:
        raise CatalogError(
            f"{adapters[0].record.reference}: fan_in_fan_out of its {CONFIG_FILE} is not that of the others, "
            "which cannot be on one base; publish it again"
        )


def _data(records: Sequence[AdapterRecord]) -> dict[str, object]:
    """What `generate` reads, and where the data of each is described."""
    return {
        "templates": records[0].data.get("templates", []),
        "end_ids": end_ids_of(records),
        "fingerprints": {record.reference: record.data.get("fingerprint") for record in records},
    }


def _save(pairs: Mapping[str, Pair], method: LoraSpec, first: LoraAdapter, folder: Path) -> None:
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": getattr(pair, side).contiguous()
        for module, pair in pairs.items()
        for side in "AB"
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": first.record.base.path,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": 0.0,
        "target_modules": method.targets,
        "bias": "none",
        "fan_in_fan_out": first.config.fan_in_fan_out,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
