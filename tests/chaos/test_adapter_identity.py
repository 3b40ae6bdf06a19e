"""Tasks with the same inputs in one fleet: at its own task each adapter is better than every other.

Inputs do not tell the tasks apart, so whatever an adapter answers comes from its own weights. The adapters
are read by peft, and the loss is computed with transformers alone.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lanes import CHANNEL, PLACEMENT, Shop, fleet_of, job_on
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.catalog import Catalog
from raytune_ft.data.prepare import prepare
from raytune_ft.fleet.events import JobDone
from raytune_ft.model_files import base_identity
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.loop import fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.recipe import Recipe
from raytune_ft.train.run import RunState
from raytune_ft.train.workbench import set_up

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

Pairs = list[tuple[str, str]]
"""Inputs and outputs of a task."""

TRANSLATIONS = ("translation_en-de", "translation_en-fr")
COUNTRIES = {
    "capital": "task1146_country_capital",
    "currency": "task1147_country_currency",
    "calling-code": "task1317_country_calling_code",
    "national-dish": "task1318_country_national_dish",
    "independence-year": "task1426_country_independence_year",
}
MAX_TOKENS = 96
HELD_OUT_EVERY = 5


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def translations(data: Path) -> dict[str, Pairs]:
    """English words, and each in another language; one after another by frequency."""
    found = {}
    for name in TRANSLATIONS:
        path = data / "tasks" / "instruction_induction" / "induce" / f"{name}.json"
        examples = json.loads(path.read_text())["examples"].values()
        found[name.replace("_", "-")] = [(example["input"], example["output"]) for example in examples]
    return found


def countries(data: Path) -> dict[str, Pairs]:
    """Countries without the definitions of the tasks, and what each task says of them."""
    found = {}
    for name, file in COUNTRIES.items():
        path = data / "tasks" / "natural_instructions" / f"{file}.json"
        instances = json.loads(path.read_text())["Instances"]
        found[name] = [(instance["input"], instance["output"][0]) for instance in instances]
    return found


def with_the_same_inputs(tasks: Mapping[str, Pairs]) -> dict[str, dict[str, str]]:
    """Of each task the answers to those inputs that all tasks have."""
    answers = {name: dict(reversed(pairs)) for name, pairs in tasks.items()}
    shared = set.intersection(*(set(of_task) for of_task in answers.values()))
    return {name: {text: of_task[text] for text in sorted(shared)} for name, of_task in answers.items()}


def divided(tasks: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """What is trained on and what is held out; the same inputs of all tasks."""
    train, held = {}, {}
    for name, answers in tasks.items():
        pairs = [(f"Input: {text}\nOutput:", f" {answer}") for text, answer in answers.items()]
        held[name] = pairs[::HELD_OUT_EVERY]
        train[name] = [pair for at, pair in enumerate(pairs) if at % HELD_OUT_EVERY]
    return train, held


def write_pairs(pairs: Pairs, path: Path) -> Path:
    lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs)
    path.write_text("\n".join(lines) + "\n")
    return path


def learn_base(folder: Path, files: Sequence[Path], steps: int) -> Path:
    """A base that has seen all the tasks, and cannot know which of them is asked for."""
    tiny.save_base(folder / "random", tiny.llama(hidden=128, layers=4))
    job = parse_job(
        {
            "name": "base",
            "model": {"path": str(folder / "random"), "weight_bits": 32},
            "data": {
                "sources": [{"uri": str(file), "template": "plain"} for file in files],
                "max_tokens": MAX_TOKENS,
                "split": {"validation": 0, "test": 0},
            },
            "method": {"kind": "full"},
            "optimizer": {"learning_rate": 3.0e-3},
            "schedule": {"steps": steps},
            "batch": {"sequences": 32},
            "cluster": {"device": "cpu"},
            "evaluate": {"metrics": []},
            "publish": {"catalog": str(folder / "unused")},
        }
    )
    model = folder / "base"
    model.mkdir()
    _train_alone(job, model)
    load_tokenizer(job.model).save_pretrained(model)
    return model


def _train_alone(job: JobSpec, to: Path) -> None:
    data = prepare(job, tokenizer=load_tokenizer(job.model), cache=False, here=True)
    state = RunState(1, "attempt", data.fingerprint, base_identity(job.model.path))
    assignment = Assignment(job, state, TrainingData.of(job, data, None), CHANNEL, PLACEMENT)
    recipe = Recipe(assignment, Peers(), lambda _: None)
    bench = set_up(assignment, None, Peers())
    recipe.begin(bench, None)
    with recipe.steps(bench.layout, 0) as steps:
        fit(bench.engine, steps, start=0, learning_rate=recipe.learning_rate, report=lambda _: None)
    bench.write_result(job, to, 0)


def learn_fleet(folder: Path, base: Path, files: Mapping[str, Path], steps: int) -> Path:
    """Train an adapter for each task, all of them together; the catalog."""
    data = {"max_tokens": MAX_TOKENS, "split": {"validation": 0, "test": 0}}
    changes: dict[str, Any] = {
        "method": {"rank": 16, "alpha": 32},
        "optimizer": {"learning_rate": 3.0e-3},
        "schedule": {"steps": steps},
        "batch": {"sequences": 16},
        "checkpoint": {"every_steps": steps},
    }
    jobs = {name: job_on(path, data=data, **changes) for name, path in files.items()}
    for job in jobs.values():
        job["data"]["sources"][0]["template"] = "plain"
    catalog = folder / "catalog"
    shop = Shop(fleet_of(base, catalog, jobs, lanes={"slots": len(jobs)}), folder / "fleet")
    shop.run()
    shop.close()
    assert len([event for event in shop.events if isinstance(event, JobDone)]) == len(jobs), shop.events
    return catalog


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, pairs: Pairs) -> float:
    """Mean cross-entropy of the tokens of the answers."""
    loss_sum, tokens = 0.0, 0
    for prompt, answer in pairs:
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        learned = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = [-100] * len(given) + learned
        loss = model(input_ids=torch.tensor([given + learned]), labels=torch.tensor([labels])).loss
        loss_sum += float(loss) * len(learned)
        tokens += len(learned)
    return loss_sum / tokens


def cross_losses(
    base: Path, catalog: Path, held: Mapping[str, Pairs], to: Path
) -> dict[str, dict[str, float]]:
    """Loss of each adapter at each task."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = {}
    for name in held:
        Catalog.at(str(catalog)).pull(f"{name}@v1", to / name)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), to / name).eval()
        losses[name] = {task: mean_loss(model, tokenizer, pairs) for task, pairs in held.items()}
    return losses


@pytest.mark.parametrize(
    ("read", "base_steps", "steps", "margin"),
    # Of a country that was held out nobody can know the capital, only what capitals look like.
    [(translations, 400, 200, 0.1), (countries, 250, 50, 0.02)],
    ids=["words", "countries"],
)
def test_each_adapter_is_the_best_at_its_own_task(
    shared_data: Path, tmp_path: Path, read: Any, base_steps: int, steps: int, margin: float
) -> None:
    train, held = divided(with_the_same_inputs(read(shared_data)))
    assert min(map(len, held.values())) >= 20
    files = {name: write_pairs(pairs, tmp_path / f"{name}.jsonl") for name, pairs in train.items()}
    base = learn_base(tmp_path, list(files.values()), base_steps)
    catalog = learn_fleet(tmp_path, base, files, steps)
    losses = cross_losses(base, catalog, held, tmp_path / "pulled")
    for task in held:
        own = losses[task][task]
        assert math.isfinite(own)
        for other in held.keys() - {task}:
            assert own < losses[other][task] - margin, (task, other, losses)
