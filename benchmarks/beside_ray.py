"""Run a command beside the processes that Ray keeps for a run, which do nothing: what do they cost?

A run on a cluster of its own has two actors beside its workers, and each process wakes a hundred times a
second to look for signals.
"""

import subprocess
import sys

import ray

_ACTORS = 2
"""Controller and synchronisation."""


@ray.remote(num_cpus=0)
class Idle:
    """Is there."""

    def ready(self) -> None:
        """Once it is."""


def main() -> None:
    """Start Ray, run the command, and end with its exit code."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actors = [Idle.remote() for _ in range(_ACTORS)]
    ray.get([actor.ready.remote() for actor in actors])
    ended = subprocess.run(sys.argv[1:], check=False)
    ray.shutdown()
    raise SystemExit(ended.returncode)


if __name__ == "__main__":
    main()
