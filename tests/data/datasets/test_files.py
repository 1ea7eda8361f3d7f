"""Pairs from a CSV and from a folder."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adregnet_jax.config import FilesConfig
from adregnet_jax.data.datasets.files import file_splits, read_voxel_points
from adregnet_jax.data.io import nifti
from adregnet_jax.data.io.points import write_points
from adregnet_jax.errors import UserError

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def scan(path, shape=(8, 6, 5), affine=AFFINE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti.write_volume(path, np.random.default_rng(seed).uniform(1, 900, shape).astype(np.float32), affine)


def table(folder, *rows, columns="split,fixed,moving"):
    path = folder / "pairs.csv"
    path.write_text("\n".join([columns, *rows]) + "\n")
    return FilesConfig(pairs=str(path))


@pytest.fixture
def folder(tmp_path):
    scan(tmp_path / "f.nii", seed=0)
    scan(tmp_path / "sub" / "m.nii.gz", seed=1)
    return tmp_path


def refusal(config):
    with pytest.raises(UserError) as error:
        for loaders in file_splits(config):
            for load in loaders:
                load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_csv_rows_go_to_their_splits(folder):
    scan(folder / "t.nii")
    scan(folder / "v.nii")
    config = table(
        folder,
        "train, f.nii, sub/m.nii.gz",
        "test,t.nii,sub/m.nii.gz",
        "",
        f"validation,v.nii,{folder}/v.nii",
    )
    train, validation, test = file_splits(config)
    assert [len(loaders) for loaders in (train, validation, test)] == [1, 1, 1]
    pair = train[0]()
    assert pair.name == "f_m"
    assert test[0]().name == "t_m"
    raw, _, _ = nifti.read_volume(folder / "f.nii")
    low, high = np.percentile(raw, [0.5, 99.5])
    np.testing.assert_allclose(pair.fixed, np.clip((raw - low) / (high - low), 0, 1), atol=1e-6)
    assert pair.moving.min() == 0
    assert pair.moving.max() == 1
    assert pair.mask.all()
    np.testing.assert_allclose(pair.spacing_mm, [1, 2, 3])
    np.testing.assert_allclose(pair.affine, AFFINE)


def test_shapes_are_padded_to_a_common_one_and_landmarks_follow(folder):
    scan(folder / "big_f.nii", (9, 6, 8))
    scan(folder / "big_m.nii", (9, 6, 8))
    (folder / "f.csv").write_text("1,2,3\n7.5,0,4\n")
    (folder / "m.txt").write_text("2 2 3\n7 1 4\n")
    nifti.write_volume(folder / "l.nii", np.arange(240).reshape(8, 6, 5), AFFINE)
    config = table(
        folder,
        "train,f.nii,sub/m.nii.gz,f.csv,m.txt,l.nii,l.nii",
        "test,big_f.nii,big_m.nii,,,,",
        columns="split,fixed,moving,fixed_landmarks,moving_landmarks,fixed_labels,moving_labels",
    )
    (train,), _, (test,) = file_splits(config)
    pair = train()
    assert pair.fixed.shape == pair.mask.shape == test().fixed.shape == (9, 6, 8)
    assert pair.mask.sum() == 240
    assert not pair.fixed[~pair.mask].any()
    assert test().mask.all()
    np.testing.assert_array_equal(pair.to_native(pair.fixed_landmarks), [[1, 2, 3], [7.5, 0, 4]])
    np.testing.assert_array_equal(pair.to_native(pair.moving_landmarks), [[2, 2, 3], [7, 1, 4]])
    assert pair.mask[tuple(pair.fixed_landmarks[0].astype(int))]
    np.testing.assert_array_equal(pair.fixed_labels[pair.mask], np.arange(240))
    raw, affine, _ = nifti.read_volume(folder / "f.nii")
    voxel = pair.fixed_landmarks[0]
    assert pair.fixed[tuple(voxel.astype(int))] == pytest.approx(
        np.clip((raw[1, 2, 3] - np.percentile(raw, 0.5)) / np.ptp(np.percentile(raw, [0.5, 99.5])), 0, 1),
        abs=1e-6,
    )
    np.testing.assert_allclose(pair.affine @ [*voxel, 1], affine @ [1, 2, 3, 1])
    assert test().fixed_landmarks is None
    assert test().fixed_labels is None


def test_only_headers_are_read_before_a_pair_is_asked_for(folder):
    (folder / "f.nii").write_bytes((folder / "f.nii").read_bytes()[:400])  # header whole, voxels cut off
    (load,), _, _ = file_splits(table(folder, "train,f.nii,sub/m.nii.gz"))
    with pytest.raises(UserError, match="cut off"):
        load()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("training,f.nii,f.nii", "line 2: split is 'training'; use one of train, validation, test"),
        ("train,f.nii", "line 2: expected as many cells"),
        ("train,f.nii,f.nii,f.nii", "line 2: expected as many cells"),
        ("train,f.nii,", "only one of fixed and moving"),
        ("train,,", "fixed and moving are empty"),
        ("train,f.nii,none.nii", "none.nii, which doesn't exist"),
    ],
)
def test_bad_rows(folder, row, message):
    assert message in refusal(table(folder, row))


def test_bad_tables(folder):
    assert "expected a CSV file or a folder" in refusal(FilesConfig())
    assert "expected a CSV file or a folder" in refusal(FilesConfig(pairs=str(folder / "none.csv")))
    assert "has no rows" in refusal(table(folder))
    assert "columns are split, fixed; expected" in refusal(
        table(folder, "train,f.nii", columns="split,fixed")
    )
    bad_column = table(folder, "train,f.nii,f.nii,f.nii", columns="split,fixed,moving,fixed_label")
    assert "columns are split, fixed, moving, fixed_label; expected" in refusal(bad_column)
    one_label = table(folder, "train,f.nii,f.nii,f.nii", columns="split,fixed,moving,fixed_labels")
    assert "only one of fixed_labels and moving_labels" in refusal(one_label)
    (folder / "pairs.csv").write_bytes(b"\xff\xfe\x00")
    assert "not a CSV" in refusal(FilesConfig(pairs=str(folder / "pairs.csv")))


def test_grids_that_differ(folder):
    scan(folder / "other.nii", (8, 6, 6))
    message = refusal(table(folder, "train,f.nii,other.nii"))
    assert "f.nii is (8, 6, 5)" in message
    assert "other.nii (8, 6, 6)" in message
    scan(folder / "moved.nii", affine=np.diag([1.0, 2.0, 3.5, 1.0]))
    assert "expected one grid" in refusal(table(folder, "train,f.nii,moved.nii"))


def test_labels_and_landmarks_that_do_not_fit(folder):
    scan(folder / "other.nii", (8, 6, 6))
    nifti.write_volume(folder / "l.nii", np.ones((8, 6, 6), int), AFFINE)
    labels = table(
        folder, "train,f.nii,f.nii,l.nii,l.nii", columns="split,fixed,moving,fixed_labels,moving_labels"
    )
    assert "labels are (8, 6, 6), their image is (8, 6, 5)" in refusal(labels)

    columns = "split,fixed,moving,fixed_landmarks,moving_landmarks"
    (folder / "a.txt").write_text("1 2 3\n")
    (folder / "b.txt").write_text("1 2 3\n4 4 4\n")
    assert "1 landmarks" in refusal(table(folder, "train,f.nii,f.nii,a.txt,b.txt", columns=columns))
    for point in ("1 2 30", "1 2 4.6", "-0.6 2 3"):  # a voxel reaches half a voxel around its centre
        (folder / "b.txt").write_text(f"{point}\n")
        assert "outside of the (8, 6, 5) voxels" in refusal(
            table(folder, "train,f.nii,f.nii,a.txt,b.txt", columns=columns)
        )
    (folder / "b.txt").write_text("x y z\n7.4 -0.4 4.4\n")
    (load,), _, _ = file_splits(table(folder, "train,f.nii,f.nii,a.txt,b.txt", columns=columns))
    np.testing.assert_allclose(load().moving_landmarks, [[7.4, -0.4, 4.4]])


@pytest.mark.parametrize("suffix", [".csv", ".fcsv", ".mrk.json"])
def test_landmarks_in_the_world_are_those_of_register(suffix, folder):
    voxels = np.array([[1, 2, 3], [7, 0.5, 4]])
    affine = np.array([[0, -2, 0, 30], [1, 0, 0, -5], [0, 0, 3, 7], [0, 0, 0, 1]])  # turned and shifted
    for name in ("f.nii", "sub/m.nii.gz"):
        scan(folder / name, affine=affine)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    write_points(folder / f"w{suffix}", world)
    (folder / "v.csv").write_text("".join(f"{x},{y},{z}\n" for x, y, z in voxels))
    columns = "split,fixed,moving,fixed_landmarks,moving_landmarks"
    (load,), _, _ = file_splits(table(folder, f"train,f.nii,sub/m.nii.gz,w{suffix},v.csv", columns=columns))
    np.testing.assert_allclose(load().fixed_landmarks, voxels, atol=1e-5)
    np.testing.assert_array_equal(load().moving_landmarks, voxels)

    write_points(folder / f"w{suffix}", world + 1000, overwrite=True)
    message = refusal(table(folder, f"train,f.nii,f.nii,w{suffix},v.csv", columns=columns))
    assert "2 of 2 landmarks are outside" in message and "RAS mm of this scan" in message


def subjects(folder, count):
    for index in range(count):
        shape = (6 + index % 3, 5, 4 + index % 2)
        scan(folder / "images" / f"s{index:02}.nii.gz", shape, seed=index)
        (folder / "labels").mkdir(exist_ok=True)
        nifti.write_volume(folder / "labels" / f"s{index:02}.nii.gz", np.full(shape, index + 1), AFFINE)
    return FilesConfig(pairs=str(folder), partners=3)


def test_a_folder_is_split_by_subject(tmp_path):
    config = subjects(tmp_path, 10)
    config.validation_fraction = config.test_fraction = 0.2
    splits = file_splits(config, seed=1)
    assert [len(loaders) for loaders in splits] == [6 * 3, 2, 2]
    seen = []
    for loaders in splits:
        names = [tuple(load().name.split("_")) for load in loaders]
        assert all(fixed != moving for fixed, moving in names)
        assert len(set(names)) == len(names)
        seen.append({name for pair in names for name in pair})
    assert sum(map(len, seen)) == len(set.union(*seen)) == 10

    # In the test split every subject is paired with the next ones, whatever the seed.
    config.test_fraction, config.test_partners = 0.5, 2
    names = [tuple(load().name.split("_")) for load in file_splits(config, seed=1)[2]]
    members = list(dict.fromkeys(fixed for fixed, _ in names))
    assert names == [(members[n], members[(n + step) % 5]) for n in range(5) for step in (1, 2)]
    config.test_fraction = 0.2

    pair = splits[0][0]()
    assert pair.fixed.shape == pair.moving.shape == (8, 5, 5)
    fixed, moving = (int(name[1:]) + 1 for name in pair.name.split("_"))
    assert set(np.unique(pair.fixed_labels)) <= {0, fixed}
    np.testing.assert_array_equal(pair.mask, (pair.fixed_labels == fixed) & (pair.moving_labels == moving))

    first_names = lambda splits: [load().name for loaders in splits for load in loaders[:2]]  # noqa: E731
    assert first_names(file_splits(config, seed=1)) == first_names(splits)
    assert first_names(file_splits(config, seed=2)) != first_names(splits)


def test_unusable_folders(tmp_path):
    assert "0 NIfTI files" in refusal(FilesConfig(pairs=str(tmp_path)))
    config = subjects(tmp_path, 8)
    assert "6 / 1 / 1 subjects" in refusal(config)
    config.validation_fraction = config.test_fraction = 0.25
    assert len(file_splits(config)[0]) == 4 * 3
    (tmp_path / "labels" / "s03.nii.gz").unlink()
    assert "1 images have no labels, the first is" in refusal(config)
    for path in (tmp_path / "labels").iterdir():
        path.unlink()
    (tmp_path / "labels").rmdir()
    scan(tmp_path / "images" / "s03.nii.gz", affine=np.diag([1.0, 2.0, 2.0, 1.0]))
    assert "expected one grid" in refusal(config)


@given(
    st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 3), min_size=1, max_size=5),
    st.sampled_from([" ", ",", ",\t", "\t "]),
)
def test_points_round_trip(tmp_path_factory, points, separator):
    path = tmp_path_factory.getbasetemp() / "points.txt"
    path.write_text("\r\n".join(separator.join(map(repr, point)) + "\t" for point in points))
    np.testing.assert_array_equal(read_voxel_points(path), points)


def test_real_scans_of_many_shapes(real_data):
    train, validation, test = file_splits(FilesConfig(pairs=str(real_data("hippocampus"))))
    assert (len(train), len(validation), len(test)) == (208 * 10, 26, 26)
    pair = test[0]()
    assert pair.fixed.shape == (43, 59, 47)
    assert set(np.unique(pair.fixed_labels)) == {0, 1, 2}


def test_a_scan_of_one_split_is_refused_in_another(folder):
    scan(folder / "atlas.nii")
    for name in ("a", "b", "c"):
        scan(folder / f"{name}.nii")
    # The atlas is the moving scan in both splits, which reveals nothing about the test subject.
    train, _, test = file_splits(table(folder, "train,a.nii,atlas.nii", "test,b.nii,atlas.nii"))
    assert (len(train), len(test)) == (1, 1)
    for rows in (("train,a.nii,b.nii", "test,b.nii,c.nii"), ("train,a.nii,b.nii", "test,a.nii,c.nii")):
        message = refusal(table(folder, *rows))
        assert "is in the splits" in message and "train" in message and "test" in message
