"""A Ray cluster of this machine that starts nodes as they are asked for; nodes of it can be killed."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ray._private.services import get_node_ip_address

_HEAD_ID = "f" * 51 + "00000"
_NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
_STORE_BYTES = 80 << 20
_START_S = 120
_SYSTEM = {
    "RAY_health_check_period_ms": "1000",
    # A busy machine answers late, and a node that is taken for lost is lost.
    "RAY_health_check_failure_threshold": "10",
}


class Autoscaled:
    """A head without CPUs, and an autoscaler beside it that adds nodes of one CPU."""

    def __init__(self, temporary: Path, most_nodes: int) -> None:
        self._temporary = temporary
        self.address = f"{get_node_ip_address()}:{_free_port()}"
        config = temporary / "autoscaling.json"
        config.write_text(json.dumps(_config(self.address, most_nodes)))
        self._said = temporary / "head.log"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                _command(self.address, config, temporary),
                env={**os.environ, **_environment()},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while "will now block" not in self._said.read_text():
            assert self._process.poll() is None, self._said.read_text()
            assert time.monotonic() < deadline, self._said.read_text()
            time.sleep(0.2)

    def nodes(self) -> dict[str, psutil.Process]:
        """The raylets of the nodes that were added, by the names of the nodes."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet" and str(self._temporary) in " ".join(process.cmdline()):
                    found[process.environ().get(_NODE_ID, _HEAD_ID)] = process
        found.pop(_HEAD_ID, None)
        return found

    def kill_one(self, draw: random.Random) -> str | None:
        """Take a node away with all that runs on it, as a cloud does; its name, or None if there is none."""
        there = self.nodes()
        if not there:
            return None
        name = draw.choice(sorted(there))
        # A worker whose raylet is gone works on for a while.
        for process in [there[name], *there[name].children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return name

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        # Nodes have sessions of their own; all of their command lines name the folder.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self._temporary) in " ".join(process.cmdline()):
                    process.kill()
        self._process.wait()


@contextlib.contextmanager
def run_autoscaled(most_nodes: int) -> Iterator[Autoscaled]:
    """A cluster that has at most so many nodes beside its head, for as long as the block lasts."""
    # Short: the path of a socket in it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ra", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        cluster = Autoscaled(Path(temporary), most_nodes)
        try:
            yield cluster
        finally:
            cluster.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _config(address: str, most_nodes: int) -> dict[str, Any]:
    """As `ray up` takes it; what a provider on one machine has no use for is empty, but must be there."""
    commands = [f"{who}setup_commands" for who in ("", "head_", "worker_")]
    commands += ["initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"]
    files = ["cluster_synced_files", "rsync_exclude", "rsync_filter"]
    return {
        **{name: [] for name in (*commands, *files)},
        "cluster_name": "fake_multinode",
        "max_workers": most_nodes,
        "idle_timeout_minutes": 1,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": {
                "resources": {"CPU": 1, "object_store_memory": _STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most_nodes,
            },
        },
    }


def _command(address: str, config: Path, temporary: Path) -> list[str]:
    return [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        f"--autoscaling-config={config}",
        f"--port={address.rpartition(':')[2]}",
        f"--temp-dir={temporary}/ray",
        "--disable-usage-stats",
        "--include-dashboard=False",
        # Also without a dashboard there is a process that listens.
        f"--dashboard-port={_free_port()}",
        "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={_free_port()}",
        "--num-cpus=0",
        "--num-gpus=0",
        f"--object-store-memory={_STORE_BYTES}",
    ]


def _environment() -> dict[str, str]:
    return {
        **_SYSTEM,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        _NODE_ID: _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
