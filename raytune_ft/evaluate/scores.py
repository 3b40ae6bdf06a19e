"""Scores of answers against references: exact match, ROUGE, BLEU and chrF. Knows no torch.

The rules, so that a number can be compared with other people's:

- exact match: fraction of the answers that equal one of their references, white space at both ends
  removed; letter case, punctuation and inner white space count. 0 to 1.
- rouge1, rouge2, rougeL: F1 of the `rouge-score` package with its Porter stemmer; with several references
  the best of them; mean over the answers. 0 to 1.
- bleu, chrf: sacrebleu's corpus scores with its default settings (13a tokens, exponential smoothing; six
  characters, beta 2) against all references of an answer. 0 to 100.

An answer without any reference cannot be judged and is left out; where none is left, there are no scores.
An empty answer counts as an answer: it is right only where a reference is empty too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType

from raytune_ft.spec import Metric

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Scale:
    """How a score is read."""

    label: str
    best: float | None
    """The highest value there is; None: unbounded, and lower is better."""

    def text(self, value: float) -> str:
        """The value as people read it: a fraction as per cent, a loss with four digits.

        >>> Scale("Exact match", 1.0).text(0.9375)
        '93.8 %'
        """
        if self.best is None:
            return f"{value:.4f}"
        return f"{100 * value:.1f} %" if self.best == 1.0 else f"{value:.1f}"


_SCALES = MappingProxyType(
    {
        "exact_match": Scale("Exact match", 1.0),
        "rouge1": Scale("ROUGE-1", 1.0),
        "rouge2": Scale("ROUGE-2", 1.0),
        "rougeL": Scale("ROUGE-L", 1.0),
        "bleu": Scale("BLEU", 100.0),
        "chrf": Scale("chrF", 100.0),
    }
)


def scale_of(name: str) -> Scale:
    """The scale of a score; a name that is none of this module's, such as a loss, has no upper end."""
    return _SCALES.get(name) or Scale(name.replace("_", " ").capitalize(), None)


def score(
    metrics: Sequence[Metric], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Measure answers by the rules at the head of this module.

    Args:
        metrics: what to measure; `rouge` gives rouge1, rouge2 and rougeL.
        predictions: one answer per example.
        references: the right answers of each example, any number per example.

    Returns:
        Score by name, in the order of `metrics`; empty where no example has a reference.

    Raises:
        ValueError: unequal numbers of predictions and references.
    """
    pairs = [pair for pair in zip(predictions, references, strict=True) if pair[1]]
    if not pairs:
        return {}
    return {name: value for metric in metrics for name, value in _measure(metric, pairs).items()}


def is_right(prediction: str, references: Sequence[str]) -> bool:
    """Whether an answer equals one of its references, white space at both ends removed.

    >>> is_right(" Paris\\n", ["Lutetia", "Paris"])
    True
    """
    return prediction.strip() in {reference.strip() for reference in references}


_Pairs = Sequence[tuple[str, Sequence[str]]]


def _measure(metric: Metric, pairs: _Pairs) -> Mapping[str, float]:
    match metric:
        case "exact_match":
            return {metric: sum(is_right(*pair) for pair in pairs) / len(pairs)}
        case "rouge":
            return _rouge(pairs)
        case "bleu" | "chrf":
            return {metric: _corpus_score(metric, pairs)}


def _rouge(pairs: _Pairs) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    totals = dict.fromkeys(ROUGE_TYPES, 0.0)
    for prediction, references in pairs:
        scored = [scorer.score(reference, prediction) for reference in references]
        for name in ROUGE_TYPES:
            totals[name] += max(float(one[name].fmeasure) for one in scored)
    return {name: total / len(pairs) for name, total in totals.items()}


def _corpus_score(metric: str, pairs: _Pairs) -> float:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorer = BLEU() if metric == "bleu" else CHRF()
    predictions = [prediction for prediction, _ in pairs]
    # Sacrebleu's shape: the first reference of every example, then the second; None where there is none.
    references = list(zip_longest(*(references for _, references in pairs)))
    return float(scorer.corpus_score(predictions, references).score)
