"""Base models and tokenizers, loaded. Weights come from safetensors only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raytune_ft.classes import check_classes, check_head, classes_config
from raytune_ft.errors import DataError, ModelError
from raytune_ft.model_files import model_folder
from raytune_ft.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal", "seq2seq", "classification"]
"""What a model does: continue a text, answer a text that an encoder read, or name the class of a text."""

_LOST_WORKER = ("gloo", "Gloo", "NCCL", "onnection closed by peer", "onnection reset by peer")
"""What a collective says whose other side is gone."""
_LOADING = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)
"""What transformers raises for a model that is none, or one that it does not know."""


@lru_cache(maxsize=4)
def load_tokenizer(spec: ModelSpec) -> "PreTrainedTokenizerBase":
    """The base's tokenizer; one without a pad token pads with its EOS, which no label ever learns as padding.

    BERT begins a text with CLS and ends it with SEP, which are a classifier's BOS and EOS.

    Raises:
        ModelError: there is none, it needs remote code, or it has no EOS token to learn.
    """
    from transformers import AutoTokenizer

    folder = model_folder(spec.path, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"model.path = {spec.path}: the tokenizer does not load: {_reason(error)}") from None
    if spec.labels and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token_id is None:
        classifier = tokenizer.sep_token_id is not None and not spec.labels
        raise ModelError(
            f"model.path = {spec.path}: the tokenizer has no EOS token, so no answer could learn to end"
            + ("; to train a classifier, name its classes in model.labels" if classifier else "")
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def outline(spec: ModelSpec) -> "PreTrainedModel":
    """The layers of the base and the names of its weights, from the config alone: no weight holds a number.

    Raises:
        ModelError: the folder is no model of the kind that the job trains.
    """
    import torch
    from transformers import AutoConfig

    folder = model_folder(spec.path, weights=False)
    try:
        written: dict[str, Any] = dict(json.loads((folder / "config.json").read_bytes()))
        check_classes(spec, written)
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, **classes_config(spec)
        )
        with torch.device("meta"):
            model = _auto_model(spec, written).from_config(
                config,
                # A driver need not have the kernels of the workers; no name depends on them.
                attn_implementation="eager",
                trust_remote_code=spec.trust_remote_code,
            )
    except _LOADING as error:
        raise _does_not_load(spec, error) from None
    drawn: PreTrainedModel = model
    return drawn


def load_base(
    spec: ModelSpec, *, device: "torch.device | None", dequantised: bool = False
) -> "PreTrainedModel":
    """The base on `device`, frozen, in eval mode, quantised as the spec says.

    Args:
        spec: the model section of the job.
        device: where it is to be resident; None where a context around the call divides it.
        dequantised: hold a 4-bit base as the plain values of its quantised weights.

    Raises:
        ModelError: the folder is no model of the kind that the job trains.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from raytune_ft.quantise import compute_dtype, dequantise, keep_weights_trainable

    folder = model_folder(spec.path)
    transformers_logging.disable_progress_bar()
    # Its report of odd weights goes to a log that nobody may see; they are refused below.
    transformers_logging.set_verbosity_error()
    try:
        config: dict[str, Any] = dict(json.loads((folder / "config.json").read_bytes()))
        check_classes(spec, config)
        if device is None:
            check_head(spec, config)
        # A classifier's head begins at random: with the same numbers on all workers.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, loading = _auto_model(spec, config).from_pretrained(
                folder,
                dtype=compute_dtype(spec),
                quantization_config=_quantisation(spec),
                device_map=None if device is None else {"": device},
                use_safetensors=True,
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **classes_config(spec),
            )
    except (*_LOADING, SafetensorError) as error:
        # Workers that divide a base talk to each other meanwhile: a lost one is no fault of the model.
        if device is None and _tells_of_a_lost_worker(error):
            raise
        raise _does_not_load(spec, error) from None
    _check_loaded(spec, model, loading)
    if spec.weight_bits == 4:
        keep_weights_trainable(model)
        if dequantised:
            dequantise(model, compute_dtype(spec))
    model.requires_grad_(False)
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def _does_not_load(spec: ModelSpec, error: Exception) -> ModelError:
    return ModelError(f"model.path = {spec.path}: the model does not load: {_reason(error)}")


def _tells_of_a_lost_worker(error: Exception) -> bool:
    from torch import distributed

    # Ray takes the group away from those that are left before it starts anew.
    if not distributed.is_initialized() or isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_WORKER)


def unknown_token(least: int, most: int, vocabulary: int) -> DataError | None:
    """Why a base with embeddings for so many tokens cannot compute tokens from `least` to `most`.

    A GPU would answer to such a token by ending all that computes on it.
    """
    if least >= 0 and most < vocabulary:
        return None
    wrong = least if least < 0 else most
    return DataError(
        f"the tokenizer makes token {wrong}, and the base has embeddings for 0 to {vocabulary - 1}; give "
        "the base the tokenizer that it was trained with"
    )


def task_of(model: "PreTrainedModel") -> Task:
    """What a loaded model does."""
    if model.get_output_embeddings() is None:
        return "classification"
    return "seq2seq" if model.config.is_encoder_decoder else "causal"


def head_paths(model: "nn.Module") -> list[str]:
    """Paths of the modules by which a classifier's body becomes a classifier; none of another model.

    They are trained whole, by every method. BERT's pooler is one of them: bases that learned from masked
    words alone never trained it, or have none.
    """
    if model.get_output_embeddings() is not None:  # type: ignore[operator]  # a PreTrainedModel
        return []
    body: Any = model.base_model
    paths = [path for path, child in model.named_children() if child is not body and list(child.parameters())]
    if getattr(body, "pooler", None) is not None:
        paths.append(f"{model.base_model_prefix}.pooler")
    return paths


def decoder_start_id(model: "PreTrainedModel") -> int:
    """The token with which a decoder begins every answer.

    Raises:
        ModelError: the config does not say.
    """
    start = model.config.decoder_start_token_id
    if start is None:
        raise ModelError(
            f"{type(model).__name__}: config.json has no decoder_start_token_id, so no answer could begin; "
            "add it (T5 begins with its pad_token_id)"
        )
    return int(start)


def question_ids(prompt_ids: Sequence[int] | np.ndarray[Any, Any], eos_id: int) -> np.ndarray[Any, Any]:
    """What an encoder reads of a prompt: its tokens, and EOS at the end."""
    ids = np.asarray(prompt_ids, dtype=np.int64)
    return ids if ids.size and ids[-1] == eos_id else np.append(ids, eos_id)


def _auto_model(spec: ModelSpec, config: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    if spec.labels:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM


def _quantisation(spec: ModelSpec) -> Any | None:
    """How to quantise; never a classifier's head, which is trained."""
    from raytune_ft.quantise import quantisation_config

    settings = quantisation_config(spec)
    if settings is not None and spec.labels:
        settings.llm_int8_skip_modules = head_paths(outline(spec))
    return settings


def _check_loaded(spec: ModelSpec, model: "PreTrainedModel", loading: Mapping[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers: training would go on from those."""
    new = tuple(f"{path}." for path in head_paths(model))
    if mismatched := sorted(
        found
        for found in [*loading["mismatched_keys"], *_mismatched_linear(model)]
        if not found[0].startswith(new)
    ):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"model.path = {spec.path}: {len(mismatched)} weights have another shape than config.json says, "
            f"the first {name}: {list(found)}, not {list(expected)}; put the config of these weights back"
        )
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith(new)):
        raise ModelError(
            f"model.path = {spec.path}: {len(missing)} weights are missing, the first {missing[0]}; "
            "copy the whole model again"
        )


def _mismatched_linear(model: "PreTrainedModel") -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """Name, found and expected shape of weights that do not fit their layer: nobody checks quantised ones."""
    from torch import nn

    from raytune_ft.quantise import whole_shape

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed = getattr(module.weight, "quant_state", None)
            found = tuple(whole_shape(module.weight) if packed is None else packed.shape)
            if found != (module.out_features, module.in_features):
                yield f"{name}.weight", found, (module.out_features, module.in_features)


def _reason(error: BaseException) -> str:
    """The first line of what a library says, or our own words where it speaks of its own options."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs Python code of its own; read that code, then set model.trust_remote_code: true"
    return text.partition("\n")[0][:300].rstrip(" :")
