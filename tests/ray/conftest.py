"""One small Ray cluster for all tests of this folder, and the jobs that they run on it."""

import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import tiny
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signing_keys import private_pem

from raytune_ft.spec import JobSpec, parse_job


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of this machine, as this process is connected to it; its address."""
    # As the command sets them for a cluster of its own.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Ray's own defaults are about to change
        context = ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=150 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Short: the path of a socket in it may have 107 characters.
            _temp_dir=str(tmp_path_factory.mktemp("ray", numbered=True)),
        )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short instructions with answers."""
    path = tmp_path_factory.mktemp("data") / "capitals.jsonl"
    lines = [
        json.dumps({"instruction": f"Name number {number}.", "output": f"{number % 10}{number % 7}"})
        for number in range(60)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def signing_key() -> str:
    """A private key as PEM text."""
    return private_pem(Ed25519PrivateKey.from_private_bytes(bytes(32)))


@pytest.fixture
def job(base: Path, capitals: Path, tmp_path: Path) -> JobSpec:
    """A job of 12 steps whose catalog is a new folder."""
    return make_job(base, capitals, tmp_path / "catalog")


def make_job(base: Path, data: Path, catalog: Path | str, /, **changes: Any) -> JobSpec:
    """A job of 12 steps in 32 bits; `changes` replace whole sections."""
    values: dict[str, Any] = {
        "name": "capitals",
        "model": {"path": str(base), "weight_bits": 32},
        "data": {"sources": [{"uri": str(data)}], "max_tokens": 64},
        "method": {"rank": 4, "dropout": 0.1},
        "optimizer": {"learning_rate": 5.0e-3},
        "schedule": {"steps": 12},
        "batch": {"sequences": 8},
        "checkpoint": {"every_steps": 4},
        "evaluate": {"max_examples": 8, "max_new_tokens": 4},
        "publish": {"catalog": str(catalog)},
    }
    return parse_job({**values, **changes})


def kill_once_kept(
    catalog: str, killed: list[int], workers: int | None = None
) -> Callable[[dict[str, Any]], None]:
    """An `on_event` that kills all training processes once, or so many, as soon as Ray has a checkpoint.

    A thread looks for it, since a short job would be over before its next event.
    """

    def kill() -> None:
        while not any(Path(catalog).rglob("checkpoint_manager_snapshot.json")):
            time.sleep(0.01)
        everyone = psutil.Process().children(recursive=True)
        training = [
            each
            for each in everyone
            if each.name().startswith("ray::RayTrainWor") or "RayTrainWorker" in each.name()
        ]
        for process in training[:workers]:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    watcher = threading.Thread(target=kill, daemon=True)

    def on_event(event: dict[str, Any]) -> None:
        if event["phase"] == "start" and not watcher.ident:
            watcher.start()

    return on_event
