"""`adregnet info` on scans: damaged, too large for memory, or of another kind."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.bad_inputs.case import (
    AFFINE,
    SHAPE,
    Case,
    Make,
    directory,
    field,
    loop,
    make_all,
    nifti_bytes,
    noise,
    nothing,
    ramp,
    raw,
    scan,
    text,
    with_value,
)


def zeros_gzip(header: bytes, gigabytes: int) -> Callable[[], bytes]:
    """A header followed by zeros, compressed a thousandfold by repeating one block."""

    def make() -> bytes:
        block = gzip.compress(bytes(64 * 2**20))
        return gzip.compress(header, 1) + block * (16 * gigabytes)  # members follow one another

    return make


def zeros_npz(name: str, shape: tuple[int, ...]) -> Make:
    """An archive with an array of zeros, written in parts."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("displacement.npy", "w", force_zip64=True) as member:
                head = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, head)
                for _ in range(4 * int(np.prod(shape)) // 2**24):
                    member.write(bytes(2**24))
            with archive.open("affine.npy", "w") as member:
                np.save(member, AFFINE)

    return make


def huge_npz(folder: Path) -> None:
    """An array whose header declares terabytes, without any data."""
    with zipfile.ZipFile(folder / "field.npz", "w") as archive:
        with archive.open("displacement.npy", "w") as member:
            head = {"descr": "<f4", "fortran_order": False, "shape": (30000, 30000, 30000, 3)}
            np.lib.format.write_array_header_1_0(member, head)
            member.write(bytes(1000))
        with archive.open("affine.npy", "w") as member:
            np.save(member, AFFINE)


def sparse(name: str, header: bytes, size: int) -> Make:
    """A file of full size that takes no space on disk."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)

    return make


NIFTI = [
    Case("no_such_file", "adregnet info scan.nii", nothing, r"scan\.nii: no such file"),
    Case("empty_nii", "adregnet info scan.nii", raw("scan.nii", b""), "not a NIfTI file; expected .nii"),
    Case("empty_gz", "adregnet info scan.nii.gz", raw("scan.nii.gz", b""), "not a NIfTI file; expected .nii"),
    Case("text_as_nii", "adregnet info scan.nii", text("scan.nii", "a,b\n" * 200), "not a NIfTI file"),
    Case(
        "not_gzip", "adregnet info scan.nii.gz", raw("scan.nii.gz", b"no" * 400), "can't be read .*gzip.*copy"
    ),
    Case("cut_header", "adregnet info scan.nii", scan(share=0.1), "not a NIfTI file; expected .nii"),
    Case("cut_voxels", "adregnet info scan.nii", scan(share=0.8), "damaged or cut off .*copy or download"),
    Case(
        "cut_gz",
        "adregnet info s.nii.gz",
        scan("s.nii.gz", noise(), share=0.8),
        "damaged or cut off .*copy or dow",
    ),
    Case(
        "nan_voxel", "adregnet info scan.nii", scan(values=with_value(np.nan)), "1 of 336 voxels are NaN or"
    ),
    Case(
        "inf_voxel", "adregnet info scan.nii", scan(values=with_value(np.inf)), "1 of 336 voxels are NaN or"
    ),
    Case(
        "beyond_float32",
        "adregnet info scan.nii",
        scan(values=with_value(1e300, np.float64)),
        "values go up to 1e\\+300, beyond float32: rescale them",
    ),
    Case(
        "complex_voxels",
        "adregnet info scan.nii",
        scan(values=ramp().astype(np.complex64)),
        "voxels are complex64; expected one real number each",
    ),
    Case(
        "colour",
        "adregnet info scan.nii",
        scan(values=np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "voxels are .*'R'.*; expected one real number each",
    ),
    Case("unknown_type", "adregnet info scan.nii", scan(datatype=9999), "not a NIfTI image that can be read"),
    Case(
        "no_type", "adregnet info scan.nii", scan(datatype=0), "scan.nii: .*expected one real number|not a N"
    ),
    Case("big_endian", "adregnet info scan.nii", scan(big_endian=True), r"maximum +335\n", 0),
    Case("big_endian_gz", "adregnet info s.nii.gz", scan("s.nii.gz", big_endian=True), r"maximum +335\n", 0),
    Case(
        "2d", "adregnet info scan.nii", scan(values=ramp((6, 7))), r"shape is \(6, 7.*expected a 3-D volume"
    ),
    Case("1d", "adregnet info scan.nii", scan(values=ramp((6,))), r"shape is \(6,.*expected a 3-D volume"),
    Case("0d", "adregnet info scan.nii", scan(dim=0), r"shape is .*expected a 3-D volume|not a NIfTI"),
    Case(
        "4d", "adregnet info scan.nii", scan(values=ramp((4, 4, 4, 5))), "expected one 3-D volume: save one"
    ),
    Case(
        "5d", "adregnet info s.nii", scan("s.nii", ramp((4, 4, 4, 2, 2))), "expected one 3-D volume: save one"
    ),
    Case("4d_of_one", "adregnet info s.nii", scan("s.nii", ramp((6, 7, 8, 1))), r"maximum +335\n", 0),
    Case(
        "negative_size",
        "adregnet info scan.nii",
        scan(dim=[3, -6, 7, 8, 1, 1, 1, 1]),
        r"shape is \(-6, 7, 8\); expected a 3-D volume",
    ),
    Case(
        "zero_spacing",
        "adregnet info scan.nii",
        scan(pixdim=[1, 0, 2, 3, 1, 1, 1, 1]),
        "spacing is 0 x 2 x 3 mm; expected numbers above 0: fix",
    ),
    Case(
        "nan_spacing",
        "adregnet info scan.nii",
        scan(pixdim=[1, 2, np.nan, 3, 1, 1, 1, 1]),
        "spacing is 2 x nan x 3 mm; expected numbers above 0: fix",
    ),
    Case(
        "negative_spacing",
        "adregnet info scan.nii",
        scan(pixdim=[1, -2, 2, 3, 1, 1, 1, 1]),
        r"spacing_mm +2 2 3\n",  # the sform has the sign
        0,
    ),
    Case(
        "flat_affine",
        "adregnet info scan.nii",
        scan(qform_code=0, srow_x=[0, 0, 0, 0]),
        r"affine has a spacing of \[0\. .*fix|two axes of the affine are parallel: fix",
    ),
    Case(
        "parallel_axes",
        "adregnet info scan.nii",
        scan(qform_code=0, srow_y=[2, 0, 0, 0]),
        r"affine has a spacing of \[.*fix|two axes of the affine are parallel: fix",
    ),
    Case(
        "nan_affine",
        "adregnet info scan.nii",
        scan(qform_code=0, srow_x=[np.nan, 0, 0, 0]),
        "affine .*fix the file's header",
    ),
    Case(
        "nan_origin",
        "adregnet info scan.nii",
        scan(qform_code=0, srow_x=[2, 0, 0, np.nan]),
        "affine .*fix the file's header",
    ),
    Case(
        "infinite_origin",
        "adregnet info scan.nii",
        scan(sform_code=0, qform_code=1, qoffset_x=np.inf),
        "affine .*fix the file's header",
    ),
    Case(
        "forms_disagree",
        "adregnet info scan.nii",
        scan(qform_code=1, quatern_b=1, quatern_c=0),
        "sform and qform disagree by .* different orientations, .* --prefer sform or --prefer qform",
    ),
    Case(
        "no_rotation",
        "adregnet info scan.nii",
        scan(sform_code=0, qform_code=1, quatern_b=0.9, quatern_c=0.9),
        "not a NIfTI image that can be read .*w2 should be positive",
    ),
    Case("metres", "adregnet info scan.nii", scan(xyzt_units=1), "units are metres; expected mm: rescale"),
    Case("slope_inf", "adregnet info scan.nii", scan(scl_slope=np.inf), r"maximum +335\n", 0),
    Case(
        "slope_nan_inter", "adregnet info scan.nii", scan(scl_slope=2, scl_inter=np.nan), "not a NIfTI image"
    ),
    Case(
        "slope_of_1e38",
        "adregnet info scan.nii",
        scan(scl_slope=3e38),
        "values go up to 1.01e\\+41, beyond float32: rescale",
    ),
    Case("offset_infinite", "adregnet info scan.nii", scan(vox_offset=np.inf), "not a NIfTI image|damaged"),
    Case("offset_beyond", "adregnet info scan.nii", scan(vox_offset=1e9), "damaged or cut off"),
    Case("offset_huge", "adregnet info scan.nii", scan(vox_offset=1e30), "not a NIfTI image|damaged"),
    Case("offset_negative", "adregnet info scan.nii", scan(vox_offset=-8), "not a NIfTI image|damaged"),
    Case("symlink_loop", "adregnet info scan.nii", loop("scan.nii"), "scan.nii: no such file"),
    Case(
        "folder_as_scan", "adregnet info scan.nii", directory("scan.nii"), "scan.nii: .*DICOM|can't be read"
    ),
    Case(
        "long_name", f"adregnet info {'n' * 300}.nii", nothing, "can't be read or written .File name too long"
    ),
    Case("other_suffix", "adregnet info scan.png", raw("scan.png", b"\x89PNG"), "not a NIfTI file; expected"),
    Case(
        "unicode_and_spaces",
        "adregnet convert 'ein Ordner/Gerät ü 脳.nii.gz' -o 'aus gabe.npz'",
        make_all(directory("ein Ordner"), field("ein Ordner/Gerät ü 脳.nii.gz")),
        "",
        0,
        ("aus gabe.npz",),
    ),
]
HUGE = [
    Case(
        "terabytes_in_nii",
        "adregnet info scan.nii",
        scan(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        "damaged or cut off",
        child=True,
    ),
    Case(
        "terabytes_in_gz",
        "adregnet info scan.nii.gz",
        scan("scan.nii.gz", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        "scan.nii.gz: expands from .* MiB to .* GiB, by its header; expected a scan: copy",
        child=True,
    ),
    Case(
        "gzip_bomb",
        "adregnet info scan.nii.gz",
        raw(
            "scan.nii.gz",
            zeros_gzip(
                nifti_bytes(ramp((2, 2, 2)).astype(np.uint8), dim=[3, 2048, 2048, 1536, 1, 1, 1, 1])[:352], 6
            ),
        ),
        "scan.nii.gz: expands from .* MiB to 6 GiB, by its header; expected a scan",
        child=True,
    ),
    Case(
        "gzip_bomb_behind_a_small_scan",
        "adregnet info scan.nii.gz",
        raw("scan.nii.gz", zeros_gzip(nifti_bytes(), 6)),
        r"maximum +335\n",
        0,
        child=True,
    ),
    Case(
        "sparse_nii",
        "adregnet info scan.nii",
        sparse("scan.nii", nifti_bytes(dim=[3, 4096, 4096, 4096, 1, 1, 1, 1])[:352], 352 + 4 * 2**36),
        "memory",
        child=True,
    ),
    Case(
        "terabytes_in_mha",
        "adregnet info scan.mha",
        raw(
            "scan.mha",
            b"ObjectType = Image\nNDims = 3\nDimSize = 30000 30000 30000\nElementType = MET_FLOAT\n"
            b"ElementSpacing = 1 1 1\nElementDataFile = LOCAL\n" + bytes(100),
        ),
        "not an image that can be read|memory",
        child=True,
    ),
    Case(
        "terabytes_in_npz",
        "adregnet convert field.npz -o out.nii.gz",
        huge_npz,
        "memory|not a field",
        child=True,
    ),
    Case(
        "npz_bomb",
        "adregnet convert field.npz -o out.nii.gz",
        zeros_npz("field.npz", (512, 512, 512, 3)),
        "expands from .* MiB to 1.5 GiB, by its header",
        child=True,
    ),
]
MHA = (
    "ObjectType = Image\nNDims = {dims}\nDimSize = {size}\nElementType = {kind}\n{more}"
    "ElementDataFile = LOCAL\n"
)


def mha(size: str = "6 7 8", kind: str = "MET_FLOAT", more: str = "", content: bytes | None = None) -> Make:
    head = MHA.format(dims=len(size.split()), size=size, kind=kind, more=more).encode()
    return raw("scan.mha", head + (ramp().tobytes() if content is None else content))


ITK = [
    Case("empty_mha", "adregnet info scan.mha", raw("scan.mha", b""), "not an image that can be read"),
    Case("cut_mha", "adregnet info scan.mha", mha(content=bytes(100)), "not an image that can be read"),
    Case(
        "colour_mha",
        "adregnet info scan.mha",
        mha(kind="MET_UCHAR", more="ElementNumberOfChannels = 3\n", content=bytes(5000)),
        "voxels are vector.*; expected one real number each",
    ),
    Case("2d_mha", "adregnet info scan.mha", mha("6 7"), r"shape is \(6, 7\); expected a 3-D volume"),
    Case(
        "big_endian_mha",
        "adregnet info scan.mha",
        mha(more="ElementByteOrderMSB = True\n", content=ramp().astype(">f4").tobytes()),
        r"maximum +335\n",
        0,
    ),
    Case("zero_spacing_mha", "adregnet info scan.mha", mha(more="ElementSpacing = 0 1 1\n"), "scan.mha: "),
    Case(
        "flat_mha", "adregnet info scan.mha", mha(more="TransformMatrix = 1 0 0 1 0 0 0 0 1\n"), "scan.mha: "
    ),
    Case(
        "nan_mha",
        "adregnet info scan.mha",
        mha(content=with_value(np.nan).tobytes()),
        "1 of 336 voxels are NaN",
    ),
    Case(
        "text_nrrd", "adregnet info scan.nrrd", text("scan.nrrd", "NRRD0004\nnonsense\n"), "not an image that"
    ),
    Case("folder_without_dicom", "adregnet info .", nothing, "holds 0 DICOM series; expected the files of a"),
]
