"""The catalog in a bucket and in a folder, and MLflow's model registry: the same operations on many adapters.

Each of `--adapters` adapters has a version of four files and an alias. They are published into the folder and
copied into the bucket of the tests' S3 server, object by object; MLflow gets them through its own client.
MLflow keeps its registry in a sqlite file and its artifacts in a folder, and is asked twice: by a client that
opens the file itself, and by one that asks MLflow's server.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from catalog_inputs import BY_ALIAS, EXACT, LATEST, LIST, PUBLISH
from catalog_ours import COLD
from page import machine, markdown, write

from raytune_ft.storage import open_storage

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from servers import free_ports, run_s3  # noqa: E402  the tests' server is a script's neighbour, not a package

BUCKET, FOLDER, SQLITE, SERVER = "catalog, S3", "catalog, folder", "MLflow, sqlite", "MLflow, server"
OPERATIONS = (LATEST, BY_ALIAS, EXACT, LIST, COLD, PUBLISH)
_START_TIMEOUT_S = 120.0
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


@dataclass(frozen=True)
class Places:
    """Where each side keeps what it is asked for."""

    folder: Path
    mlflow_python: str
    mlflow_server: str

    def commands(self) -> dict[str, list[str]]:
        """Program of each variant, as far as its place."""
        ours = [sys.executable, str(HERE / "catalog_ours.py")]
        theirs = [self.mlflow_python, str(HERE / "catalog_mlflow.py")]
        return {
            BUCKET: [*ours, "--catalog", "s3://benchmark/catalog"],
            FOLDER: [*ours, "--catalog", str(self.folder / "catalog")],
            SQLITE: [*theirs, "--tracking", f"sqlite:///{self.folder / 'mlflow.db'}"],
            SERVER: [*theirs, "--tracking", self.mlflow_server],
        }


def call(places: Places, variant: str, what: str, **options: int) -> dict[str, Any]:
    """Run one side's program, and return what it printed."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    files = str(places.folder / f"files-{variant}".replace(" ", ""))
    done = subprocess.run(
        [*places.commands()[variant], what, "--files", files, *flags],
        cwd=places.folder,
        env={**os.environ, **_QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{variant}: {what} failed:\n{done.stderr[-3000:]}")
    printed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}
    return printed


def copy_new(folder: Path, copied: set[str]) -> None:
    """Bring the bucket in step with the folder, without what is derived."""
    source, target = open_storage(str(folder / "catalog")), open_storage("s3://benchmark/catalog")
    keys = [found.key for found in source.list() if not found.key.startswith("derived/")]
    new = [key for key in keys if key not in copied]
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda key: target.write(key, source.read(key)), new):
            pass
    copied.update(new)


def measure_size(
    places: Places, before: int, adapters: int, repeats: int, copied: set[str]
) -> dict[str, Any]:
    """Fill all places up to a number of adapters; then all variants, one after the other."""
    began = time.perf_counter()
    for variant in (FOLDER, SQLITE):
        call(places, variant, "fill", start=before, adapters=adapters)
    copy_new(places.folder, copied)
    print(f"{adapters:,} adapters: filled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found = {}
    for variant in places.commands():
        found[variant] = call(places, variant, "operate", adapters=adapters, repeats=repeats)
        print(f"{variant}: {json.dumps(milliseconds(found[variant]))}", file=sys.stderr)
    return found


def milliseconds(found: Mapping[str, Any]) -> dict[str, float]:
    """Median of each operation."""
    return {name: 1e3 * statistics.median(of["seconds"]) for name, of in found["operations"].items()}


def table(sizes: Mapping[int, Mapping[str, Any]]) -> str:
    """One row for each operation and number of adapters; ratios against MLflow's faster way."""
    variants = (BUCKET, FOLDER, SQLITE, SERVER)
    head = (
        "",
        "adapters",
        *(f"{name}, ms (requests)" for name in variants),
        "S3 × MLflow's best",
        "folder ×",
    )
    rows = []
    for name in OPERATIONS:
        for adapters, found in sizes.items():
            took = {variant: milliseconds(of) for variant, of in found.items()}
            # MLflow lists in one way.
            best = min(took[peer][LIST if name == COLD else name] for peer in (SQLITE, SERVER))
            cells = [_cell(found[variant], name) for variant in variants]
            ratios = [f"{took[ours][name] / best:.2f}" for ours in (BUCKET, FOLDER)]
            rows.append((name, f"{adapters:,}", *cells, *ratios))
    memory = [
        (f"{adapters:,}", *(f"{found[variant]['peak_bytes'] / 2**20:.0f}" for variant in variants))
        for adapters, found in sizes.items()
    ]
    memory_head = ("memory of the client, MiB", *variants)
    return f"{markdown(head, rows)}\n\n{markdown(memory_head, memory)}"


def _cell(found: Mapping[str, Any], name: str) -> str:
    if name not in found["operations"]:
        return "–"
    return f"{milliseconds(found)[name]:,.1f} ({found['operations'][name]['requests']:,})"


@contextmanager
def mlflow_server(python: str, folder: Path) -> Iterator[str]:
    """MLflow's server on the sqlite file, one worker; its uri."""
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    # Clients write artifacts into the folder themselves, as they do beside sqlite.
    command += ["--default-artifact-root", str(folder / "artifacts"), "--no-serve-artifacts"]
    with (folder / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **_QUIET}, stdout=log, stderr=log)
    try:
        _wait_for(f"{uri}/health", process, folder / "mlflow.log")
        yield uri
    finally:
        process.terminate()
        process.wait()


def _wait_for(uri: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(uri, timeout=5).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"MLflow's server did not start:\n{log.read_text()[-3000:]}") from error
            time.sleep(0.2)


def run_all(mlflow_python: str, sizes: Sequence[int], repeats: int) -> dict[int, dict[str, Any]]:
    """Start both servers and measure at each number of adapters."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        with run_s3(folder / "s3") as server, mlflow_server(mlflow_python, folder) as uri:
            os.environ |= server.environment()
            boto3.client("s3").create_bucket(Bucket="benchmark")
            places, copied = Places(folder, mlflow_python, uri), set[str]()
            starts = (0, *sizes[:-1])
            return {
                adapters: measure_size(places, before, adapters, repeats, copied)
                for before, adapters in zip(starts, sizes, strict=True)
            }


def main() -> None:
    """Measure and write the table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--mlflow-python", required=True, help="python of the environment with MLflow")
    options.add_argument("--adapters", type=int, nargs="+", default=[10, 1_000, 10_000])
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--write", type=Path, help="the page whose table to replace")
    options.add_argument("--results", type=Path, help="folder for catalog.json")
    arguments = options.parse_args()
    sizes = run_all(arguments.mlflow_python, sorted(arguments.adapters), arguments.repeats)
    asked = [arguments.mlflow_python, "-c", "import importlib.metadata as m; print(m.version('mlflow'))"]
    peer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    what = f"medians of {arguments.repeats}; MLflow {peer}"
    text = f"{table(sizes)}\n\n{machine(('boto3', 'pydantic'), what)}"
    write("catalog", text, arguments.write, arguments.results, {str(size): of for size, of in sizes.items()})


if __name__ == "__main__":
    main()
