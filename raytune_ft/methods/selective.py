"""Which weights of the base are trained, and from which step on. Names alone: no torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raytune_ft.errors import ModelError
from raytune_ft.spec import TrainOnlySpec

_SHOWN_NAMES = 6


@dataclass(frozen=True)
class Unfreezing:
    """Gradual unfreezing (Howard and Ruder 2018, section 3.3) as a function of the step, and of nothing else.

    So a run that goes on trains what it would have trained uninterrupted, and nothing has to be kept.
    """

    groups: tuple[frozenset[str], ...]
    """Names of the weights that join together, in the order in which they join; none is empty."""
    every_steps: int

    def trained(self, step: int) -> frozenset[str]:
        """Names of the weights that step `step` trains; the first step of a run is 0."""
        joined = 1 + step // self.every_steps
        return frozenset().union(*self.groups[:joined])


def unfreezing(names: Sequence[str], trained: Iterable[str], every_steps: int) -> Unfreezing:
    """One layer more every so many steps, from the last one down; the embeddings join at the end.

    Args:
        names: of all weights, in the model's order.
        trained: those that are trained at all. Layers without any of them take no time.
        every_steps: steps until the next layer joins.
    """
    wanted = frozenset(trained)
    groups = [wanted.intersection(group) for group in layer_groups(names)]
    return Unfreezing(tuple(group for group in groups if group), every_steps)


def layer_groups(names: Iterable[str]) -> list[list[str]]:
    """The weights by layer, from the last layer up to what stands before the first, the embeddings.

    A layer is what shares a path down to the first number in it, such as `model.layers.3`. What stands
    between or after layers, such as a final norm, belongs to the layer before it.
    """
    groups: list[list[str]] = [[]]
    current = None
    for name in names:
        layer = layer_of(name)
        if layer is not None and layer != current:
            groups.append([])
            current = layer
        groups[-1].append(name)
    return groups[::-1]


def layer_of(name: str) -> str | None:
    """The path of the layer that a weight belongs to; None for embeddings, final norms and heads.

    >>> layer_of("model.layers.3.mlp.experts.7.up_proj.weight")
    'model.layers.3'
    """
    found = re.match(r"(?:[^.]+\.)*?[0-9]+(?=\.)", name)
    return found[0] if found else None


def selected(names: Sequence[str], spec: TrainOnlySpec) -> list[str]:
    """Names of the weights that `spec` trains, in the model's order.

    Args:
        names: of all weights, in the model's order.
        spec: the section `method.train_only`.

    Raises:
        ModelError: it asks for what the model does not have; names what it has.
    """
    if spec.last_layers is not None:
        return _last_layers(names, spec.last_layers)
    if spec.biases:
        biases = [name for name in names if name.endswith("bias")]
        if not biases:
            raise ModelError(
                "method.train_only.biases: the base has no biases; "
                f"use layers or patterns; its weights are {_some(names)}"
            )
        return biases
    patterns = [re.compile(pattern) for pattern in spec.patterns or ()]
    for pattern in patterns:
        if not any(map(pattern.search, names)):
            raise ModelError(
                f"method.train_only.patterns: '{pattern.pattern}' is found in no weight's name; "
                f"the base has {_some(names)}"
            )
    return [name for name in names if any(pattern.search(name) for pattern in patterns)]


def _last_layers(names: Sequence[str], asked: int) -> list[str]:
    *groups, _ = layer_groups(names)
    if not groups:
        raise ModelError(
            f"method.train_only.layers = last-{asked}: the base has no numbered layers; use patterns; "
            f"its weights are {_some(names)}"
        )
    if asked > len(groups):
        raise ModelError(
            f"method.train_only.layers = last-{asked}: the base has {len(groups)} layers; "
            f"use last-{len(groups)} or fewer"
        )
    chosen = {name for group in groups[:asked] for name in group}
    return [name for name in names if name in chosen]


def _some(names: Sequence[str]) -> str:
    """Examples of names: of each layer's, the first layer's stand for all."""
    kinds = {re.sub(r"\b[0-9]+\b", "N", name): name for name in reversed(names)}
    shown = list(reversed(kinds.values()))
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(shown[:_SHOWN_NAMES]) + more
