"""`raytune-ft plan` of a fleet: its jobs by base, the bytes of a lane, and how long it would take."""

import json
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_ft.cli.plan import facts_at, parse_size, plan_as_json
from raytune_ft.errors import SpecError
from raytune_ft.fleet.placement import Group
from raytune_ft.fleet.plan import FleetPlan, plan_fleet
from raytune_ft.fleet.simulate import Forecast, Preemptions
from raytune_ft.fleet.work import BYTES_PER_TOKEN
from raytune_ft.planner import usable_bytes
from raytune_ft.report import duration_text
from raytune_ft.spec import FleetSpec
from raytune_ft.terminal import visible

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_PLAIN_WIDTH = 130


def plan_fleet_command(
    fleet: FleetSpec,
    file: Path,
    gpu_memory: str | None,
    tflops: float | None,
    simulate: bool,
    preemptions_per_hour: float,
    as_json: bool,
) -> None:
    """Print the jobs of a fleet by base, the bytes of a lane, and the predicted time.

    Args:
        fleet: the fleet.
        file: where it stands.
        gpu_memory: memory of a lane's device, such as `24GiB`; None: nothing limits the slots.
        tflops: what a lane's device sustains, in 10^12 operations a second; None: a guess.
        simulate: print a table over numbers of GPUs too.
        preemptions_per_hour: of each lane, in the prediction.
        as_json: print one JSON object instead.

    Raises:
        SpecError: `gpu_memory` is no size, or a job of the fleet is none.
        DataError: a source names nothing.
        ModelError: there is no such model, or a job does not fit.
        StorageError: a store cannot be listed.
    """
    for option, value in (("--tflops", tflops), ("--preemptions", preemptions_per_hour)):
        if value is not None and not math.isfinite(value):
            raise SpecError(f"{option} {value}: write a finite number, such as 40")
    plan = plan_fleet(
        fleet,
        facts_at,
        place_name=str(file),
        device_bytes=None if gpu_memory is None else parse_size(gpu_memory),
        flops_per_s=None if tflops is None else tflops * 1e12,
    )
    losses = Preemptions(preemptions_per_hour) if preemptions_per_hour else None
    (own,) = plan.forecasts([fleet.lanes.max], losses)
    table = plan.forecasts(GPU_COUNTS, losses) if simulate else []
    if as_json:
        # The one place where standard output is a machine's to read.
        print(json.dumps(_as_json(plan, own, table)))  # noqa: T201
        return
    console = Console()
    # A file or pipe has no width of its own; the tables need this much.
    _print(console if console.is_terminal else Console(width=_PLAIN_WIDTH), plan, own, table)


def _as_json(plan: FleetPlan, own: Forecast, table: list[Forecast]) -> dict[str, Any]:
    return {
        "name": plan.fleet.name,
        "tokens": plan.tokens,
        "device_bytes": plan.device_bytes,
        "usable_bytes": None if plan.device_bytes is None else usable_bytes(plan.device_bytes),
        "tflops": plan.flops_per_s / 1e12,
        "jobs": [
            {
                "name": job.spec.name,
                "base": group.base,
                "steps": job.work.steps,
                "tokens": job.work.tokens,
                "seconds": job.queued.seconds,
            }
            for group in plan.groups
            for job in group.jobs
        ],
        "groups": [_group_as_json(group) for group in plan.groups],
        "forecast": _forecast_as_json(own),
        "forecasts": [_forecast_as_json(forecast) for forecast in table],
    }


def _group_as_json(group: Group) -> dict[str, Any]:
    model = group.jobs[0].spec.model
    return {
        "base": group.base,
        "path": model.path,
        "weight_bits": model.weight_bits,
        "resident": group.lane.resident,
        "jobs": len(group.jobs),
        "tokens": group.tokens,
        "slots": group.lane.slots,
        **plan_as_json(group.lane.memory),
    }


def _forecast_as_json(forecast: Forecast) -> dict[str, Any]:
    return {
        "gpus": forecast.gpus,
        "lanes": forecast.lanes,
        "seconds": forecast.makespan_s,
        "gpu_hours": forecast.gpu_hours,
        "idle_share": forecast.idle_share,
        "base_loads": forecast.base_loads,
        "preemptions": forecast.preemptions,
    }


def _print(console: Console, plan: FleetPlan, own: Forecast, table: list[Forecast]) -> None:
    jobs = sum(len(group.jobs) for group in plan.groups)
    console.print(
        f"{plan.fleet.name}: {jobs:,} jobs, bases: {len(plan.groups)}, about {plan.tokens:,} tokens "
        f"({BYTES_PER_TOKEN:g} bytes of data each; none was read)",
        highlight=False,
    )
    console.print(_groups_table(plan))
    if plan.device_bytes is None:
        lines = ["memory: unchecked, so slots are as many as make a lane faster; give --gpu-memory"]
    else:
        lines = [f"memory: {usable_bytes(plan.device_bytes) / 2**30:.1f} GiB of a device may be filled"]
    lines.append(
        f"time: about {duration_text(own.makespan_s)} on lanes: {own.lanes}; {own.gpu_hours:.2f} GPU-hours, "
        f"{own.idle_share:.0%} idle, at {plan.flops_per_s / 1e12:g} TFLOP/s of a lane (--tflops)"
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if table:
        console.print(_forecasts_table(table))


def _groups_table(plan: FleetPlan) -> Table:
    table = Table(
        title="GiB of a lane with all slots taken", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("base", overflow="fold")
    terms = list(plan.groups[0].lane.memory.terms)
    for name in ("jobs", "tokens", "slots", *terms, "device"):
        table.add_column(name, justify="right")
    for group in plan.groups:
        model = group.jobs[0].spec.model
        held = f"{model.weight_bits} bits" + (", dequantised" if group.lane.resident == "dequantised" else "")
        memory = group.lane.memory
        sizes = [f"{size / 2**30:,.2f}" for size in (*memory.terms.values(), memory.total)]
        table.add_row(
            f"{escape(visible(model.path))} {held}",
            f"{len(group.jobs):,}",
            f"{group.tokens:,}",
            f"{group.lane.slots}",
            *sizes,
        )
    return table


def _forecasts_table(forecasts: list[Forecast]) -> Table:
    table = Table(title="Simulated", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    preempted = any(forecast.preemptions for forecast in forecasts)
    names = ("GPUs", "lanes", "time", "faster", "GPU-hours", "idle", "base loads")
    for name in (*names, *(["preemptions"] if preempted else [])):
        table.add_column(name, justify="right")
    for forecast in forecasts:
        cells = [
            f"{forecast.gpus}",
            f"{forecast.lanes}",
            duration_text(forecast.makespan_s),
            f"{forecasts[0].makespan_s / forecast.makespan_s:.1f}×",
            f"{forecast.gpu_hours:,.2f}",
            f"{forecast.idle_share:.0%}",
            f"{forecast.base_loads}",
        ]
        table.add_row(*cells, *([f"{forecast.preemptions}"] if preempted else []))
    return table
