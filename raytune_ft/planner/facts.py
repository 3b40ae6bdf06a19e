"""The dimensions of a model that memory depends on."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.errors import ModelError

_UNGATED = frozenset(
    {
        *("gpt_neox", "gpt_neo", "phi", "starcoder2", "nemotron", "persimmon", "arcee"),
        *("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"),
    }
)
"""Families that say `intermediate_size` like the gated ones, but have two matrices per MLP, not three."""
_LARGEST = 10**12
"""No dimension comes near; products of larger numbers overflow."""
_ROUTED_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SHARED_EXPERTS = ("n_shared_experts",)
_NO_COUNT_OF_EXPERTS = re.compile(
    "per_|size|dim|period|offset|capacity|group|select|activ|top|rank|layer|interval|freq|step|token"
)
"""What else is said of experts: how many a token sees, in which layers they are, how wide."""


@dataclass(frozen=True)
class ModelFacts:
    """What memory depends on, read from `config.json` and the sizes of the weight files."""

    parameters: int
    """Weights of the matrices and embeddings; norms and biases are below rounding."""
    hidden: int
    attention: int
    """Width of the queries of all heads: `hidden` in most families."""
    layers: int
    """Of encoder and decoder together, where there are both."""
    intermediate: int
    vocabulary: int
    tied: bool
    """The head is the input embedding."""
    max_positions: int | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], place: str = "config.json") -> "ModelFacts":
        """Read a Hugging Face config; names differ among families.

        Args:
            config: its content.
            place: where it was read, for the message.

        Raises:
            ModelError: a dimension is missing, or is none.
        """
        text = config.get("text_config") or config
        if not isinstance(text, Mapping):
            raise ModelError(f"{place}: text_config: must be an object")
        _check_experts(text, place)

        def optional(*names: str) -> int | None:
            return _dimension(text, place, *names)

        def dimension(*names: str) -> int:
            value = optional(*names)
            if value is None:
                raise ModelError(
                    f"{place} has none of {', '.join(names)}: not the config of a language model; "
                    "name the folder of one in model.path"
                )
            return value

        hidden = dimension("hidden_size", "n_embd", "d_model")
        layers = dimension("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        vocabulary = dimension("vocab_size")
        intermediate = optional("intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
        positions = _most_positions(text, place)
        tied = bool(text.get("tie_word_embeddings", True))
        attention, key_value = _attention_widths(text, place, hidden)
        per_layer = 2 * hidden * (attention + key_value) + _mlp_parameters(text, place, hidden, intermediate)
        parameters = layers * per_layer
        if text.get("is_encoder_decoder"):
            decoder = optional("num_decoder_layers") or layers
            # A decoder's layer attends twice: to itself, and to what the encoder made.
            parameters += decoder * (per_layer + 2 * hidden * (attention + key_value))
            layers += decoder
        parameters += vocabulary * hidden * (1 if tied else 2)
        return cls(parameters, hidden, attention, layers, intermediate, vocabulary, tied, positions)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding and of a head of its own, which are never quantised."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def _dimension(config: Mapping[str, Any], place: str, *names: str) -> int | None:
    """The first of these fields that is there; null stands for none."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        return None
    value = config[name]
    # A bool is an int to Python.
    if type(value) is not int or value <= 0:
        raise ModelError(f"{place}: {name} = {json.dumps(value):.60}: must be a whole number above 0")
    if value > _LARGEST:
        raise ModelError(f"{place}: {name}: must be {_LARGEST:,} or less")
    return value


def _attention_widths(config: Mapping[str, Any], place: str, hidden: int) -> tuple[int, int]:
    """Width of all queries, and of all keys: grouped heads share theirs (Ainslie et al. 2023)."""
    heads = _dimension(config, place, "num_attention_heads", "n_head", "n_heads", "num_heads") or 1
    width = _dimension(config, place, "head_dim", "d_kv") or hidden // heads
    # Falcon writes the number of its groups in every config, and means it in its newer architecture alone.
    new_falcon = config.get("new_decoder_architecture")
    grouped = _dimension(config, place, "num_key_value_heads", *(["num_kv_heads"] if new_falcon else []))
    return heads * width, (grouped or (1 if config.get("multi_query") else heads)) * width


def _mlp_parameters(config: Mapping[str, Any], place: str, hidden: int, intermediate: int) -> int:
    gated = "intermediate_size" in config and config.get("model_type") not in _UNGATED
    # T5's later versions say it themselves.
    gated = gated or str(config.get("feed_forward_proj", "")).startswith("gated")
    matrices = 3 if gated else 2
    routed, shared = _experts(config, place, _ROUTED_EXPERTS), _experts(config, place, _SHARED_EXPERTS)
    if not routed:
        return matrices * hidden * intermediate
    width = _dimension(config, place, "moe_intermediate_size") or intermediate
    return matrices * hidden * width * (routed + shared)


def _experts(config: Mapping[str, Any], place: str, names: Sequence[str]) -> int:
    # Dense models of these families say 0.
    return _dimension(config, place, *(name for name in names if config.get(name) != 0)) or 0


def _check_experts(config: Mapping[str, Any], place: str) -> None:
    """Refuse experts that would not be counted: the model would seem many times smaller than it is."""
    known = (*_ROUTED_EXPERTS, *_SHARED_EXPERTS)
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    for name, value in (item for part in (config, *inner) for item in part.items()):
        counts = "expert" in str(name) and name not in known and not _NO_COUNT_OF_EXPERTS.search(name)
        if counts and type(value) is int and value > 1:
            raise ModelError(
                f"{place}: {name} = {value}: experts under a name that is not known here, so they "
                f"cannot be counted; say it as {' or '.join(known)} too"
            )


def _most_positions(config: Mapping[str, Any], place: str) -> int | None:
    """Tokens that a row may have; None where there is no limit."""
    # T5 says how long its own examples were, and takes any length: it sees distances alone.
    relative = "relative_attention_num_buckets" in config
    names = ("max_position_embeddings", *(() if relative else ("n_positions", "n_ctx")))
    return _dimension(config, place, *names)
