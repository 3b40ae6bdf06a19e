"""A run's identity and state: what goes on, what begins anew, what is refused."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stores import InterruptedStorage, WrappedStorage

from raytune_ft.errors import DataError, ModelError, StorageError
from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.storage import FolderStorage
from raytune_ft.train.run import Run, RunState, asked_of, digest


def job(tmp_path: Path, **sections: Any) -> JobSpec:
    return parse_job(
        {
            "name": "j",
            "model": {"path": "base"},
            "data": {"sources": [{"uri": "d.jsonl"}]},
            "publish": {"catalog": str(tmp_path)},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        ({"evaluate": {"metrics": []}}, True),
        ({"checkpoint": {"every_steps": 3}}, True),
        ({"cluster": {"max_restarts": 9}}, True),
        ({"batch": {"sequences_per_worker": 4}}, True),
        ({"model": {"path": "base", "gradient_checkpointing": True}}, True),
        ({"model": {"path": "base", "resident": "packed"}}, True),
        ({"method": {"rank": 3}}, False),
        ({"schedule": {"steps": 3}}, False),
        ({"optimizer": {"learning_rate": 1.0}}, False),
        ({"batch": {"sequences": 4}}, False),
        ({"model": {"path": "other"}}, False),
        ({"model": {"path": "base", "weight_bits": 8}}, False),
        ({"data": {"sources": [{"uri": "d.jsonl"}], "seed": 1}}, False),
    ],
)
def test_the_id_covers_what_training_depends_on(tmp_path: Path, sections: dict[str, Any], same: bool) -> None:
    assert (Run(job(tmp_path)).id == Run(job(tmp_path, **sections)).id) is same


def test_the_same_command_goes_on_with_the_same_attempt(tmp_path: Path) -> None:
    run = Run(job(tmp_path))
    state = run.begin("data", "base")
    assert run.begin("data", "base") == state
    other = job(tmp_path, evaluate={"metrics": []})
    assert state.publish_id(run.job) != state.publish_id(other)


@pytest.mark.parametrize(
    ("data", "base", "error", "message"),
    [
        (
            "0123456789abcdef",
            "base",
            DataError,
            "j: the data changed since this run began (fingerprint data then, 0123456789ab now); "
            "put the old data back, or start over with --restart",
        ),
        (
            "data",
            "0123456789abcdef",
            ModelError,
            "j: base changed since this run began (base then, 0123456789ab now); "
            "put the old base back, or start over with --restart",
        ),
    ],
)
def test_changed_inputs_stop_an_unfinished_run(
    tmp_path: Path, data: str, base: str, error: type[Exception], message: str
) -> None:
    run = Run(job(tmp_path))
    state = run.begin("data", "base")
    with pytest.raises(error) as caught:
        run.begin(data, base)
    assert str(caught.value) == message
    assert run.begin("data", "base") == state, "a refusal loses nothing"


def test_of_several_that_begin_at_once_all_have_one_attempt(tmp_path: Path) -> None:
    runs = [Run(job(tmp_path)) for _ in range(8)]
    with ThreadPoolExecutor(len(runs)) as threads:
        states = set(threads.map(lambda run: run.begin("data", "base"), runs))
    assert len(states) == 1


class LateStorage(WrappedStorage):
    """Somebody else begins between our look and our first write."""

    def __init__(self, rival: Run) -> None:
        super().__init__(rival.storage)
        self.rival = rival
        self.states: list[RunState] = []

    def read_or_none(self, key: str) -> bytes | None:
        found = super().read_or_none(key)
        self.states.append(self.rival.begin("data", "base"))
        return found


def test_two_that_begin_at_once_have_one_attempt(tmp_path: Path) -> None:
    ours = Run(job(tmp_path))
    ours.storage = late = LateStorage(Run(job(tmp_path)))
    assert [ours.begin("data", "base")] == late.states


def test_the_folder_is_that_of_the_job_in_its_catalog(tmp_path: Path) -> None:
    run = Run(job(tmp_path))
    assert run.storage.uri == f"{run.parent_uri}/{run.id}" == str(tmp_path / "runs" / "j" / run.id)
    other = Run(job(tmp_path, name="k"))
    assert (other.id, other.storage.uri == run.storage.uri) == (run.id, False)


def test_a_digest_knows_values_not_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == digest({"b": [2, {"d": 4, "c": 3}], "a": 1})
    assert digest([1, 2]) != digest([2, 1])


def test_changed_inputs_begin_anew_after_a_finished_run(tmp_path: Path) -> None:
    run = Run(job(tmp_path))
    state = run.begin("data", "base")
    run.finish({"version": 1}, "inputs")
    assert run.finished("inputs") == {"version": 1}
    assert run.finished("others") is None
    assert Run(job(tmp_path, evaluate={"metrics": []})).finished("inputs") is None
    assert run.begin("new", "base").attempt != state.attempt
    assert run.finished("inputs") is None


@pytest.mark.parametrize("deletions", range(3))
def test_a_restart_that_was_interrupted_anywhere_restarts(
    tmp_path: Path, deletions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(job(tmp_path))
    before = run.begin("data", "base")
    run.storage.write("checkpoint_1/position.json", b"{}")
    run.finish({"version": 1}, "inputs")
    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, "delete", failing_after(FolderStorage.delete, deletions))
        with pytest.raises(KeyboardInterrupt):
            run.clear()
    again = Run(job(tmp_path))
    if deletions == 0:
        assert again.finished("inputs") == {"version": 1}, "nothing was deleted yet"
        return
    assert again.finished("inputs") is None
    after = again.begin("data", "base")
    if deletions == 1:
        assert after == before, "only the result was forgotten"
    else:
        assert after.attempt != before.attempt
        assert [found.key for found in again.storage.list()] == ["run.json"], "no old checkpoint is left"


def failing_after(
    delete: Callable[[FolderStorage, str], None], count: int
) -> Callable[[FolderStorage, str], None]:
    """`delete`, until it was called `count` times."""
    calls = iter(range(count))

    def limited(storage: FolderStorage, key: str) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        delete(storage, key)

    return limited


@pytest.mark.parametrize(
    "sections",
    [
        {"cluster": {"max_restarts": 9}},
        {"cluster": {"max_preemptions": 2}},
        {"checkpoint": {"every_steps": 3, "keep": 5}},
    ],
)
def test_how_often_a_run_may_be_interrupted_is_no_part_of_what_is_done(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    run, other = Run(job(tmp_path)), Run(job(tmp_path, **sections))
    state = run.begin("data", "base")
    run.finish({"version": 1}, "inputs")
    assert other.finished("inputs") == {"version": 1}
    assert state.publish_id(run.job) == state.publish_id(other.job)
    elsewhere = Run(job(tmp_path, cluster={"device": "cpu"}))
    assert elsewhere.finished("inputs") is None


@pytest.mark.parametrize("best_by", ["validation_loss", "exact_match"])
def test_which_step_is_published_is_part_of_what_is_done(tmp_path: Path, best_by: str) -> None:
    run = Run(job(tmp_path))
    other = Run(job(tmp_path, checkpoint={"keep_best": True, "best_by": best_by}))
    state = run.begin("data", "base")
    run.finish({"version": 1}, "inputs")
    assert run.id == other.id
    assert other.finished("inputs") is None
    assert state.publish_id(run.job) != state.publish_id(other.job)


def as_older(job: JobSpec) -> dict[str, Any]:
    """A resolved job as it was before early stopping and the fields of what a record teaches."""
    resolved = job.resolved()
    del resolved["schedule"]["early_stopping"], resolved["checkpoint"]["best_by"]
    for name in ("turns", "thoughts", "max_too_long_fraction"):
        del resolved["data"][name]
    for source in resolved["data"]["sources"]:
        del source["ignore"], source["on_lost"]
    return resolved


def test_what_is_done_without_new_fields_keeps_the_name_that_it_had_before_there_were_any(
    tmp_path: Path,
) -> None:
    asked = as_older(job(tmp_path))
    del asked["cluster"]["max_restarts"], asked["cluster"]["max_preemptions"]
    assert asked_of(job(tmp_path)) == digest({**asked, "checkpoint": {}})
    stopping = job(tmp_path, schedule={"early_stopping": {"patience": 1}})
    assert Run(stopping).id != Run(job(tmp_path)).id
    source = job(tmp_path).data.sources[0].model_dump(mode="json")
    ignoring = job(tmp_path, data={"sources": [{**source, "ignore": ["id"]}]})
    assert Run(ignoring).id != Run(job(tmp_path)).id


def test_results_that_name_all_of_the_job_still_hold(tmp_path: Path) -> None:
    run = Run(job(tmp_path))
    kept = {"job": digest(as_older(run.job)), "inputs": "inputs", "result": {"version": 1}}
    run.storage.write("result.json", json.dumps(kept).encode())
    assert run.finished("inputs") == {"version": 1}
    assert run.finished("others") is None


def test_who_comes_late_clears_nothing_that_another_has_begun(tmp_path: Path) -> None:
    ours, theirs = Run(job(tmp_path)), Run(job(tmp_path))
    ours.storage.write("kept/of-before.json", b"{}")

    def others_begin() -> None:
        theirs.begin("data", "base")
        theirs.storage.write("kept/theirs.json", b"{}")

    # After the look for the state, while the leftovers are listed.
    ours.storage = InterruptedStorage(ours.storage, 1, others_begin)
    state = ours.begin("data", "base")
    assert theirs.storage.read_or_none("kept/theirs.json") is not None
    assert state == theirs.begin("data", "base")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"job": "x"}'])
def test_a_damaged_result_is_named(tmp_path: Path, content: bytes) -> None:
    run = Run(job(tmp_path))
    run.storage.write("result.json", content)
    with pytest.raises(
        StorageError, match=r"result\.json: not the result of a run; remove it, and run again"
    ):
        run.finished("inputs")
