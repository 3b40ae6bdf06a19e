"""References are what was taught: a model that answers as it was taught is right."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from answerers import CHATML, chat_base, chat_tokenizer, job_of, llama_of, recipe_of, teach
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from raytune_ft.evaluate.references import answer_text, taught_references
from raytune_ft.spec import EvaluateSpec
from raytune_ft.train.assess import LONGEST_ANSWER_TOKENS, Asked
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.examples import Question
from raytune_ft.train.peers import Peers
from raytune_ft.train.workbench import Workbench, set_up

ANSWER = "over the lazy dog"
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"Name number {n}."},
            {"role": "assistant", "content": ANSWER},
        ]
    }
    for n in range(12)
]


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tmp_path_factory.mktemp("bases") / "base", chat_tokenizer())


class TestTaughtReferences:
    TOKENIZER = chat_tokenizer(plain=["<think>", "</think>", "<end>"])
    END = TOKENIZER.convert_tokens_to_ids("<end>")

    def taught(self, references: list[str], answer: str) -> list[str]:
        return taught_references(references, self.TOKENIZER.encode(answer), self.TOKENIZER, {self.END})

    def test_what_the_template_writes_is_part_of_it(self) -> None:
        assert self.taught(["fox"], "<think>\n\n</think>\n\nfox<end>") == ["<think>\n\n</think>\n\nfox"]

    def test_the_others_have_the_same_around_them(self) -> None:
        found = self.taught([" fox ", "dog", "fox"], "<think>\n\n</think>\n\nfox.<end>")
        assert found == [f"<think>\n\n</think>\n\n{answer}." for answer in ("fox", "dog", "fox")]

    def test_the_last_place_is_the_answer(self) -> None:
        assert self.taught(["fox", "dog"], "<think>fox?</think>fox<end>")[1] == "<think>fox?</think>dog"

    def test_where_the_template_rewrites_the_answer_the_others_stay(self) -> None:
        assert self.taught(["fox", "dog"], "FOX<end>") == ["FOX", "dog"]

    def test_what_the_tokenizer_loses_is_lost_in_all(self) -> None:
        words = tiny.tokenizer()
        words.backend_tokenizer.normalizer = normalizers.Lowercase()
        ids = [*words.encode("The Fox"), 1]
        assert taught_references(["The Fox", "A Dog"], ids, words, {1}) == ["the fox", "a dog"]

    def test_nothing_after_the_end_is_part_of_it(self) -> None:
        ids = self.TOKENIZER.encode("fox<end>dog<end>")
        assert answer_text(self.TOKENIZER, ids, {self.END}) == "fox"
        assert answer_text(self.TOKENIZER, ids, set()) == "fox<end>dog<end>"


THOUGHT = "<think>\n\n</think>\n\n"


def perfect(folder: Path, words: Any, **changes: Any) -> tuple[Workbench, Any, list[str]]:
    """A base that learned all answers, ready to be asked; its recipe, and what it tells."""
    model, told = llama_of(words), []
    job = job_of(chat_base(folder / "base", words, model), folder, RECORDS, **changes)
    assert teach(model, job) < 0.02
    chat_base(folder / "base", words, model)
    recipe, assignment = recipe_of(job, told)
    return set_up(assignment, None, Peers()), recipe, told


def before(position: Position) -> dict[str, Any]:
    assert position.before is not None
    return position.before


def thinking(*, plain_end: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose template writes an empty thought before each answer, as Qwen3's does."""
    thought = "{{ '<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '' }}"
    template = CHATML.replace("{{ message['content'] }}", f"{thought}{{{{ message['content'] }}}}")
    ends = ["<|im_end|>"]
    return chat_tokenizer(
        template,
        plain=["<think>", "</think>", *(ends if plain_end else [])],
        special=["<|im_start|>", *([] if plain_end else ends)],
    )


class TestPerfectModel:
    @pytest.mark.parametrize(
        "plain_end", [False, True], ids=["a special end", "an end that is no special token"]
    )
    def test_it_is_right_everywhere(self, tmp_path: Path, plain_end: bool) -> None:
        bench, recipe, told = perfect(tmp_path, thinking(plain_end=plain_end))
        found = before(recipe.begin(bench, None))
        assert found["scores"]["exact_match"] == 1.0
        assert found["scores"]["rougeL"] == 1.0
        assert found["examples"]["exact_match"] >= 3
        # The data may take a mark that is not special for the end, or write EOS after it.
        assert {answer.removesuffix("<|im_end|>") for answer in found["answers"]} == {THOUGHT + ANSWER}
        assert told == ["evaluate before"]


class TestLongestAnswer:
    TOKENS = len(chat_tokenizer().encode(f"{ANSWER}<|im_end|>"))

    def begun(self, base: Path, folder: Path, **evaluate: Any) -> tuple[Workbench, Position, list[str]]:
        told: list[str] = []
        job = job_of(base, folder, RECORDS, evaluate={"metrics": ["exact_match"], **evaluate})
        recipe, assignment = recipe_of(job, told)
        bench = set_up(assignment, None, Peers())
        return bench, recipe.begin(bench, None), told

    def test_auto_is_the_longest_reference_with_its_end(self, base: Path, tmp_path: Path) -> None:
        _, position, told = self.begun(base, tmp_path)
        assert before(position)["how"]["max_new_tokens"] == {"test split": self.TOKENS}
        assert told == ["evaluate before"]

    def test_references_that_are_cut_are_told_of(self, base: Path, tmp_path: Path) -> None:
        _, position, told = self.begun(base, tmp_path, max_new_tokens=3)
        count = before(position)["examples"]["exact_match"]
        assert told == [
            f"{count} of {count} references of the test split are longer than evaluate.max_new_tokens = 3, "
            "so their answers are cut off and never match; raise it, or set it to auto",
            "evaluate before",
        ]

    def test_a_base_is_asked_anew_where_answers_may_have_another_length(
        self, base: Path, tmp_path: Path
    ) -> None:
        bench, position, _ = self.begun(base, tmp_path)
        asked_before = {**before(position)["how"], "max_new_tokens": 32}
        for how, phases in [(before(position)["how"], []), (asked_before, ["evaluate before"])]:
            told: list[str] = []
            recipe, _ = recipe_of(
                job_of(base, tmp_path, RECORDS, evaluate={"metrics": ["exact_match"]}), told
            )
            kept = replace(position, before={**before(position), "how": how})
            again = recipe.begin(replace(bench, position=kept), None)
            assert told == phases
            assert before(again) == before(position)

    def test_auto_has_a_limit_of_its_own(self) -> None:
        asked = Asked([Question([1], ["a"], [2])] * 4, LONGEST_ANSWER_TOKENS, 1)
        assert asked.notice(EvaluateSpec(), "test split") == (
            "1 of 4 references of the test split are longer than evaluate.max_new_tokens = auto (at most "
            "512), so their answers are cut off and never match; give a higher number"
        )
        assert Asked([], 0, 0).notice(EvaluateSpec(), "test split") is None
