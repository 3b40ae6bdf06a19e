"""The base of a lane, as jobs come and go."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from lanes import PLACEMENT, fleet_of, job_on, write_task

from raytune_ft.fleet.plan import plan_fleet
from raytune_ft.fleet.resident import Resident
from raytune_ft.model_files import model_folder, read_facts


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_a_pass_has_a_row_of_each_job_however_many_the_lane_trains(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    lengths = {"long": 128, "a": 32, "b": 32}
    jobs = {
        name: job_on(write_task(tmp_path, name), data={"max_tokens": length})
        for name, length in lengths.items()
    }
    plan = plan_fleet(
        fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 3}),
        lambda path: read_facts(model_folder(path, weights=False)),
        place_name="fleet.yaml",
        device_bytes=None,
        flops_per_s=None,
    )
    resident = Resident(plan.groups[0], PLACEMENT)
    passes = []
    for slots in (3, 2, 1):
        resident.set_slots(slots)
        passes.append(resident.bank.tokens_per_pass)
    assert passes == [128 + 32 + 32, 128 + 32, 0]
    specs = [placed.spec for placed in plan.groups[0].jobs]
    benches = [resident.bench(spec, "data", None) for spec in specs]
    assert sorted(bench.engine.slot for bench in benches) == [0, 1, 2]
    resident.leave(benches[1])
    assert resident.bench(specs[1], "data", None).engine.slot == 1
