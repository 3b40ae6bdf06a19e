"""From segments of text to token ids, with the learned ones marked."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, cycle
from typing import Literal, NamedTuple

from raytune_ft.data.conversation import Malformed, Turn
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.segments import Segment
from raytune_ft.data.template import AUTO, RAW_TEXT, find_template
from raytune_ft.errors import DataError

_END_TOKENS = 3
"""How many tokens an end of turn has at most, with the white space that belongs to it."""


class Tokenised(NamedTuple):
    """An example: T token ids (32-bit integers), and which of them the loss counts."""

    input_ids: "array[int]"
    runs: list[int]
    """Lengths of the runs of tokens that are by turns given and learned. The first and last may be 0; there
    are as many of each kind."""

    @property
    def learned(self) -> list[bool]:
        """For each token whether the loss counts it."""
        return [is_learned for run, is_learned in zip(self.runs, cycle((False, True))) for _ in range(run)]


def tokenise(examples: Sequence[Sequence[Segment]], encoder: Encoder) -> list[Tokenised | None]:
    """Token ids of each example, or None for one in which no token would be learned.

    A prompt's tokens are exactly those that generation sees: each segment is encoded by itself. Where the
    tokenizer puts a space before every text (SentencePiece), an answer gets no second one, and segments that
    are one text are encoded at once: each has the tokens that begin in it. BOS comes first where the
    tokenizer adds one and the text does not begin with it; EOS comes last and is learned, unless the last
    token is EOS or another special one by which the template ends the turn. One by which the data happens to
    end is no end.
    """
    encoded = iter(_encode(examples, encoder))
    return [_join(segments, encoded, encoder) for segments in examples]


def _encode(examples: Sequence[Sequence[Segment]], encoder: Encoder) -> list["array[int]"]:
    """Token ids of all segments of all examples, one after another."""
    if not encoder.is_joined:
        return encoder.encode([text for segments in examples for text in _texts(segments, encoder)])
    found: list[array[int]] = []
    for segments in examples:
        is_one_text = any(segment.continues for segment in segments)
        joined = encoder.encode_joined([segment.text for segment in segments]) if is_one_text else None
        found += joined or encoder.encode(_texts(segments, encoder))
    return found


def prompt_ids(segments: Sequence[Segment], encoder: Encoder) -> list[int]:
    """Token ids of a prompt, as they stand before an answer in training."""
    input_ids = [token for ids in encoder.encode(_texts(segments, encoder)) for token in ids]
    if encoder.adds_bos and encoder.bos_id is not None and input_ids[:1] != [encoder.bos_id]:
        input_ids.insert(0, encoder.bos_id)
    return input_ids


def _texts(segments: Sequence[Segment], encoder: Encoder) -> list[str]:
    if not encoder.adds_space:
        return [segment.text for segment in segments]
    return [s.text.removeprefix(" ") if at else s.text for at, s in enumerate(segments)]


def _join(segments: Sequence[Segment], encoded: Iterable["array[int]"], encoder: Encoder) -> Tokenised | None:
    """The example of some segments; takes as many of the encoded texts."""
    input_ids = array("i")
    runs = [0]
    # The segments come first: a text more must not be taken.
    for segment, ids in zip(segments, encoded, strict=False):
        if ids:
            input_ids += ids
            if segment.learned == (len(runs) % 2 == 0):
                runs[-1] += len(ids)
            else:
                runs.append(len(ids))
    if len(runs) == 1:
        return None
    if encoder.adds_bos and encoder.bos_id is not None and input_ids[0] != encoder.bos_id:
        input_ids.insert(0, encoder.bos_id)
        runs[0] += 1
    ends = encoder.end_ids if segments[-1].ends_turn else {encoder.eos_id}
    # A template may have white space behind its end of turn learned.
    last = input_ids[-_END_TOKENS if segments[-1].text[-1:].isspace() else -1 :]
    if len(runs) % 2 == 0 and encoder.eos_id is not None and ends.isdisjoint(last):
        input_ids.append(encoder.eos_id)
        runs[-1] += 1
    if len(runs) % 2:
        runs.append(0)
    if runs[0] == 0:
        # Nothing stands before the first token that could predict it.
        runs[:2] = [1, runs[1] - 1]
        if runs[1] == 0 and len(runs) > 2:
            runs[:3] = [1 + runs[2]]
    return Tokenised(input_ids, runs) if runs[1] else None


def learned_ends(example: Tokenised, encoder: Encoder) -> set[int]:
    """Return the tokens by which the learned answers of an example end: where generation has to stop."""
    found = set[int]()
    for learned_from, stop in zip(*[iter(accumulate(example.runs))] * 2, strict=True):
        last = example.input_ids[max(learned_from, stop - _END_TOKENS) : stop]
        found.update([token for token in last if token in encoder.end_ids][-1:])
    return found


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
    removable = example.runs[0] - max(first, 1)
    if too_long == "drop" or removable < excess:
        return None, "dropped"
    input_ids = example.input_ids[:first] + example.input_ids[first + excess :]
    return Tokenised(input_ids, [example.runs[0] - excess, *example.runs[1:]]), "cut"


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
