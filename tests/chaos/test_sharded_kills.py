"""A full fine-tune of two workers, killed again and again at random places: the same bits."""

from pathlib import Path

import pytest
from sharded_kills import compare  # type: ignore[import-not-found]  # this folder's

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

KILLS = 10


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_random_kills_leave_no_trace(tmp_path: Path, zero_stage: int, seed: int) -> None:
    struck, bits = compare(tmp_path, zero_stage=zero_stage, workers=2, kills=KILLS, seed=seed)
    assert struck
    assert bits == 0
