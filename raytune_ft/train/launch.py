"""The driver: checks what needs no GPU, passes the data, starts the worker, keeps the result."""

import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raytune_ft.catalog import Catalog
from raytune_ft.data.prepare import PreparedData, prepare
from raytune_ft.data.sources import fingerprint, list_objects
from raytune_ft.errors import BadInput, RaytuneError, SpecError, TrainingError
from raytune_ft.models import base_identity, load_tokenizer, model_folder, read_facts
from raytune_ft.planner import check_max_tokens
from raytune_ft.report import RunReport, write_report
from raytune_ft.spec import JobSpec
from raytune_ft.storage import arrow_filesystem, disk_errors
from raytune_ft.tensorboard import ScalarLog
from raytune_ft.train.assignment import Assignment, Outcome, train_worker
from raytune_ft.train.progress import Event, EventReader
from raytune_ft.train.run import Run, RunState, digest

_QUARANTINE_FILE = "quarantine.jsonl"
_POLL_S = 0.2
_CONNECT_TIMEOUT_S = 5.0
OnEvent = Callable[[Event], None]


def train(
    job: JobSpec, output: Path, *, restart: bool = False, on_event: OnEvent = lambda _: None
) -> dict[str, Any]:
    """Run a job to a published adapter, or go on with it where it stopped.

    Args:
        job: the checked job file.
        output: local folder for report, resolved job, result, quarantine and TensorBoard scalars.
        restart: forget the run's checkpoints and result, and begin anew.
        on_event: hears of every phase and step while the run goes on.

    Returns:
        The result: adapter, version, uri, steps, loss, scores, speed, memory and seconds.

    Raises:
        BadInput: found before any training.
        TrainingError: training could not go on.
        StorageError: the store failed for longer than the retries last.
    """
    began = time.perf_counter()
    check_max_tokens(job, read_facts(model_folder(job.model.path, weights=False)))
    Catalog.at(job.publish.catalog).check()
    base = base_identity(job.model.path)
    inputs = digest([fingerprint(list_objects(job.data)), base])
    run = Run(job)
    if restart:
        run.clear()
    elif result := run.finished(inputs):
        on_event({"phase": "done before"})
        return result
    _prepare_output(job, output)
    # Both take seconds: one computes, the other waits for processes.
    with ThreadPoolExecutor(max_workers=1) as pool:
        tokenizer = pool.submit(load_tokenizer, job.model)
        with ray_session():
            on_event({"phase": "data"})
            data = prepare(job, output / _QUARANTINE_FILE, tokenizer=tokenizer.result())
            state = run.begin(data.fingerprint, base)
            on_event({"phase": "start"})
            outcome = _run_worker(job, run, state, data, output, on_event)
    result = {**outcome.result, "seconds": time.perf_counter() - began}
    _keep(job, result, outcome, data, output)
    run.finish(result, inputs)
    return result


def _prepare_output(job: JobSpec, output: Path) -> None:
    """Make the folder, without what an earlier run left that would mix with this one's."""
    if output.exists() and not output.is_dir():
        raise SpecError(f"--output {output}: is a file; name a folder")
    with disk_errors(str(output)):
        output.mkdir(parents=True, exist_ok=True)
        # The worker sends the whole history of a run that goes on.
        shutil.rmtree(output / "tensorboard", ignore_errors=True)
        (output / _QUARANTINE_FILE).unlink(missing_ok=True)
        (output / "job.json").write_text(json.dumps(job.resolved(), indent=2) + "\n")


@contextmanager
def ray_session() -> Iterator[None]:
    """The cluster that `RAY_ADDRESS` names, or one on this machine for as long as the run lasts."""
    if ray.is_initialized():
        yield
        return
    # Ray Train looks for the end of the worker this often; its default of 2 s is a large part of a short job.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    address = os.environ.get("RAY_ADDRESS", "local")
    local: dict[str, Any] = {}
    if address != "local":
        _check_reachable(address)
    else:
        local["include_dashboard"] = False
        # Nobody takes this machine away with a notice, and the watcher is a process.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with warnings.catch_warnings():
        # Ray announces changes of its defaults to GPU-less clusters; nothing here depends on them.
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask before Ray does, which would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise SpecError(
            f"RAY_ADDRESS = {address}: nobody answers there ({error.strerror or error}); "
            "start the cluster, or unset RAY_ADDRESS to run on this machine"
        ) from None


def _run_worker(
    job: JobSpec, run: Run, state: RunState, data: PreparedData, output: Path, on_event: OnEvent
) -> Outcome:
    use_gpu = _use_gpu(job)
    threads = 1 if use_gpu else _largest_node_cpus()
    assignment = Assignment(
        job=job,
        state=state,
        data={
            "fingerprint": data.fingerprint,
            "counts": data.counts.to_json(),
            "templates": data.templates,
            "end_ids": data.end_ids,
        },
        end_ids=data.end_ids,
        tables=data.examples.to_arrow_refs(),
        channel=uuid.uuid4().hex,
        use_gpu=use_gpu,
        threads=threads,
    )
    filesystem, path = arrow_filesystem(run.parent_uri)
    trainer = DataParallelTrainer(
        train_worker,
        train_loop_config={"assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=job.cluster.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": threads} | _gpu(use_gpu),
        ),
        run_config=RunConfig(
            name=run.id,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.cluster.max_restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=job.checkpoint.keep),
        ),
    )
    try:
        with _Follower(assignment.channel, output / "tensorboard", on_event) as follower:
            returned = _fit(trainer, follower.take).return_value
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise TrainingError(
            f"the worker was lost more than cluster.max_restarts = {job.cluster.max_restarts} times; "
            f"the last time: {_cause(error)}; the same command goes on from the last checkpoint"
        ) from error
    if isinstance(returned, RaytuneError):
        raise returned
    outcome: Outcome = returned
    return outcome


def _fit(trainer: DataParallelTrainer, meanwhile: Callable[[], None]) -> ray.train.Result:
    """Run the trainer; call `meanwhile` again and again until it ends.

    `fit` blocks, and in the main thread it would also take over Ctrl-C.
    """
    ended: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001  raised again below, in the main thread
            ended.set_exception(error)

    threading.Thread(target=fit, name="fit", daemon=True).start()
    while not ended.done():
        wait([ended], timeout=_POLL_S)
        meanwhile()
    return ended.result()


def _use_gpu(job: JobSpec) -> bool:
    there = ray.cluster_resources().get("GPU", 0)
    if job.cluster.device == "gpu" and not there:
        raise BadInput("cluster.device = gpu: the cluster has no GPU; add a GPU node, or use device: auto")
    return bool(there) and job.cluster.device != "cpu"


def _gpu(use_gpu: bool) -> dict[str, float]:
    return {"GPU": 1} if use_gpu else {}


def _largest_node_cpus() -> int:
    return max(1, *(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]))


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__


class _Follower:
    """Turns the worker's events into scalars and into what a display shows; a repeated step counts once."""

    def __init__(self, channel: str, folder: Path, on_event: OnEvent) -> None:
        self._reader = EventReader(channel)
        self._scalars = ScalarLog(folder)
        self._on_event = on_event
        self._step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._scalars.close()
        if kind is None:
            self._reader.close()

    def take(self) -> None:
        """Handle all events that have come."""
        for event in self._reader.read():
            history = event.pop("history", [])
            for entry in history:
                if entry["step"] > self._step:
                    self._step = entry["step"]
                    self._scalars.write(entry["step"], _scalars(entry))
            if history:
                last = history[-1]
                event |= {"step": last["step"], "loss": last["loss"], "tokens_per_second": _speed(history)}
            self._on_event(event)


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    named = {
        "train/loss": entry["loss"],
        "train/learning_rate": entry["learning_rate"],
        "train/grad_norm": entry["grad_norm"],
        "train/tokens_per_second": _speed([entry]),
    }
    if "validation_loss" in entry:
        named["validation/loss"] = entry["validation_loss"]
    return named


def _speed(history: list[dict[str, Any]]) -> float:
    return float(sum(entry["tokens"] for entry in history) / sum(entry["seconds"] for entry in history))


def _keep(job: JobSpec, result: dict[str, Any], outcome: Outcome, data: PreparedData, output: Path) -> None:
    """Write what a person reads afterwards."""
    report = RunReport(
        title=job.name,
        job=job.resolved(),
        result=result,
        history=outcome.history,
        scores_before=result["scores_before"],
        scores_after=result["scores_after"],
        samples=outcome.samples,
        data_counts=data.counts.to_json(),
        machine=outcome.machine,
        versions=outcome.versions,
    )
    with disk_errors(str(output)):
        (output / "result.json").write_text(json.dumps(result) + "\n")
        write_report(report, output / "report.html")
