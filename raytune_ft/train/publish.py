"""Publishing what was trained: files in the layout that others load, and the record of where it came from."""

import json
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raytune_ft import __version__
from raytune_ft.catalog import AdapterRecord, BaseModelRef, Catalog, RecordDraft, model_card
from raytune_ft.catalog.record import FILE_SUFFIXES
from raytune_ft.methods import METHODS, saving
from raytune_ft.spec import JobSpec
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.run import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LIBRARIES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "numpy", "pyarrow")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the result depends on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, str]:
    """What the result was computed on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"system": f"{platform.system()} {platform.machine()}", "device": device}


def publish(
    job: JobSpec,
    state: RunState,
    position: Position,
    data: dict[str, Any],
    scores_after: dict[str, float] | None,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> AdapterRecord:
    """Publish the trained model as the next version; a retry of the same attempt finds its own version.

    Raises:
        StorageError: the catalog cannot be written; nothing of the version is visible.
    """
    method = METHODS[type(job.method)]
    draft = RecordDraft(
        adapter=job.adapter_name,
        kind=method.artifact,
        base=BaseModelRef(path=job.model.path, digest=position.base_digest),
        method=job.method.model_dump(mode="json"),
        job=job.resolved(),
        data=data,
        seed=job.data.seed,
        steps=position.step,
        tokens=sum(entry["tokens"] for entry in position.history),
        learned_tokens=sum(entry["learned_tokens"] for entry in position.history),
        loss=position.history[-1]["loss"],
        code_version=__version__,
        library_versions=library_versions(),
        machine=machine(),
        scores_before=position.before["scores"] if position.before else None,
        scores_after=scores_after,
        parent=None,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with saving(folder):
            method.save(model, job.method, folder, job.model.path)
            if method.artifact == "model":
                tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(draft))
        (folder / "job.json").write_text(json.dumps(job.resolved(), indent=2) + "\n")
        # A model that came with code is published without it: a catalog holds nothing that runs.
        written = (file for file in sorted(folder.rglob("*")) if file.name.endswith(FILE_SUFFIXES))
        files = {file.relative_to(folder).as_posix(): file for file in written}
        catalog = Catalog.at(job.publish.catalog)
        record = catalog.publish(draft, files, publish_id=state.publish_id(job))
    if job.publish.alias:
        # A run that was resumed late must not take the alias back from a newer version.
        catalog.set_alias(record.adapter, job.publish.alias, record.version, forward_only=True)
    return record
