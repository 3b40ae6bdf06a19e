"""The best step is published bit for bit, whatever the engine, and a run that goes on decides alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lanes import PLACEMENT, same
from overfitting import Folders, overfitting_job, write_keys
from safetensors.torch import load_file
from sharding import join, run_group

from raytune_ft.data.prepare import prepare
from raytune_ft.errors import DataError
from raytune_ft.model_files import base_identity
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import JobSpec
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.recipe import Recipe, Trained
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.run import RunState
from raytune_ft.train.workbench import Workbench, set_up


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_keys(tmp_path_factory.mktemp("data") / "keys.jsonl")


class Silent:
    """Nobody watches."""

    def write(self, event: dict[str, Any]) -> None:
        del event

    def new(self, step: int) -> bool:
        del step
        return False


class Killed(Exception):
    """What stands for the end of a process."""


class Attempt:
    """A run of a job in this process, from a checkpoint or from its beginning to its end."""

    def __init__(self, job: JobSpec, peers: Peers = Peers(), checkpoint: Path | None = None) -> None:
        data = prepare(job, tokenizer=load_tokenizer(job.model), cache=False, here=True)
        state = RunState(1, "attempt", data.fingerprint, base_identity(job.model.path))
        assignment = Assignment(job, state, TrainingData.of(job, data, None), "channel", PLACEMENT)
        self.job, self.peers = job, peers
        self.recipe = Recipe(assignment, peers, lambda _: None)
        self.bench: Workbench = set_up(assignment, checkpoint, peers)
        self.start: Position = self.recipe.begin(self.bench, checkpoint)

    def train(
        self, kept: Folders, written: Path, *, warnings: Any = None, killed_after: int | None = None
    ) -> tuple[Trained | None, list[dict[str, Any]]]:
        """Train; what every step would be published as stands in `written/<step>`, what is in `written`."""
        recorder = Recorder(
            self.bench.engine,
            self.start,
            self.recipe.total_steps,
            self.job.checkpoint.every_steps,
            Silent(),
            lambda: self.recipe.validate(self.bench),
            self.peers,
            self.recipe.ledger.to_json,
            kept,
            warnings or Silent(),
            best_by=self.job.best_by,
            stopping=self.job.schedule.early_stopping,
        )

        def report(done: StepReport) -> None:
            recorder(done)
            (written / f"{done.step}").mkdir(parents=True, exist_ok=True)
            self.bench.write_result(self.job, written / f"{done.step}", self.peers.rank)
            if done.step == killed_after:
                raise Killed

        with self.recipe.steps(self.bench.layout, self.start.step) as steps:
            fit(
                self.bench.engine,
                recorder.until_stopped(steps),
                start=self.start.step,
                learning_rate=self.recipe.learning_rate,
                report=report,
                peers=self.peers,
            )
        position = recorder.finish()
        written.mkdir(exist_ok=True)
        return self.recipe.finish(self.bench, position, written, kept.fetch), position.history


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    found: dict[str, torch.Tensor] = load_file(file)
    return found


def measured(history: list[dict[str, Any]]) -> dict[int, float]:
    return {entry["step"]: entry["validation_loss"] for entry in history if "validation_loss" in entry}


def assert_best_is_written(trained: Trained, history: list[dict[str, Any]], written: Path) -> int:
    losses = measured(history)
    assert list(losses) == [3, 6, 9, 12, 15, 16]
    best = min(losses, key=lambda step: losses[step])
    assert best < 15, "the validation loss rises again"
    assert trained.selection.step == best
    assert trained.selection.best is not None
    assert trained.selection.best.value == losses[best]
    assert same(weights(written), weights(written / f"{best}"))
    assert not same(weights(written), weights(written / "16"))
    return best


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"weight_bits": 16}},
        {"method": {"kind": "lora", "rank": 8, "dropout": 0.1}, "optimizer": {"learning_rate": 0.005}},
    ],
    ids=["full", "bf16", "lora"],
)
def test_the_best_step_is_published(base: Path, keys: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    job = overfitting_job(base, keys, tmp_path / "catalog", **sections)
    attempt, kept = Attempt(job), Folders(tmp_path / "kept")
    trained, history = attempt.train(kept, tmp_path / "written")
    assert trained is not None
    best = assert_best_is_written(trained, history, tmp_path / "written")
    assert kept.needed[-1] == best
    assert trained.after is not None
    assert trained.after == attempt.recipe.assess(attempt.bench, trained.asked, "again"), (
        "the scores are those of its weights"
    )
    # Killed before it is published: the same command goes on from the last checkpoint.
    again, _ = Attempt(job, checkpoint=tmp_path / "kept" / "16").train(kept, tmp_path / "again")
    assert again is not None
    assert (again.selection, again.after) == (trained.selection, trained.after)
    assert same(weights(tmp_path / "again"), weights(tmp_path / "written"))


def zero_worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    to = Path(folder)
    for stage in (2, 3):
        values = json.loads((to / "job.json").read_text())
        values["cluster"] = {**values["cluster"], "workers": world, "zero_stage": stage}
        attempt = Attempt(JobSpec.model_validate(values), Peers.current())
        written = to / f"written-{stage}"
        trained, history = attempt.train(Folders(to / f"kept-{stage}"), written)
        losses = attempt.peers.sum([history[-1]["validation_loss"]])
        assert losses[0] / world == history[-1]["validation_loss"], "all workers know it"
        if trained is not None:
            assert_best_is_written(trained, history, written)


@pytest.mark.slow
def test_the_best_step_of_divided_weights_is_published(base: Path, keys: Path, tmp_path: Path) -> None:
    job = overfitting_job(base, keys, tmp_path / "catalog")
    (tmp_path / "job.json").write_text(json.dumps(job.resolved()))
    run_group(zero_worker, 2, tmp_path)


STOPPING = {
    "schedule": {"steps": 40, "decay": "constant", "early_stopping": {"patience": 2}},
    "checkpoint": {"keep_best": False},
}


def test_training_stops_early_at_the_same_step_however_often_it_was_killed(
    base: Path, keys: Path, tmp_path: Path
) -> None:
    job = overfitting_job(base, keys, tmp_path / "catalog", **STOPPING)
    trained, history = Attempt(job).train(Folders(tmp_path / "kept"), tmp_path / "written")
    assert trained is not None
    stop, best = trained.selection.stopped, trained.selection.best
    assert stop is not None
    assert best is not None
    assert len(history) == stop.step < 40
    assert stop.step == list(measured(history))[-1]
    assert (stop.best_step, trained.selection.step) == (best.step, best.step)
    kept, start = Folders(tmp_path / "kept2"), None
    for killed_after in (4, 8, stop.step):
        with pytest.raises(Killed):
            Attempt(job, checkpoint=start).train(kept, tmp_path / "killed", killed_after=killed_after)
        start = kept.folder / f"{max(kept.kept())}"
    again, resumed = Attempt(job, checkpoint=start).train(kept, tmp_path / "again")
    assert again is not None
    assert again.selection == trained.selection
    assert measured(resumed) == measured(history)
    assert same(weights(tmp_path / "again"), weights(tmp_path / "written"))


class Announced(Silent):
    """A node is about to go after the third step, at which a checkpoint is due."""

    def new(self, step: int) -> bool:
        return step == 3


@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_that_was_kept_in_a_hurry_is_measured_before_the_weights_change(
    base: Path, keys: Path, tmp_path: Path, killed: bool
) -> None:
    job = overfitting_job(base, keys, tmp_path / "catalog", schedule={"steps": 7})
    _, history = Attempt(job).train(Folders(tmp_path / "kept"), tmp_path / "written")
    hurried = Folders(tmp_path / "hurried")
    if killed:
        with pytest.raises(Killed):
            Attempt(job).train(hurried, tmp_path / "first", warnings=Announced(), killed_after=3)
        position = json.loads((hurried.folder / "3" / "position.json").read_text())
        assert not measured(position["history"])
        attempt = Attempt(job, checkpoint=hurried.folder / "3")
        _, found = attempt.train(hurried, tmp_path / "again")
    else:
        _, found = Attempt(job).train(hurried, tmp_path / "again", warnings=Announced())
    assert measured(found) == measured(history)
    assert same(weights(tmp_path / "again"), weights(tmp_path / "written"))


def test_a_score_of_the_validation_split_decides(base: Path, tmp_path: Path) -> None:
    """Constant answers, so that all of them are right at some time."""
    data = tmp_path / "same.jsonl"
    lines = [json.dumps({"prompt": f"number {n}:", "completion": " 7"}) for n in range(24)]
    data.write_text("\n".join(lines) + "\n")
    job = overfitting_job(
        base,
        data,
        tmp_path / "catalog",
        checkpoint={"best_by": "exact_match"},
        evaluate={"metrics": []},
        optimizer={"learning_rate": 0.003},
    )
    trained, history = Attempt(job).train(Folders(tmp_path / "kept"), tmp_path / "written")
    assert trained is not None
    scores = {entry["step"]: entry["validation_scores"] for entry in history if "validation_scores" in entry}
    assert scores.keys() == measured(history).keys()
    assert all(score.keys() == {"exact_match"} for score in scores.values())
    assert scores[16]["exact_match"] == 1.0
    first = min(step for step, score in scores.items() if score["exact_match"] == 1.0)
    assert trained.selection.step == first, "of equals the earlier"
    assert same(weights(tmp_path / "written"), weights(tmp_path / "written" / f"{first}"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"split": {"validation": 0.001, "test": 0.0}}},
            r"data\.split\.validation = 0\.001 holds out no example, and checkpoint\.keep_best and "
            r"schedule\.early_stopping need some",
        ),
        (
            {"checkpoint": {"best_by": "rougeL"}, "data": {"sources": "text"}},
            "rougeL cannot be measured on the validation split: none of its examples has a prompt and a",
        ),
    ],
)
def test_what_the_validation_split_cannot_measure_is_refused(
    base: Path, keys: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    if sections["data"].get("sources") == "text":
        text = tmp_path / "text.jsonl"
        text.write_text(
            "".join(json.dumps({"text": f"a line of text, number {n}"}) + "\n" for n in range(30))
        )
        sections = {**sections, "data": {"sources": [{"uri": str(text)}]}}
    job = overfitting_job(base, keys, tmp_path / "catalog", **sections)
    with pytest.raises(DataError, match=message):
        Attempt(job)
