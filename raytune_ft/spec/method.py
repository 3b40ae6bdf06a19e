"""The sections that say what is trained."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from raytune_ft.spec.values import Fraction, Section


def _check_layers(layers: str) -> str:
    if not re.fullmatch(r"last-[1-9][0-9]{0,3}", layers):
        raise ValueError("must be last- and a number of layers from 1 to 9999, such as last-4")
    return layers


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
"""A regular expression."""


class LoraSpec(Section):
    kind: Literal["lora"] = "lora"
    shares_batch: ClassVar[bool] = True
    """Examples of several jobs may go through the base together, each token with its own job's update."""
    rank: PositiveInt = 16
    """Rank r of the update B·A (Hu et al. 2021)."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Probability of zeroing an input of A."""
    targets: Literal["all-linear", "attention"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Modules with an update: all linear layers but the head, the attention projections, or name suffixes."""

    @property
    def names_parts(self) -> bool:
        """Whether it names parts of the base, which a base may not have."""
        return self.targets != "all-linear"


class TrainOnlySpec(Section):
    """Which weights are trained, in one of three ways; the others stay those of the base."""

    layers: Annotated[str, AfterValidator(_check_layers)] | None = None
    """`last-4`: the last four layers, and what stands after them: the final norm, and a head of its own."""
    patterns: (
        Annotated[tuple[Annotated[str, AfterValidator(_check_pattern)], ...], Field(min_length=1)] | None
    ) = None
    """Regular expressions; a weight is trained where one of them is found in its name."""
    biases: bool = False
    """All biases, and nothing else (BitFit, Ben Zaken et al. 2022)."""

    @property
    def last_layers(self) -> int | None:
        """How many of the last layers; None where they are chosen otherwise."""
        return None if self.layers is None else int(self.layers.removeprefix("last-"))

    @model_validator(mode="after")
    def _one_way(self) -> "TrainOnlySpec":
        if sum((self.layers is not None, self.patterns is not None, self.biases)) != 1:
            raise ValueError("give one of layers: last-4, patterns: [...] and biases: true")
        return self


class UnfreezeSpec(Section):
    """Gradual unfreezing (Howard and Ruder 2018, section 3.3): the last layer first, then the next."""

    every_steps: PositiveInt
    """Optimizer steps until the next layer down is trained too."""


class FullSpec(Section):
    kind: Literal["full"] = "full"
    shares_batch: ClassVar[bool] = False
    train_only: TrainOnlySpec | None = None
    """Train some of the weights; null: all. The published model is whole in any case."""
    unfreeze: UnfreezeSpec | None = None
    """Begin with the last layer alone; null: train all from the first step."""

    @property
    def names_parts(self) -> bool:
        """See `LoraSpec.names_parts`."""
        return self.train_only is not None


def _method_kind(value: Any) -> Any:
    """`kind` may be left out: it is lora by default, like every other field."""
    if isinstance(value, dict):
        return value.get("kind", LoraSpec.model_fields["kind"].default)
    return getattr(value, "kind", None)


MethodSpec = Annotated[
    Annotated[LoraSpec, Tag("lora")] | Annotated[FullSpec, Tag("full")],
    Discriminator(_method_kind),
]
