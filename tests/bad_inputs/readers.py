"""File readers called from Python, and programs for single data sets."""

from __future__ import annotations

import pickle

import numpy as np

from adregnet_jax.config import DirLabConfig, FilesConfig, IxiConfig
from adregnet_jax.data.datasets import dirlab, files, ixi
from adregnet_jax.data.io import nifti, points, transforms
from adregnet_jax.data.io.images import read_image
from adregnet_jax.data.io.pickles import read_pickle
from tests.bad_inputs.case import (
    Case,
    Make,
    Shell,
    directory,
    loop,
    make_all,
    nothing,
    ramp,
    raw,
    scan,
    text,
    with_value,
)


def dirlab_case(size: int) -> Make:
    """Case 1 with images of `size` bytes and one landmark outside them."""
    makes = [raw(f"case1_{phase}_s.img", bytes(size)) for phase in ("T00", "T50")]
    return make_all(*makes, *(text(f"Case1_300_{phase}_xyz.txt", "1 2 300\n") for phase in ("T00", "T50")))


READERS = [
    Case(
        "read_volume_4d",
        lambda at: nifti.read_volume(at / "scan.nii"),
        scan(values=ramp((4, 4, 4, 5))),
        "3-D vol",
    ),
    Case(
        "read_labels_half",
        lambda at: nifti.read_labels(at / "scan.nii"),
        scan(values=ramp() / 2),
        "whole numbers",
    ),
    Case(
        "read_labels_nan",
        lambda at: nifti.read_labels(at / "scan.nii"),
        scan(values=with_value(np.nan)),
        "whole n",
    ),
    Case(
        "read_labels_1e30",
        lambda at: nifti.read_labels(at / "scan.nii"),
        scan(values=with_value(1e30)),
        "1e\\+30",
    ),
    Case(
        "read_grid_empty",
        lambda at: nifti.read_grid(at / "scan.nii"),
        raw("scan.nii", b""),
        "not a NIfTI file",
    ),
    Case(
        "read_image_loop",
        lambda at: read_image(at / "scan.nii"),
        loop("scan.nii"),
        "can't be read|no such file",
    ),
    Case(
        "read_points_suffix",
        lambda at: points.read_points(at / "p.txt"),
        text("p.txt", ""),
        "not a kind of points",
    ),
    Case(
        "read_field_loop",
        lambda at: transforms.read_field(at / "f.npz"),
        loop("f.npz"),
        "not a field|no such file",
    ),
    Case(
        "read_matrix_loop",
        lambda at: transforms.read_matrix(at / "m.txt"),
        loop("m.txt"),
        "not a text|no such file",
    ),
    Case(
        "read_matrix_folder",
        lambda at: transforms.read_matrix(at / "m.mat"),
        directory("m.mat"),
        "no such file",
    ),
    Case(
        "voxel_points_of_words",
        lambda at: files.read_voxel_points(at / "p.txt"),
        text("p.txt", "1 2 3\n4 five 6\n"),
        "line 2: expected three numbers x y z, got '4 five 6'",
    ),
    Case(
        "voxel_points_empty",
        lambda at: files.read_voxel_points(at / "p.txt"),
        text("p.txt", ""),
        "or no line|no line",
    ),
    Case(
        "voxel_points_utf16",
        lambda at: files.read_voxel_points(at / "p.txt"),
        raw("p.txt", b"\xff\xfe1"),
        "not a te",
    ),
    Case(
        "pairs_nowhere",
        lambda at: files.file_splits(FilesConfig(pairs=str(at / "no"))),
        nothing,
        "expected a CSV",
    ),
    Case("pickle_empty", lambda at: read_pickle(at / "a.pkl"), raw("a.pkl", b""), "not a pickle, or cut off"),
    Case("pickle_loop", lambda at: read_pickle(at / "a.pkl"), loop("a.pkl"), "a.pkl: .*(symbolic|no such)"),
    Case(
        "pickle_runs",
        lambda at: read_pickle(at / "a.pkl"),
        raw("a.pkl", pickle.dumps(Shell(), 2)),
        "nothing was run",
    ),
    Case(
        "pickle_shapes",
        lambda at: read_pickle(at / "a.pkl"),
        raw("a.pkl", pickle.dumps((np.zeros((2, 2, 2), "f4"), np.zeros((2, 2, 3), "i2")))),
        r"image is \(2, 2, 2\), labels are \(2, 2, 3\): expected one grid",
    ),
    Case(
        "pickle_labels_1e30",
        lambda at: read_pickle(at / "a.pkl"),
        raw("a.pkl", pickle.dumps((np.zeros((2, 2, 2), "f4"), np.full((2, 2, 2), 1e30)))),
        "label",
    ),
    Case(
        "pickle_big_endian",
        lambda at: read_pickle(at / "a.pkl")[0].max(),
        raw("a.pkl", pickle.dumps((ramp().astype(">f4"), ramp().astype(">i2")))),
        r"^335\.0$",
        0,
    ),
    Case(
        "dirlab_no_root", lambda at: dirlab.find_cases(at / "no"), nothing, "DIR-Lab folder .* doesn't exist"
    ),
    Case(
        "dirlab_cut",
        lambda at: dirlab.dirlab_pair(DirLabConfig(root=str(at)), 1),
        dirlab_case(1000),
        r"case 1 has 256 x 256 x 94 voxels of 2 bytes, expected 12320768 bytes, got 1000: unpack",
    ),
    Case(
        "dirlab_landmarks",
        lambda at: dirlab.read_landmarks(dirlab.find_cases(at)[1], 1),
        dirlab_case(0),
        "1 of 1 landmarks are outside 1..256",
    ),
    Case(
        "dirlab_report", "adregnet_jax.data.datasets.dirlab no", nothing, "DIR-Lab folder 'no' doesn't exist"
    ),
    Case("dirlab_report_of_nothing", "adregnet_jax.data.datasets.dirlab", nothing, "required: root"),
    Case(
        "dirlab_case_eleven",
        lambda at: dirlab.dirlab_pair(DirLabConfig(root=str(at)), 11),
        nothing,
        "no DIR-Lab case",
    ),
    Case(
        "ixi_mode",
        lambda at: ixi.ixi_splits(IxiConfig(root=str(at), mode="x")),
        nothing,
        "data.ixi.mode is 'x'",
    ),
    Case(
        "t1t2_empty",
        lambda at: ixi.ixi_splits(IxiConfig(root=str(at), mode="t1t2")),
        nothing,
        "has no scans: expect",
    ),
    Case(
        "prepare_nothing",
        "adregnet_jax.data.datasets.prepare_ixi no out --masks no",
        nothing,
        "no: there is no such folder",
    ),
    Case(
        "prepare_without_masks",
        "adregnet_jax.data.datasets.prepare_ixi no out",
        nothing,
        "no brain masks: give --masks",
    ),
    Case("prepare_without_input", "adregnet_jax.data.datasets.prepare_ixi", nothing, "required: INPUT"),
]
