"""The error tree: what is raised in a worker arrives at the driver as itself."""

import pickle
from collections.abc import Iterator

import pytest

from raytune_ft.errors import BadInput, GateRefused, RaytuneError, StorageError, TrainingError

MESSAGE = "jobs/x.yaml: model.weight_bits = 5: must be 4, 8, 16 or 32"
FAMILIES = {BadInput: 2, TrainingError: 3, StorageError: 4, GateRefused: 5}
"""Exit code of each family, as the command line documents it."""


def descendants(kind: type[RaytuneError]) -> Iterator[type[RaytuneError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


TREE = [RaytuneError, *descendants(RaytuneError)]


def test_the_tree_is_found_whole() -> None:
    # The other tests here say something only while they see all kinds.
    assert {"SpecError", "ModelError", "Diverged", "OutOfMemory", "StorageFull"} <= {k.__name__ for k in TREE}


@pytest.mark.parametrize("kind", TREE)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_kind_and_message_survive_a_pickle(kind: type[RaytuneError], protocol: int) -> None:
    again = pickle.loads(pickle.dumps(kind(MESSAGE), protocol))
    assert type(again) is kind
    assert str(again) == MESSAGE
    assert again.args == (MESSAGE,)


@pytest.mark.parametrize("kind", TREE[1:])
def test_every_kind_ends_with_the_exit_code_of_its_family(kind: type[RaytuneError]) -> None:
    (code,) = {code for family, code in FAMILIES.items() if issubclass(kind, family)}
    assert kind.exit_code == kind(MESSAGE).exit_code == code


def test_an_error_without_a_family_is_a_failure_of_training() -> None:
    assert RaytuneError.exit_code == 3
