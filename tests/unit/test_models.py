"""Base models and tokenizers: what loads, what is refused, and in which words."""

import fcntl
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from raytune_ft.errors import ModelError
from raytune_ft.model_files import _from_bucket, base_digest, base_identity, model_folder, read_facts
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.spec import ModelSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "saved")


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    """A base that the test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def spec(folder: Path, bits: int = 32) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(folder), "weight_bits": bits})


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loading_refusal(folder: Path) -> str:
    return refusal(lambda: load_base(spec(folder), device=CPU))


class TestFolder:
    @pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "{}/"])
    def test_a_folder_is_used_as_it_is(self, base: Path, form: str) -> None:
        assert model_folder(form.format(base)) == base

    def test_a_copy_that_another_worker_makes_is_waited_for(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
        copy = _from_bucket(str(base), weights=False)
        (copy / ".model.safetensors.partial").write_bytes(b"what a worker left that was killed")
        weights = copy / "model.safetensors"
        with copy.with_name(f".{copy.name}.lock").open() as lock, ThreadPoolExecutor() as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(_from_bucket, str(base), True)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            weights.write_bytes(b"the other's")
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert waiting.result() == copy
        assert weights.read_bytes() == b"the other's"
        assert not [file.name for file in copy.iterdir() if file.name.startswith(".")]

    def test_the_home_folder(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(base.parent))
        assert model_folder("~/base") == base

    def test_signs_that_mean_something_in_other_uris(self, base: Path) -> None:
        odd = base.rename(base.with_name("a b#1"))
        assert model_folder(f"file://{odd}") == model_folder(str(odd)) == odd

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("file://{}/none", "model.path = file://{}/none: no such folder"),
            ("{}/base/config.json", "model.path = {}/base/config.json: no such folder"),
            ("{}/none", "model.path = {}/none: no such folder, and not a Hub id"),
            (
                "nobody/nothing",
                "model.path = nobody/nothing: no such folder (looked for {cwd}/nobody/nothing), and the Hub "
                "did not give it (LocalEntryNotFoundError); check the name, HF_TOKEN and HF_HUB_OFFLINE",
            ),
            (
                "{}",
                "model.path = {}: no config.json; name the folder that holds the model's files",
            ),
        ],
    )
    def test_what_is_no_model(self, base: Path, path: str, message: str) -> None:
        path, message = path.format(base.parent), message.format(base.parent, cwd=Path.cwd())
        assert refusal(lambda: model_folder(path)) == message

    @pytest.mark.parametrize("names", [["pytorch_model.bin"], ["a.pt", "b.ckpt", "c.pth"]])
    def test_pickled_weights_alone(self, base: Path, names: list[str]) -> None:
        (base / "model.safetensors").unlink()
        for name in names:
            torch.save({}, base / name)
        assert refusal(lambda: model_folder(str(base))) == (
            f"model.path = {base}: only pickled weights ({', '.join(names)}), "
            "which can run code when loaded; convert them with save_pretrained(safe_serialization=True)"
        )

    def test_pickled_weights_beside_safe_ones_are_left_alone(self, base: Path) -> None:
        (base / "pytorch_model.bin").write_bytes(b"no pickle, so that to load it would fail")
        assert isinstance(load_base(spec(base), device=CPU), PreTrainedModel)

    def test_no_weights(self, base: Path) -> None:
        (base / "model.safetensors").unlink()
        assert refusal(lambda: model_folder(str(base))) == f"model.path = {base}: no .safetensors file"


class TestDigest:
    def test_the_same_for_every_copy(self, base: Path, saved: Path) -> None:
        (base / "model.safetensors").touch()
        (base / "README.md").write_text("Not part of what a model computes.")
        assert base_digest(base) == base_digest(saved)
        assert base_identity(str(base)) == base_identity(str(saved))

    def test_another_tokenizer_is_another_base(self, base: Path, saved: Path) -> None:
        (base / "chat_template.jinja").write_text("{{ messages }}")
        assert base_digest(base) == base_digest(saved)
        assert base_identity(str(base)) != base_identity(str(saved))

    @pytest.mark.parametrize("cached", [False, True])
    def test_of_the_hub_the_revision_whatever_is_in_the_cache(
        self, saved: Path, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        revision = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "models--org--base"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision)
        shutil.copytree(saved, repository / "snapshots" / revision)
        if not cached:
            (repository / "snapshots" / revision / "model.safetensors").unlink()
        assert base_identity("org/base") == revision

    def test_another_for_other_weights(self, base: Path, saved: Path) -> None:
        weights = load_file(base / "model.safetensors")
        weights["model.norm.weight"] += 0.5
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        assert base_digest(base) != base_digest(saved)

    def test_another_for_another_config(self, base: Path, saved: Path) -> None:
        change_json(base / "config.json", rms_norm_eps=1e-5)
        assert base_digest(base) != base_digest(saved)

    def test_another_for_other_files(self, base: Path, saved: Path) -> None:
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        renamed = base_digest(base)
        assert renamed != base_digest(saved)
        (base / "more.safetensors").write_bytes(b"")
        assert base_digest(base) not in (renamed, base_digest(saved))

    def test_first_and_last_bytes_of_a_large_file_count(self, base: Path) -> None:
        weights = base / "model.safetensors"
        weights.write_bytes(bytes(8 << 20))
        digests = {base_digest(base)}
        for place in (0, (8 << 20) - 1):
            content = bytearray(8 << 20)
            content[place] = 1
            weights.write_bytes(content)
            digests.add(base_digest(base))
        assert len(digests) == 3


class TestTokenizer:
    def test_a_pad_token_of_its_own(self, base: Path) -> None:
        assert load_tokenizer(spec(base)).pad_token == "<pad>"

    def test_without_a_pad_token_it_pads_with_eos(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(spec(tiny.save_base(tmp_path / "bare", pad_token=False)))
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1

    def test_without_eos(self, base: Path) -> None:
        change_json(base / "tokenizer_config.json", eos_token=None)
        assert refusal(lambda: load_tokenizer(spec(base))) == (
            f"model.path = {base}: the tokenizer has no EOS token, so no answer could learn to end"
        )

    def test_none(self, base: Path) -> None:
        for file in base.glob("tokenizer*"):
            file.unlink()
        message = refusal(lambda: load_tokenizer(spec(base)))
        assert message.startswith(f"model.path = {base}: the tokenizer does not load: Couldn't instantiate")

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_broken(self, base: Path, content: str) -> None:
        (base / "tokenizer.json").write_text(content)
        message = refusal(lambda: load_tokenizer(spec(base)))
        assert message.startswith(f"model.path = {base}: the tokenizer does not load: ")


class TestLoad:
    @pytest.mark.parametrize(
        ("bits", "linear", "rest"),
        [
            (4, torch.uint8, torch.bfloat16),
            (8, torch.int8, torch.bfloat16),
            (16, torch.bfloat16, torch.bfloat16),
            (32, torch.float32, torch.float32),
        ],
    )
    def test_types(self, base: Path, bits: int, linear: torch.dtype, rest: torch.dtype) -> None:
        model = load_base(spec(base, bits), device=CPU)
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        assert layer.weight.dtype == linear
        assert model.get_input_embeddings().weight.dtype == model.model.norm.weight.dtype == rest
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_the_values_are_those_of_the_file(self, base: Path) -> None:
        loaded = load_base(spec(base), device=CPU).state_dict()
        for name, tensor in load_file(base / "model.safetensors").items():
            assert torch.equal(loaded[name], tensor)

    def test_dequantised_values_are_rounded_ones(self, base: Path) -> None:
        plain = load_base(spec(base), device=CPU)
        rounded = load_base(spec(base, 4), device=CPU, dequantised=True)
        name = "model.layers.1.self_attn.o_proj"
        before, after = (model.get_submodule(name).weight for model in (plain, rounded))
        assert after.dtype == torch.bfloat16
        apart = (before - after.float()).abs().max() / before.abs().max()
        assert 1e-3 < apart < 0.2


class TestBrokenModel:
    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
            (b"\xff", "not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
            (b"[]", "not a model's config: holds a list, not an object"),
            (b"null", "not a model's config: holds a NoneType, not an object"),
        ],
    )
    def test_a_config_that_is_none(self, base: Path, content: bytes, complaint: str) -> None:
        (base / "config.json").write_bytes(content)
        assert refusal(lambda: read_facts(base)) == f"{base / 'config.json'}: {complaint}"
        assert loading_refusal(base).startswith(f"model.path = {base}: the model does not load: ")
        message = refusal(lambda: load_tokenizer(spec(base)))
        assert message.startswith(f"model.path = {base}: the tokenizer does not load: ")

    def test_an_unknown_architecture(self, base: Path) -> None:
        change_json(base / "config.json", model_type="perceptron")
        assert loading_refusal(base).startswith(
            f"model.path = {base}: the model does not load: "
            "The checkpoint you are trying to load has model type `perceptron`"
        )

    @pytest.mark.parametrize("bits", [4, 8, 32])
    def test_weights_of_another_config(self, base: Path, bits: int) -> None:
        change_json(base / "config.json", intermediate_size=96)
        assert refusal(lambda: load_base(spec(base, bits), device=CPU)) == (
            f"model.path = {base}: 6 weights have another shape than config.json says, "
            "the first model.layers.0.mlp.down_proj.weight: [64, 128], not [64, 96]; "
            "put the config of these weights back"
        )

    @pytest.mark.parametrize("bits", [4, 32])
    def test_weights_that_are_missing(self, base: Path, bits: int) -> None:
        weights = load_file(base / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        assert refusal(lambda: load_base(spec(base, bits), device=CPU)) == (
            f"model.path = {base}: 1 weights are missing, the first model.layers.1.mlp.up_proj.weight; "
            "copy the whole model again"
        )

    def test_weights_cut_short(self, base: Path) -> None:
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        assert loading_refusal(base).startswith(
            f"model.path = {base}: the model does not load: Error while deserializing header"
        )

    def test_another_kind_of_model(self, base: Path) -> None:
        change_json(base / "config.json", model_type="bert")
        assert loading_refusal(base).startswith(
            f"model.path = {base}: 44 weights are missing, the first bert."
        )


class TestRemoteCode:
    """A folder may bring Python code; it runs only where the job file says so."""

    @pytest.fixture
    def mark(self, base: Path) -> Path:
        """The file by which the code that comes with `base` shows that it ran."""
        mark = base.parent / "ran"
        code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nraise RuntimeError('ran')\n"
        for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
            (base / name).write_text(code)
        return mark

    def test_of_a_model(self, base: Path, mark: Path) -> None:
        names = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
        change_json(base / "config.json", model_type="own", auto_map=names)
        assert loading_refusal(base) == (
            f"model.path = {base}: the model does not load: it needs Python code of its own; "
            "read that code, then set model.trust_remote_code: true"
        )
        assert not mark.exists()

    def test_of_a_tokenizer(self, base: Path, mark: Path) -> None:
        names = {"AutoTokenizer": ["tokenization_own.Own", None]}
        change_json(base / "tokenizer_config.json", tokenizer_class="Own", auto_map=names)
        assert refusal(lambda: load_tokenizer(spec(base))) == (
            f"model.path = {base}: the tokenizer does not load: it needs Python code of its own; "
            "read that code, then set model.trust_remote_code: true"
        )
        assert not mark.exists()

    def test_is_not_needed_for_a_known_architecture(self, base: Path, mark: Path) -> None:
        change_json(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
        assert type(load_base(spec(base), device=CPU)).__name__ == "LlamaForCausalLM"
        assert not mark.exists()

    def test_runs_where_the_job_says_so(self, base: Path, mark: Path) -> None:
        names = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
        change_json(base / "config.json", model_type="own", auto_map=names)
        trusting = spec(base).model_copy(update={"trust_remote_code": True})
        refusal(lambda: load_base(trusting, device=CPU))
        assert mark.exists()


@pytest.mark.parametrize("said", ["[gloo] Connection closed by peer", "the process group was taken away"])
def test_a_worker_that_is_lost_while_a_base_is_divided_is_no_fault_of_the_base(
    saved: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lose)
    # Without a process group any error may be that of a worker whose group is gone.
    with pytest.raises(RuntimeError, match=re.escape(said)):
        load_base(spec(saved), device=None)
    with pytest.raises(ModelError, match="the model does not load"):
        load_base(spec(saved), device=CPU)
