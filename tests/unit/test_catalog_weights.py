"""What the check of a safetensors header lets through, against the format's own library."""

import json

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from raytune_ft.catalog.weights import LENGTH_BYTES, header_problem, length_problem


def problem_of(content: bytes) -> str | None:
    """What the two checks say of a whole file."""
    length = content[:LENGTH_BYTES]
    problem = length_problem(length, len(content))
    if problem is not None:
        return problem
    stop = LENGTH_BYTES + int.from_bytes(length, "little")
    return header_problem(content[LENGTH_BYTES:stop], len(content) - stop)


def loads(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except Exception:  # noqa: BLE001  the library's errors have no common base
        return False
    return True


@given(
    st.lists(
        st.tuples(st.sampled_from([np.float32, np.float16, np.int8, np.bool_]), st.integers(0, 5)), max_size=4
    )
)
def test_what_the_library_writes_is_sound(tensors: list[tuple[type, int]]) -> None:
    arrays = {f"t{at}": np.ones((count, 2), dtype) for at, (dtype, count) in enumerate(tensors)}
    assert problem_of(save(arrays, metadata={"format": "pt"})) is None


@given(st.data())
def test_what_the_library_refuses_is_refused(data: st.DataObject) -> None:
    content = bytearray(save({"w": np.ones(2, np.float32)}, metadata={"format": "pt"}))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"{}[],:')))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    damaged = bytes(content[:cut])
    if not loads(damaged):
        assert problem_of(damaged) is not None


@pytest.mark.parametrize(
    ("header", "weight_bytes", "problem"),
    [
        (b"[]", 0, "its header is not an object"),
        (b"\xff", 0, "its header is not JSON"),
        (b"[" * 100_000, 0, "its header is not JSON"),
        (b'{"w": 1, "w": 2}', 0, "its header names something twice"),
        (b'{"__metadata__": {"a": 1}}', 0, "its __metadata__ is not a map of texts"),
        (b'{"w": {}}', 0, "its tensor 'w' has other fields than dtype, shape and data_offsets"),
        (b"{}", 4, "its tensors take 0 bytes, and the file holds 4 after the header"),
    ],
)
def test_messages(header: bytes, weight_bytes: int, problem: str) -> None:
    assert header_problem(header, weight_bytes) == problem


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ([2, 6], "its tensors overlap at byte 2 of the weights"),
        ([5, 9], "its tensors leave a hole at byte 4 of the weights"),
        ([-1, 3], "its tensor 'b' has a shape or offsets that are no sizes"),
        ([4, True], "its tensor 'b' has a shape or offsets that are no sizes"),
        ([4, 9], "its tensor 'b' has the bytes 4 to 9, and its shape takes 4"),
    ],
)
def test_places(second: list[int], problem: str) -> None:
    first = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": first, "b": {**first, "data_offsets": second}})
    assert header_problem(header.encode(), 9) == problem


def test_lengths() -> None:
    assert length_problem(b"\0" * 7, 7) == "ends within the 8 bytes of its header's length"
    assert length_problem(b"\xff" * 8, 100) == (
        "says that its header has 18,446,744,073,709,551,615 bytes, and at most 92 are possible"
    )
