"""A sharded checkpoint counts where it is whole, and is refused by name where it is not."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from raytune_ft.errors import ModelError, SpecError
from raytune_ft.train.fragments import optimizer_state
from raytune_ft.train.shards import misfit, overlaps, read_manifests

SHAPES = {"a": [4, 3], "b": [5]}


def write_part(
    folder: Path, rank: int, ranges: Sequence[tuple[str, int, int]], *, world: int = 2, updates: int = 7
) -> None:
    """A rank's file as another implementation would write it."""
    pieces = [{"name": n, "start": s, "numel": k, "step": 7, "state": ["exp_avg"]} for n, s, k in ranges]
    manifest = {
        "schema_version": 1,
        "rank": rank,
        "world": world,
        "updates": updates,
        "stage": 2,
        "shapes": SHAPES,
        "pieces": pieces,
    }
    tensors = {
        f"{kind}/{name}:{start}": torch.ones(k) for name, start, k in ranges for kind in ("master", "exp_avg")
    }
    save_file(tensors, folder / f"rank-{rank}.safetensors", metadata={"raytune_ft": json.dumps(manifest)})


def refusal(folder: Path, shapes: dict[str, list[int]] = SHAPES) -> str:
    with pytest.raises(ModelError) as caught:
        read_manifests(folder, shapes)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value).removeprefix(str(folder))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint of two ranks."""
    write_part(tmp_path, 0, [("a", 0, 7)])
    write_part(tmp_path, 1, [("a", 7, 5), ("b", 0, 5)])
    assert [manifest.rank for manifest in read_manifests(tmp_path, SHAPES)] == [0, 1]
    return tmp_path


def test_a_missing_file(checkpoint: Path) -> None:
    (checkpoint / "rank-1.safetensors").unlink()
    assert refusal(checkpoint) == (
        ": the checkpoint is incomplete: rank-1.safetensors is missing, 2 ranks wrote it; "
        "restore the file, or start over with --restart"
    )
    (checkpoint / "rank-0.safetensors").unlink()
    assert refusal(checkpoint).startswith(": no rank-*.safetensors: not a sharded checkpoint")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_file_that_was_cut_short(kept: float, checkpoint: Path) -> None:
    file = checkpoint / "rank-1.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert refusal(checkpoint).startswith("/rank-1.safetensors: cut short, damaged or not ours (")


def test_a_file_of_somebody_else(checkpoint: Path) -> None:
    save_file({"x": torch.ones(2)}, checkpoint / "rank-1.safetensors")
    assert refusal(checkpoint).startswith("/rank-1.safetensors: cut short, damaged or not ours (")


def test_a_file_of_another_checkpoint(checkpoint: Path) -> None:
    write_part(checkpoint, 1, [("a", 7, 5), ("b", 0, 5)], updates=6)
    assert refusal(checkpoint) == (
        ": the checkpoint is mixed: rank-1.safetensors says rank 1 of 2, step 6, ZeRO stage 2, 2 parameters, "
        "rank-0.safetensors rank 0 of 2, step 7, ZeRO stage 2, 2 parameters; "
        "restore the file, or start over with --restart"
    )
    shutil.copy(checkpoint / "rank-0.safetensors", checkpoint / "rank-1.safetensors")
    assert refusal(checkpoint).startswith(": the checkpoint is mixed: rank-1.safetensors says rank 0 of 2")


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([("a", 8, 4), ("b", 0, 5)], "a: elements 7 to 7 of 12 are missing"),
        ([("a", 6, 6), ("b", 0, 5)], "a: elements 6 to 6 of 12 stand in it twice"),
        ([("a", 7, 4), ("b", 0, 5)], "a: elements 11 to 11 of 12 are missing"),
        ([("a", 7, 6), ("b", 0, 5)], "a: elements 12 to 12 are more than its 12"),
        ([("a", 7, 5)], "b: elements 0 to 4 of 5 are missing"),
    ],
)
def test_elements_that_are_missing_or_too_many(
    ranges: list[tuple[str, int, int]], said: str, checkpoint: Path
) -> None:
    write_part(checkpoint, 1, ranges)
    assert refusal(checkpoint).startswith(f": the checkpoint is incomplete: {said}; ")


def test_another_model(checkpoint: Path) -> None:
    assert refusal(checkpoint, {"a": [4, 3], "b": [6]}) == (
        ": the checkpoint is of another model or method: 1 parameters differ, "
        "the first b: [5] there, [6] here; --restart starts over"
    )
    assert "2 parameters differ, the first b: [5] there, absent here" in refusal(
        checkpoint, {"a": [4, 3], "c": [5]}
    )


def test_state_of_blocks_is_refused() -> None:
    import bitsandbytes as bnb

    weight = nn.Parameter(torch.ones(64, 128))
    optimizer = bnb.optim.AdamW8bit([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(SpecError, match=r"^optimizer.kind: AdamW8bit keeps '\w+' for blocks of elements"):
        optimizer_state(optimizer, weight)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
    """A number of elements, and two ways to divide them into half-open ranges, shuffled."""
    numel = draw(st.integers(1, 60))

    def divided() -> list[tuple[int, int]]:
        borders = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=6))})
        return draw(st.permutations(list(itertools.pairwise(borders))))

    return numel, divided(), divided()


@given(partitions())
def test_any_division_is_read_from_any_other(
    division: tuple[int, list[tuple[int, int]], list[tuple[int, int]]],
) -> None:
    numel, saved, wanted = division
    whole = list(range(numel))
    stored = [whole[low:high] for low, high in saved]
    for low, high in wanted:
        read = [-1] * (high - low)
        for part in overlaps(saved, low, high):
            assert read[part.at : part.at + part.numel] == [-1] * part.numel
            read[part.at : part.at + part.numel] = stored[part.source][part.first : part.first + part.numel]
        assert read == whole[low:high]


@given(partitions(), st.integers(0, 5), st.integers(-2, 2), st.integers(-2, 2))
def test_only_a_division_covers(
    division: tuple[int, list[tuple[int, int]], list[tuple[int, int]]], at: int, before: int, after: int
) -> None:
    numel, ranges, _ = division
    at %= len(ranges)
    low, high = ranges[at]
    low, high = max(low + before, 0), high + after
    ranges = [*ranges[:at], *ranges[at + 1 :], *([(low, high)] if low < high else [])]
    counts = [sum(low <= element < high for low, high in ranges) for element in range(numel + 2)]
    assert (misfit(ranges, numel) is None) == (counts == [1] * numel + [0, 0])
