"""Sharded checkpoints are read by any number of ranks and any stage. Real DeepSpeed engines over gloo."""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sharding import Names, computed, differences, join, new_engine, run_group, train
from torch import Tensor

from raytune_ft.errors import StorageError
from raytune_ft.train.export import gathered
from raytune_ft.train.shards import copy_shards, load_shards

STEPS = 2
WORLDS = (4, 2, 3, 1)
"""Each goes on from what the one before it wrote."""
LIMIT_BYTES = 4096
KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Case:
    """A checkpoint on its way through the worlds."""

    stages: tuple[int, ...]
    """ZeRO stage in each world."""
    dtype: str = "fp32"
    method: str = "full"
    offload: bool = False

    def engine(self, world: int) -> tuple[Any, Names]:
        """A new one, for a world."""
        stage = self.stages[WORLDS.index(world)]
        return new_engine(stage, self.dtype, method=self.method, offload=self.offload)


CASES = [
    Case((1, 2, 3, 3)),
    Case((2, 1, 1, 3)),
    Case((3, 3, 2, 2)),
    Case((1, 3, 2, 1)),
    Case((1, 2, 3, 1), "bf16"),
    Case((2, 1, 1, 3), "bf16"),
    Case((3, 3, 1, 2), "bf16"),
    Case((3, 2, 3, 2), "bf16", offload=True),
    Case((3, 2, 2, 3), "bf16", "lora"),
]
SAMPLE = "sample"
PARTS = {SAMPLE: (0, 7), "others": (1, 2, 3, 4, 5, 6, 8)}
"""Numbers of the cases that the same workers take, one after another."""


def whole(engine: Any, names: Names) -> dict[str, Tensor]:
    """All that is trained and what is kept of it, as DeepSpeed's own functions give it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links the states after the step of the first group, when the others have none.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in names.items():
        found[name] = safe_get_full_fp32_param(parameter)
        states = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in KINDS}
        found |= {f"{kind} of {name}": state for kind, state in states.items()}
    found |= {f"computed {name}": tensor for name, tensor in computed(names).items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def steps_taken(engine: Any) -> set[int]:
    """Step counts of the optimizer."""
    return {int(state["step"]) for state in engine.basic_optimizer.state.values() if state}


def write(case: Case, number: int, rank: int, folder: Path) -> dict[str, Any]:
    """The first world: trains, saves, and goes on both as it is and from what it saved."""
    engine, names = case.engine(WORLDS[0])
    train(engine, range(STEPS))
    target = folder / f"{WORLDS[0]}-{number}"
    target.mkdir(exist_ok=True)
    copy_shards(engine, names, rank)(target)
    reference, saved_steps = whole(engine, names), (engine.global_steps, steps_taken(engine))
    train(engine, [STEPS])
    uninterrupted = whole(engine, names)
    dist.barrier()
    other, names = case.engine(WORLDS[0])
    train(other, [7])
    load_shards(other, names, target)
    loaded = whole(other, names)
    counts = (other.global_steps, steps_taken(other))
    train(other, [STEPS])
    if rank == 0:
        torch.save(reference, folder / f"reference-{number}.pt")
    return {
        "saved steps": saved_steps,
        "trained": len(differences(uninterrupted, reference)),
        "loaded": differences(loaded, reference),
        "went on": differences(whole(other, names), uninterrupted),
        "steps": counts,
    }


def read_on(case: Case, number: int, world: int, rank: int, folder: Path) -> dict[str, Any]:
    """A later world: reads what the one before wrote, and writes it for the next."""
    at = WORLDS.index(world)
    engine, names = case.engine(world)
    load_shards(engine, names, folder / f"{WORLDS[at - 1]}-{number}")
    target = folder / f"{world}-{number}"
    target.mkdir(exist_ok=True)
    copy_shards(engine, names, rank)(target)
    reference = torch.load(folder / f"reference-{number}.pt")
    found = {"loaded": differences(whole(engine, names), reference)}
    masters = gathered(engine, names)
    found["gathered"] = differences(masters, {n: reference[n] for n in names}) if rank == 0 else list(masters)
    counts = (engine.global_steps, steps_taken(engine))
    train(engine, [STEPS])
    return {**found, "steps": counts}


def full_disk(folder: Path) -> tuple[str, bool]:
    """What a disk that is full says, and whether the file that stood there stands there still."""
    engine, names = new_engine(2)
    copy_shards(engine, names, 0)(folder)
    (file,) = folder.glob("rank-*")
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, limits[1]))
    try:
        copy_shards(engine, names, 0)(folder)
    except StorageError as error:
        return str(error), [f.read_bytes() for f in folder.iterdir()] == [before]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "", False


def work(rank: int, world: int, name: str) -> None:
    """One worker of a world: takes the part that the folder is named for, and writes down what it found."""
    folder = Path(name)
    join(rank, world, name)
    found: dict[Any, Any] = {}
    for number in PARTS[folder.name]:
        case = CASES[number]
        found[number] = (
            write(case, number, rank, folder)
            if world == WORLDS[0]
            else read_on(case, number, world, rank, folder)
        )
    if world == 1 and folder.name == SAMPLE:
        (folder / "full").mkdir()
        found["full"] = full_disk(folder / "full")
    torch.save(found, folder / f"found-{world}-{rank}.pt")
    dist.destroy_process_group()


Folders = Callable[[str], Path]
"""Where all worlds, one after another, left what they wrote and found of a part."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Runs a part when the first test asks for it."""
    above = tmp_path_factory.mktemp("shards")

    @cache
    def run(part: str) -> Path:
        folder = above / part
        folder.mkdir()
        for world in WORLDS:
            run_group(work, world, folder)
        return folder

    return run


def found_by(folder: Path, world: int, rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = torch.load(folder / f"found-{world}-{rank}.pt", weights_only=False)
    return found


ALL = [
    pytest.param(part, number, id=str(CASES[number]), marks=() if part == SAMPLE else pytest.mark.slow)
    for part, numbers in PARTS.items()
    for number in numbers
]


@pytest.mark.parametrize(("part", "number"), ALL)
def test_the_same_ranks_go_on_bit_for_bit(part: str, number: int, folders: Folders) -> None:
    folder = folders(part)
    for rank in range(WORLDS[0]):
        found = found_by(folder, WORLDS[0], rank)[number]
        assert found["trained"] > 0
        assert found["loaded"] == []
        assert found["went on"] == []
        assert found["steps"] == found["saved steps"]


@pytest.mark.parametrize(("part", "number"), ALL)
def test_other_ranks_and_stages_read_every_bit(part: str, number: int, folders: Folders) -> None:
    folder = folders(part)
    steps = found_by(folder, WORLDS[0], 0)[number]["saved steps"]
    for world in WORLDS[1:]:
        for rank in range(world):
            found = found_by(folder, world, rank)[number]
            assert found == {"loaded": [], "gathered": [], "steps": steps}


def test_a_checkpoint_holds_every_element_once(folders: Folders) -> None:
    folder, number = folders(SAMPLE), PARTS[SAMPLE][-1]
    files = sorted((folder / f"{WORLDS[0]}-{number}").glob("rank-*"))
    saved = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    reference = torch.load(folder / f"reference-{number}.pt")
    assert saved == sum(tensor.numel() for name, tensor in reference.items() if "computed" not in name)


def test_a_disk_that_fails_keeps_what_stood_there(folders: Folders) -> None:
    folder = folders(SAMPLE)
    message, kept = found_by(folder, 1, 0)["full"]
    assert message.startswith(f"{folder}/full: cannot be written: ")
    assert kept
