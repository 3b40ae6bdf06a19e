"""What a kill leaves of a checkpoint that was on its way."""

import json
from pathlib import Path

from raytune_ft.spec import parse_job
from raytune_ft.train.run import Run


def test_a_checkpoint_that_was_never_complete_goes_and_all_others_stay(tmp_path: Path) -> None:
    run = Run(
        parse_job(
            {
                "name": "j",
                "model": {"path": "base"},
                "data": {"sources": [{"uri": "d.jsonl"}]},
                "publish": {"catalog": str(tmp_path)},
            }
        )
    )
    state = run.begin("data", "base")
    stays = {"run.json", "lease/9999999998.json", "checkpoint_manager_snapshot.json"}
    stays |= {f"checkpoint_{name}/{part}" for name in ("kept", "latest") for part in ("a", "rank-1/b")}
    listed = {
        "checkpoint_results": [{"checkpoint_dir_name": "checkpoint_kept"}],
        "latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint_latest"},
    }
    for key in [*stays - {"run.json"}, "checkpoint_cut/a", "checkpoint_cut/rank-1/b"]:
        run.storage.write(key, json.dumps(listed).encode())
    assert run.begin("data", "base") == state
    assert {found.key for found in run.storage.list()} == stays
    run.storage.delete("checkpoint_manager_snapshot.json")
    run.begin("data", "base")
    assert {found.key for found in run.storage.list()} == {"run.json", "lease/9999999998.json"}
