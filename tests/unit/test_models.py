"""Base models and tokenizers: what loads, what is refused, and in which words."""

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from raytune_ft.errors import ModelError
from raytune_ft.model_files import (
    _from_bucket,
    base_digest,
    base_identity,
    check_tokenizer,
    is_base,
    model_folder,
    read_facts,
    tokenizer_digest,
)
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


class TestWeightIndex:
    """What says where the weights are is checked before transformers follows it."""

    INDEX = "model.safetensors.index.json"
    NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    REMEDY = (
        ", and weights may only stand in .safetensors files of the folder itself; "
        "write the model again with save_pretrained"
    )

    @pytest.fixture
    def sharded(self, base: Path) -> Path:
        """A base in two shards, as transformers writes it."""
        weights = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        names = sorted(weights)
        shards = {self.NAMES[0]: names[:9], self.NAMES[1]: names[9:]}
        for file, tensors in shards.items():
            save_file({name: weights[name] for name in tensors}, base / file, metadata={"format": "pt"})
        self.write_index(base, {name: file for file, tensors in shards.items() for name in tensors})
        return base

    def write_index(self, folder: Path, weight_map: Any) -> None:
        (folder / self.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def test_shards_that_it_names_are_loaded(self, sharded: Path, saved: Path) -> None:
        loaded = load_base(spec(sharded), device=CPU).state_dict()
        for name, tensor in load_file(saved / "model.safetensors").items():
            assert torch.equal(loaded[name], tensor)

    @pytest.mark.parametrize(
        "shard",
        [
            "../../outside/y.safetensors",
            "/outside/y.safetensors",
            "more/y.safetensors",
            "more\\y.safetensors",
            "..",
            "b.bin",
            "y.safetensors.bin",
            "y.SAFETENSORS",
            "y\0.safetensors",
            "",
            7,
            None,
            ["model.safetensors"],
        ],
    )
    @pytest.mark.parametrize("weights", [True, False])
    def test_shards_elsewhere_or_of_another_kind(self, sharded: Path, shard: Any, weights: bool) -> None:
        for place in ("model.norm.weight", "zz"):
            said = json.loads((sharded / self.INDEX).read_text())["weight_map"]
            self.write_index(sharded, {**said, place: shard})
            expected = f"model.path = {sharded}: {self.INDEX} names {shard!r}{self.REMEDY}"
            assert refusal(lambda: model_folder(str(sharded), weights=weights)) == expected
            assert refusal(lambda: base_digest(sharded)) == expected
        assert loading_refusal(sharded) == expected

    def test_pickles_are_never_loaded(self, sharded: Path, tmp_path: Path) -> None:
        """An index whose shards are all pickles: transformers itself would unpickle them."""

        class Marks:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "ran",)

        torch.save({"model.norm.weight": Marks()}, sharded / "b.bin")
        torch.save({"model.norm.weight": Marks()}, sharded / "adapter_model.bin")
        said = json.loads((sharded / self.INDEX).read_text())["weight_map"]
        self.write_index(sharded, dict.fromkeys(said, "b.bin"))
        assert f"names 'b.bin'{self.REMEDY}" in loading_refusal(sharded)
        self.write_index(sharded, said)
        for name in ("adapter_model.bin", "../base/model.safetensors", 3):
            change_json(sharded / "config.json", transformers_weights=name)
            assert loading_refusal(sharded) == (
                f"model.path = {sharded}: config.json: transformers_weights names {name!r}{self.REMEDY}"
            )
        assert not (tmp_path / "ran").exists()

    def test_pickles_and_their_index_beside_safetensors_are_left_alone(self, sharded: Path) -> None:
        (sharded / "b.bin").write_bytes(b"no pickle, so that to load it would fail")
        index = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "b.bin"}})
        (sharded / "pytorch_model.bin.index.json").write_text(index)
        assert isinstance(load_base(spec(sharded), device=CPU), PreTrainedModel)

    def test_a_config_may_name_the_files(self, sharded: Path) -> None:
        (sharded / self.INDEX).rename(sharded / "own.safetensors.index.json")
        change_json(sharded / "config.json", transformers_weights="own.safetensors.index.json")
        assert isinstance(load_base(spec(sharded), device=CPU), PreTrainedModel)
        (sharded / "own.safetensors.index.json").unlink()
        assert loading_refusal(sharded) == (
            f"model.path = {sharded}: own.safetensors.index.json is not there, and config.json names it "
            "(1 of 1 weight files are missing); copy the whole model again"
        )

    def test_an_adapter_beside_the_weights(self, base: Path) -> None:
        """By its config transformers loads the base that it names."""
        config = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}
        (base / "adapter_config.json").write_text(json.dumps(config))
        assert loading_refusal(base) == (
            f"model.path = {base}: holds adapter_config.json, by which transformers would load another base; "
            "remove that file, or merge the adapter with raytune-ft catalog merge"
        )

    @pytest.mark.parametrize("weights", [True, False])
    def test_a_missing_shard_is_named(self, sharded: Path, weights: bool) -> None:
        (sharded / self.NAMES[1]).unlink()
        assert refusal(lambda: model_folder(str(sharded), weights=weights)) == (
            f"model.path = {sharded}: {self.NAMES[1]} is not there, and {self.INDEX} names it (1 of 2 weight "
            "files are missing); copy the whole model again"
        )

    @pytest.mark.parametrize(
        "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9**5]
    )
    def test_what_is_no_index(self, sharded: Path, content: str) -> None:
        (sharded / self.INDEX).write_text(content)
        assert loading_refusal(sharded) == (
            f"model.path = {sharded}: {self.INDEX} is no index of weights; copy the whole model again"
        )

    def test_from_a_bucket_nothing_is_fetched_that_it_leads_astray(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
        assert base_digest(_from_bucket(str(sharded), weights=True)) == base_digest(sharded)
        self.write_index(sharded, {"model.norm.weight": "../y.safetensors"})
        assert "names '../y.safetensors'" in refusal(lambda: _from_bucket(str(sharded), weights=True))
        self.write_index(sharded, {"model.norm.weight": "gone.safetensors"})
        for weights in (True, False):
            message = refusal(lambda weights=weights: _from_bucket(str(sharded), weights))  # type: ignore[misc]
            assert "gone.safetensors is not there" in message
        fetched = [file.parent.name for file in (tmp_path / "cache").rglob("*.safetensors")]
        assert len(set(fetched)) == 1


class TestDigestOfShards:
    """Digests stand in the records of catalogs: of usual folders they never change."""

    SHARDS = MappingProxyType(
        {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
    )

    def folder(self, at: Path, files: Mapping[str, bytes], named: Iterable[str] = ()) -> Path:
        at.mkdir()
        for name, content in {"config.json": b"{}", **files}.items():
            (at / name).write_bytes(content)
        if named:
            index = {"metadata": {}, "weight_map": {f"weight {name}": name for name in named}}
            (at / "model.safetensors.index.json").write_text(json.dumps(index))
        return at

    def test_as_they_always_were(self, tmp_path: Path) -> None:
        single = self.folder(tmp_path / "single", {"model.safetensors": b"weights"})
        assert base_digest(single) == "18c9e6438d1e197c68cb323fc8e9125ccf827b9b2179e474c23d47395c053cee"
        sharded = self.folder(tmp_path / "sharded", self.SHARDS, self.SHARDS)
        assert base_digest(sharded) == "051ccea6dfae20666e4b30449bb125c2b7e9dc8626ac14a2ba1fa009501ee85d"

    def test_of_files_that_are_not_read_nothing(self, tmp_path: Path) -> None:
        folder = self.folder(
            tmp_path / "base", {**self.SHARDS, "consolidated.safetensors": b"all"}, self.SHARDS
        )
        digest = base_digest(folder)
        (folder / "consolidated.safetensors").write_bytes(b"changed")
        assert base_digest(folder) == digest
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"One")
        assert base_digest(folder) != digest

    def test_another_index_is_another_base(self, tmp_path: Path) -> None:
        first, second = self.SHARDS
        one = self.folder(tmp_path / "one", self.SHARDS, [first])
        other = self.folder(tmp_path / "other", self.SHARDS, [second])
        both = self.folder(tmp_path / "both", self.SHARDS, self.SHARDS)
        assert len({base_digest(folder) for folder in (one, other, both)}) == 3

    def test_records_of_earlier_versions_hold(self, tmp_path: Path) -> None:
        """They cover all safetensors files of the folder."""
        folder = self.folder(
            tmp_path / "base", {**self.SHARDS, "consolidated.safetensors": b"all"}, self.SHARDS
        )
        earlier = "0c038d626c2921710420c5a35f4976765c10718b4dbfbf29aa96123fef756c13"
        assert base_digest(folder) != earlier
        assert is_base(folder, earlier, earlier=True)
        assert not is_base(folder, earlier, earlier=False)
        for of_then in (True, False):
            assert is_base(folder, base_digest(folder), earlier=of_then)
            assert not is_base(folder, "d" * 64, earlier=of_then)


class TestTokenizerDigest:
    @pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "vocab.txt", "spiece.model"])
    def test_another_for_other_files(self, base: Path, saved: Path, name: str) -> None:
        content = (base / name).read_text() if (base / name).is_file() else ""
        (base / name).write_text(f"{content} ")
        assert tokenizer_digest(base) != tokenizer_digest(saved)

    def test_the_same_whatever_else_stands_there(self, base: Path, saved: Path) -> None:
        for name in ("README.txt", "config.json", "trainer_state.json", "more.safetensors", "tokenizer.py"):
            (base / name).write_text("not the tokenizer's")
        assert tokenizer_digest(base) == tokenizer_digest(saved)

    def test_what_a_record_says_is_compared(self, base: Path) -> None:
        then = tokenizer_digest(base)
        check_tokenizer("sum@v1", str(base), then)
        (base / "chat_template.jinja").write_text("{{ messages }}")
        check_tokenizer("sum@v1", str(base), None)
        assert refusal(lambda: check_tokenizer("sum@v1", str(base), then)) == (
            f"sum@v1 was trained with another tokenizer than {base} holds now (digest {then[:12]}…, found "
            f"{tokenizer_digest(base)[:12]}…); put the tokenizer and chat template of then back, "
            "or train again"
        )


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
