"""The dimensions of a model that memory depends on."""

from collections.abc import Mapping
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
            ModelError: a dimension is missing.
        """
        text: Mapping[str, Any] = config.get("text_config") or config

        def dimension(*names: str) -> int:
            for name in names:
                if isinstance(text.get(name), int):
                    return int(text[name])
            raise ModelError(f"{place} has none of {', '.join(names)}; so this is no causal language model")

        hidden = dimension("hidden_size", "n_embd", "d_model")
        layers = dimension("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        vocabulary = dimension("vocab_size")
        intermediate = next(
            (int(text[n]) for n in ("intermediate_size", "n_inner", "ffn_dim", "d_ff") if text.get(n)),
            4 * hidden,
        )
        positions = next(
            (int(text[n]) for n in ("max_position_embeddings", "n_positions", "n_ctx") if text.get(n)), None
        )
        tied = bool(text.get("tie_word_embeddings", True))
        attention, key_value = _attention_widths(text, hidden)
        per_layer = 2 * hidden * (attention + key_value) + _mlp_parameters(text, hidden, intermediate)
        parameters = layers * per_layer
        if text.get("is_encoder_decoder"):
            decoder = int(text.get("num_decoder_layers") or layers)
            # A decoder's layer attends twice: to itself, and to what the encoder made.
            parameters += decoder * (per_layer + 2 * hidden * (attention + key_value))
            layers += decoder
        parameters += vocabulary * hidden * (1 if tied else 2)
        return cls(parameters, hidden, attention, layers, intermediate, vocabulary, tied, positions)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding and of a head of its own, which are never quantised."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def _attention_widths(config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    """Width of all queries, and of all keys: grouped heads share theirs (Ainslie et al. 2023)."""
    heads = (
        config.get("num_attention_heads")
        or config.get("n_head")
        or config.get("n_heads")
        or config.get("num_heads")
        or 1
    )
    width = config.get("head_dim") or config.get("d_kv") or hidden // heads
    # Falcon writes the number of its groups in every config, and means it in its newer architecture alone.
    grouped = config.get("num_kv_heads") if config.get("new_decoder_architecture") else None
    shared = 1 if config.get("multi_query") else heads
    return heads * width, (config.get("num_key_value_heads") or grouped or shared) * width


def _mlp_parameters(config: Mapping[str, Any], hidden: int, intermediate: int) -> int:
    gated = "intermediate_size" in config and config.get("model_type") not in _UNGATED
    # T5's later versions say it themselves.
    gated = gated or str(config.get("feed_forward_proj", "")).startswith("gated")
    mlp = (3 if gated else 2) * hidden * intermediate
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        mlp = experts * mlp // intermediate * (config.get("moe_intermediate_size") or intermediate)
    return int(mlp)
