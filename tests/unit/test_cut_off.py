"""What a kill leaves of a checkpoint that was on its way."""

import json
from pathlib import Path

import pytest

from raytune_ft.errors import StorageError
from raytune_ft.spec import parse_job
from raytune_ft.train.run import Run

LIST = "checkpoint_manager_snapshot.json"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(
        parse_job(
            {
                "name": "j",
                "model": {"path": "base"},
                "data": {"sources": [{"uri": "d.jsonl"}]},
                "publish": {"catalog": str(tmp_path)},
            }
        )
    )


def test_a_checkpoint_that_was_never_complete_goes_and_all_others_stay(run: Run) -> None:
    state = run.begin("data", "base")
    stays = {"run.json", "lease/9999999998.json", LIST}
    stays |= {f"checkpoint_{name}/{part}" for name in ("kept", "latest") for part in ("a", "rank-1/b")}
    listed = {
        "checkpoint_results": [{"checkpoint_dir_name": "checkpoint_kept"}],
        "latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint_latest"},
    }
    for key in [*stays - {"run.json"}, "checkpoint_cut/a", "checkpoint_cut/rank-1/b"]:
        run.storage.write(key, json.dumps(listed).encode())
    assert run.begin("data", "base") == state
    assert {found.key for found in run.storage.list()} == stays
    run.storage.delete(LIST)
    run.begin("data", "base")
    assert {found.key for found in run.storage.list()} == {"run.json", "lease/9999999998.json"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"checkpoint_results": [{"checkpoint_dir',
        b"null",
        b"[]",
        b"{}",
        b'{"checkpoint_results": 3}',
        b'{"checkpoint_results": ["checkpoint_kept"]}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_list_that_was_cut_off_removes_nothing(run: Run, text: bytes) -> None:
    run.begin("data", "base")
    for key, content in ((LIST, text), ("checkpoint_kept/a", b"weights")):
        run.storage.write(key, content)
    with pytest.raises(StorageError) as caught:
        run.begin("data", "base")
    assert str(caught.value) == (
        f"{run.storage.uri}/{LIST}: cut off, or not Ray Train's list of checkpoints ({len(text)} bytes); "
        "nothing was removed; put the file back, or start over with --restart"
    )
    assert {found.key for found in run.storage.list()} == {"run.json", LIST, "checkpoint_kept/a"}
    run.clear()
    assert list(run.storage.list()) == []
