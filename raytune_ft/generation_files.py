"""Where answers end, and the files by which a published folder tells that to whoever loads it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
_MODEL_CONFIG = "config.json"


def stop_token_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", end_ids: Sequence[int]
) -> list[int]:
    """EOS, the ends of turn that were learned, and those that the model's own generation config names."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*listed, *end_ids, tokenizer.eos_token_id] if token is not None})


@contextmanager
def saved_without_settings(model: "PreTrainedModel") -> Iterator[None]:
    """Let `save_pretrained` write a model, but not how it generates: see `write_generation_config`.

    transformers reads settings that contradict each other, such as a temperature without sampling, and
    refuses to write them: a base that has them would fail after its training.
    """
    from transformers import GenerationConfig

    # A classifier has none.
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def write_generation_config(
    folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", end_ids: Sequence[int]
) -> None:
    """Write how to generate: the settings of the base, ending where a trained answer ends.

    With it `generate` of transformers stops where the answers stopped whose scores stand in the record. A
    folder that holds a causal model names the same ends in its config.json, which some servers read instead.

    Args:
        folder: gets generation_config.json; one that is there is replaced.
        model: the base or what was trained; one that cannot generate, such as a classifier, gets no file.
        tokenizer: the base's.
        end_ids: tokens that the learned answers end with.

    Raises:
        OSError: the disk failed.
    """
    if not model.can_generate():
        return
    ends = stop_token_ids(model, tokenizer, end_ids)
    # The text, and not `save_pretrained`: that refuses bases whose settings contradict each other.
    settings: dict[str, Any] = json.loads(model.generation_config.to_json_string())
    settings["eos_token_id"] = _as_written(ends)
    if settings.get("pad_token_id") is None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    # As if somebody had written it: transformers makes those that it derived itself anew.
    settings.pop("_from_model_config", None)
    _write(folder / GENERATION_CONFIG, settings)
    config = folder / _MODEL_CONFIG
    if config.is_file() and not model.config.is_encoder_decoder:
        described = json.loads(config.read_text(encoding="utf-8"))
        # Models that see or hear keep what concerns text in a section of its own.
        text = described if "eos_token_id" in described else described.get("text_config", described)
        text["eos_token_id"] = _as_written(ends)
        _write(config, described)


def add_ends(path: Path, end_ids: Sequence[int]) -> bool:
    """Add ends to a generation_config.json that may be anybody's; False where it is none, and stays.

    Raises:
        OSError: the disk failed.
    """
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    if not isinstance(settings, dict):
        return False
    listed = settings.get("eos_token_id")
    named = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(token) is int for token in named):
        return False
    if ends := sorted({*named, *end_ids}):
        settings["eos_token_id"] = _as_written(ends)
    _write(path, settings)
    return True


def write_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase", *, is_model: bool) -> None:
    """Write the base's tokenizer with its chat template. The same tokenizer gives the same bytes.

    Args:
        folder: holds the weights.
        tokenizer: the base's.
        is_model: the folder holds a whole model, which has no other tokenizer. Beside an adapter one that
            came with Python code is left out: nothing that runs is published, and half of it does not load.

    Raises:
        OSError: the disk failed.
    """
    has_code = tokenizer._auto_class is not None or "auto_map" in tokenizer.init_kwargs
    if has_code and not is_model:
        return
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    # Each call of a tokenizer sets these, and the last call would be written.
    if getattr(backend, "truncation", None) is not None:
        backend.no_truncation()
    if getattr(backend, "padding", None) is not None:
        backend.no_padding()
    tokenizer.save_pretrained(folder)


def _as_written(ends: Sequence[int]) -> int | list[int]:
    return ends[0] if len(ends) == 1 else list(ends)


def _write(path: Path, values: dict[str, Any]) -> None:
    """As transformers writes it."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
