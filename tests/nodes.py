"""A Ray cluster of several nodes on this machine, nodes that go, and drivers beside them."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.3",
    "OMP_NUM_THREADS": "1",
}
_HEALTH = {
    "health_check_period_ms": 1000,
    # A busy machine answers late, and a node that is taken for lost is lost.
    "health_check_failure_threshold": 10,
    "health_check_initial_delay_ms": 0,
}


class Nodes:
    """A head without CPUs, which nothing is trained on, and the nodes that are added."""

    def __init__(self, temporary: str) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": 80 << 20,
                "include_dashboard": False,
                "_system_config": _HEALTH,
                "temp_dir": temporary,
            },
        )
        self.address = self._cluster.address
        self._added: list[Any] = []

    def add(self, cpus: int = 1) -> Any:
        """A node more, which is there when this returns."""
        node = self._cluster.add_node(num_cpus=cpus, object_store_memory=80 << 20)
        self._added.append(node)
        return node

    def announce(self, node: Any, deadline_s: float) -> None:
        """Tell the cluster that a node will be taken away."""
        accepted, reason = GcsClient(address=self.address).drain_node(
            node.node_id,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the test wants it",
            int((time.time() + deadline_s) * 1000),
        )
        assert accepted, reason

    def kill(self, node: Any) -> None:
        """Take a node away with all that runs on it, as a cloud does."""
        self._added.remove(node)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def clear(self) -> None:
        """Take away all nodes but the head."""
        while self._added:
            self.kill(self._added[0])

    def close(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def run_nodes() -> Iterator[Nodes]:
    """A cluster, for as long as the block lasts."""
    # Short: the path of a socket in it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rn", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        nodes = Nodes(temporary)
        try:
            yield nodes
        finally:
            nodes.close()


class Driver:
    """`raytune-ft train`, or another command, in a process of its own."""

    def __init__(self, job: Path, address: str, *, name: str = "driver", command: str = "train") -> None:
        program = Path(sys.executable).parent / "raytune-ft"
        self._said, self._printed = job.parent / f"{name}.err", job.parent / f"{name}.out"
        with self._said.open("w") as said, self._printed.open("w") as printed:
            self.process = subprocess.Popen(
                [program, command, str(job), "--json", "--output", str(job.parent / "out")],
                stdout=printed,
                stderr=said,
                env={**os.environ, **_ENVIRONMENT, "RAY_ADDRESS": address},
            )

    @property
    def lines(self) -> list[str]:
        """What stands on standard error by now."""
        return self._said.read_text().splitlines()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 600) -> None:
        """Until the condition holds; fails with what the driver said where it never does."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.05)

    def said(self, text: str) -> bool:
        """Whether a line of standard error has it."""
        return any(text in line for line in self.lines)

    def result(self, timeout_s: float = 1800) -> dict[str, Any]:
        """What it printed at the end; it has to succeed."""
        assert self.process.wait(timeout=timeout_s) == 0, self.lines
        result: dict[str, Any] = json.loads(self._printed.read_text())
        return result

    def end(self) -> None:
        """SIGKILL, and nothing of it is left."""
        self.process.kill()
        self.process.wait()
