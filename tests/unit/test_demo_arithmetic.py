"""The demo's data and model: right, repeatable, and readable by what trains on them."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import tokenise_window
from raytune_ft.data.index import divide
from raytune_ft.data.sources import list_objects
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import read_job

SCRIPT = Path(__file__).parents[2] / "jobs" / "demo" / "arithmetic.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_arithmetic", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


arithmetic = _load()
OPERATIONS = {operation.name: operation for operation in arithmetic.OPERATIONS}


def _right(name: str, a: int, b: int, completion: str) -> bool:
    """Checks an answer by another way than the generator takes."""
    numbers = [int(digits) for digits in re.findall(r"\d+", completion)]
    match name:
        case "addition":
            return numbers[0] - b == a
        case "subtraction":
            return numbers[0] + b == a
        case "multiplication":
            return numbers[0] == sum(a for _ in range(b))
        case "successor":
            return numbers[0] - 1 - b == a
        case "swapping":
            return numbers == [b, a]
        case "smaller":
            return numbers == sorted([a, b])[:1]
        case "division":
            quotient, remainder = numbers if "remainder" in completion else (*numbers, 0)
            return quotient * b + remainder == a and remainder < b
        case "copying":
            return numbers == [a, b]
    return numbers == sorted([a, b])[1:]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_answer_is_right(name: str) -> None:
    for example in arithmetic.examples(OPERATIONS[name], seed=0):
        a, b = (int(number) for number in example.pair.split())
        assert re.findall(r"\d+", example.prompt) == [str(a), str(b)]
        assert _right(name, a, b, example.completion), example


def test_answers_of_each_operation_by_hand() -> None:
    answers = {name: operation.answer(49, 6) for name, operation in OPERATIONS.items()}
    assert answers == {
        "addition": "55",
        "copying": "49 6",
        "comparing": "49",
        "subtraction": "43",
        "smaller": "6",
        "swapping": "6 49",
        "successor": "56",
        "multiplication": "294",
        "division": "8 remainder 1",
    }
    assert OPERATIONS["division"].answer(48, 6) == "8"


def test_no_prompt_stands_twice_in_any_of_the_files() -> None:
    prompts = Counter(
        example.prompt
        for operation in OPERATIONS.values()
        for example in arithmetic.examples(operation, seed=0)
    )
    assert max(prompts.values()) == 1


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_each_pair_stands_once_in_each_phrasing(operation: "arithmetic.Operation") -> None:
    made = arithmetic.examples(operation, seed=0)
    wordings = {(example.pair, re.sub(r"\d+", "#", example.prompt)) for example in made}
    assert len(wordings) == len(made) == len(operation.pairs) * len(operation.phrasings)
    assert len({example.pair for example in made}) == len(operation.pairs)


@pytest.mark.parametrize("seed", [0, 1, 2026])
def test_the_seed_alone_decides(seed: int) -> None:
    division = OPERATIONS["division"]
    made = arithmetic.examples(division, seed)
    assert made == arithmetic.examples(division, seed)
    assert made != arithmetic.examples(division, seed + 1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    arithmetic.main(["--to", str(folder)])
    return folder


def test_the_tokenizer_knows_every_word_and_gives_the_text_back(demo: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    lines = [line for file in (demo / "data").iterdir() for line in file.read_text("utf-8").splitlines()]
    texts = sorted({record["prompt"] + record["completion"] for record in map(json.loads, lines)})
    ids = tokenizer(texts)["input_ids"]
    assert max(map(len, ids)) < 64
    assert not [text for text, own in zip(texts, ids, strict=True) if tokenizer.unk_token_id in own]
    assert tokenizer.batch_decode(ids) == texts
    assert len(tokenizer) < 100
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_the_model_loads_and_is_as_small_as_it_says(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    assert 0.6e6 < model.num_parameters() < 0.75e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert not list((demo / "model").glob("*.bin"))


def test_files_do_not_depend_on_when_they_are_written(demo: Path, tmp_path: Path) -> None:
    arithmetic.main(["--to", str(tmp_path)])
    files = sorted(file.relative_to(demo) for file in demo.rglob("*") if file.is_file())
    assert len(files) >= len(OPERATIONS) + 3
    assert all((tmp_path / file).read_bytes() == (demo / file).read_bytes() for file in files)


def test_no_pair_of_the_subtraction_test_stands_in_its_training_data(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO", str(demo))
    job = read_job(SCRIPT.with_name("subtraction.yaml"), [f"model.path={demo / 'model'}"])
    tokenizer = load_tokenizer(job.model)
    (found,) = list_objects(job.data)
    encoder = Encoder.of(tokenizer)
    windows = divide(found, 0, job.data.sources[0].format, None)
    tables = [tokenise_window(found, window, job.data, encoder).table for window in windows]
    pairs: dict[str, set[tuple[str, ...]]] = {"train": set(), "test": set()}
    count = Counter[str]()
    for table in tables:
        for row in table.to_pylist():
            asked = [
                token for token, learned in zip(row["input_ids"], row["learned"], strict=True) if not learned
            ]
            pairs[row["split"]].add(tuple(re.findall(r"\d+", tokenizer.decode(asked))))
            count[row["split"]] += 1
    assert pairs["train"].isdisjoint(pairs["test"])
    assert {split: len(of_split) for split, of_split in pairs.items()} == {
        split: number / 3 for split, number in count.items()
    }
    assert count["test"] >= job.evaluate.max_examples
