"""A full fine-tune of two workers, killed again and again at random moments: the same bits."""

from pathlib import Path

import pytest
from sharded_kills import STAGES, compare  # type: ignore[import-not-found]  # this folder's

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

KILLS = 10


@pytest.mark.parametrize("zero_stage", STAGES)
def test_random_kills_leave_no_trace(tmp_path: Path, zero_stage: int) -> None:
    found = compare(tmp_path, zero_stage=zero_stage, kills=KILLS, seed=1)
    assert len(found.kills) == KILLS
    assert found.differing_bits == 0
