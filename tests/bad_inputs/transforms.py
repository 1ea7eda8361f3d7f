"""`adregnet convert`, `apply`, `invert` and `compose`: fields and matrices."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from tests.bad_inputs.case import (
    AFFINE,
    SHAPE,
    Case,
    Make,
    Shell,
    directory,
    field,
    loop,
    make_all,
    noise,
    nothing,
    ramp,
    raw,
    scan,
    text,
    with_value,
)


def npz(name: str, **arrays: Any) -> Make:
    return lambda folder: np.savez(folder / name, **arrays)


def object_arrays() -> bytes:
    held = np.empty((2, 2, 2, 3), object)
    held[...] = Shell()
    file = io.BytesIO()
    np.savez(file, displacement=held, affine=AFFINE)
    return file.getvalue()


ITK_MATRIX = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
TRANSFORMS = [
    Case(
        "empty_matrix", "adregnet info m.txt", text("m.txt", ""), "not an ITK transform; expected '#Insight"
    ),
    Case(
        "matrix_of_fsl",
        "adregnet info m.txt",
        text("m.txt", "1 0 0 0\n" * 4),
        "a bare matrix, whose coordinates depend on the program: convert it to one of ITK",
    ),
    Case(
        "eleven_parameters",
        "adregnet convert m.txt -o m.tfm",
        text("m.txt", f"{ITK_MATRIX}Parameters: {'1 ' * 11}\nFixedParameters: 0 0 0\n"),
        "expected 12 Parameters and 3 FixedParameters: write it again",
    ),
    Case(
        "nan_matrix",
        "adregnet convert m.txt -o m.tfm",
        text("m.txt", f"{ITK_MATRIX}Parameters: {'nan ' * 12}\nFixedParameters: 0 0 0\n"),
        "the matrix has numbers that are NaN or infinite",
    ),
    Case(
        "garbage_mat",
        "adregnet info m.mat",
        raw("m.mat", b"\0\1" * 50),
        "not an ITK transform that can be read",
    ),
    Case(
        "garbage_h5", "adregnet info f.h5", raw("f.h5", b"\0\1" * 50), "not an ITK transform that can be read"
    ),
    Case(
        "empty_npz",
        "adregnet info f.npz",
        raw("f.npz", b""),
        "not a field .*expected arrays named displacement",
    ),
    Case("other_arrays", "adregnet info f.npz", npz("f.npz", flow=np.zeros(3)), "not a field .*displacement"),
    Case(
        "whole_numbers_in_npz",
        "adregnet convert f.npz -o f.nii.gz",
        npz("f.npz", displacement=np.zeros((*SHAPE, 3), int), affine=AFFINE),
        r"expected floats displacement \(x, y, z, 3\) and affine \(4, 4\), got int64",
    ),
    Case(
        "flat_affine_in_npz",
        "adregnet convert f.npz -o f.nii.gz",
        npz("f.npz", displacement=np.zeros((*SHAPE, 3)), affine=np.diag([1.0, 1, 0, 1])),
        "affine has a spacing of .*fix",
    ),
    Case(
        "perspective_in_npz",
        "adregnet convert f.npz -o f.nii.gz",
        npz("f.npz", displacement=np.zeros((*SHAPE, 3)), affine=np.full((4, 4), 1.0) + np.eye(4)),
        "last row of the affine is .*expected 0 0 0 1",
    ),
    Case(
        "pickle_in_npz",
        "adregnet convert f.npz -o f.nii.gz",
        raw("f.npz", object_arrays),
        "not a field .*pickle",
    ),
    Case(
        "pickle_as_npz",
        "adregnet convert f.npz -o f.nii.gz",
        raw("f.npz", pickle.dumps(Shell())),
        "not a field .*expected arrays",
    ),
    Case(
        "nan_in_field",
        "adregnet invert field.nii.gz -o back.nii.gz",
        field(displacement=np.full((*SHAPE, 3), np.nan)),
        "1008 of 1008 voxels are NaN or infinite: replace",
    ),
    Case(
        "scan_as_field",
        "adregnet invert scan.nii -o back.nii.gz",
        scan(),
        r"not a displacement field; expected \(x,",
    ),
    Case(
        "cut_field",
        "adregnet invert scan.nii.gz -o back.nii.gz",
        scan("scan.nii.gz", noise((16, 16, 16, 1, 3)), share=0.7, intent_code=1007),
        "damaged or cut off",
    ),
    Case(
        "unknown_suffix",
        "adregnet convert field.nii.gz -o f.xyz",
        field(),
        "kind of file not known; expected one",
    ),
    Case(
        "output_is_there",
        "adregnet convert field.nii.gz -o f.npz",
        make_all(field(), text("f.npz", "mine")),
        "f.npz: exists already; choose another name",
    ),
    Case(
        "output_behind_a_file",
        "adregnet convert field.nii.gz -o way/f.npz",
        make_all(field(), text("way", "")),
        "way/f.npz: can't be written .*check the name, the folder",
    ),
    Case(
        "output_in_no_folder",
        "adregnet invert field.nii.gz -o no/f.npz",
        field(),
        "no/f.npz: can't be written",
    ),
    Case(
        "output_is_a_folder",
        "adregnet convert field.nii.gz -o f.npz --overwrite",
        make_all(field(), directory("f.npz")),
        "f.npz: can't be written",
    ),
    Case(
        "output_is_a_loop", "adregnet convert field.nii.gz -o f.npz", make_all(field(), loop("f.npz")), "", 0
    ),
    Case(
        "long_output",
        f"adregnet convert field.nii.gz -o {'n' * 300}.npz",
        field(),
        "can't be written .*too long",
    ),
    Case(
        "unwritable_suffix_of_points",
        "adregnet apply field.nii.gz p.csv -o p.nii.gz",
        make_all(field(), text("p.csv", "x,y,z\n1,2,3\n")),
        "p.nii.gz: not a kind of points file; expected one of",
    ),
    Case(
        "no_points",
        "adregnet apply field.nii.gz p.csv -o q.csv",
        make_all(field(), text("p.csv", "")),
        "columns are",
    ),
    Case(
        "field_leads_elsewhere",
        "adregnet apply field.nii.gz scan.nii -o w.nii.gz",
        make_all(
            field(), scan(affine=np.array([[2.0, 0, 0, 9e4], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]))
        ),
        "the field field.nii.gz doesn't lead into this image anywhere",
    ),
    Case(
        "labels_that_are_no_labels",
        "adregnet apply field.nii.gz scan.nii -o w.nii.gz --mode label",
        make_all(field(), scan(values=ramp() / 2)),
        "labels must be whole numbers, found 0.5",
    ),
    Case(
        "labels_beyond_int32",
        "adregnet apply field.nii.gz scan.nii -o w.nii.gz --mode label",
        make_all(field(), scan(values=with_value(3e9, np.float64))),
        "label.* 3e\\+09",
    ),
    Case(
        "image_can_not_be_written",
        "adregnet apply field.nii.gz scan.nii -o w.png",
        make_all(field(), scan()),
        "w.png: can't write this kind",
    ),
    Case(
        "composed_alone",
        "adregnet compose field.nii.gz -o out.nii.gz",
        field(),
        "takes two or more fields, got one",
    ),
    Case(
        "composed_without_grid",
        "adregnet compose field.nii.gz field.nii.gz --invert 1 -o out.nii.gz",
        field(),
        "no grid in the fixed world.*--reference GRID",
    ),
    Case("no_argument", "adregnet convert", nothing, "Missing argument"),
    Case("structures_alone", "adregnet contours s.dcm f.npz -o out", nothing, "Missing option '--fixed'"),
    Case("dose_alone", "adregnet dose d.dcm f.npz -o out", nothing, "Missing option '--fixed'"),
    Case("unknown_command", "adregnet regster", nothing, "No such command"),
    Case("unknown_option", "adregnet info scan.nii --jsn", scan(), "No such option"),
    Case(
        "format_of_matrix",
        "adregnet convert m.txt -o m.tfm --format itk",
        text("m.txt", ""),
        "apply to fields in NIfTI files, not to a matrix",
    ),
    Case(
        "judged_on_another_grid",
        "adregnet assess scan.nii scan.nii field.nii.gz",
        make_all(scan(), field(displacement=np.zeros((5, 7, 8, 3), np.float32))),
        "the field has \\(5, 7, 8\\) voxels.*expected a field on the grid of the fixed scan",
    ),
    Case(
        "judged_with_another_scan",
        "adregnet assess scan.nii far.nii field.nii.gz",
        make_all(
            scan(),
            field(),
            scan("far.nii", affine=np.array([[2.0, 0, 0, 9e4], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])),
        ),
        "doesn't lead into .*far.nii anywhere",
    ),
    Case(
        "judged_with_a_mask_of_another_scan",
        "adregnet assess scan.nii scan.nii field.nii.gz --fixed-mask mask.nii",
        make_all(scan(), field(), scan("mask.nii", np.ones((4, 4, 4), np.uint8))),
        "the mask is \\(4, 4, 4\\) voxels, its scan .* expected one grid",
    ),
    Case(
        "judged_flat",
        "adregnet assess scan.nii flat.nii field.nii.gz",
        make_all(scan(), field(), scan("flat.nii", np.ones(SHAPE, np.float32))),
        "flat.nii: every voxel has the same value: there is nothing to judge by",
    ),
    Case(
        "verdict_without_one",
        "adregnet register scan.nii scan.nii -o out --assess off --fail-on fail",
        scan(),
        "--fail-on fail needs a verdict: drop --assess off",
    ),
]
