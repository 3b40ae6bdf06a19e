"""Token ids of texts, each word encoded once: real text says the same words again and again, and a tokenizer
goes through their letters anew each time.

Only for tokenizers that divide a text by a known pattern and look at the parts one by one, as those of GPT-2,
Llama 3, Qwen and most others of bytes do. What stands here is where such a pattern never matches across; what
becomes of a word is the tokenizer's own answer, so that the ids are the same.
"""

import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, filterfalse
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_REMEMBERED_WORDS = 200_000
"""Then all are forgotten. They take some 40 MB, of a script with few spaces up to twice that."""
_LONGEST_WORD = 32
"""Characters of a word that is remembered; text without spaces is hardly said again."""
_SPACES = r" \t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which these patterns call \\s; Python's \\s has \\x1c to \\x1f too."""


class _Words(NamedTuple):
    """Patterns whose matches are a text's words. A tokenizer's own pattern divides each of them alone as it
    does inside the text."""

    in_ascii: re.Pattern[str]
    """Of a text that is ASCII: there, digits are divided from all else."""
    in_any: re.Pattern[str]

    @classmethod
    def of(cls, form: str) -> "_Words":
        """Of a form with `_` for white space and WORD for anything else."""
        return cls(
            re.compile(form.replace("_", r"[ \t-\r]").replace("WORD", r"(?:[^ \t-\r0-9]+|[0-9]+)")),
            re.compile(form.replace("_", f"[{_SPACES}]").replace("WORD", f"[^{_SPACES}]+")),
        )


_BEFORE_SPACES = _Words.of(r"_*WORD|_+")
"""Nothing but spaces takes spaces into its match."""
_AFTER_NEWLINES = _Words.of(r"_*[\r\n]|_*WORD(?:[\r\n](?:_*[\r\n])?)?|_+")
"""Signs take the newlines behind them, and spaces end with their last newline."""
_LIKE_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTERS+|\p{N}DIGITS| ?[^\sMARKS\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = {
    _LIKE_LLAMA.replace("LETTERS", letters).replace("MARKS", marks).replace("DIGITS", digits): _AFTER_NEWLINES
    for letters, marks, digits in (
        (r"\p{L}", r"\p{L}", "{1,3}"),  # Llama 3, and OpenAI's cl100k
        (r"\p{L}", r"\p{L}", ""),  # Qwen 2 and 3
        (r"[\p{L}\p{M}]", r"\p{L}\p{M}", ""),  # Qwen 3.5
    )
}


class WordEncoder:
    """A tokenizer's answers, remembered. For several threads too."""

    def __init__(self, backend: "Tokenizer", words: _Words) -> None:
        self._backend = backend
        self._words = words
        self._normalises = backend.normalizer is not None
        added = list(backend.get_added_tokens_decoder().values())
        # The longest that begins at a place is taken, as the tokenizer does.
        longest_first = sorted(map(self._looked_for, added), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        plain = not any(token.lstrip or token.rstrip or token.single_word for token in added)
        self._added_are_borders = plain and len({token.normalized for token in added}) == 1
        self._ids: dict[str, bytes] = {}
        self._lock = Lock()

    @classmethod
    def of(cls, backend: "Tokenizer") -> "WordEncoder | None":
        """None where the ids of a text may be others than those of its words."""
        from tokenizers.models import BPE

        # A model that drops merges at random answers differently each time.
        if not isinstance(backend.model, BPE) or backend.model.dropout or backend.pre_tokenizer is None:
            return None
        if backend.truncation or backend.padding or backend.encode_special_tokens:
            return None
        # No space becomes one character with what stands before it; what is not normalised is left whole.
        if backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"}:
            return None
        state = _state(backend.pre_tokenizer)
        words = _words_of(state["pretokenizers"] if state["type"] == "Sequence" else [state])
        return None if words is None else cls(backend, words)

    def encode(self, texts: Iterable[str]) -> list["array[int]"]:
        """Token ids of each text by itself, without special tokens that it does not name."""
        words = [self._divided(text) for text in texts]
        with self._lock:
            pairs = [(each, self._remembered(each)) for each in words]
            unseen = self._ask(chain.from_iterable(each for each, known in pairs if known is None))
            ids = [self._joined(each) if known is None else known for each, known in pairs]
            self._forget(unseen)
        return ids

    def _remembered(self, words: Iterable[str]) -> "array[int] | None":
        """None where one of them was not seen."""
        try:
            return self._joined(words)
        except KeyError:
            return None

    def _joined(self, words: Iterable[str]) -> "array[int]":
        return array("i", b"".join(map(self._ids.__getitem__, words)))

    def _ask(self, words: Iterable[str]) -> list[str]:
        """Take in those that were not seen, which are returned."""
        unseen = list(dict.fromkeys(filterfalse(self._ids.__contains__, words)))
        found = self._backend.encode_batch_fast(unseen, add_special_tokens=False)
        self._ids.update(zip(unseen, (array("i", each.ids).tobytes() for each in found), strict=True))
        return unseen

    def _forget(self, unseen: Iterable[str]) -> None:
        for word in unseen:
            if len(word) > _LONGEST_WORD:
                del self._ids[word]
        if len(self._ids) > _REMEMBERED_WORDS:
            self._ids.clear()

    def _looked_for(self, added: "AddedToken") -> str:
        """How a text has the token, once it is normalised."""
        if self._normalises and added.normalized:
            return unicodedata.normalize("NFC", added.content)
        return added.content

    def _divided(self, text: str) -> Sequence[str]:
        words = (self._words.in_ascii if text.isascii() else self._words.in_any).findall
        if self._normalises and not unicodedata.is_normalized("NFC", text):
            return (text,)
        if self._added is None or self._added.search(text) is None:
            return words(text)
        if not self._added_are_borders:
            return (text,)
        # By turns text and added token.
        pieces = enumerate(self._added.split(text))
        return [word for at, piece in pieces for word in ((piece,) if at % 2 else words(piece))]


def _state(component: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def _words_of(steps: Sequence[dict[str, Any]]) -> _Words | None:
    """What the steps of a pre-tokenizer leave together, if it is known of all of them."""
    words = None
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True} if words is None:
                words = _BEFORE_SPACES
            case {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            } if words is None and pattern in _KNOWN:
                words = _KNOWN[pattern]
            case {"type": "Digits"}:
                pass
            # Of bytes that have become letters a pattern that comes after this would know no spaces.
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False} if words is not None:
                pass
            case _:
                return None
    return words
