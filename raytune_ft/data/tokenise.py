"""From segments of text to token ids, with the learned ones marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raytune_ft.data.encoder import Encoder
from raytune_ft.data.records import Malformed, Turn
from raytune_ft.data.template import AUTO, RAW_TEXT, Segment, find_template
from raytune_ft.errors import DataError


@dataclass(frozen=True, slots=True)
class Tokenised:
    """An example: T token ids, and for each whether the loss counts it."""

    input_ids: list[int]
    learned: list[bool]


def tokenise(examples: Sequence[Sequence[Segment]], encoder: Encoder) -> list[Tokenised | None]:
    """Token ids of each example, or None for one in which no token would be learned.

    Each segment is encoded by itself, so that a prompt's tokens are exactly those that generation sees. A
    segment's leading space belongs to it; tokenizers that put a space before every text (SentencePiece) get
    an answer without it. BOS comes first where the tokenizer adds one and the text does not begin with it;
    EOS comes last and is learned, unless the last token is EOS or another special one by which the template
    ends the turn. One by which the data happens to end is no end.
    """
    encoded = iter(encoder.encode([text for segments in examples for text in _texts(segments, encoder)]))
    return [_join(segments, [next(encoded) for _ in segments], encoder) for segments in examples]


def prompt_ids(segments: Sequence[Segment], encoder: Encoder) -> list[int]:
    """Token ids of a prompt, as they stand before an answer in training."""
    input_ids = [token for ids in encoder.encode(_texts(segments, encoder)) for token in ids]
    if encoder.adds_bos and encoder.bos_id is not None and input_ids[:1] != [encoder.bos_id]:
        input_ids.insert(0, encoder.bos_id)
    return input_ids


def _texts(segments: Sequence[Segment], encoder: Encoder) -> list[str]:
    return [
        s.text.removeprefix(" ") if encoder.adds_space and at else s.text for at, s in enumerate(segments)
    ]


def _join(segments: Sequence[Segment], encoded: Sequence[list[int]], encoder: Encoder) -> Tokenised | None:
    input_ids = [token for ids in encoded for token in ids]
    learned = [segment.learned for segment, ids in zip(segments, encoded, strict=True) for _ in ids]
    if not any(learned):
        return None
    if encoder.adds_bos and encoder.bos_id is not None and input_ids[0] != encoder.bos_id:
        input_ids.insert(0, encoder.bos_id)
        learned.insert(0, False)
    ends = encoder.end_ids if segments[-1].ends_turn else (encoder.eos_id,)
    if learned[-1] and encoder.eos_id is not None and input_ids[-1] not in ends:
        input_ids.append(encoder.eos_id)
        learned.append(True)
    # Nothing stands before the first token that could predict it.
    learned[0] = False
    return Tokenised(input_ids, learned) if any(learned) else None


def answer_start(learned: Sequence[bool]) -> int:
    """Where the last run of learned tokens begins: before it stands what generation is given.

    >>> answer_start([False, True, True, False, False, True])
    5
    """
    end = len(learned)
    while end and not learned[end - 1]:
        end -= 1
    while end and learned[end - 1]:
        end -= 1
    return end


def fit(
    example: Tokenised, max_tokens: int, too_long: Literal["drop", "cut"], *, keep_first: bool
) -> tuple[Tokenised | None, Literal["kept", "cut", "dropped"]]:
    """Make an example fit `max_tokens`, or drop it.

    `cut` takes tokens from the left of the prompt (after BOS, where `keep_first` says there is one), so that
    all learned tokens stay, with at least one before the first of them. Where that is not enough, the
    example is dropped.
    """
    excess = len(example.input_ids) - max_tokens
    if excess <= 0:
        return example, "kept"
    first = int(keep_first)
    removable = example.learned.index(True) - max(first, 1)
    if too_long == "drop" or removable < excess:
        return None, "dropped"
    kept = Tokenised(
        example.input_ids[:first] + example.input_ids[first + excess :],
        example.learned[:first] + example.learned[first + excess :],
    )
    return kept, "cut"


def ask(prompt: str, template: str, encoder: Encoder, *, context: str = "") -> list[int]:
    """Token ids of a prompt as a template writes it, up to where its answer begins.

    Args:
        prompt: what is asked.
        template: a concrete one, such as `PreparedData.templates` names.
        encoder: the tokenizer's.
        context: what an instruction is about, as the `input` of a record is.

    Raises:
        DataError: the template does not exist, or cannot be filled from a prompt alone.
    """
    if template in (AUTO, RAW_TEXT):
        return prompt_ids((Segment(prompt, learned=False),), encoder)
    try:
        segments = find_template(template, encoder).open_answer((Turn("user", prompt, context),))
    except Malformed as error:
        raise DataError(f"a prompt alone does not fill it: {error}") from None
    return prompt_ids(segments, encoder)
