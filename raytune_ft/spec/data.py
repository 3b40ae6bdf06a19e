"""The sections that say what is trained on."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from raytune_ft.spec.values import DataLocation, Fraction, Section


class FieldsSpec(Section):
    """Which columns hold what, where the names differ from the usual ones. Dotted paths reach inside."""

    prompt: str | None = None
    completion: str | None = None
    system: str | None = None
    messages: str | None = None
    text: str | None = None


class RecordsSpec(Section):
    """Where records stand, and how they are read."""

    uri: DataLocation
    """A file, a folder, a glob such as `s3://datasets/tasks/*.json`, or `hf://owner/name` on the Hub. Of a
    folder with several splits one is named: `FOLDER/train`."""
    template: str = "auto"
    """How a record becomes text: a name (`raytune-ft data --templates` lists them), `chat` for the
    tokenizer's own chat template, inline Jinja2, or `auto` by the record's shape."""
    format: Literal["auto", "jsonl", "json", "natural-instructions", "csv", "parquet", "arrow"] = "auto"
    """`auto` finds it by content."""
    fields: FieldsSpec = FieldsSpec()
    ignore: tuple[str, ...] = ()
    """Columns, keys of messages and kinds of content (`tools`, `thoughts`, …) that need not reach the model;
    they are counted by name."""
    on_lost: Literal["refuse", "count"] = "refuse"
    """What happens to a record of which the template leaves something out: it is malformed, or it is trained
    on without that, and counted by name."""


class SourceSpec(RecordsSpec):
    weight: PositiveFloat = 1.0
    """Each epoch takes `weight` × the source's examples: 0.5 half of them, 2.0 each of them twice."""


class MixtureSpec(Section):
    """How much of each source an epoch takes: weight × min(examples, cap) ^ (1 / temperature), which at the
    defaults is each example once (Raffel et al. 2020, section 3.5.2; Longpre et al. 2023)."""

    cap: PositiveInt | None = None
    """Count no more than this many examples of a source; null: all of them."""
    temperature: Annotated[float, Field(ge=1.0)] = 1.0
    """Above 1, small sources are seen more often and large ones less, for the same length of an epoch."""
    stop: Literal["quota", "first_exhausted", "all_exhausted", "steps"] = "quota"
    """Where an epoch ends. `quota`: when each source has given its share; `first_exhausted`: when the first
    source has been seen once; `all_exhausted`: when all have, the others again; `steps`: never, so that
    `schedule.steps` decides."""


class SplitSpec(Section):
    """Fractions by a hash of each example's input: equal inputs never stand on both sides."""

    validation: Fraction = 0.05
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _leaves_training_data(self) -> "SplitSpec":
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"validation + test = {self.validation + self.test:g} leaves no training data; the limit is 1"
            )
        return self


class DataSpec(Section):
    sources: Annotated[tuple[SourceSpec, ...], Field(min_length=1)]
    mixture: MixtureSpec = MixtureSpec()
    split: SplitSpec = SplitSpec()
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longest example, and longest packed row, in tokens."""
    too_long: Literal["drop", "cut"] = "drop"
    """What happens to an example above `max_tokens`: dropped, or its prompt cut from the left so that all
    learned tokens stay (dropped where they alone do not fit). Both are counted."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a chat are learned."""
    thoughts: Literal["keep", "drop"] = "keep"
    """What the assistant thinks before an answer (`reasoning_content`, `<think>`): learned with the answer,
    or taken out and counted."""
    packing: bool = True
    """Pack the examples of a step into shared rows. Attention never crosses an example, so the result is
    the same to rounding; only padding goes."""
    max_bad_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """More malformed records than this, of all data or of one source, stop the job before any training."""
    max_too_long_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """More examples of a source than this that are longer than `max_tokens`, and dropped, stop the job."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Order of the data, initial adapter weights and dropout."""
