"""The short part of `make torture`."""

import random
from pathlib import Path

import pytest

from tools.torture import faults, kills
from tools.torture.runs import LostError, Place, check_files

pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("torture"), steps=80)


def test_a_killed_training_loses_nothing(place):
    assert list(kills.training(place, 2, random.Random(0))) == ["", ""]


@pytest.mark.parametrize("fault", [faults.newest_checkpoint_damaged, faults.nan_in_a_batch])
def test_a_fault_loses_nothing(place, fault):
    fault(place, place.folder / fault.__name__)


def test_another_state_is_reported(place, tmp_path):
    """A state that differs from the undisturbed run's counts as lost."""
    place.check_state(place.reference)
    step, right = place.newest_state(place.reference)
    place.digests[step] = "another"
    with pytest.raises(LostError, match=f"the state of step {step} differs"):
        place.check_state(place.reference)
    place.digests[step] = right
    place.check_state(tmp_path)  # without checkpoints nothing is lost


def test_half_a_file_is_reported(place, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    (tmp_path / ".rows.csv").write_text("a,")
    check_files(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b\n1")
    with pytest.raises(LostError, match=r"rows\.csv is half a file"):
        check_files(tmp_path)
