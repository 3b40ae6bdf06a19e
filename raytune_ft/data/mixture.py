"""How much of each source an epoch takes: arithmetic on numbers of examples. No torch, no ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from raytune_ft.errors import DataError
from raytune_ft.spec import MixtureSpec


@dataclass(frozen=True)
class SourceShape:
    """What the order needs to know of a source."""

    windows: tuple[int, ...]
    """Numbers of its windows among all of the job."""
    sizes: tuple[int, ...]
    """What each of them weighs: training examples where they are counted, bytes otherwise."""
    examples: int
    """Training examples of the source, counted or estimated."""

    @cached_property
    def total(self) -> int:
        """Sum of the sizes."""
        return sum(self.sizes)


def shares(
    sources: Sequence[SourceShape], weights: Sequence[float], mixture: MixtureSpec, examples: int | None
) -> tuple[Fraction, ...]:
    """Training examples of each source that an epoch takes.

    A source's share is weight × min(n, cap) ^ (1 / T): examples-proportional mixing with a limit and a
    temperature (Raffel et al. 2020, section 3.5.2). `mixture.stop` decides what the shares are scaled to.
    Exact fractions, so that equal shares stay equal however they are added up.

    Args:
        sources: their numbers of examples.
        weights: of `data.sources`.
        mixture: cap, temperature and stop.
        examples: what an epoch has in all where `mixture.stop` is `steps`: those of the whole run.

    Raises:
        DataError: no source has training examples.

    >>> news, sums = SourceShape((0,), (300,), 300), SourceShape((1,), (100,), 100)
    >>> [int(share) for share in shares([news, sums], [1.0, 1.0], MixtureSpec(stop="all_exhausted"), None)]
    [300, 100]
    >>> [int(share) for share in shares([news, sums], [1.0, 1.0], MixtureSpec(cap=100), None)]
    [100, 100]
    """
    if not any(source.examples for source in sources):
        raise DataError("the training split is empty; give more data, or a smaller data.split")
    capped = [min(source.examples, mixture.cap or source.examples) for source in sources]
    exact = [Fraction(str(weight)) for weight in weights]
    rates = [
        weight * (Fraction(count) if mixture.temperature == 1.0 else _root(count, mixture.temperature))
        for weight, count in zip(exact, capped, strict=True)
    ]
    passes = [source.examples / rate for source, rate in zip(sources, rates, strict=True) if rate]
    total = sum(rates, Fraction(0))
    if mixture.stop == "first_exhausted":
        scale = min(passes)
    elif mixture.stop == "all_exhausted":
        scale = max(passes)
    elif mixture.stop == "steps" and examples is not None:
        scale = examples / total
    else:
        counts = (weight * count for weight, count in zip(exact, capped, strict=True))
        scale = sum(counts, Fraction(0)) / total
    return tuple(rate * scale for rate in rates)


def _root(count: int, temperature: float) -> Fraction:
    return Fraction(float(count) ** (1.0 / temperature)).limit_denominator(10**9)
