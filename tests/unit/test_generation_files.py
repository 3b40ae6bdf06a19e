"""What is published ends its answers elsewhere where they end here, and costs its bytes once."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from answerers import CHATML, chat_base, chat_tokenizer, job_of, llama_of, recipe_of
from overfitting import Folders
from test_generate import says
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from raytune_ft.catalog import Catalog, copy_version, verify
from raytune_ft.generation_files import add_ends, write_generation_config, write_tokenizer
from raytune_ft.merge import Combination, combine_adapters, merge_into_folder
from raytune_ft.spec import JobSpec
from raytune_ft.train.peers import Peers
from raytune_ft.train.workbench import set_up

WORDS = chat_tokenizer()
END = WORDS.convert_tokens_to_ids("<|im_end|>")
TOLD = ["fox", "<|im_end|>", "dog"]
"""What the base says, token after token; its EOS comes never."""
RECORDS = [
    {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "fox"}]}
    for n in range(12)
]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base that says `fox<|im_end|>dog` to everything, and knows no end but EOS, which it never says."""
    words = chat_tokenizer()
    order = [int(WORDS.encode("\n")[-1]), *WORDS.encode("".join(TOLD))]
    model = says(llama_of(words), order)
    model.generation_config = GenerationConfig(
        eos_token_id=1, pad_token_id=2, temperature=0.7, do_sample=True, repetition_penalty=1.5
    )
    model.config.tie_word_embeddings = False
    return chat_base(tmp_path / "base", words, model)


def trained(job: JobSpec) -> Path:
    """A job without Ray; what it published, pulled."""
    recipe, assignment = recipe_of(job)
    bench = set_up(assignment, None, Peers())
    # No step is needed: the base says what it is to learn. An adapter that is all zero cannot be merged.
    for name, parameter in bench.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 1e-9)
    entry = {"step": 1, "loss": 1.0, "tokens": 1, "learned_tokens": 1, "seconds": 1.0}
    position = replace(recipe.begin(bench, None), step=1, history=[entry])
    folder = Path(job.publish.catalog).parent / f"written-{job.name}"
    folder.mkdir()
    done = recipe.finish(bench, position, folder, Folders(folder).fetch)
    assert done is not None
    recipe.publish(done, None, 1.0)
    to = folder.parent / f"pulled-{job.name}"
    Catalog.at(job.publish.catalog).pull(job.adapter_name, to)
    return to


def answer(model: Any, tokenizer: Any, **settings: Any) -> list[int]:
    """What plain `generate` adds to a chat's question."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False, **settings)[0]
    return list(said[prompt["input_ids"].shape[1] :].tolist())


class TestElsewhere:
    def test_the_base_goes_on(self, base: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base)
        assert END in answer(model, AutoTokenizer.from_pretrained(base))[:-1]

    def test_a_model_folder_ends_as_it_was_taught(self, base: Path, tmp_path: Path) -> None:
        full = {"method": {"kind": "full"}, "optimizer": {"learning_rate": 1.0e-9}}
        pulled = trained(job_of(base, tmp_path, RECORDS, **full))
        model = AutoModelForCausalLM.from_pretrained(pulled)
        said = answer(model, AutoTokenizer.from_pretrained(pulled))
        assert said[-1] == END
        assert WORDS.decode(said, skip_special_tokens=True) == "fox"
        assert json.loads((pulled / "config.json").read_text())["eos_token_id"] == [1, END]
        settings = json.loads((pulled / "generation_config.json").read_text())
        kept = {"pad_token_id": 2, "temperature": 0.7, "do_sample": True, "repetition_penalty": 1.5}
        assert settings.items() >= {**kept, "eos_token_id": [1, END]}.items()

    def test_a_model_whose_settings_contradict_each_other_is_published(
        self, base: Path, tmp_path: Path
    ) -> None:
        path = base / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False}))
        full = {"method": {"kind": "full"}, "optimizer": {"learning_rate": 1.0e-9}}
        pulled = trained(job_of(base, tmp_path, RECORDS, **full))
        settings = json.loads((pulled / "generation_config.json").read_text())
        assert settings.items() >= {"do_sample": False, "temperature": 0.7, "eos_token_id": [1, END]}.items()

    def test_an_adapter_brings_along_what_ends_its_answers(self, base: Path, tmp_path: Path) -> None:
        pulled = trained(job_of(base, tmp_path, RECORDS))
        tokenizer = AutoTokenizer.from_pretrained(pulled)
        assert tokenizer.chat_template == CHATML
        settings = GenerationConfig.from_pretrained(pulled)
        loaders = [
            lambda: peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), pulled),
            lambda: peft.AutoPeftModelForCausalLM.from_pretrained(pulled),
        ]
        for load in loaders:
            model = load()
            assert answer(model, tokenizer, generation_config=settings)[-1] == END
            model.generation_config = settings
            said = answer(model, tokenizer)
            assert said[-1] == END
            assert tokenizer.decode(said, skip_special_tokens=True) == "fox"

    def test_what_is_merged_from_it_ends_so_too(self, base: Path, tmp_path: Path) -> None:
        jobs = [job_of(base, tmp_path, RECORDS, name=name) for name in ("one", "other")]
        pulled = [trained(job) for job in jobs]
        catalog = Catalog.at(str(tmp_path / "catalog"))
        combine_adapters(catalog, ["one", "other"], Combination.of("cat", 2), name="both")
        catalog.pull("both", tmp_path / "both")
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        ):
            assert (tmp_path / "both" / name).read_bytes() == (pulled[0] / name).read_bytes(), name
        merge_into_folder(catalog, "both", tmp_path / "whole")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        assert answer(model, AutoTokenizer.from_pretrained(tmp_path / "whole"))[-1] == END


class TestBytes:
    def test_a_tokenizer_is_stored_once(self, base: Path, tmp_path: Path) -> None:
        for name in ("one", "other"):
            trained(job_of(base, tmp_path, RECORDS, name=name))
        catalog = Catalog.at(str(tmp_path / "catalog"))
        one, other = ({e.name: e.sha256 for e in catalog.resolve(name).files} for name in ("one", "other"))
        shared = {name for name in one if one[name] == other[name]}
        assert shared >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        stored = [path.name for path in (tmp_path / "catalog" / "blobs").rglob("*") if path.is_file()]
        assert len(stored) == len(set(one.values()) | set(other.values()))

    def test_verify_and_copies_take_it_for_what_it_is(self, base: Path, tmp_path: Path) -> None:
        pulled = trained(job_of(base, tmp_path, RECORDS))
        catalog, elsewhere = (Catalog.at(str(tmp_path / name)) for name in ("catalog", "elsewhere"))
        assert verify(catalog).problems == ()
        copy_version(catalog, elsewhere, "answers")
        elsewhere.pull("answers", tmp_path / "copied")
        copied = {file.name: file.read_bytes() for file in (tmp_path / "copied").iterdir()}
        assert copied == {file.name: file.read_bytes() for file in pulled.iterdir()}

    def test_what_a_tokenizer_did_before_changes_nothing(self, tmp_path: Path) -> None:
        def written(tokenizer: PreTrainedTokenizerFast, name: str) -> dict[str, bytes]:
            (folder := tmp_path / name).mkdir()
            write_tokenizer(folder, tokenizer, is_model=False)
            return {path.name: path.read_bytes() for path in folder.iterdir()}

        used = chat_tokenizer()
        used(["a", "b c"], padding=True, truncation=True, max_length=7)
        assert written(used, "used") == written(chat_tokenizer(), "new")

    def test_half_of_a_tokenizer_with_code_is_not_written_beside_an_adapter(self, tmp_path: Path) -> None:
        words = chat_tokenizer()
        words.init_kwargs["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        write_tokenizer(tmp_path, words, is_model=False)
        assert not list(tmp_path.iterdir())
        write_tokenizer(tmp_path, words, is_model=True)
        assert (tmp_path / "tokenizer.json").is_file()


class TestGenerationConfig:
    def written(self, folder: Path, model: PreTrainedModel, end_ids: list[int]) -> dict[str, Any]:
        write_generation_config(folder, model, tiny.tokenizer(), end_ids)
        settings: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
        return settings

    def test_a_single_end_is_a_number(self, tmp_path: Path) -> None:
        assert self.written(tmp_path, tiny.llama(), [1])["eos_token_id"] == 1

    def test_padding_is_the_tokenizers_where_the_base_has_none(self, tmp_path: Path) -> None:
        model = tiny.llama()
        model.generation_config = GenerationConfig(eos_token_id=[7])
        found = self.written(tmp_path, model, [9])
        assert (found["eos_token_id"], found["pad_token_id"]) == ([1, 7, 9], 2)
        assert model.generation_config.eos_token_id == [7]

    def test_settings_that_contradict_each_other_are_no_reason_to_fail(self, tmp_path: Path) -> None:
        model = tiny.llama()
        model.generation_config.temperature = 0.5
        assert self.written(tmp_path, model, [1])["temperature"] == 0.5

    def test_a_decoder_begins_as_before(self, tmp_path: Path) -> None:
        assert self.written(tmp_path, tiny.t5(), [])["decoder_start_token_id"] == 2

    def test_a_classifier_has_none(self, tmp_path: Path) -> None:
        write_generation_config(tmp_path, tiny.bert(), tiny.wordpiece(), [3])
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("content", "ends"),
        [('{"eos_token_id": 4}', [4, 9]), ('{"eos_token_id": [4, 9]}', [4, 9]), ("{}", 9)],
    )
    def test_ends_are_added(self, tmp_path: Path, content: str, ends: Any) -> None:
        path = tmp_path / "generation_config.json"
        path.write_text(content)
        assert add_ends(path, [9])
        assert json.loads(path.read_text()) == {"eos_token_id": ends}

    @pytest.mark.parametrize("content", ["[]", "{", "\xff", '{"eos_token_id": ["x"]}', "[" * 100_000])
    def test_what_is_no_config_is_refused(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "generation_config.json"
        path.write_text(content, encoding="latin-1")
        assert not add_ends(path, [9])
        assert path.read_text(encoding="latin-1") == content
