"""Miniature IXI folders in TransMorph's format."""

import pickle

import numpy as np
import pytest

from adregnet_jax.config import DataConfig, IxiConfig
from adregnet_jax.data.datasets import ixi
from adregnet_jax.data.io import nifti
from adregnet_jax.data.splits import load_splits
from adregnet_jax.errors import UserError

SHAPE = (5, 4, 3)
SUBJECTS = {"Train": (0, 4, 10, 11), "Val": (2, 5), "Test": (1, 3, 7)}


def scan(number):
    """An image that encodes its number, and labels."""
    image = np.full(SHAPE, number / 100, np.float32)
    labels = np.random.default_rng(number).integers(0, 46, SHAPE).astype(np.int16)
    return image, labels


def pickled(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


@pytest.fixture
def root(tmp_path):
    for folder, numbers in SUBJECTS.items():
        for number in numbers:
            pickled(tmp_path / folder / f"subject_{number}.pkl", scan(number))
    pickled(tmp_path / "atlas.pkl", scan(50))
    (tmp_path / "Train" / "._subject_0.pkl").write_bytes(b"left by a file manager")
    return tmp_path


def config(root, **changes):
    return DataConfig(kind="ixi", ixi=IxiConfig(**{"root": str(root), "shape": SHAPE} | changes))


def refusal(settings):
    with pytest.raises(UserError) as error:
        for pairs in load_splits(settings):
            for pair in pairs:
                assert pair.name
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_atlas_moves_to_each_subject(root):
    splits = load_splits(config(root))
    for numbers, pairs in zip(SUBJECTS.values(), splits, strict=True):
        assert {pair.name for pair in pairs} == {f"subject_{number}" for number in numbers}
        for pair in pairs:
            number = int(pair.name.removeprefix("subject_"))
            for values, expected in zip((pair.fixed, pair.fixed_labels), scan(number), strict=True):
                np.testing.assert_array_equal(values, expected)
            for values, expected in zip((pair.moving, pair.moving_labels), scan(50), strict=True):
                np.testing.assert_array_equal(values, expected)
            np.testing.assert_array_equal(pair.spacing_mm, [1, 1, 1])
            assert pair.mask is None


def test_names_in_another_letter_case(root):
    (root / "Train").rename(root / "train")
    (root / "Val").rename(root / "VAL")
    (root / "atlas.pkl").rename(root / "Atlas_1.PKL")
    (root / "Test" / "subject_1.pkl").rename(root / "Test" / "Subject_1.PKL")
    assert [len(pairs) for pairs in load_splits(config(root))] == [4, 2, 3]
    assert load_splits(config(root)).test[0].moving[0, 0, 0] == np.float32(0.5)


def test_pairs_of_subjects_stay_in_their_split(root):
    (root / "atlas.pkl").unlink()  # not needed
    settings = config(root, mode="pairs")
    splits = load_splits(settings)
    for numbers, pairs in zip(SUBJECTS.values(), splits, strict=True):
        assert len(pairs) == len(numbers)
        for pair in pairs:
            fixed, moving = (int(number) for number in pair.name.split("_")[1::2])
            assert fixed != moving
            assert {fixed, moving} <= set(numbers)
            np.testing.assert_array_equal(pair.fixed, scan(fixed)[0])
            np.testing.assert_array_equal(pair.moving_labels, scan(moving)[1])

    names = [
        [load().name for loaders in ixi.ixi_splits(settings.ixi, seed) for load in loaders]
        for seed in range(3)
    ]
    again = [load().name for loaders in ixi.ixi_splits(settings.ixi, 0) for load in loaders]
    assert again == names[0]
    assert names[1:] != [names[0], names[0]]

    message = refusal(config(root, mode="pairs", partners=2))
    assert "data.ixi.partners is 2, val has 2 scans" in message
    for pickle_file in (root / "Val").iterdir():
        pickle_file.rename(root / "Train" / pickle_file.name)
    pickled(root / "Val" / "subject_20.pkl", scan(20))
    pickled(root / "Val" / "subject_21.pkl", scan(21))
    pickled(root / "Val" / "subject_22.pkl", scan(22))
    train = load_splits(config(root, mode="pairs", partners=2)).train
    assert len({pair.name for pair in train}) == len(train) == 6 * 2


def test_labels_with_the_numbers_of_freesurfer(root):
    """TransMorph's own loader renumbers its files by this table."""
    image, _ = scan(1)
    numbers = np.zeros(SHAPE, np.int16)
    numbers.flat[:46] = ixi.FREESURFER_NUMBERS
    numbers.flat[46:49] = 48, 250, 2035  # without a name here
    pickled(root / "Test" / "subject_1.pkl", (image, numbers))
    labels = load_splits(config(root)).test[0].fixed_labels
    np.testing.assert_array_equal(labels.flat[:46], np.arange(46))
    assert not labels.flat[46:].any()
    assert ixi.LABEL_NAMES[numbers.flat[:46].tolist().index(17)] == "Left-Hippocampus"


def test_scans_saved_as_nifti(tmp_path):
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    for folder, numbers in SUBJECTS.items():
        for number in numbers:
            image, labels = scan(number)
            for kind, values in (("images", image), ("labels", labels)):
                path = tmp_path / folder / kind / f"s{number}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nifti.write_volume(path, values, affine)
    assert "has no atlas" in refusal(config(tmp_path))
    nifti.write_volume(tmp_path / "atlas_image.nii.gz", scan(50)[0], affine)
    nifti.write_volume(tmp_path / "atlas_labels.nii.gz", scan(50)[1], affine)
    pair = load_splits(config(tmp_path)).test[0]
    assert pair.name == "s1"
    np.testing.assert_array_equal(pair.fixed, scan(1)[0])
    np.testing.assert_array_equal(pair.moving_labels, scan(50)[1])
    np.testing.assert_array_equal(pair.affine, affine)

    nifti.write_volume(tmp_path / "atlas_image.nii.gz", scan(50)[0], np.eye(4))
    assert "axes of fixed and moving scan differ" in refusal(config(tmp_path))
    nifti.write_volume(tmp_path / "atlas_image.nii.gz", scan(50)[0], np.diag([2.0, 2, 2, 1]))
    assert "expected 1 mm" in refusal(config(tmp_path))
    (tmp_path / "Val" / "labels" / "s2.nii.gz").unlink()
    assert "1 images have no labels, the first is" in refusal(config(tmp_path))


def test_unusable_folders(root, tmp_path_factory):
    for missing in ("", str(root / "none")):
        message = refusal(config(missing))
        assert "doesn't exist: expected Train, Val and Test" in message
        assert ixi.SOURCE in message
    assert "has no scans in train, val, test" in refusal(config(tmp_path_factory.mktemp("empty")))
    assert "data.ixi.mode is 'both'" in refusal(config(root, mode="both"))
    (root / "atlas.pkl").unlink()
    assert "has no atlas" in refusal(config(root))


def test_unusable_scans(root):
    assert "data.ixi.shape is (160, 192, 224)" in refusal(config(root, shape=(160, 192, 224)))
    image, labels = scan(1)
    path = root / "Test" / "subject_1.pkl"
    pickled(path, (image * 100, labels + 1 - labels.min()))
    assert load_splits(config(root)).test[0].fixed.max() == 1  # 1 itself is inside
    pickled(path, (image * 300, labels))
    assert "intensities run from 3 to 3; expected 0 to 1" in refusal(config(root))
    pickled(path, (image - 0.03, labels))
    assert load_splits(config(root)).test[0].fixed.min() == 0  # a little outside is clipped
    pickled(path, (image, labels - 1))
    assert "has label -1" in refusal(config(root))
    path.write_bytes(path.read_bytes()[:-9])
    assert "cut off" in refusal(config(root))


def test_seventeen_groups():
    assert len(ixi.LABEL_NAMES) == len(ixi.FREESURFER_NUMBERS) == len(set(ixi.LABEL_NAMES)) == 46
    assert len(ixi.GROUPS) == 17
    assert sorted(sum(ixi.GROUPS.values(), ())) == list(ixi.SCORED_LABELS)
    assert ixi.GROUPS["Hippocampus"] == (14, 31)
    assert ixi.GROUPS["Brain-Stem"] == (13,)
    assert ixi.GROUPS["Thalamus-Proper"] == (7, 27)
