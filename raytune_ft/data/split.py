"""Which split an example belongs to: a pure function of its input."""

import hashlib
import unicodedata
from typing import Literal

from raytune_ft.spec import SplitSpec

Split = Literal["train", "validation", "test"]


def split_of(input_text: str, spec: SplitSpec) -> Split:
    """The split of an example, by a hash of its input.

    Inputs that differ only in white space or in Unicode's way of writing a character are equal, so that they
    stand on one side. An example keeps its place when data is added, and stays in `test` when only
    `validation` changes.

    Args:
        input_text: all before the first answer, or the whole of a plain text; see `Conversation.input_text`.
        spec: the fractions.
    """
    normal = " ".join(unicodedata.normalize("NFC", input_text).split())
    digest = hashlib.blake2b(normal.encode("utf-8"), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    if position < spec.test:
        return "test"
    return "validation" if position < spec.test + spec.validation else "train"
