"""What the right answer to a question is: the text that the model was taught, as generation would give it."""

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], ends: Collection[int]) -> str:
    """The text of an answer's token ids, up to the first end, without special tokens, stripped.

    Answers that were generated and those that were taught are both read so. What a tokenizer changes or
    loses is then the same in both, and the text of an end that is no special token stands in neither.
    """
    said = list(takewhile(lambda token: token not in ends, ids))
    text: str = tokenizer.decode(said, skip_special_tokens=True)
    return text.strip()


def answer_tokens(ids: Sequence[int], ends: Collection[int]) -> int:
    """Tokens that have to be generated for an answer: up to its first end, and that one.

    >>> answer_tokens([7, 8, 2, 9], {2}), answer_tokens([7, 8], {2})
    (3, 2)
    """
    return next((at for at, token in enumerate(ids, 1) if token in ends), len(ids))


def taught_references(
    references: Sequence[str],
    answer_ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    ends: Collection[int],
) -> list[str]:
    """The references of a question as generation would give them; the first is the one that was taught.

    A template may write more into an answer than the record holds, such as an empty `<think>` block. The
    others get what it wrote around the first. Where the first is not found in what was taught, the template
    has rewritten it, and the others stay as they are.

    Args:
        references: of the record, at least one.
        answer_ids: the learned tokens of the answer, with its end.
        tokenizer: the base's.
        ends: tokens at which generation stops.
    """
    taught = answer_text(tokenizer, answer_ids, ends)
    if len(references) == 1:
        return [taught]
    first, *others = (
        answer_text(tokenizer, tokenizer.encode(text, add_special_tokens=False), ends) for text in references
    )
    at = taught.rfind(first) if first else -1
    if at < 0:
        return [taught, *others]
    before, after = taught[:at], taught[at + len(first) :]
    return [taught, *(f"{before}{other}{after}".strip() for other in others)]
