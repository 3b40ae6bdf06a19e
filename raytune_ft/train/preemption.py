"""Notices that a node of the run will be taken away."""

import time

import ray.train

from raytune_ft.train.peers import Peers

ASK_EVERY_S = 2.0
_MOST_STEPS = 50
"""From one question to the next."""


class Notices:
    """Asks Ray now and then, all workers at the same step, whether a node of theirs is about to go.

    Asking takes a round trip of all workers to an actor, which a step of some milliseconds would feel.
    """

    def __init__(self, peers: Peers, step: int) -> None:
        """Begin to ask after `step`."""
        self._peers = peers
        self._asked_step = step
        self._asked_at = time.monotonic()
        self._next_step = step + 1
        self._known: set[str] = set()

    def new(self, step: int) -> bool:
        """Whether a notice has come that was not there before; the same on all workers.

        Args:
            step: steps done.
        """
        if step < self._next_step:
            return False
        info = ray.train.get_preemption_info()
        now = time.monotonic()
        # The first worker's clock decides for all when they ask next.
        mine = (now - self._asked_at) / (step - self._asked_step) if self._peers.rank == 0 else 0.0
        (step_s,) = self._peers.sum([mine])
        self._asked_step, self._asked_at = step, now
        # Steps may become slower than they were.
        self._next_step = step + min(_MOST_STEPS, max(1, int(ASK_EVERY_S / max(step_s, 1e-3))))
        nodes = set(info.preempted_node_ids) if info else set()
        new = nodes - self._known
        self._known |= nodes
        return bool(new)
