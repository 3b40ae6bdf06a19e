"""How several low-rank updates become one: PEFT's rules, on the two factors of each, without any base."""

import hashlib
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from raytune_ft.catalog.record import MOST_SOURCES
from raytune_ft.errors import CatalogError
from raytune_ft.merge.lora_files import MAX_RANK, LoraAdapter, Pair

COMBINATIONS = ("cat", "linear", "ties", "dare_linear", "dare_ties")
DEFAULT_DENSITY = 0.5
_MAX_WEIGHT = 1000
"""Nobody means more; the products stay far from what float32 holds."""


@dataclass(frozen=True)
class Combination:
    """A way to combine, with its settings; made by `of`."""

    method: str
    weights: tuple[float, ...]
    density: float | None
    """Share of the values of each factor that is kept; None for methods that keep all."""
    majority_sign: str | None
    """How a sign is elected: by the sum of the values, or by their number; None where none is."""
    seed: int | None
    """Of the values that DARE drops; None where nothing is drawn."""

    @classmethod
    def of(
        cls,
        method: str,
        count: int,
        *,
        weights: Sequence[float] | None = None,
        density: float | None = None,
        majority_sign: str | None = None,
        seed: int | None = None,
    ) -> "Combination":
        """Check the settings, and fill those that are not given.

        Args:
            method: one of `COMBINATIONS`.
            count: adapters.
            weights: one for each adapter; None: equal, with the sum 1.
            density: above 0, at most 1; None: 0.5 where the method has one.
            majority_sign: `total` or `frequency`; None: `total` where the method elects one.
            seed: 0 to 2^63 - 1; None: 0 where the method draws.

        Raises:
            CatalogError: a setting is out of its limits, or of another method.
        """
        if method not in COMBINATIONS:
            raise CatalogError(f"--method {method!r:.60}: write one of {', '.join(COMBINATIONS)}")
        if count > MOST_SOURCES:
            raise CatalogError(f"catalog merge: {count:,} adapters; the limit is {MOST_SOURCES:,}")
        weights = (1 / count,) * count if weights is None else tuple(weights)
        if len(weights) != count:
            raise CatalogError(f"--weights: {len(weights)} for {count} adapters; give one for each")
        if not all(math.isfinite(weight) and abs(weight) <= _MAX_WEIGHT for weight in weights):
            raise CatalogError(f"--weights {weights}: must be numbers from -{_MAX_WEIGHT} to {_MAX_WEIGHT}")
        trims, elects, draws = method not in ("cat", "linear"), "ties" in method, "dare" in method
        _check_belongs("--density", density, trims, method)
        _check_belongs("--majority-sign", majority_sign, elects, method)
        _check_belongs("--seed", seed, draws, method)
        if density is not None and not 0 < density <= 1:
            raise CatalogError(f"--density {density}: must be above 0 and at most 1")
        if majority_sign not in (None, "total", "frequency"):
            raise CatalogError(f"--majority-sign {majority_sign!r:.60}: write total or frequency")
        if seed is not None and not 0 <= seed < 1 << 63:
            raise CatalogError(f"--seed {seed}: must be from 0 to 2^63 - 1")
        return cls(
            method,
            weights,
            (density or DEFAULT_DENSITY) if trims else None,
            (majority_sign or "total") if elects else None,
            (seed or 0) if draws else None,
        )

    def settings(self) -> dict[str, Any]:
        """As JSON values, without what the method does not have."""
        found = {**asdict(self), "weights": list(self.weights)}
        return {name: value for name, value in found.items() if value is not None}


def _check_belongs(option: str, value: object, wanted: bool, method: str) -> None:
    if value is not None and not wanted:
        raise CatalogError(f"{option} {value}: means nothing to --method {method}; leave it out")


def combined_rank(adapters: Sequence[LoraAdapter], method: str) -> int:
    """Rank of the result.

    Raises:
        CatalogError: the method needs equal ranks and they are not, or their sum is too high.
    """
    ranks = [adapter.config.r for adapter in adapters]
    if method == "cat":
        if sum(ranks) > MAX_RANK:
            raise CatalogError(f"--method cat: the ranks add up to {sum(ranks):,}; the limit is {MAX_RANK:,}")
        return sum(ranks)
    if len(set(ranks)) > 1:
        listed = ", ".join(f"{adapter.record.reference} {adapter.config.r}" for adapter in adapters)
        raise CatalogError(f"--method {method}: needs equal ranks, and they are {listed}; use --method cat")
    return ranks[0]


def combine(adapters: Sequence[LoraAdapter], how: Combination) -> dict[str, Pair]:
    """The update of each layer that any of the adapters has; its scale is 1.

    Equal to PEFT's `add_weighted_adapter`. Where only some adapters have a layer, only they count. DARE draws
    for each layer from the seed and the layer's name, so that the same command gives the same bits.

    Raises:
        CatalogError: the adapters do not fit each other, or nothing is left of them.
    """
    rank = combined_rank(adapters, how.method)
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    for adapter in adapters:
        for module, pair in adapter.pairs.items():
            shape, first = shapes.setdefault(module, (pair.shape, adapter.record.reference))
            if shape != pair.shape:
                raise CatalogError(
                    f"{module}: {first} is for a weight of {list(shape)}, {adapter.record.reference} for one "
                    f"of {list(pair.shape)}; one of their files was altered; publish it again"
                )
    pairs = {module: _combine_layer(adapters, how, module, rank) for module in sorted(shapes)}
    if not all(bool(torch.isfinite(factor).all()) for pair in pairs.values() for factor in (pair.A, pair.B)):
        raise CatalogError(f"--weights {how.weights}: the sum is not finite; give smaller weights")
    if not any(bool(pair.A.any()) and bool(pair.B.any()) for pair in pairs.values()):
        raise CatalogError(
            f"--method {how.method} with --weights {how.weights}: nothing is left of the adapters; "
            "give other weights, or a higher --density"
        )
    return pairs


def _combine_layer(adapters: Sequence[LoraAdapter], how: Combination, module: str, rank: int) -> Pair:
    having = [
        (adapter.pairs[module], weight * adapter.config.scale)
        for adapter, weight in zip(adapters, how.weights, strict=True)
        if module in adapter.pairs
    ]
    if how.method == "cat":
        A = torch.cat([pair.A * weight for pair, weight in having], dim=0)
        B = torch.cat([pair.B for pair, _ in having], dim=1)
        absent = rank - A.shape[0]
        return Pair(torch.nn.functional.pad(A, (0, 0, 0, absent)), torch.nn.functional.pad(B, (0, absent)))
    # Each factor bears the root of the weight, and one of them its sign.
    roots = [math.sqrt(abs(weight)) for _, weight in having]
    signed = [math.copysign(root, weight) for root, (_, weight) in zip(roots, having, strict=True)]
    with torch.random.fork_rng(devices=[]):
        if how.seed is not None:
            torch.manual_seed(layer_seed(how.seed, module))
        return Pair(
            A=_mix([pair.A for pair, _ in having], signed, how),
            B=_mix([pair.B for pair, _ in having], roots, how),
        )


def layer_seed(seed: int, module: str) -> int:
    """Seed of what is drawn for one layer."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{module}".encode(), digest_size=7).digest(), "big")


def _mix(factors: list[Tensor], weights: Sequence[float], how: Combination) -> Tensor:
    # Imported by PEFT, it offers optional kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft.utils import merge_utils

    settings: dict[str, Any] = {}
    if how.density is not None:
        settings["density"] = how.density
    if how.majority_sign is not None:
        settings["majority_sign_method"] = how.majority_sign
    functions: Mapping[str, Any] = {
        "linear": merge_utils.task_arithmetic,
        "ties": merge_utils.ties,
        "dare_linear": merge_utils.dare_linear,
        "dare_ties": merge_utils.dare_ties,
    }
    with warnings.catch_warnings():
        # Of a density of 1, which keeps everything on purpose.
        warnings.filterwarnings("ignore", message="The density")
        mixed: Tensor = functions[how.method](factors, torch.tensor(weights), **settings)
    return mixed.contiguous()
