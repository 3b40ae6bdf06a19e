"""Segments to tokens: what is learned, where BOS and EOS stand, and what happens to long examples."""

import pickle
from array import array
from typing import Literal

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from raytune_ft.data.chat_template import ChatTemplate
from raytune_ft.data.conversation import Conversation, Turn
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.segments import Segment
from raytune_ft.data.template import Template, TurnFormat, find_template
from raytune_ft.data.tokenise import Tokenised, answer_start, ask, fit, prompt_ids, tokenise
from raytune_ft.errors import DataError

TINY = Encoder.of(tiny.tokenizer())
BOS, EOS, PAD = 0, 1, 2


def words(*, bos: bool = False, marker: bool = False) -> Encoder:
    """A tokenizer of words; `<|im_end|>` is a special token of it."""
    names = ["<unk>", "<s>", "</s>", "<|im_end|>", *"abcde", *(f"▁{letter}" for letter in "abcde")]
    core = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace() if marker else pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return Encoder.of(tokenizer)


def segments(*texts: str) -> tuple[Segment, ...]:
    """Segments that are by turns given and learned."""
    return tuple(Segment(text, learned=bool(at % 2)) for at, text in enumerate(texts))


def one(encoder: Encoder, *texts: str) -> tuple[list[int], list[bool]]:
    (example,) = tokenise([segments(*texts)], encoder)
    assert example is not None
    return list(example.input_ids), example.learned


def test_answer_and_eos_are_learned() -> None:
    assert one(words(), "a b", "c") == ([4, 5, 6, 2], [False, False, True, True])


def test_bos_comes_first_where_the_tokenizer_adds_it() -> None:
    assert one(words(bos=True), "a b", "c") == ([1, 4, 5, 6, 2], [False, False, False, True, True])
    assert one(words(bos=True), "<s> a", "c")[0] == [1, 4, 6, 2]
    assert prompt_ids(segments("a b"), words(bos=True)) == [1, 4, 5]
    assert prompt_ids(segments("<s> a"), words(bos=True)) == [1, 4]


def test_eos_is_not_repeated() -> None:
    assert one(words(), "a", "c")[0] == one(words(), "a", "c </s>")[0] == [4, 6, 2]


MARKED = "{% for m in messages %}{{ m.content }} <|im_end|> {% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TurnFormat(user="{content}", end=" <|im_end|>"), [3]),
        (TurnFormat(user="{content}", end=" a"), [4, 2]),
        (TurnFormat(user="{content}", end="{eos}", eos=" </s>"), [2]),
        (TurnFormat(user="{content}"), [2]),
        (find_template("{{ messages[0].content }}", TINY), [2]),
        (ChatTemplate(MARKED, {}), [3]),
        (ChatTemplate(MARKED.replace("<|im_end|>", ""), {}), [2]),
    ],
)
@pytest.mark.parametrize("answer", ["c", "c <|im_end|>"])
def test_eos_ends_what_the_template_does_not(template: Template, ends: list[int], answer: str) -> None:
    """A special token in the data is no end: the model would learn to go on after one, or not to stop."""
    chat = Conversation((Turn("user", "a"), Turn("assistant", answer)), (answer,), "chat")
    (found,) = tokenise([template.render(chat).examples[0].segments], words())
    assert found is not None
    ids = list(found.input_ids)
    assert ids[ids.index(6) :] == [6, *([3] if answer != "c" else []), *ends]


def test_eos_ends_raw_text() -> None:
    (found,) = tokenise([(Segment("a <|im_end|>", learned=True),)], words())
    assert found is not None
    assert list(found.input_ids) == [4, 3, 2]


def test_unknown_word_does_not_end_a_turn() -> None:
    assert one(words(), "a", "c zzz")[0] == [4, 6, 0, 2]


def test_every_answer_of_a_chat_is_learned() -> None:
    assert one(words(), "a", "b", "c", "d") == ([4, 5, 6, 7, 2], [False, True, False, True, True])


def test_leading_space_where_the_tokenizer_puts_one_itself() -> None:
    encoder = words(marker=True)
    assert encoder.adds_space
    assert one(encoder, "a", " b")[0] == one(encoder, "a", "b")[0] == [9, 10, 2]


def test_leading_space_of_an_answer_is_learned_with_it() -> None:
    assert not TINY.adds_space
    ids, learned = one(TINY, "Answer:", " fox")
    given, answer = TINY.encode(["Answer:", " fox"])
    assert ids == [*given, *answer, EOS]
    assert learned == [False] * len(given) + [True] * (len(answer) + 1)


def test_raw_text_learns_all_but_its_first_token() -> None:
    (example,) = tokenise([(Segment("a b c", learned=True),)], words())
    assert example == Tokenised(array("i", [4, 5, 6, 2]), [1, 3])
    (example,) = tokenise([(Segment("a b", learned=True),)], words(bos=True))
    assert example == Tokenised(array("i", [1, 4, 5, 2]), [1, 3])


def test_nothing_learned() -> None:
    examples = [segments("a"), segments("a", " "), (Segment("", learned=True),), segments("a", "b")]
    assert [example is None for example in tokenise(examples, words())] == [True, True, True, False]


def test_batch_equals_each_by_itself() -> None:
    examples = [segments("the quick", " fox"), segments("0", "1", "2", "3"), (Segment("dog", learned=True),)]
    assert tokenise(examples, TINY) == [tokenise([example], TINY)[0] for example in examples]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, max_size=6))
def test_tokens_are_the_text_and_masks_its_segments(texts: list[str]) -> None:
    ids, learned = one(TINY, *texts)
    assert len(ids) == len(learned)
    decode = tiny_decode
    start = answer_start(learned)
    if len(texts) % 2 == 0:
        assert ids[-1] == EOS
        assert decode(ids[:-1]) == "".join(texts)
        assert ids[:start] == prompt_ids(segments(*texts[:-1]), TINY)
    assert sum(learned) == sum(map(len, TINY.encode(texts[1::2]))) + (len(texts) % 2 == 0)


def tiny_decode(ids: list[int]) -> str:
    return str(tiny.tokenizer().decode(ids, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize(
    ("learned", "start"),
    [([], 0), ([False], 0), ([False, True], 1), ([True, False, True, True, False], 2), ([True, True], 0)],
)
def test_answer_start(learned: list[bool], start: int) -> None:
    assert answer_start(learned) == start


def example(prompt: int, answer: int) -> Tokenised:
    return Tokenised(array("i", range(prompt + answer)), [prompt, answer])


@pytest.mark.parametrize(
    ("prompt", "answer", "limit", "too_long", "keep_first", "ids", "outcome"),
    [
        (3, 2, 5, "drop", False, [0, 1, 2, 3, 4], "kept"),
        (4, 2, 5, "drop", False, None, "dropped"),
        (4, 2, 5, "cut", False, [1, 2, 3, 4, 5], "cut"),
        (4, 2, 5, "cut", True, [0, 2, 3, 4, 5], "cut"),
        (4, 2, 3, "cut", False, [3, 4, 5], "cut"),
        (4, 2, 3, "cut", True, [0, 4, 5], "cut"),
        (4, 3, 3, "cut", False, None, "dropped"),
        (4, 9, 8, "cut", True, None, "dropped"),
    ],
)
def test_fit(
    prompt: int,
    answer: int,
    limit: int,
    too_long: Literal["drop", "cut"],
    keep_first: bool,
    ids: list[int] | None,
    outcome: str,
) -> None:
    kept, what = fit(example(prompt, answer), limit, too_long, keep_first=keep_first)
    assert (None if kept is None else list(kept.input_ids), what) == (ids, outcome)
    if kept is not None:
        assert sum(kept.learned) == answer
        assert not kept.learned[0]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(8, 40), st.booleans(), st.booleans())
def test_fit_keeps_every_learned_token_or_drops(
    prompt: int, answer: int, limit: int, cut: bool, keep_first: bool
) -> None:
    before = example(prompt, answer)
    kept, outcome = fit(before, limit, "cut" if cut else "drop", keep_first=keep_first)
    if kept is None:
        assert outcome == "dropped"
        assert prompt + answer > limit
        assert not cut or answer + 1 > limit
    else:
        assert len(kept.input_ids) <= limit
        assert kept.input_ids[-answer:] == before.input_ids[-answer:]
        assert (outcome == "kept") == (kept == before)


def test_a_prompt_is_asked_as_it_stands_in_training() -> None:
    whole, learned = one(TINY, "### Instruction:\nfox\n\n### Response:\n", "dog")
    assert ask("fox", "instruction", TINY) == whole[: answer_start(learned)]
    assert ask("fox", "Q: {{ question }} A:", TINY) == list(TINY.encode(["Q: fox A:"])[0])
    assert ask("fox", "text", TINY) == list(TINY.encode(["fox"])[0])
    with pytest.raises(DataError) as raised:
        ask("fox", "{{ topic }}", TINY)
    assert str(raised.value) == (
        "a prompt alone does not fill it: template {{ topic }}: 'topic' is undefined; "
        "besides the completion the record has prompt, instruction, question, input"
    )


def test_encoder_travels_without_the_tokenizer() -> None:
    assert isinstance(TINY.backend, Tokenizer)
    assert (TINY.bos_id, TINY.eos_id, TINY.adds_bos, TINY.end_ids) == (BOS, EOS, False, {EOS, PAD})


def test_tokenizer_that_does_more_than_its_core_travels_whole() -> None:
    class Reversed(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers is untyped here
        def _encode_plus(self, text: object, *arguments: object, **options: object) -> object:
            turned = text[::-1] if isinstance(text, str) else [part[::-1] for part in text]  # type: ignore[attr-defined]
            return super()._encode_plus(turned, *arguments, **options)

    core = tiny.tokenizer()
    encoder = Encoder.of(Reversed(tokenizer_object=core.backend_tokenizer, eos_token="</s>"))
    assert encoder.encode(["fox"]) == TINY.encode(["xof"])


def test_special_tokens_that_are_read_as_text_stay_text() -> None:
    core = tiny.tokenizer().backend_tokenizer
    splitting = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", split_special_tokens=True)
    (found,) = pickle.loads(pickle.dumps(Encoder.of(splitting))).encode(["a</s>"])
    assert EOS not in found
    assert found.tolist() == splitting("a</s>", add_special_tokens=False)["input_ids"]
