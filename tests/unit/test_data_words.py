"""Words that are encoded once: the same ids as the tokenizer's own, for each that it is used for."""

import pickle
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from raytune_ft.data import words
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.words import WordEncoder

# As they stand in the tokenizer.json of Llama 3, Qwen 2 and Qwen 3.5.
ENDINGS, REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = ENDINGS + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
QWEN = ENDINGS + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
QWEN_MARKS = ENDINGS + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + REST
PIECES = [
    *(" ", "  ", "\n", "\r\n", "\t", "\0", "\x1c", "\u00a0", "\u2003", "\u180e", "\u0085"),
    *("the", "The", "dog's", "'LL", "x", "0", "1234", "12.5", ".", "...", "?!", "\u00b2", "_"),
    *("é", "é x", "e\u0301", "\u0301", "\u212a", "中文", "ไทย", "🙂", "\u1160", "한"),
    *("<|im_end|>", "<|im_end|", "<|im_end|>x", "a token", "a token two", "<", "|"),
]
ASCII = [piece for piece in PIECES if piece.isascii()]
TEXTS = st.one_of(
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=14).map("".join),
    st.lists(st.sampled_from(ASCII), max_size=20).map("".join),
    st.text("a1B' .,\n\t", max_size=14),
)
SPLIT, BYTES = pre_tokenizers.Split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def trained(
    steps: Any, *added: AddedToken, normalizer: Any = None, dropout: float | None = None
) -> Tokenizer:
    """Byte-level BPE of some hundred merges over the pieces, and pairs of them."""
    tokenizer = Tokenizer(models.BPE(dropout=dropout))
    tokenizer.pre_tokenizer = steps
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    corpus = [left + right for left in PIECES for right in PIECES]
    tokenizer.train_from_iterator([tiny.CORPUS, *corpus] * 3, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def in_order(*steps: Any) -> Any:
    return pre_tokenizers.Sequence(list(steps))


def pattern(text: str, **options: Any) -> Any:
    return SPLIT(Regex(text), **{"behavior": "isolated", **options})


PLAIN = [AddedToken(content, normalized=False) for content in ("<|im_end|>", "a token", "a token two")]
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": lambda: trained(GPT2),
    "GPT-2 with added tokens": lambda: trained(GPT2, *PLAIN),
    "added tokens of two kinds": lambda: trained(GPT2, *PLAIN, AddedToken("dog", normalized=True)),
    "an added token that takes spaces": lambda: trained(GPT2, *PLAIN, AddedToken("x", lstrip=True)),
    "an added token that is a word": lambda: trained(GPT2, AddedToken("the", single_word=True)),
    "digits": lambda: trained(in_order(pre_tokenizers.Digits(individual_digits=True), GPT2)),
    "Llama 3": lambda: trained(in_order(pattern(LLAMA), BYTES), *PLAIN),
    "Qwen": lambda: trained(in_order(pattern(QWEN), BYTES), *PLAIN, normalizer=normalizers.NFC()),
    "Qwen with a token that is not normalised": lambda: trained(
        in_order(pattern(QWEN), BYTES), AddedToken("e\u0301 x", normalized=True), normalizer=normalizers.NFC()
    ),
    "Qwen 3.5": lambda: trained(in_order(pattern(QWEN_MARKS), BYTES), normalizer=normalizers.NFC()),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def remembering(backend: Tokenizer) -> WordEncoder:
    found = WordEncoder.of(backend)
    assert found is not None
    return found


def cut_off() -> Tokenizer:
    backend = trained(GPT2)
    backend.enable_truncation(2)
    return backend


def own(backend: Tokenizer, texts: Sequence[str]) -> list["array[int]"]:
    return [array("i", backend.encode(text, add_special_tokens=False).ids) for text in texts]


@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_the_tokenizers_own(backend: Tokenizer, texts: list[str]) -> None:
    remembered = remembering(backend)
    for _ in range(2):
        assert remembered.encode(texts) == own(backend, texts)


@pytest.mark.parametrize(
    "other",
    [
        trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        trained(BYTES),
        trained(GPT2, dropout=0.5),
        trained(GPT2, normalizer=normalizers.Replace("the dog", "x")),
        trained(in_order(pattern(r"[^.]+|\."), BYTES)),
        trained(in_order(pattern(QWEN, behavior="merged_with_next"), BYTES)),
        trained(in_order(pattern(QWEN, invert=True), BYTES)),
        trained(in_order(BYTES, pattern(QWEN))),
        trained(in_order(BYTES, GPT2)),
        cut_off(),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        trained(in_order(pre_tokenizers.Metaspace(), GPT2)),
        trained(pre_tokenizers.Metaspace(split=False)),
        Tokenizer(models.BPE()),
    ],
    ids=lambda backend: str(backend.pre_tokenizer)[:30],
)
def test_others_are_left_to_themselves(other: Tokenizer) -> None:
    assert WordEncoder.of(other) is None


@given(text=TEXTS)
def test_a_word_is_divided_as_it_is_within_its_text(backend: Tokenizer, text: str) -> None:
    words_of, divide = remembering(backend)._words, backend.pre_tokenizer
    assert divide is not None
    whole = [part for part, _ in divide.pre_tokenize_str(text)]
    found = (words_of.in_ascii if text.isascii() else words_of.in_any).findall(text)
    assert "".join(found) == text
    assert [part for word in found for part, _ in divide.pre_tokenize_str(word)] == whole


class Counting:
    """A tokenizer that notes what it is asked."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.asked += texts
        return self.backend.encode_batch_fast(texts, **options)


def test_a_word_is_encoded_once() -> None:
    backend: Any = Counting(trained(GPT2, *PLAIN))
    remembered = remembering(backend)
    remembered.encode(["the dog the dog", "12 dogs:\n\n the<|im_end|>dog"])
    first = ["the", " dog", " the", "12", " dogs:", "\n\n the", "<|im_end|>", "dog"]
    assert backend.asked == first
    remembered.encode(["dog the<|im_end|>12", "the dog dogs"])
    assert backend.asked == [*first, " dogs"]


def test_long_words_are_not_kept_and_many_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_REMEMBERED_WORDS", 3)
    backend: Any = Counting(trained(GPT2))
    remembered = remembering(backend)
    texts = ["a b", "x" * 33]
    for _ in range(2):
        assert remembered.encode(texts) == own(backend.backend, texts)
    assert backend.asked == ["a", " b", "x" * 33, "x" * 33]
    remembered.encode(["c d"])
    remembered.encode(["a"])
    assert backend.asked[4:] == ["c", " d", "a"]


def test_several_threads_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_REMEMBERED_WORDS", 10)
    backend = trained(GPT2)
    remembered = remembering(backend)
    texts = [[f"{word} {at} {word}{at}" for word in PIECES] for at in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(remembered.encode, texts))
    assert found == [own(backend, each) for each in texts]


def test_an_encoder_remembers_words_and_travels() -> None:
    encoder = Encoder.of(tiny.tokenizer())
    texts = ["### Instruction:\nthe  dog</s>\n", ""]
    expected = own(encoder.backend, texts)
    assert encoder._words is not None
    assert encoder.encode(texts) == expected
    assert pickle.loads(pickle.dumps(encoder)).encode(texts) == expected
