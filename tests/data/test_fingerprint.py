"""A fingerprint depends on the data, not on their location."""

import shutil

import pytest

from adregnet_jax.config import DataConfig, DirLabConfig, FilesConfig, IxiConfig
from adregnet_jax.data.fingerprint import HEAD_BYTES, data_fingerprint


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.nii").write_bytes(bytes(HEAD_BYTES + 5))
    (root / "images" / "b.nii").write_bytes(b"scan")
    (root / "other.nii").write_bytes(b"not in the table")
    (root / "pairs.csv").write_text("split,fixed,moving\ntrain,images/a.nii, images/b.nii\n")
    return root


def of_files(place):
    return data_fingerprint(DataConfig(kind="files", files=FilesConfig(pairs=str(place))))


def test_every_file_counts(folder):
    before = of_files(folder)
    assert before["files"] == 4
    assert before["bytes"] == sum(path.stat().st_size for path in folder.rglob("*.*"))
    changes = [
        lambda: (folder / "images" / "b.nii").write_bytes(b"scaN"),
        lambda: (folder / "images" / "b.nii").rename(folder / "images" / "c.nii"),
        lambda: (folder / "images" / "a.nii").write_bytes(bytes(HEAD_BYTES + 6)),
    ]
    found = [before["sha256"]]
    for change in changes:
        change()
        found.append(of_files(folder)["sha256"])
    assert len(set(found)) == 4


def test_their_location_does_not_count(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert of_files(tmp_path / "elsewhere") == of_files(folder)
    for data in (
        DataConfig(kind="dirlab", dirlab=DirLabConfig(root=str(folder))),
        DataConfig(kind="ixi", ixi=IxiConfig(root=str(folder))),
    ):
        assert data_fingerprint(data) == of_files(folder)


def test_only_files_named_in_a_table_count(folder):
    before = of_files(folder / "pairs.csv")
    assert before["files"] == 3
    (folder / "other.nii").write_bytes(b"something else")
    assert of_files(folder / "pairs.csv") == before
    (folder / "images" / "b.nii").write_bytes(b"replaced")
    assert of_files(folder / "pairs.csv") != before


def test_generated_data_have_none():
    assert data_fingerprint(DataConfig(kind="phantom")) is None
    assert data_fingerprint(DataConfig(kind="synthetic")) is None
