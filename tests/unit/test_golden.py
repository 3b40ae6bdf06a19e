"""Twenty steps of each method against the losses that are kept in tests/golden."""

import importlib.util
from pathlib import Path

import pytest
import tiny

_PATH = Path(__file__).parents[1] / "golden" / "losses.py"
_SPEC = importlib.util.spec_from_file_location("golden_losses", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("name", sorted(golden.CASES))
def test_losses_are_those_that_were_kept(name: str, base: Path) -> None:
    # Other processors round differently; bfloat16 has 8 bits of mantissa.
    tolerance = 1e-4 if name.endswith("fp32") else 2e-2
    assert golden.losses(name, base) == pytest.approx(golden.read(name), abs=tolerance)


def test_every_kept_file_is_tested() -> None:
    assert sorted(path.stem for path in _PATH.parent.glob("*.txt")) == sorted(golden.CASES)
