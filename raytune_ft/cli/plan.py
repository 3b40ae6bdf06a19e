"""`raytune-ft plan`: what a job needs in bytes, from the model's config alone, and what fits."""

import json
import os
import re
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_ft.errors import SpecError
from raytune_ft.model_files import model_folder, read_facts
from raytune_ft.planner import (
    MemoryPlan,
    ModelFacts,
    Option,
    alternatives,
    check_max_tokens,
    choose,
    option_of,
    options,
    settings,
    trainable_parameters,
    usable_bytes,
)
from raytune_ft.spec import JobSpec
from raytune_ft.storage import local_path
from raytune_ft.terminal import visible

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}
_PLAIN_WIDTH = 110


def plan_command(job: JobSpec, gpu_memory: str | None, as_json: bool) -> None:
    """Print the bytes of a worker for every stage and offload, what fits, and what to choose.

    Reads the model's config: no weights, no data. A cluster is asked for its GPUs alone.

    Args:
        job: the job.
        gpu_memory: memory of a worker's device, such as `24GiB`; None: of the smallest GPU of the cluster
            that `RAY_ADDRESS` names. Where there is none, the bytes are printed alone.
        as_json: print one JSON object instead.

    Raises:
        SpecError: `gpu_memory` is no size, or the cluster does not say what its GPUs have.
        ModelError: there is no such model, or the job does not fit; raised after the bytes are printed.
    """
    device_bytes = _cluster_bytes(job) if gpu_memory is None else parse_size(gpu_memory)
    facts = facts_at(job.model.path)
    check_max_tokens(job, facts)
    found = options(job, facts, device_bytes)
    chosen = None if device_bytes is None else _chosen(job, facts, device_bytes)
    if as_json:
        # The one place where standard output is a machine's to read.
        print(json.dumps(_as_json(job, facts, device_bytes, found, chosen)))  # noqa: T201
    else:
        console = Console()
        # A file or pipe has no width of its own; the table needs this much.
        _print(
            console if console.is_terminal else Console(width=_PLAIN_WIDTH), job, facts, device_bytes, found
        )
        _print_chosen(job, chosen)
    if device_bytes is not None:
        choose(job, facts, device_bytes)


def parse_size(text: str) -> int:
    """Bytes of a size such as `24GiB`, `80 GB` or `25769803776`.

    Raises:
        SpecError: it is no size above zero.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", text)
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size <= 0:
        raise SpecError(f"--gpu-memory {text:.60}: write a number above 0 and a unit, such as 24GiB or 80GB")
    return size


def _cluster_bytes(job: JobSpec) -> int | None:
    """Memory of the cluster's smallest GPU; None without a cluster, and for a job that computes on CPU."""
    address = os.environ.get("RAY_ADDRESS")
    if not address or job.cluster.device == "cpu":
        return None
    from raytune_ft.train.devices import smallest_gpu_bytes

    found = smallest_gpu_bytes()
    # A job that may take a GPU or not is planned without one where none is there.
    if found is None and job.cluster.device == "gpu":
        raise SpecError(
            f"RAY_ADDRESS = {address}: the cluster has no GPU that says how much memory it has; give it with "
            "--gpu-memory, such as 24GiB, or unset RAY_ADDRESS to print the bytes alone"
        )
    return found


def facts_at(path: str) -> ModelFacts:
    """Dimensions of a `model.path`. A config alone will do, so that weights may come later."""
    if not path.startswith("s3://") and (local_path(path) / "config.json").is_file():
        return read_facts(local_path(path))
    return read_facts(model_folder(path, weights=False))


def _chosen(job: JobSpec, facts: ModelFacts, device_bytes: int) -> Option | None:
    own = option_of(job, facts, device_bytes)
    return own if own.fits else next(iter(alternatives(job, facts, device_bytes)), None)


def _as_json(
    job: JobSpec, facts: ModelFacts, device_bytes: int | None, found: list[Option], chosen: Option | None
) -> dict[str, Any]:
    return {
        "name": job.name,
        "parameters": facts.parameters,
        "trainable_parameters": trainable_parameters(facts, job),
        "device_bytes": device_bytes,
        "usable_bytes": None if device_bytes is None else usable_bytes(device_bytes),
        "options": [_option_as_json(option) for option in found],
        "chosen": None if chosen is None else _option_as_json(chosen),
    }


def _option_as_json(option: Option) -> dict[str, Any]:
    auto = option.auto
    return {
        "zero_stage": option.sharding.stage,
        "offload": option.sharding.offload,
        "workers": option.sharding.workers,
        "given": {"tokens_per_forward": option.tokens_given, **plan_as_json(option.given)},
        "auto": auto
        and {
            "tokens_per_forward": auto.tokens_per_forward,
            "resident": auto.resident,
            **plan_as_json(auto.memory),
        },
        "fits": option.fits,
    }


def plan_as_json(plan: MemoryPlan) -> dict[str, int]:
    """The bytes of a plan by name, as JSON has them."""
    sizes = {**plan.terms, "total": plan.total, "host": plan.host}
    return {f"{name}_bytes": size for name, size in sizes.items()}


def _print(
    console: Console, job: JobSpec, facts: ModelFacts, device_bytes: int | None, found: list[Option]
) -> None:
    trained = trainable_parameters(facts, job)
    console.print(
        f"{escape(visible(job.model.path))}: {facts.parameters:,} parameters, {trained:,} trained; "
        f"{job.model.weight_bits} bits, {job.optimizer.kind}, workers: {found[0].sharding.workers}",
        highlight=False,
    )
    table = Table(title="GiB of each worker", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("zero_stage\noffload")
    for option in found:
        own = option.job.cluster == job.cluster
        header = f"{option.sharding.stage}\n{option.sharding.offload}"
        table.add_column(header, justify="right", style="bold" if own else None)
    for cells in zip(*(_cells(option, device_bytes) for option in found), strict=True):
        label, _ = cells[0]
        table.add_row(label, *(text for _, text in cells), end_section=label in ("workspace", "tokens"))
    console.print(table)


def _cells(option: Option, device_bytes: int | None) -> list[tuple[str, str]]:
    """The lines of a column: what stands there, and of what."""
    plan = option.given
    sizes = {**plan.terms, "device": plan.total, "host": plan.host}
    cells = [(name, _gib(size)) for name, size in sizes.items()]
    cells.append(("tokens", f"{option.tokens_given:,}"))
    if device_bytes is not None and option.auto is not None:
        smaller = option.fits and plan.total > usable_bytes(device_bytes)
        cells += [
            ("auto device", _gib(option.auto.memory.total)),
            ("auto tokens", f"{option.auto.tokens_per_forward:,}"),
            ("fits", "less" if smaller else "yes" if option.fits else "no"),
        ]
    return cells


def _print_chosen(job: JobSpec, chosen: Option | None) -> None:
    if chosen is None or chosen.auto is None:
        return
    how = settings(job, chosen) or "the job as it is"
    print(f"chosen: {how}; {chosen.auto.tokens_per_forward:,} tokens in a forward pass")  # noqa: T201


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f}"
