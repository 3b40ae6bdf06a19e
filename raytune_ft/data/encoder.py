"""The part of a tokenizer that the data pass needs, small enough to travel to every task.

A Hub tokenizer takes seconds to import in each process; its Rust core and a few names take milliseconds.
"""

import hashlib
import pickle
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from raytune_ft.data.words import WordEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a B1 <s>\né中 "
_CACHED_WORDS = 200_000
"""Of tokenizers that remember words themselves, 10,000 if nothing is said."""


@dataclass(frozen=True)
class Encoder:
    """Text to token ids, never with special tokens of its own, and the names of those."""

    backend: Any
    """A `tokenizers.Tokenizer`, or the whole tokenizer where that alone would encode differently."""
    eos_id: int | None
    eos_token: str
    bos_id: int | None
    adds_bos: bool
    """The tokenizer puts its BOS before every text by itself."""
    end_ids: frozenset[int]
    """EOS and the added tokens of the vocabulary, such as `<|im_end|>`: by each a template may end a turn."""
    end_tokens: tuple[str, ...]
    """Their texts, sorted."""
    adds_space: bool
    """It puts a word marker before every text, as SentencePiece does."""
    adds_eos: bool
    """It puts its EOS behind every text by itself: each text is made to stand alone, as those of T5 are."""
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """What a chat template knows by name: bos_token, eos_token, …"""
    digest: str | None = None
    """Names everything that decides on the tokens; None where the backend's behaviour cannot be told."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        """The encoder of a Hub tokenizer."""
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        dressed = tokenizer("a")["input_ids"]
        bos_id = tokenizer.bos_token_id
        ends = _ends(tokenizer)
        encoder = cls(
            backend=_backend(tokenizer),
            eos_id=tokenizer.eos_token_id,
            eos_token=tokenizer.eos_token or "",
            bos_id=bos_id,
            adds_bos=bos_id is not None and dressed[:1] == [bos_id] != plain[:1],
            end_ids=frozenset(ends),
            end_tokens=tuple(sorted(text for text in ends.values() if text)),
            adds_space=bool(plain) and str(tokenizer.convert_ids_to_tokens(plain[0])).startswith("▁"),
            adds_eos=dressed[-1:] == [tokenizer.eos_token_id] != plain[-1:],
            chat_template=_chat_template(tokenizer),
            special_tokens=dict(tokenizer.special_tokens_map),
        )
        return replace(encoder, digest=_digest(encoder))

    def __reduce__(self) -> tuple[Callable[[str | None, bytes], "Encoder"], tuple[str | None, bytes]]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _unpickled, (self.digest, pickle.dumps(values))

    def encode(self, texts: Sequence[str]) -> list["array[int]"]:
        """Token ids of each text by itself, as 32-bit integers."""
        if self._words is not None:
            return self._words.encode(texts)
        return [array("i", ids) for ids in _encode(self.backend, texts)]

    @property
    def is_joined(self) -> bool:
        """Whether texts that follow each other have to be encoded together: alone, each would get a space."""
        return self.adds_space and not self.adds_eos

    def encode_joined(self, texts: Sequence[str]) -> list["array[int]"] | None:
        """Token ids of texts that follow each other, as one text has them: each gets those that begin in it.

        Returns:
            None where a token reaches from one text into the next, or the tokenizer cannot tell.
        """
        ids, offsets = _encode_with_offsets(self.backend, "".join(texts))
        borders = list(accumulate(map(len, texts)))
        found = [array("i") for _ in texts]
        for token, (start, stop) in zip(ids, offsets, strict=True):
            at = bisect_right(borders, start)
            if at == len(texts) or stop > borders[at]:
                return None
            found[at].append(token)
        # A text without a token of its own stands inside another's.
        return found if all(ids or not text for ids, text in zip(found, texts, strict=True)) else None

    @cached_property
    def _words(self) -> WordEncoder | None:
        from tokenizers import Tokenizer

        words = WordEncoder.of(self.backend) if isinstance(self.backend, Tokenizer) else None
        if words is None:
            _enlarge_cache(self.backend)
        return words


_arrived: dict[str, Encoder] = {}


def _unpickled(digest: str | None, values: bytes) -> Encoder:
    """An encoder that was sent here; the last one is kept, as a large vocabulary takes long to build."""
    if digest is None:
        return Encoder(**pickle.loads(values))  # noqa: S301  see Encoder.__reduce__
    if digest not in _arrived:
        _arrived.clear()
        _arrived[digest] = Encoder(**pickle.loads(values))  # noqa: S301
    return _arrived[digest]


def _digest(encoder: Encoder) -> str | None:
    import tokenizers

    if not isinstance(encoder.backend, tokenizers.Tokenizer):
        return None
    digest = hashlib.sha256(f"{tokenizers.__version__}\n{encoder.backend.to_str()}".encode())
    plain = {
        each.name: getattr(encoder, each.name)
        for each in fields(encoder)
        if each.name not in ("backend", "digest")
    }
    plain["end_ids"] = sorted(encoder.end_ids)
    plain["special_tokens"] = sorted(encoder.special_tokens.items())
    digest.update(repr(plain).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _backend(tokenizer: "PreTrainedTokenizerBase") -> Any:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        # Some tokenizers do more in Python around their Rust core, or read special tokens as text; those
        # travel whole.
        probe = [_PROBE, *tokenizer.all_special_tokens]
        if _encode(copy, probe) == _encode(tokenizer, probe):
            return copy
    return tokenizer


def _enlarge_cache(backend: Any) -> None:
    # tokenizers 0.23 has no public name for it; models that look no words up have none at all.
    resize = getattr(getattr(backend, "model", None), "_resize_cache", None)
    if resize is not None:
        resize(_CACHED_WORDS)


def _encode(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    if not texts:
        return []
    if isinstance(backend, Tokenizer):
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    ids: list[list[int]] = backend(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def _encode_with_offsets(backend: Any, text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
    """Token ids, and the characters that each stands for; nothing where the tokenizer does not tell."""
    from tokenizers import Tokenizer

    if isinstance(backend, Tokenizer):
        encoded = backend.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets
    if not backend.is_fast:
        return [], []
    encoded = backend(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _ends(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Tokens that an answer can end with: EOS and what was added to the vocabulary, without BOS."""
    inner = {tokenizer.unk_token_id, tokenizer.bos_token_id}
    ends = {at: token.content for at, token in tokenizer.added_tokens_decoder.items() if at not in inner}
    if tokenizer.eos_token_id is not None:
        ends[tokenizer.eos_token_id] = tokenizer.eos_token
    return ends


def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else str(template)
