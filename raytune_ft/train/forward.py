"""What a pass through the model is: from a batch to the logits of what is learned, for each kind of model."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.errors import DataError, ModelError
from raytune_ft.models import decoder_start_id, task_of
from raytune_ft.train.batch import Arrangement, Batch, Classes, Continuations, Pairs
from raytune_ft.train.joint import attend_here, side_by_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Forward(Protocol):
    """The two halves of a pass: logits exist for learned positions only, a chunk of them at a time."""

    @property
    def head(self) -> Sequence[Tensor]:
        """What `project` is made of; none of it is used by `learned`, but for tied embeddings."""
        ...

    def learned(self, *batches: Batch) -> Tensor:
        """Hidden states (N, D) of the positions that predict what is learned, of one batch after another.

        Several only of a model for which `can_share_passes` holds.
        """
        ...

    def project(self, hidden_ND: Tensor) -> Tensor:
        """Their logits (N, V)."""
        ...


def forward_of(model: "PreTrainedModel", *, hooks: bool = True, compiled: bool = False) -> Forward:
    """The forward pass of a loaded model.

    Args:
        model: of any task.
        hooks: call the head with its hooks; False for a caller who gathers a sharded head by himself, once
            for all of its chunks.
        compiled: compile what comes before the head, when it is first called; the model stays as it is.
    """
    attend_here()
    match task_of(model):
        case "classification":
            return _Classifying(model, compiled=compiled)
        case "seq2seq":
            return _Translating(model, hooks=hooks, compiled=compiled)
        case "causal":
            return _Continuing(model, hooks=hooks, compiled=compiled)


def _callable(module: nn.Module, *, compiled: bool) -> Callable[..., Any]:
    if not compiled:
        return module
    # It tells the compiler too, for whose import a process without one does not wait.
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
    # Rows and batches have many sizes: one program is to do for all.
    return torch.compile(module, dynamic=True)


def arrangement_of(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Arrangement:
    """How examples become rows of a model: what its forward pass expects.

    Raises:
        ModelError: the model does not say how its decoder begins, or its tokenizer mixes two classes up.
    """
    eos_id = int(tokenizer.eos_token_id)
    match task_of(model):
        case "classification":
            id2label: dict[int, str] = model.config.id2label
            return Classes(eos_id, ClassOf(tokenizer, [id2label[at] for at in sorted(id2label)]))
        case "seq2seq":
            return Pairs(eos_id, decoder_start_id(model))
        case "causal":
            return Continuations()


class ClassOf:
    """The class that the tokens of an answer name."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str]) -> None:
        """Read the labels as the tokenizer writes them: it may know neither case nor accents.

        Raises:
            ModelError: two of them look the same to the tokenizer.
        """
        self._tokenizer = tokenizer
        self._labels = labels
        self._found: dict[bytes, int] = {}
        self._classes: dict[str, int] = {}
        for at, label in enumerate(labels):
            written = self._text(tokenizer(label, add_special_tokens=False)["input_ids"])
            if not written or written in self._classes:
                others = f"'{labels[self._classes[written]]}' and '{label}'" if written else f"'{label}'"
                raise ModelError(
                    f"model.labels: {others} become '{written}' in the base's tokenizer; choose other words"
                )
            self._classes[written] = at

    def __call__(self, answer_ids: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> int:
        """Number of the class.

        Raises:
            DataError: the answer is none of the labels.
        """
        key = answer_ids.tobytes()
        if key not in self._found:
            text = self._text(answer_ids.tolist())
            if text not in self._classes:
                raise DataError(
                    f"a completion is '{text:.60}', which is none of model.labels "
                    f"({', '.join(self._labels)}); add it there, or correct the data"
                )
            self._found[key] = self._classes[text]
        return self._found[key]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


class _Head:
    """A language model's head, with all that its architecture does to hidden states and logits.

    Gemma caps its logits, Granite divides and Cohere multiplies them, some T5 scale what goes in, BART adds
    to what comes out; the head module alone would miss it.
    """

    def __init__(self, model: "PreTrainedModel", *, hooks: bool) -> None:
        config: Any = model.config.get_text_config()
        module = model.get_output_embeddings()
        self._call = module if hooks else module.forward
        self._scale_in = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
        self._scale_out = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._bias = getattr(model, "final_logits_bias", None)
        self.head = list(module.parameters())

    def project(self, hidden_ND: Tensor) -> Tensor:
        """See `Forward.project`."""
        if self._scale_in != 1.0:
            hidden_ND = hidden_ND * self._scale_in
        logits_NV: Tensor = self._call(hidden_ND)
        if self._scale_out != 1.0:
            logits_NV = logits_NV * self._scale_out
        if self._bias is not None:
            logits_NV = logits_NV + self._bias
        return (logits_NV / self._cap).tanh() * self._cap if self._cap else logits_NV


class _Continuing(_Head):
    """A causal language model: each token is predicted from those before it."""

    def __init__(self, model: "PreTrainedModel", *, hooks: bool, compiled: bool) -> None:
        super().__init__(model, hooks=hooks)
        self._model = model
        self._body = _callable(model.base_model, compiled=compiled)

    def learned(self, *batches: Batch) -> Tensor:
        """See `Forward.learned`."""
        if len(batches) > 1:
            hidden_1ND = side_by_side(self._model, batches)
            starts = accumulate((batch.input_ids_BT.numel() for batch in batches), initial=0)
            places = [batch.predictor_N + start for batch, start in zip(batches, starts, strict=False)]
            several_ND: Tensor = hidden_1ND[0].index_select(0, torch.cat(places))
            return several_ND
        (batch,) = batches
        # Without an attention mask the model reads the borders of packed examples from the positions.
        output = self._body(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        hidden_ND: Tensor = output.last_hidden_state.flatten(0, 1).index_select(0, batch.predictor_N)
        return hidden_ND


class _Translating(_Head):
    """An encoder, which reads the question, and a decoder, which continues an answer to it."""

    def __init__(self, model: "PreTrainedModel", *, hooks: bool, compiled: bool) -> None:
        super().__init__(model, hooks=hooks)
        self._encoder = _callable(model.get_encoder(), compiled=compiled)
        self._decoder = _callable(model.get_decoder(), compiled=compiled)

    def learned(self, *batches: Batch) -> Tensor:
        """See `Forward.learned`."""
        (batch,) = batches
        mask_BT = batch.attention_mask
        encoded = self._encoder(input_ids=batch.input_ids_BT, attention_mask=mask_BT)
        # Padding stands after the answer, where a decoder does not look.
        decoded = self._decoder(
            input_ids=batch.decoder_ids_BS,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=mask_BT,
            use_cache=False,
        )
        hidden_ND: Tensor = decoded.last_hidden_state.flatten(0, 1).index_select(0, batch.predictor_N)
        return hidden_ND


class _Classifying:
    """A classifier: one prediction for a row. Its few classes need no chunks, so all of it is one half."""

    head: Sequence[Tensor] = ()

    def __init__(self, model: "PreTrainedModel", *, compiled: bool) -> None:
        self._model = _callable(model, compiled=compiled)

    def learned(self, *batches: Batch) -> Tensor:
        """The logits already: see `Forward.learned`."""
        (batch,) = batches
        output = self._model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask)
        logits_NV: Tensor = output.logits.index_select(0, batch.predictor_N)
        return logits_NV

    def project(self, hidden_ND: Tensor) -> Tensor:
        """They are logits already."""
        return hidden_ND
