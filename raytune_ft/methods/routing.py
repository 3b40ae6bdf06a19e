"""Which tokens of a pass are whose: the jobs of a pass stand side by side, each with its own adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from raytune_ft.errors import ModelError
from raytune_ft.methods.dropout import token_keys
from raytune_ft.methods.grouped import Groups


@dataclass(frozen=True)
class Share:
    """What a pass holds of one job."""

    slot: int
    """Of the job's adapter."""
    step: int
    """Of the job."""
    example_BX: Tensor
    """Number of each token's example within the step: of all tokens of B rows, or of whole rows (B, 1)."""
    position_BT: Tensor
    """Position of each token in its example."""
    _keys: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def keys(self, tokens: int) -> Tensor:
        """Keys of the tokens that a layer sees of it, from which dropout is drawn; see `token_keys`.

        A layer may see other tokens than the rows have: those of a decoder, or one of each row. Where these
        do not come in rows either, only their order tells them apart. All layers share them.
        """
        if tokens not in self._keys:
            self._keys[tokens] = self._new_keys(tokens)
        return self._keys[tokens]

    def _new_keys(self, tokens: int) -> Tensor:
        rows, columns = self.example_BX.shape
        if tokens == self.position_BT.numel() and columns == self.position_BT.shape[1]:
            return token_keys(self.step, self.example_BX.flatten(), self.position_BT.flatten())
        device = self.example_BX.device
        if columns > 1 or tokens % rows:
            number_N = torch.arange(tokens, device=device)
            return token_keys(self.step, torch.full_like(number_N, -1), number_N)
        position_T = torch.arange(tokens // rows, device=device)
        example_N = self.example_BX.expand(rows, len(position_T)).flatten()
        return token_keys(self.step, example_N, position_T.repeat(rows))


class Part:
    """The tokens that a layer sees of one job: from `start` to before `stop`, rows one after another."""

    def __init__(self, share: Share, start: int, stop: int) -> None:
        self.slot = share.slot
        self.start = start
        self.stop = stop
        self._share = share

    @property
    def keys(self) -> Tensor:
        """Keys (stop - start,) from which dropout is drawn."""
        return self._share.keys(self.stop - self.start)


class Route:
    """Where each token of a pass goes."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self._stops = list(accumulate(share.position_BT.numel() for share in shares))
        self._groups: dict[tuple[float, ...], Groups] = {}

    @classmethod
    def whole(cls, slot: int) -> "Route":
        """All tokens of whatever comes go to one adapter."""
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        return cls([Share(slot, 0, nothing, nothing)])

    def parts(self, tokens: int) -> list[Part]:
        """What each job has of the tokens that a layer sees, in their order.

        Raises:
            ModelError: several jobs share the pass, and the layer does not see all of its tokens.
        """
        # Nothing is kept by the number of tokens: a compiled pass would be one of that number alone.
        if len(self._shares) == 1:
            return [Part(self._shares[0], 0, tokens)]
        if self._stops[-1] != tokens:
            raise ModelError(
                f"a layer sees {tokens} tokens of a pass that has {self._stops[-1]}: jobs cannot share "
                "passes through this model; train them one after another"
            )
        starts = (0, *self._stops)
        return [Part(*each) for each in zip(self._shares, starts, self._stops, strict=False)]

    def groups(self, scales: tuple[float, ...], device: torch.device) -> Groups:
        """The parts with a scale each, on the device: made once for all layers that have the same scales."""
        if scales not in self._groups:
            self._groups[scales] = Groups.of(self._stops, scales, device)
        return self._groups[scales]


class Routed(nn.Module):
    """A layer with adapters of several jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.route = Route.whole(0)


def set_route(model: nn.Module, route: Route) -> None:
    """Tell all layers with adapters whose the tokens are that come next."""
    for module in model.modules():
        if isinstance(module, Routed):
            module.route = route
