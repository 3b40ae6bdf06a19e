"""Jobs from the file to the published adapter on a real cluster: kills, resumes, refusals."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import ray
import tiny
import torch
from conftest import kill_once_kept, make_job  # type: ignore[import-not-found]  # this folder's
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from raytune_ft.catalog import Catalog
from raytune_ft.errors import BadInput, DataError, ModelError, TrainingError
from raytune_ft.evaluate.answer import answer_prompt
from raytune_ft.model_files import tokenizer_digest
from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.train.launch import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def adapter(catalog: str, reference: str, to: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published version."""
    Catalog.at(catalog).pull(reference, to)
    tensors: dict[str, torch.Tensor] = load_file(to / "adapter_model.safetensors")
    return tensors


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(job: JobSpec, **sections: Any) -> JobSpec:
    return parse_job({**job.resolved(), **sections})


@pytest.fixture(scope="module")
def reference(
    cluster: str, base: Path, capitals: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobSpec, dict[str, Any], dict[str, torch.Tensor], Path]:
    """A job that nobody disturbed: what it returned, its adapter, its output folder."""
    assert cluster
    folder = tmp_path_factory.mktemp("reference")
    job = make_job(base, capitals, folder / "catalog")
    result = train(job, folder / "out")
    return job, result, adapter(job.publish.catalog, "capitals@v1", folder / "pulled"), folder


class TestDone:
    def test_the_result_has_all_that_is_promised(self, reference: Any) -> None:
        job, result, _, folder = reference
        assert set(result) == {
            "adapter", "version", "uri", "steps", "loss", "scores_before", "scores_after",
            "scored_examples", "max_new_tokens", "tokens_per_second", "peak_memory_bytes", "seconds",
        }  # fmt: skip
        assert (result["adapter"], result["version"], result["steps"]) == ("capitals", 1, 12)
        assert Path(result["uri"]).is_file()
        assert result["scores_after"]["token_loss"] < result["scores_before"]["token_loss"]
        assert set(result["scores_after"]) == {
            "exact_match",
            "rouge1",
            "rouge2",
            "rougeL",
            "bleu",
            "token_loss",
        }
        assert json.loads((folder / "out" / "result.json").read_text()) == result
        assert json.loads((folder / "out" / "job.json").read_text()) == job.resolved()
        report = (folder / "out" / "report.html").read_text()
        assert "Name number" in report
        assert not (folder / "out" / "quarantine.jsonl").exists()

    def test_every_step_is_a_scalar(self, reference: Any) -> None:
        folder = reference[3]
        events = EventAccumulator(str(folder / "out" / "tensorboard")).Reload()
        assert [scalar.step for scalar in events.Scalars("train/loss")] == list(range(1, 13))
        assert [scalar.step for scalar in events.Scalars("validation/loss")] == [4, 8, 12]

    def test_the_record_tells_where_it_came_from(self, reference: Any) -> None:
        job, result, _, _ = reference
        record = Catalog.at(job.publish.catalog).resolve("capitals@candidate")
        assert record.version == 1
        assert record.job == job.resolved()
        assert record.scores_after == result["scores_after"]
        assert record.data["counts"]["total"]["train"] > 0
        assert record.base.path == job.model.path
        assert record.base.tokenizer_digest == tokenizer_digest(Path(job.model.path))
        assert {"ray", "torch", "transformers", "python"} <= set(record.library_versions)
        assert {entry.name for entry in record.files} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
            "job.json", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        assert record.scored_examples == result["scored_examples"]
        assert set(result["scored_examples"]) == set(result["scores_after"])
        # The job of these tests allows 4 tokens.
        assert record.max_new_tokens == result["max_new_tokens"] == {"test split": 4}

    def test_it_loads_in_peft_and_changes_the_answers(self, reference: Any) -> None:
        job, _, _, folder = reference
        base = AutoModelForCausalLM.from_pretrained(job.model.path)
        ids = torch.arange(3, 30)[None]
        before = base(ids).logits
        after = peft.PeftModel.from_pretrained(base, folder / "pulled")(ids).logits
        assert (after - before).abs().max() > 1e-3

    def test_the_same_command_does_not_train_again(self, reference: Any, tmp_path: Path) -> None:
        job, result, _, _ = reference
        events: list[Any] = []
        assert train(job, tmp_path, on_event=events.append) == result
        assert events == [{"phase": "done before"}]

    def test_generate_answers(self, reference: Any) -> None:
        job = reference[0]
        reply = answer_prompt(job.publish.catalog, "capitals@candidate", "Name number 3.", max_new_tokens=4)
        assert isinstance(reply, str)

    @pytest.mark.slow
    def test_another_run_has_the_same_bits(self, reference: Any, job: JobSpec, tmp_path: Path) -> None:
        train(job, tmp_path / "out")
        assert equal(reference[2], adapter(job.publish.catalog, "capitals", tmp_path / "pulled"))


class TestKilled:
    def test_a_killed_worker_is_replaced_and_ends_with_the_same_bits(
        self, reference: Any, job: JobSpec, tmp_path: Path
    ) -> None:
        killed: list[int] = []
        result = train(job, tmp_path / "out", on_event=kill_once_kept(job.publish.catalog, killed))
        assert len(killed) == 1
        assert result["steps"] == 12
        assert result["version"] == 1
        assert equal(reference[2], adapter(job.publish.catalog, "capitals", tmp_path / "pulled"))

    @pytest.mark.slow
    def test_a_run_that_gave_up_goes_on_with_the_same_command(
        self, reference: Any, job: JobSpec, tmp_path: Path
    ) -> None:
        fragile = changed(job, cluster={"max_restarts": 0})
        killed: list[int] = []
        with pytest.raises(TrainingError, match=r"lost more than cluster.max_restarts = 0 times.*goes on"):
            train(fragile, tmp_path / "out", on_event=kill_once_kept(job.publish.catalog, killed))
        assert Catalog.at(job.publish.catalog).newest_versions() == {}
        started: list[int] = []
        result = train(
            fragile, tmp_path / "out", on_event=lambda event: started.append(event.get("step", -1))
        )
        assert next(step for step in started if step >= 0) >= 4
        assert result["scores_before"] == reference[1]["scores_before"]
        assert equal(reference[2], adapter(job.publish.catalog, "capitals", tmp_path / "pulled"))

    @pytest.mark.slow
    def test_a_changed_base_is_trained_on_anew(self, job: JobSpec, tmp_path: Path) -> None:
        own = tiny.save_base(tmp_path / "own")
        quick = changed(
            job, model={"path": str(own), "weight_bits": 32}, schedule={"steps": 2}, evaluate={"metrics": []}
        )
        assert train(quick, tmp_path / "out")["version"] == 1
        tiny.save_base(own, tiny.llama(layers=1))
        assert train(quick, tmp_path / "out")["version"] == 2
        # The same training, asked for more: the checkpoint serves, and the bare base is asked the same.
        more = changed(
            quick, evaluate={"metrics": ["exact_match", "chrf"], "max_examples": 4, "max_new_tokens": 2}
        )
        again = train(more, tmp_path / "out")
        assert again["version"] == 3
        assert (
            again["scores_before"].keys()
            == again["scores_after"].keys()
            == {"exact_match", "chrf", "token_loss"}
        )
        assert again["scores_after"]["token_loss"] < again["scores_before"]["token_loss"]

    @pytest.mark.slow
    def test_restart_trains_again_and_publishes_the_next_version(self, job: JobSpec, tmp_path: Path) -> None:
        quick = changed(job, schedule={"steps": 2}, evaluate={"metrics": []})
        assert train(quick, tmp_path / "out")["version"] == 1
        assert train(quick, tmp_path / "out", restart=True)["version"] == 2


class TestMethods:
    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_32bit"])
    def test_four_bits(self, job: JobSpec, tmp_path: Path, optimizer: str) -> None:
        quick = changed(
            job,
            model={"path": job.model.path, "weight_bits": 4},
            optimizer={"kind": optimizer, "learning_rate": 5e-3},
            schedule={"steps": 4},
        )
        result = train(quick, tmp_path / "out")
        assert result["scores_after"]["token_loss"] < result["scores_before"]["token_loss"]

    @pytest.mark.slow
    def test_full_publishes_a_model_that_trains_further(self, job: JobSpec, tmp_path: Path) -> None:
        full = changed(
            job,
            method={"kind": "full"},
            schedule={"steps": 4},
            publish={"catalog": job.publish.catalog, "adapter": "base"},
        )
        result = train(full, tmp_path / "out")
        assert result["scores_after"]["token_loss"] < result["scores_before"]["token_loss"]
        record = Catalog.at(job.publish.catalog).pull("base", tmp_path / "base")
        assert record.kind == "model"
        further = changed(
            job, model={"path": str(tmp_path / "base"), "weight_bits": 32}, schedule={"steps": 1}
        )
        again = train(further, tmp_path / "further")
        # Answers are generated in batches, the loss is a plain sum: equal weights, equal loss.
        assert again["scores_before"]["token_loss"] == pytest.approx(
            result["scores_after"]["token_loss"], abs=1e-6
        )
        assert isinstance(answer_prompt(job.publish.catalog, "base", "Name number 3.", max_new_tokens=2), str)


class TestRefused:
    """Each before any training: nothing is published, and no checkpoint is left."""

    @pytest.fixture(autouse=True)
    def _nothing_published(self, job: JobSpec) -> Any:
        yield
        assert Catalog.at(job.publish.catalog).newest_versions() == {}
        assert not list(Path(job.publish.catalog).glob("runs/*/*/checkpoint_*"))

    def test_a_target_that_does_not_exist(self, job: JobSpec, tmp_path: Path) -> None:
        phases: list[str] = []
        with pytest.raises(ModelError) as caught:
            train(
                changed(job, method={"targets": ["query"]}),
                tmp_path,
                on_event=lambda event: phases.append(event["phase"]),
            )
        assert "start" not in phases, "no worker was asked for"
        assert str(caught.value) == (
            "method.targets: no linear layer is called 'query'; the base has "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
        )

    def test_more_tokens_than_the_model_has_positions(self, job: JobSpec, tmp_path: Path) -> None:
        data = {**job.resolved()["data"], "max_tokens": 512}
        with pytest.raises(ModelError) as caught:
            train(changed(job, data=data), tmp_path)
        assert str(caught.value) == (
            f"data.max_tokens = 512 is above the 256 positions of {job.model.path}; "
            "set data.max_tokens: 256 or less"
        )

    def test_pickled_weights(self, job: JobSpec, tmp_path: Path) -> None:
        pickled = tiny.save_base(tmp_path / "pickled")
        (pickled / "model.safetensors").unlink()
        torch.save({}, pickled / "pytorch_model.bin")
        with pytest.raises(ModelError) as caught:
            train(changed(job, model={"path": str(pickled)}), tmp_path)
        assert str(caught.value) == (
            f"model.path = {pickled}: only pickled weights (pytorch_model.bin), "
            "which can run code when loaded; convert them with save_pretrained(safe_serialization=True)"
        )

    def test_a_folder_that_is_no_model(self, job: JobSpec, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelError, match=r"empty: no config.json; name the folder"):
            train(changed(job, model={"path": str(tmp_path / "empty")}), tmp_path)

    def test_a_model_that_is_nowhere(self, job: JobSpec, tmp_path: Path) -> None:
        with pytest.raises(
            ModelError, match=r"model.path = nobody/nothing: no such folder .*, and the Hub did not"
        ):
            train(changed(job, model={"path": "nobody/nothing"}), tmp_path)

    def test_no_gpu(self, job: JobSpec, tmp_path: Path) -> None:
        if ray.cluster_resources().get("GPU"):
            pytest.skip("this machine has a GPU")
        with pytest.raises(BadInput) as caught:
            train(changed(job, cluster={"device": "gpu"}), tmp_path)
        assert str(caught.value) == (
            "cluster.device = gpu: the cluster has no GPU; add a GPU node, or use device: auto"
        )


@pytest.mark.slow
def test_a_tokenizer_without_a_pad_token(job: JobSpec, tmp_path: Path) -> None:
    bare = tiny.save_base(tmp_path / "bare", pad_token=False)
    quick = changed(job, model={"path": str(bare), "weight_bits": 32}, schedule={"steps": 2})
    assert train(quick, tmp_path / "out")["steps"] == 2


@pytest.mark.slow
def test_data_that_changed_under_a_run(job: JobSpec, capitals: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_bytes(capitals.read_bytes())
    mine = changed(
        job, data={**job.resolved()["data"], "sources": [{"uri": str(own)}]}, cluster={"max_restarts": 0}
    )
    with pytest.raises(TrainingError):
        train(mine, tmp_path / "out", on_event=kill_once_kept(mine.publish.catalog, []))
    own.write_text(own.read_text().replace("number 3", "number three"))
    with pytest.raises(DataError, match=r"^capitals: the data changed since this run began .*--restart$"):
        train(mine, tmp_path / "out")
    assert Catalog.at(job.publish.catalog).newest_versions() == {}
