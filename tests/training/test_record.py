"""`splits.json`: the subjects of each split, for every kind of data, and runs refused because of it."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from adregnet_jax.config import Config, DataConfig, DirLabConfig, FilesConfig, IxiConfig, PhantomConfig
from adregnet_jax.data.io import nifti
from adregnet_jax.data.splits import load_splits
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation.evaluate import evaluate
from adregnet_jax.training.record import append_start, check_splits, write_splits

SUBJECTS = 20


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for n in range(SUBJECTS):
        values = rng.random((4, 4, 4)).astype(np.float32)
        nifti.write_volume(folder / "images" / f"s{n:02d}.nii", values, np.eye(4))
    return folder


def of_files(folder, **changes):
    return DataConfig(kind="files", files=FilesConfig(pairs=str(folder), **changes))


def of_phantom(**changes):
    phantom = PhantomConfig(train_cases=3, validation_cases=1, test_cases=2, shape=(16, 16, 16))
    return DataConfig(phantom=dataclasses.replace(phantom, **changes))


def recorded(tmp_path, config):
    write_splits(tmp_path, config.kind, load_splits(config))
    return json.loads((tmp_path / "splits.json").read_text())


def refusal(workdir, config):
    with pytest.raises(UserError) as error:
        check_splits(workdir, config.kind, load_splits(config))
    assert "\n" not in str(error.value)
    return str(error.value)


def trained(tmp_path, config):
    recorded(tmp_path, config)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    return tmp_path


def test_a_folder_is_split_by_subject(tmp_path, scans):
    record = recorded(tmp_path, of_files(scans, partners=3))
    parts = {split: record[split] for split in ("train", "validation", "test")}
    assert [len(part["subjects"]) for part in parts.values()] == [16, 2, 2]
    assert sorted(name for part in parts.values() for name in part["subjects"]) == [
        f"s{n:02d}.nii" for n in range(SUBJECTS)
    ]
    assert len(parts["train"]["pairs"]) == 16 * 3
    for split, pairs in zip(parts, load_splits(of_files(scans, partners=3)), strict=True):
        read = [pair.name for pair in pairs]
        told = [f"{fixed}_{moving}".replace(".nii", "") for fixed, moving in parts[split]["pairs"]]
        assert told == read
        assert {name for pair in parts[split]["pairs"] for name in pair} == set(parts[split]["subjects"])


def test_scans_of_a_csv_are_told_by_their_place_beside_it(tmp_path, scans):
    table = scans / "pairs.csv"
    lines = ["split,fixed,moving", "train,images/s00.nii,images/s01.nii"]
    lines += [f"test,{scans}/images/s02.nii,images/s01.nii", "validation,images/s03.nii,images/s03.nii"]
    table.write_text("\n".join(lines) + "\n")
    record = recorded(tmp_path, of_files(table))
    assert record["test"]["pairs"] == [["images/s02.nii", "images/s01.nii"]]
    assert record["validation"]["subjects"] == ["images/s03.nii"]


def test_phantom_cases_and_dirlab_cases_have_their_numbers(tmp_path):
    record = recorded(tmp_path, of_phantom())
    for split, pairs in zip(("train", "validation", "test"), load_splits(of_phantom()), strict=True):
        assert record[split]["subjects"] == [pair.name for pair in pairs]
    dirlab = DirLabConfig(cases=(1, 2, 3, 4), test_case=2)
    for protocol, train in (("leave-one-out", ["case1", "case4"]), ("paper", ["case1", "case2", "case4"])):
        dirlab.protocol = protocol
        record = recorded(tmp_path, DataConfig(kind="dirlab", dirlab=dirlab))
        assert record["train"]["subjects"] == train
        assert (record["validation"]["subjects"], record["test"]["subjects"]) == (["case3"], ["case2"])


def test_ixi_subjects_and_the_atlas(tmp_path):
    for name in ("Train/a", "Train/b", "Val/c", "Test/d", "Test/e", "atlas"):
        path = tmp_path / "ixi" / f"{name}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps((np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.int16))))
    config = DataConfig(kind="ixi", ixi=IxiConfig(root=str(tmp_path / "ixi"), shape=(2, 2, 2)))
    record = recorded(tmp_path, config)
    assert record["train"] == {"subjects": ["a", "atlas", "b"], "pairs": [["a", "atlas"], ["b", "atlas"]]}
    assert [pair.name for pair in load_splits(config).test] == [pair[0] for pair in record["test"]["pairs"]]


def test_another_split_is_refused_and_names_the_subject(tmp_path, scans):
    workdir = trained(tmp_path, of_files(scans))
    check_splits(workdir, "files", load_splits(of_files(scans, partners=2, test_partners=1)))
    message = refusal(workdir, of_files(scans, test_fraction=0.2))
    assert "was trained with another split: there s" in message
    assert "is in train, in this config in" in message
    assert "was trained with files data, this config has phantom" in refusal(workdir, of_phantom())
    with pytest.raises(UserError, match="was trained with another split"):  # training doesn't continue either
        write_splits(workdir, "files", load_splits(of_files(scans, test_fraction=0.2)))


def test_new_subjects_are_refused(tmp_path):
    workdir = trained(tmp_path, of_phantom())
    message = refusal(workdir, of_phantom(test_cases=3))
    assert "there phantom_2000002 is in none, in this config in test" in message


def test_the_evaluation_refuses_it(tmp_path):
    trained(tmp_path, of_phantom())
    with pytest.raises(UserError, match="was trained with another split"):
        evaluate(Config(data=of_phantom(test_cases=3)), tmp_path)


def test_runs_without_a_record_and_damaged_records(tmp_path):
    splits = load_splits(of_phantom())
    check_splits(tmp_path, "phantom", splits)
    write_splits(tmp_path, "files", load_splits(of_phantom(test_cases=1)))
    write_splits(tmp_path, "phantom", splits)  # without a checkpoint, the run may change
    check_splits(tmp_path, "phantom", splits)
    for damaged in ("{", "[]", '{"train": 3}'):
        (tmp_path / "splits.json").write_text(damaged)
        assert "not a record of splits" in refusal(tmp_path, of_phantom())


def test_data_that_changed_since_the_last_start_are_reported(tmp_path):
    one, other = {"files": 1, "sha256": "1"}, {"files": 1, "sha256": "2"}
    told = [append_start(tmp_path, 0, data) for data in (one, one, other, other, None)]
    assert told == [False, False, True, False, True]
    lines = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [line["data"] for line in lines] == [one, one, other, other, None]
