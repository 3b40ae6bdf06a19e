"""The driver: checks what needs no GPU, passes the data, starts the worker, keeps the result."""

import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import ray
import ray.exceptions
import ray.train
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray.train import BackendConfig, ScalingConfig

from raytune_ft.catalog import Catalog, Signer
from raytune_ft.catalog.gate import as_of_now
from raytune_ft.data.formats import BadRecord
from raytune_ft.data.other_tasks import list_other_tasks, read_other_tasks
from raytune_ft.data.prepare import prepare, write_quarantine
from raytune_ft.data.sources import fingerprint, list_objects
from raytune_ft.errors import RaytuneError, SpecError
from raytune_ft.model_files import base_identity, model_folder, read_facts
from raytune_ft.models import load_tokenizer
from raytune_ft.planner import check_max_tokens
from raytune_ft.report import RunReport, write_report
from raytune_ft.spec import JobSpec
from raytune_ft.storage import disk_errors
from raytune_ft.tensorboard import ScalarLog, step_scalars
from raytune_ft.train.assignment import Assignment, Outcome, TrainingData, train_worker
from raytune_ft.train.budgets import lost, run_config
from raytune_ft.train.kept import place_of
from raytune_ft.train.lease import Lease, check_holds, hold
from raytune_ft.train.parts import missing_parts
from raytune_ft.train.progress import Event, EventReader, recorded_failure
from raytune_ft.train.room import BusyCluster, find_room
from raytune_ft.train.run import Run, name_inputs
from raytune_ft.train.trainer import Trainer, start_fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUARANTINE_FILE = "quarantine.jsonl"
_POLL_S = 0.2
_CONNECT_TIMEOUT_S = 5.0
_ONE_HEAP = "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""What `keep_freed_memory` needs, for processes that compute on CPU. Ray Train trains in a thread, which
would have a heap of its own, and only the first heap of a process keeps what is freed. glibc cuts a few bytes
off an aligned block: while they wait in a cache, what is freed of the block is too small to be the next of
its size, and memory grows from step to step."""
_COLLECTIVE_TIMEOUT_S = 7200
"""The others wait while the first worker evaluates and publishes. One that is lost is found by Ray."""
OnEvent = Callable[[Event], None]


def train(
    job: JobSpec,
    output: Path,
    *,
    restart: bool = False,
    publish_step: int | None = None,
    cache: bool = True,
    wait_s: float = 0.0,
    on_event: OnEvent = lambda _: None,
) -> dict[str, Any]:
    """Run a job to a published adapter, or go on with it where it stopped.

    Args:
        job: the checked job file.
        output: local folder for report, resolved job, result, quarantine and TensorBoard scalars.
        restart: forget the run's checkpoints and result, and begin anew.
        publish_step: train nothing, and publish the kept checkpoint of this step as a version of its own; the
            run and its result stay as they are.
        cache: keep tokenised windows in the catalog's bucket, and take from there what another run tokenised.
        wait_s: how long to wait for an autoscaler to add the nodes that the job asks for.
        on_event: hears of every phase and step while the run goes on.

    Returns:
        The result: adapter, version, uri, steps, loss, scores, speed, memory and seconds; `scored_examples`,
        `max_new_tokens` and `notices` tell what the scores rest on. `forgetting` where it was measured, and
        `gate` where the job has one: a gate that refused is no error here, since the version is published.

    Raises:
        BadInput: found before any training.
        RunHeld: another driver is at work on the run.
        TrainingError: training could not go on.
        StorageError: the store failed for longer than the retries last.
    """
    began = time.perf_counter()
    check_max_tokens(job, read_facts(model_folder(job.model.path, weights=False)))
    Catalog.at(job.publish.catalog).check()
    if job.publish.sign:
        Signer.from_environment()
    base = base_identity(job.model.path)
    inputs = inputs_of(job, base)
    run, channel = Run(job), uuid.uuid4().hex
    publish_from = "" if publish_step is None else place_of(run, publish_step)
    goes_on = not restart and publish_step is None
    if goes_on and (done := _done_before(run, inputs, on_event)):
        return done
    with hold(run.storage, channel, on_wait=lambda line: on_event({"phase": line})) as lease:
        # While this driver waited for the lease, another may have come to the end.
        if goes_on and (done := _done_before(run, inputs, on_event)):
            return done
        if restart:
            run.clear()
        _prepare_output(job, output)
        assignment, outcome = _train_held(
            job,
            run,
            base,
            lease,
            channel,
            output,
            publish_step=publish_step,
            publish_from=publish_from,
            cache=cache,
            wait_s=wait_s,
            on_event=on_event,
        )
        result = {**outcome.result, "seconds": time.perf_counter() - began}
        if outcome.bad:
            write_quarantine(outcome.bad, output / _QUARANTINE_FILE)
        _keep(assignment, result, outcome, output)
        check_holds(run.storage, channel)
        if publish_step is not None:
            return result
        # As they were read: since they were listed for the first time this driver may have waited for hours.
        run.finish(result, assignment.data.inputs(base))
    return result


def _done_before(run: Run, inputs: str, on_event: OnEvent) -> dict[str, Any] | None:
    result = run.finished(inputs)
    if result is not None:
        on_event({"phase": "done before"})
        return as_of_now(result, Catalog.at(run.job.publish.catalog))
    return None


def _train_held(
    job: JobSpec,
    run: Run,
    base: str,
    lease: Lease,
    channel: str,
    output: Path,
    *,
    publish_step: int | None,
    publish_from: str,
    cache: bool,
    wait_s: float,
    on_event: OnEvent,
) -> tuple[Assignment, Outcome]:
    """Pass the data and run the workers; who calls it holds the lease."""
    # Both take seconds: one computes, the other waits for processes.
    with ThreadPoolExecutor(max_workers=1) as pool:
        loading = pool.submit(_tokenizer_of, job)
        with ray_session() as own_cluster:
            # A base that is refused is no reason to wait for nodes.
            tokenizer = loading.result()
            placement = find_room(job.cluster, wait_s, on_event)
            on_event({"phase": "data"})
            data = prepare(job, output / _QUARANTINE_FILE, tokenizer=tokenizer, cache=cache)
            for notice in data.counts.notices:
                on_event({"phase": "data", "notice": notice})
            others = read_other_tasks(job, tokenizer=tokenizer, cache=cache)
            # The renewal may be late; what was left behind is deleted now.
            check_holds(run.storage, channel)
            begin = run.begin if publish_step is None else run.go_back
            state, training = begin(data.fingerprint, base), TrainingData.of(job, data, others)
            assignment = Assignment(job, state, training, channel, placement, publish_step, publish_from)
            on_event({"phase": "start"})
            outcome = _run_workers(assignment, run, lease, output, on_event, own_cluster=own_cluster)
            return assignment, outcome


def _tokenizer_of(job: JobSpec) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base that has all parts which the job names."""
    if wrong := missing_parts([job]):
        raise wrong[job.name]
    return load_tokenizer(job.model)


def inputs_of(job: JobSpec, base: str) -> str:
    """See `name_inputs`. Lists the data, and reads none of it.

    Args:
        job: the job.
        base: its base as `base_identity` names it.

    Raises:
        DataError: a source names nothing.
        StorageError: the store cannot be read.
    """
    others = list_other_tasks(job)
    return name_inputs(fingerprint(list_objects(job.data)), base, fingerprint(others) if others else None)


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
def ray_session() -> Iterator[bool]:
    """The cluster that `RAY_ADDRESS` names, or one on this machine for as long as the run lasts.

    Yields:
        Whether the cluster ends with the session, and all that is at work on it.
    """
    if ray.is_initialized():
        yield False
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
        if not NvidiaGPUAcceleratorManager.get_current_node_num_accelerators():
            os.environ.setdefault("GLIBC_TUNABLES", _ONE_HEAP)
    with warnings.catch_warnings():
        # Ray announces changes of its defaults to GPU-less clusters; nothing here depends on them.
        warnings.simplefilter("ignore", FutureWarning)
        before = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    # Ray's own handler would leave the run's lease behind.
    _on_sigterm(_interrupt)
    try:
        yield address == "local"
    finally:
        ray.shutdown()
        _on_sigterm(before)


def _on_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


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


def _run_workers(
    assignment: Assignment, run: Run, lease: Lease, output: Path, on_event: OnEvent, *, own_cluster: bool
) -> Outcome:
    job = assignment.job
    trainer = Trainer(
        train_worker,
        assignment,
        own_cluster=own_cluster,
        scaling_config=ScalingConfig(
            num_workers=job.cluster.elastic or job.cluster.workers,
            use_gpu=assignment.placement.use_gpu,
            resources_per_worker=assignment.placement.resources,
        ),
        backend_config=_backend(job),
        run_config=run_config(job, run),
    )
    busy = BusyCluster(job.cluster, assignment.placement, on_event)
    with _Follower(assignment.channel, output, on_event) as follower:

        def meanwhile() -> None:
            lease.check()
            busy.look(came=follower.take())

        try:
            returned = _fit(trainer, meanwhile).return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            noted = recorded_failure(assignment.channel)
            if noted is None:
                raise lost(job, error) from error
            returned = noted
    if isinstance(returned, RaytuneError):
        raise returned
    outcome: Outcome = returned
    return outcome


def _backend(job: JobSpec) -> BackendConfig:
    """How workers find each other. One alone needs nobody, but for DeepSpeed; nor does the driver torch."""
    if job.cluster.most_workers == 1 and not job.cluster.zero_stage:
        return BackendConfig()
    from ray.train.torch import TorchConfig

    return TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S)


def _fit(trainer: Trainer, meanwhile: Callable[[], None]) -> ray.train.Result:
    """Run the trainer; call `meanwhile` again and again until it ends."""
    ended = start_fit(trainer)
    while not ended.done():
        wait([ended], timeout=_POLL_S)
        meanwhile()
    return ended.result()


class _Follower:
    """Turns the worker's events into scalars and into what a display shows; a repeated step counts once."""

    def __init__(self, channel: str, output: Path, on_event: OnEvent) -> None:
        self._reader = EventReader(channel)
        self._scalars = ScalarLog(output / "tensorboard")
        self._quarantine = output / _QUARANTINE_FILE
        self._on_event = on_event
        self._step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._scalars.close()
        # Where the cluster is gone, so are its events.
        with suppress(Exception):
            self._reader.close()

    def take(self) -> bool:
        """Handle all events that have come; whether there were any."""
        came = False
        for event in self._reader.read():
            came = True
            if "bad" in event:
                write_quarantine([BadRecord(**record) for record in event["bad"]], self._quarantine)
                continue
            history = event.pop("history", [])
            for entry in history:
                if entry["step"] >= self._step:
                    self._step = entry["step"]
                    self._scalars.write(entry["step"], step_scalars(entry))
            if history:
                last = history[-1]
                event |= {"step": last["step"], "loss": last["loss"], "tokens_per_second": _speed(history)}
            self._on_event(event)
        return came


def _speed(history: list[dict[str, Any]]) -> float:
    return float(sum(entry["tokens"] for entry in history) / sum(entry["seconds"] for entry in history))


def _keep(assignment: Assignment, result: dict[str, Any], outcome: Outcome, output: Path) -> None:
    """Write what a person reads afterwards."""
    report = RunReport(
        title=assignment.job.name,
        job=assignment.job.resolved(),
        result=result,
        history=outcome.history,
        scores_before=result["scores_before"],
        scores_after=result["scores_after"],
        samples=outcome.samples,
        data_counts=outcome.data_counts,
        machine=outcome.machine,
        versions=outcome.versions,
        task_epochs=assignment.data.course.task_epochs,
    )
    with disk_errors(str(output)):
        (output / "result.json").write_text(json.dumps(result) + "\n")
        write_report(report, output / "report.html")
