"""Answer one prompt with what the catalog holds: an adapter on its base, or a model."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from raytune_ft.catalog import AdapterRecord, Catalog, Trust
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.template import AUTO
from raytune_ft.data.tokenise import ask
from raytune_ft.errors import CatalogError, ModelError
from raytune_ft.evaluate.generate import answer
from raytune_ft.methods.lora import add_lora, load_lora
from raytune_ft.model_files import check_tokenizer, is_base, model_folder
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.spec import JobSpec, LoraSpec, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer_prompt(
    catalog_uri: str,
    reference: str,
    prompt: str,
    *,
    context: str = "",
    max_new_tokens: int,
    trust_remote_code: bool = False,
    trust: Trust = Trust(),
) -> str:
    """Pull `reference`, load it, and answer `prompt` greedily, rendered as in its training.

    Args:
        catalog_uri: where the catalog is.
        reference: `name`, `name@alias` or `name@vN`.
        prompt: what is asked.
        context: what an instruction is about.
        max_new_tokens: the longest answer.
        trust_remote_code: run Python code that comes with the base. What the record says of it counts for
            nothing: whoever may write a catalog must not choose what runs here.
        trust: what is asked of the version's signature.

    Raises:
        CatalogError: the catalog does not hold it, or its signature is refused.
        ModelError: its base is gone, or is another one by now, or has another tokenizer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pulled"
        record = Catalog.at(catalog_uri).pull(reference, folder, trust=trust)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        spec, model = _load(record, folder, device, trust_remote_code)
        tokenizer = load_tokenizer(spec)
        encoder = Encoder.of(tokenizer)
        templates = record.data.get("templates") or [AUTO]
        prompt_ids = ask(prompt, templates[0], encoder, context=context)
        (reply,) = answer(
            model,
            tokenizer,
            [prompt_ids],
            end_ids=record.data.get("end_ids", []),
            max_new_tokens=max_new_tokens,
            batch_sequences=1,
        )
    return reply


def _load(
    record: AdapterRecord, folder: Path, device: torch.device, trust_remote_code: bool
) -> tuple[ModelSpec, "PreTrainedModel"]:
    try:
        job = JobSpec.model_validate(record.job)
    except ValidationError:
        raise CatalogError(
            f"{record.reference}: its job was written by another version of raytune-ft"
        ) from None
    base = job.model.model_copy(update={"trust_remote_code": trust_remote_code})
    if record.kind == "model":
        spec = base.model_copy(update={"path": str(folder)})
        return spec, load_base(spec, device=device)
    if not is_base(model_folder(job.model.path), record.base.digest, earlier=record.base.is_earlier):
        raise ModelError(
            f"{record.reference} was trained on another base than {job.model.path} holds now; "
            "put that base back, or train again"
        )
    check_tokenizer(record.reference, job.model.path, record.base.tokenizer_digest)
    model = load_base(base, device=device)
    if isinstance(job.method, LoraSpec):
        load_lora(add_lora(model, job.method, job.data.seed), folder)
    return base, model
