"""Publishing what was trained: files in the layout that others load, and the record of where it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft import __version__
from raytune_ft.catalog import AdapterRecord, BaseModelRef, Catalog, RecordDraft, Signer
from raytune_ft.catalog.gate import refusals, verdict
from raytune_ft.catalog.record import BestStep, StoppedEarly, publishable_files
from raytune_ft.generation_files import write_generation_config, write_tokenizer
from raytune_ft.merge.result import write_card_and_job
from raytune_ft.methods import METHODS, saving
from raytune_ft.models import Task
from raytune_ft.provenance import library_versions, machine
from raytune_ft.spec import JobSpec
from raytune_ft.train.assess import forgetting
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.run import RunState, digest
from raytune_ft.train.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_AUTO_CLASSES: Mapping[Task, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}
"""What transformers loads a model with."""


def signer_of(job: JobSpec) -> Signer | None:
    """Who signs the result, where the job asks for it.

    Raises:
        BadInput: the environment of this process holds no key to sign with.
    """
    return Signer.from_environment() if job.publish.sign else None


@dataclass(frozen=True)
class Measured:
    """What the trained model scored, and what the scores rest on."""

    scores: dict[str, float]
    examples: dict[str, int]
    """How many each score was measured on, by its name."""
    max_new_tokens: dict[str, int]
    """The longest answer, by what was asked about; nothing where no answer is generated."""
    notices: tuple[str, ...] = ()
    """What the scores do not tell by themselves."""


def write_beside_weights(
    job: JobSpec,
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    end_ids: Sequence[int],
) -> None:
    """Write the tokenizer and how to generate, so that answers end elsewhere where they ended here.

    Args:
        job: what was trained.
        folder: holds the weights.
        model: what was trained.
        tokenizer: the base's.
        end_ids: tokens that the learned answers end with.

    Raises:
        StorageError: the disk fails or is full.
    """
    with saving(folder):
        write_tokenizer(folder, tokenizer, is_model=METHODS[type(job.method)].artifact == "model")
        write_generation_config(folder, model, tokenizer, end_ids)


def publish(
    job: JobSpec,
    state: RunState,
    position: Position,
    data: dict[str, Any],
    measured: Measured | None,
    folder: Path,
    task: Task,
    signer: Signer | None,
    selection: Selection,
) -> AdapterRecord:
    """Publish the trained model as the next version; a retry of the same attempt finds its own version.

    The weights are in `folder` already, and what `write_beside_weights` writes; the rest is added there. No
    alias moves; see `move_alias`.

    Raises:
        StorageError: the catalog cannot be written; nothing of the version is visible.
    """
    draft = _draft(job, position, data, measured, selection)
    with saving(folder):
        write_card_and_job(draft, folder, _AUTO_CLASSES[task])
    catalog, files = Catalog.at(job.publish.catalog), publishable_files(folder)
    return catalog.publish(draft, files, publish_id=_publish_id(job, state, data, selection), signer=signer)


def _draft(
    job: JobSpec,
    position: Position,
    data: dict[str, Any],
    measured: Measured | None,
    selection: Selection,
) -> RecordDraft:
    scores_before = position.before["scores"] if position.before else None
    return RecordDraft(
        adapter=job.adapter_name,
        kind=METHODS[type(job.method)].artifact,
        base=BaseModelRef(
            path=job.model.path, digest=position.base_digest, tokenizer_digest=position.tokenizer_digest
        ),
        method=job.method.model_dump(mode="json"),
        job=job.resolved(),
        data=data,
        seed=job.data.seed,
        steps=position.step,
        tokens=sum(entry["tokens"] for entry in position.history),
        learned_tokens=sum(entry["learned_tokens"] for entry in position.history),
        loss=position.history[selection.step - 1]["loss"],
        code_version=__version__,
        library_versions=library_versions(),
        machine=machine(),
        scores_before=scores_before,
        scores_after=measured.scores if measured else None,
        scored_examples=measured.examples if measured else None,
        max_new_tokens=(measured.max_new_tokens or None) if measured else None,
        notices=measured.notices if measured else (),
        forgetting=forgetting(scores_before, measured.scores if measured else None),
        parent=None,
        **_chosen(selection),
    )


def _chosen(selection: Selection) -> dict[str, Any]:
    """What the record says of the step; nothing where the last one is published, as always."""
    best, stopped = selection.best, selection.stopped
    return {
        "published_step": selection.step if best or selection.asked_for else None,
        "best": BestStep(**asdict(best)) if best else None,
        "stopped_early": StoppedEarly(**asdict(stopped)) if stopped else None,
    }


def _publish_id(job: JobSpec, state: RunState, data: dict[str, Any], selection: Selection) -> str:
    # Asked about other examples of other tasks, the same weights are another version: it has other scores.
    others = data.get("other_tasks")
    asked = f"-{digest(others)[:12]}" if others else ""
    step = f"-step-{selection.step}" if selection.asked_for else ""
    return f"{state.publish_id(job)}{asked}{step}"


def move_alias(job: JobSpec, record: AdapterRecord) -> dict[str, Any] | None:
    """Let the job's alias mean a version, if it has an alias and its gate does not refuse.

    Returns:
        What the gate said, see `gate.verdict`. None where the job has no gate.

    Raises:
        StorageError: the catalog cannot be read or written; the same call completes it.
    """
    alias, gate = job.publish.alias, job.publish.gate
    if alias is None:
        return None
    catalog = Catalog.at(job.publish.catalog)
    refused = refusals(gate or {}, record)
    if refused:
        _, entry = catalog.newest_alias_entry(record.adapter, alias)
    else:
        # A run that was resumed late must not take the alias back from a newer version.
        entry = catalog.set_alias(record.adapter, alias, record.version, forward_only=True)
    if gate is None:
        return None
    return verdict(alias, refused, record.version, None if entry is None else entry.version)
