"""The header of a safetensors file, checked by the format's rules without reading the weights."""

import json
import math
from collections.abc import Mapping
from typing import Any

LENGTH_BYTES = 8
"""The header's length stands before it, little-endian."""
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
METADATA = "__metadata__"
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def length_problem(length: bytes, size_bytes: int) -> str | None:
    """What is wrong with the bytes before the header of a file of this size, or None."""
    if len(length) < LENGTH_BYTES:
        return f"ends within the {LENGTH_BYTES} bytes of its header's length"
    header_bytes = int.from_bytes(length, "little")
    limit = min(MAX_HEADER_BYTES, size_bytes - LENGTH_BYTES)
    if header_bytes > limit:
        return f"says that its header has {header_bytes:,} bytes, and at most {limit:,} are possible"
    return None


def header_problem(header: bytes, weight_bytes: int) -> str | None:
    """What is wrong with a header, or None.

    Args:
        header: the JSON.
        weight_bytes: of the file, all that follows the header.
    """
    try:
        # A plain dict would keep the last of two equal names in silence.
        tensors = json.loads(header.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Twice) else "is not JSON"
        return f"its header {reason}"
    if not isinstance(tensors, dict):
        return "its header is not an object"
    metadata = tensors.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        return f"its {METADATA} is not a map of texts"
    spans: list[tuple[int, int]] = []
    for name, tensor in tensors.items():
        span = _span(tensor)
        if isinstance(span, str):
            return f"its tensor {name!r:.200} {span}"
        spans.append(span)
    return _cover_problem(spans, weight_bytes)


class _Twice(ValueError):
    """A name stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice("names something twice")
    return found


def _span(tensor: object) -> tuple[int, int] | str:
    """First byte of a tensor and the one after its last, or what is wrong with it."""
    if not isinstance(tensor, Mapping) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        return "has other fields than dtype, shape and data_offsets"
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"has the dtype {dtype!r:.40}, which the format does not know"
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return "has a shape or offsets that are no sizes"
    start, stop = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if (stop - start) * 8 != bits:
        return f"has the bytes {start:,} to {stop:,}, and its shape takes {bits // 8:,}"
    return start, stop


def _are_sizes(values: object) -> bool:
    # A bool is an int in Python. Sizes above 64 bits would make the product a way to burn time.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _cover_problem(spans: list[tuple[int, int]], weight_bytes: int) -> str | None:
    """Tensors must stand side by side, without overlap or hole, and end with the file."""
    at = 0
    for start, stop in sorted(spans):
        if start != at:
            what = "overlap" if start < at else "leave a hole"
            return f"its tensors {what} at byte {min(start, at):,} of the weights"
        at = stop
    if at != weight_bytes:
        return f"its tensors take {at:,} bytes, and the file holds {weight_bytes:,} after the header"
    return None
