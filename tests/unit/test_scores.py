"""Scores against the golden values of the packages and papers that they come from.

Not run are the golden answers whose result has to be found in a longer text first (GSM8K, Big-Bench Hard
with chains of thought): no metric here looks for one.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.evaluate.scores import is_right, scale_of, score
from raytune_ft.spec import Metric

GOLDEN = Path(__file__).parents[2].parent / "shared" / "data" / "golden" / "metrics"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is not there")

TOKENIZER = "BLEU with another tokenizer than sacrebleu's default 13a"
ORDER = "BLEU with n-grams up to another length than 4"
BETA = "chrF with beta 3, where sacrebleu's default and ours is 2"
EPSILON = "chrF with epsilon smoothing, which sacrebleu's default leaves out"
WHITE_SPACE = "chrF that counts white space, which sacrebleu's default leaves out"
NORMALISED = "exact match after lower-casing and dropping articles and punctuation; ours counts them"
UNSTEMMED = "ROUGE without the stemmer, which is always on here"
LSUM = "rougeLsum, ROUGE-L by lines; we report ROUGE-L of the whole answer"
CLASSES = "a score of class numbers or of single functions, not of answers"

DIFFERENT: dict[str, str] = {
    "corpus_bleu.2": TOKENIZER,
    "corpus_bleu.4": TOKENIZER,
    **{f"max_ngram_order.{order}": ORDER for order in (1, 2, 3, 5, 6)},
    **{f"chrf.test_cases.{number}": EPSILON for number in (5, 6, 7, 8, 9)},
    "chrf.test_cases.10": BETA,
    "chrf.test_cases.11": BETA,
    "chrf.test_cases_keep_whitespace.0": WHITE_SPACE,
    "chrf.test_cases_keep_whitespace.1": WHITE_SPACE,
    "trivia_qa.9": NORMALISED,
    "mean_multiclass_f1.11": CLASSES,
    "pearson_corrcoef.12": CLASSES,
    "spearman_corrcoef.13": CLASSES,
    "f1_score_with_invalid.14": CLASSES,
    "accuracy.15": CLASSES,
    "matthews_corrcoef_100x.16": CLASSES,
    "all_match.17": CLASSES,
    "all_match.18": CLASSES,
    "normalize_trivia_qa.19": CLASSES,
    "normalize_trivia_qa.20": CLASSES,
    "normalize_squad.21": CLASSES,
    "normalize_squad.22": CLASSES,
    **{f"R155.{kind}.{line}": UNSTEMMED for kind in ("rouge1", "rouge2", "rougeL") for line in (0, 1)},
    "large.rouge1": UNSTEMMED,
    "RougeEmpty.rougeLsum": LSUM,
    "RougeLsum": LSUM,
    "RougeLsum.emptyTarget": LSUM,
    "RougeLsum.nonWord": LSUM,
    "RougeLsum.sentenceOrder.stem": LSUM,
    "RougeLsum.noNewlines.stem": LSUM,
    "R155.rougeLsum.multi0.stem": LSUM,
    "rougeLsum.wholeLargeFiles": LSUM,
    "multi.rougeLsum.stem": LSUM,
}
"""Golden cases whose rule is another than ours, with the reason."""


def _read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def _read_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


def _cases(name: str, key: str = "cases") -> list[Any]:
    """Cases of a golden file that follow our rules; none where the file is absent."""
    if not (GOLDEN / name).exists():
        return []
    return [pytest.param(case, id=case["id"]) for case in _read(name)[key] if case["id"] not in DIFFERENT]


@needs_golden
def test_every_different_case_is_one_of_the_golden_ones() -> None:
    rouge = _read("rouge_google/expected.json")
    cases = [*rouge["pair_cases"], *rouge["aggregate_cases"]]
    for name in ("sacrebleu_bleu.json", "sacrebleu_chrf.json", "t5_metrics.json"):
        cases += _read(name)["cases"]
    assert DIFFERENT.keys() <= {case["id"] for case in cases}


def _references(case: dict[str, Any]) -> list[list[str]]:
    return [list(of_one) for of_one in zip(*case["references"], strict=True)]


@pytest.mark.parametrize("case", _cases("sacrebleu_bleu.json"))
def test_bleu_is_sacrebleus(case: dict[str, Any]) -> None:
    scores = score(["bleu"], case["hypotheses"], _references(case))
    assert scores["bleu"] == pytest.approx(case["expected"], abs=case["epsilon"])


@pytest.mark.parametrize("case", _cases("sacrebleu_chrf.json"))
def test_chrf_is_sacrebleus(case: dict[str, Any]) -> None:
    scores = score(["chrf"], case["hypotheses"], _references(case))
    assert scores["chrf"] == pytest.approx(case["expected"], abs=case["epsilon"])


@needs_golden
@pytest.mark.parametrize(
    "case_id",
    [name for name, why in DIFFERENT.items() if why in (TOKENIZER, ORDER, BETA, EPSILON, WHITE_SPACE)],
)
def test_cases_listed_as_different_do_differ(case_id: str) -> None:
    metric: Metric = "chrf" if case_id.startswith("chrf") else "bleu"
    case = next(case for case in _read(f"sacrebleu_{metric}.json")["cases"] if case["id"] == case_id)
    scores = score([metric], case["hypotheses"], _references(case))
    assert scores[metric] != pytest.approx(case["expected"], abs=case["epsilon"])


T5_NAMES: dict[str, tuple[str, float]] = {
    "bleu": ("bleu", 1.0),
    "rouge1": ("rouge1", 100.0),
    "rouge2": ("rouge2", 100.0),
    "em": ("exact_match", 100.0),
    "sequence_accuracy": ("exact_match", 100.0),
}
"""T5's name of a score, ours, and what ours is multiplied with to be theirs."""


@pytest.mark.parametrize("case", _cases("t5_metrics.json"))
def test_scores_are_t5s(case: dict[str, Any]) -> None:
    references = [[target] if isinstance(target, str) else target for target in case["targets"]]
    scores = score(["exact_match", "rouge", "bleu"], case["predictions"], references)
    ours = {theirs: scores[name] * factor for theirs, (name, factor) in T5_NAMES.items()}
    shared = case["expected"].keys() & T5_NAMES.keys()
    assert shared
    assert {name: ours[name] for name in shared} == pytest.approx(
        {name: case["expected"][name] for name in shared}
    )


def _text(case: dict[str, Any], side: str) -> str:
    if side in case:
        return str(case[side])
    return (
        (GOLDEN / "rouge_google" / case[f"{side}_file"])
        .read_text(encoding="utf-8")
        .splitlines()[case["line"]]
    )


@pytest.mark.parametrize("case", _cases("rouge_google/expected.json", "pair_cases"))
def test_rouge_is_googles_and_perls(case: dict[str, Any]) -> None:
    scores = score(["rouge"], [_text(case, "prediction")], [[_text(case, "target")]])
    expected = pytest.approx(case["expected"]["fmeasure"], abs=10 ** -case.get("places", 12))
    assert scores[case["type"]] == expected


@pytest.mark.parametrize("case", _cases("rouge_google/expected.json", "aggregate_cases"))
def test_mean_rouge_is_perls(case: dict[str, Any]) -> None:
    if case["source"].endswith(".jsonl"):
        pairs = _read_lines("rouge_google/pyrouge_multi_pairs.jsonl")
        predictions, targets = [pair["prediction"] for pair in pairs], [pair["target"] for pair in pairs]
    else:
        predictions, targets = (
            (GOLDEN / "rouge_google" / f"{side}_large.txt").read_text(encoding="utf-8").splitlines()
            for side in ("prediction", "target")
        )
    scores = score(["rouge"], predictions, [[target] for target in targets])
    assert scores[case["type"]] == pytest.approx(case["expected_mid"]["fmeasure"], abs=case["delta"])


@needs_golden
def test_self_instruct_answers_score_as_the_reference_implementations_say() -> None:
    lines = _read_lines("reference_scored_davinci-self-instruct.jsonl")
    summary = _read("reference_scored_davinci-self-instruct.summary.json")
    predictions, references = [line["prediction"] for line in lines], [[line["reference"]] for line in lines]
    scores = score(["rouge", "bleu", "chrf"], predictions, references)
    stemmed = summary["mean_rouge_f_stemmed"]
    expected = {name: stemmed[name] for name in ("rouge1", "rouge2", "rougeL")}
    assert scores == pytest.approx(
        {**expected, "bleu": summary["corpus_bleu"], "chrf": summary["corpus_chrf"]}
    )
    # Natural Instructions' exact match ignores letter case and punctuation: it accepts one answer more.
    strict = [is_right(prediction, right) for prediction, right in zip(predictions, references, strict=True)]
    accepted = [bool(line["exact_match_ni"]) for line in lines]
    assert [at for at in range(len(lines)) if strict[at] != accepted[at]] == [124]


@needs_golden
def test_exact_match_gives_the_published_accuracies_of_big_bench_hard() -> None:
    published = _read("bbh_expected_accuracy.json")["expected_accuracy_percent"]["direct"]
    answers: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line in _read_lines("bbh_predictions_direct.jsonl"):
        answers[line["task"]].append((line["prediction"], line["target"]))
    measured = {
        task: 100 * score(["exact_match"], [p for p, _ in of_task], [[t] for _, t in of_task])["exact_match"]
        for task, of_task in answers.items()
    }
    assert measured == pytest.approx({task: values["accuracy"] for task, values in published.items()})


def test_the_best_of_several_references_counts_and_their_number_may_differ() -> None:
    scores = score(
        ["exact_match", "rouge", "bleu", "chrf"],
        ["the cat sat on the mat", "a dog ran away from home"],
        [["a cat sat", "the cat sat on the mat", "no"], ["a dog ran away from home"]],
    )
    assert scores == pytest.approx(
        {"exact_match": 1, "rouge1": 1, "rouge2": 1, "rougeL": 1, "bleu": 100, "chrf": 100}
    )


def test_an_answer_without_references_is_left_out() -> None:
    metrics: list[Metric] = ["exact_match", "rouge", "bleu", "chrf"]
    assert score(metrics, ["yes", "anything"], [["yes"], []]) == score(metrics, ["yes"], [["yes"]])


def test_nothing_to_judge_gives_no_scores() -> None:
    assert score(["exact_match", "bleu"], [], []) == {}
    assert score(["exact_match", "bleu"], ["anything"], [[]]) == {}


def test_an_empty_answer_is_wrong_unless_nothing_is_expected() -> None:
    wrong = score(["exact_match", "rouge", "bleu", "chrf"], [""], [["Paris"]])
    assert set(wrong.values()) == {0.0}
    assert score(["exact_match"], [" \n"], [[""]]) == {"exact_match": 1.0}


def test_scores_stand_in_the_order_that_was_asked_for() -> None:
    scores = score(["bleu", "rouge", "exact_match"], ["a"], [["a"]])
    assert list(scores) == ["bleu", "rouge1", "rouge2", "rougeL", "exact_match"]


def test_unequal_numbers_of_answers_and_references_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        score(["exact_match"], ["a", "b"], [["a"]])


@given(st.lists(st.tuples(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=3)), max_size=6))
def test_every_score_lies_between_zero_and_its_best(pairs: list[tuple[str, list[str]]]) -> None:
    scores = score(
        ["exact_match", "rouge", "bleu", "chrf"],
        [answer for answer, _ in pairs],
        [right for _, right in pairs],
    )
    for name, value in scores.items():
        best = scale_of(name).best
        assert best is not None
        assert 0.0 <= value <= best * (1 + 1e-9)


@given(st.text(), st.lists(st.text()))
def test_a_reference_is_a_right_answer_whatever_surrounds_it(answer: str, others: list[str]) -> None:
    assert is_right(f" \n{answer}\t", [*others, answer])


def test_a_loss_is_better_when_it_is_lower() -> None:
    assert scale_of("token_loss").best is None
    assert scale_of("token_loss").label == "Token loss"
