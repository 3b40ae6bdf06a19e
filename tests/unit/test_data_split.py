"""The split is a pure function of the input."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.split import split_of
from raytune_ft.spec import SplitSpec

HALVES = SplitSpec(validation=0.3, test=0.3)
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts, st.sampled_from([" ", "\n", "\t ", "\u00a0"]))
def test_white_space_does_not_matter(text: str, space: str) -> None:
    assert split_of(f"{space}{text}{space}", HALVES) == split_of(text, HALVES)


@given(st.lists(texts, min_size=1), st.sampled_from([" ", "\n", "  \r\n"]))
def test_how_words_are_set_apart_does_not_matter(words: list[str], space: str) -> None:
    assert split_of(space.join(words), HALVES) == split_of(" ".join(words), HALVES)


def test_how_unicode_writes_a_character_does_not_matter() -> None:
    composed = [f"{n} caf\u00e9" for n in range(50)]
    decomposed = [f"{n} cafe\u0301" for n in range(50)]
    assert [split_of(t, HALVES) for t in composed] == [split_of(t, HALVES) for t in decomposed]


@given(texts, st.floats(0, 0.49), st.floats(0, 0.49))
def test_test_stays_when_validation_changes(text: str, test: float, validation: float) -> None:
    before = split_of(text, SplitSpec(validation=0, test=test))
    after = split_of(text, SplitSpec(validation=validation, test=test))
    assert (before == "test") == (after == "test")


@given(texts)
def test_no_fractions_no_split(text: str) -> None:
    assert split_of(text, SplitSpec(validation=0, test=0)) == "train"


def test_fractions_hold() -> None:
    found = Counter(split_of(f"What is {n}?", SplitSpec(validation=0.05, test=0.1)) for n in range(20_000))
    assert abs(found["test"] / 20_000 - 0.1) < 0.01
    assert abs(found["validation"] / 20_000 - 0.05) < 0.01


def test_the_split_is_the_same_in_every_version() -> None:
    """A changed hash would move examples that were trained on into the test split of the next run."""
    spec = SplitSpec(validation=0.3, test=0.3)
    assert [split_of(text, spec) for text in ("a", "b", "c", "Name the capital of Peru.", "")] == [
        "test",
        "validation",
        "test",
        "test",
        "train",
    ]
