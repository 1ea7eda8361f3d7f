"""Bad input, made by code: what a user may give by mistake, or with intent, and the line that refuses it.

A case's command runs in the folder that its `make` filled, so paths in it are relative. Some cases hold good
input that looks bad, such as a big-endian file; these have the status 0, and `expected` is in what is
printed.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import header_dtype

from adregnet_jax.config import DirLabConfig, FilesConfig, IxiConfig
from adregnet_jax.data.datasets import dirlab, files, ixi
from adregnet_jax.data.io import nifti, points, transforms
from adregnet_jax.data.io.images import read_image
from adregnet_jax.data.io.pickles import read_pickle

Make = Callable[[Path], object]

SHAPE = (6, 7, 8)
AFFINE = np.diag([-2.0, 2.0, 3.0, 1.0])
PAIR = "adregnet register fixed.nii.gz moving.nii.gz --output out"
TRAIN = "train.py --config config.py --workdir run"
EVAL = "eval.py --config config.py --workdir run"
FILES = "--config.data.kind=files --config.data.files.pairs"
IXI = "--config.data.kind=ixi --config.data.ixi.root=."


@dataclasses.dataclass(frozen=True)
class Case:
    """Bad input, and what is to be said of it.

    Attributes:
      name: of the test.
      command: as typed, or a function that reads from the folder and raises a `UserError`.
      make: fills the folder.
      expected: regular expression, found in the line: what was expected, what came, what to do.
      status: of the process; 1 means that a pair of a batch failed.
      leaves: what the command may leave beside what was there.
      child: in a process of its own, whose address space is limited.
    """

    name: str
    command: str | Callable[[Path], object]
    make: Make
    expected: str
    status: int = 2
    leaves: tuple[str, ...] = ()
    child: bool = False


def make_all(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


def nothing(_folder: Path) -> None:
    pass


def raw(name: str, content: bytes | Callable[[], bytes]) -> Make:
    """A file; the content of a large one is made when it is needed."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())

    return make


def text(name: str, content: str) -> Make:
    return raw(name, content.encode())


def directory(name: str) -> Make:
    return lambda folder: (folder / name).mkdir(parents=True)


def loop(name: str) -> Make:
    """A link that leads to itself."""
    return lambda folder: (folder / name).symlink_to(name)


def ramp(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def nifti_bytes(
    values: np.ndarray | None = None,
    affine: np.ndarray = AFFINE,
    *,
    big_endian: bool = False,
    **header: Any,
) -> bytes:
    """A NIfTI file whose header then gets the raw values `header`, whatever they are."""
    image = nib.Nifti1Image(ramp() if values is None else values, affine)
    image.header.set_xyzt_units("mm")
    if big_endian:
        swapped = image.header.as_byteswapped(">")
        image = nib.Nifti1Image(image.dataobj, affine, swapped)
    content = bytearray(image.to_bytes())
    fields = np.frombuffer(content, header_dtype.newbyteorder(">" if big_endian else "<"), 1)
    for name, value in header.items():
        fields[name] = value
    return bytes(content)


def scan(name: str = "scan.nii", values: np.ndarray | None = None, *, share: float = 1.0, **options) -> Make:
    """A NIfTI file of which `share` is there."""

    def make(folder: Path) -> None:
        content = nifti_bytes(values, **options)
        content = gzip.compress(content) if name.endswith(".gz") else content
        raw(name, content[: round(share * len(content))])(folder)

    return make


def noise(shape: tuple[int, ...] = (16, 16, 16)) -> np.ndarray:
    """What can't be compressed, so that a share of the file is a share of the voxels."""
    return np.random.default_rng(0).random(shape, np.float32)


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    values = ramp().astype(dtype)
    values[1, 2, 3] = value
    return values


def pair(fixed: Make | None = None, moving: Make | None = None) -> Make:
    return make_all(fixed or scan("fixed.nii.gz"), moving or scan("moving.nii.gz"))


def field(name: str = "field.nii.gz", displacement: np.ndarray | None = None) -> Make:
    if displacement is None:
        displacement = np.zeros((*SHAPE, 3), np.float32)
    return lambda folder: transforms.write_field(folder / name, displacement, AFFINE)


def npz(name: str, **arrays: Any) -> Make:
    return lambda folder: np.savez(folder / name, **arrays)


def config(content: str = "from adregnet_jax.config import Config as get_config\n") -> Make:
    return text("config.py", content)


def pairs_csv(*rows: str, columns: str = "split,fixed,moving") -> Make:
    return text("pairs.csv", "\n".join([columns, *rows]) + "\n")


def three_splits(**changes: Make) -> Make:
    """A pair in each split, of small scans; `changes` are other files of these names, without suffix."""
    names = [f"{split}_{role}" for split in files.SPLITS for role in ("fixed", "moving")]
    rows = [f"{split},{split}_fixed.nii,{split}_moving.nii" for split in files.SPLITS]
    makes = [changes.get(name) or scan(f"{name}.nii") for name in names]
    return make_all(config(), pairs_csv(*rows), *makes)


def ixi_pickles(train: bytes) -> Make:
    """The folder of TransMorph with that pickle as the one training scan."""
    image, labels = np.zeros((8, 8, 8), np.float32), np.zeros((8, 8, 8), np.int16)
    good = pickle.dumps((image, labels))
    others = [raw(name, good) for name in ("atlas.pkl", "Val/b.pkl", "Test/c.pkl")]
    return make_all(config(), raw("Train/a.pkl", train), *others)


class Shell:
    """What runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


class Evaluated:
    """What runs Python when it is unpickled."""

    def __reduce__(self):
        return eval, ("open('was_run', 'w').close()",)


def object_arrays() -> bytes:
    held = np.empty((2, 2, 2, 3), object)
    held[...] = Shell()
    file = io.BytesIO()
    np.savez(file, displacement=held, affine=AFFINE)
    return file.getvalue()


def zeros_gzip(header: bytes, gigabytes: int) -> Callable[[], bytes]:
    """A header and zeros behind it, compressed a thousandfold; one block serves again and again."""

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
    """An array that promises terabytes, and has none."""
    with zipfile.ZipFile(folder / "field.npz", "w") as archive:
        with archive.open("displacement.npy", "w") as member:
            head = {"descr": "<f4", "fortran_order": False, "shape": (30000, 30000, 30000, 3)}
            np.lib.format.write_array_header_1_0(member, head)
            member.write(bytes(1000))
        with archive.open("affine.npy", "w") as member:
            np.save(member, AFFINE)


def sparse(name: str, header: bytes, size: int) -> Make:
    """A file that has its full size and takes no room."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)

    return make


def run_folder(record: str | None = None, checkpoint: str | None = None) -> Make:
    """A workdir with a config.json of that text, and a file in the folder of its checkpoints."""
    makes = [config(), directory("run/checkpoints/1")]
    if record is not None:
        makes.append(text("run/config.json", record))
    if checkpoint is not None:
        makes.append(text("run/checkpoints/1/params", checkpoint))
    return make_all(*makes)


SMALL_MODEL = {"channels": (4,), "cross_attention": False, "regional_attention": False}
SMALL = " ".join(f"--config.model.{name}='{value}'" for name, value in SMALL_MODEL.items())


def trained(*damages: Make, **model: Any) -> Make:
    """A workdir with the checkpoint of a small network; then each of `damages`."""

    def make(folder: Path) -> None:
        import jax
        import jax.numpy as jnp

        from adregnet_jax.config import Config, ModelConfig
        from adregnet_jax.nn.models import make_model
        from adregnet_jax.training.checkpoint import Checkpoints
        from adregnet_jax.training.state import TrainState
        from tests.random_parameters import random_parameters

        settings = ModelConfig(**SMALL_MODEL | model)
        volume = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), np.float32)
        params = random_parameters(make_model(settings), volume, volume)
        one = jnp.ones((), jnp.int32)
        state = TrainState(step=one, params=params, opt_state=(), best_metric=jnp.zeros(()), best_step=one)
        (folder / "run").mkdir()
        checkpoints = Checkpoints(folder / "run")
        checkpoints.save(1, state)
        checkpoints.close()
        record = {"config": dataclasses.asdict(Config(model=ModelConfig(**SMALL_MODEL)))}
        (folder / "run" / "config.json").write_text(json.dumps(record))
        for each in (config(), *damages):
            each(folder)

    return make


def cut_checkpoint(folder: Path) -> None:
    """Every file of the parameters loses its second half."""
    for path in sorted((folder / "run" / "checkpoints" / "1" / "params").rglob("*")):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cases_csv(name: str, rows: list[Mapping[str, Any]]) -> Make:
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text(name, file.getvalue())


def measured(case: str, **more: Any) -> dict[str, Any]:
    """A row of cases.csv."""
    names = ("ncc_before", "ncc", "mse_before", "mse", "ssim_before", "ssim", "jacobian_mean", "jacobian_sd")
    row = {"name": case, "landmarks": 3, "tre_before_mm": 2.0, "tre_before_sd_mm": 1.0, "tre_mm": 1.0}
    row |= {"tre_sd_mm": 0.5, "tre_snapped_mm": 1.0, "folded_percent": 0.0, "seconds": 1.0}
    return row | dict.fromkeys(names, 0.5) | more


COLLECT = "adregnet_jax.evaluation.collect run --output tables"
ONE_CASE = cases_csv("run/eval/cases.csv", [measured("phantom_1"), measured("phantom_2")])
MARKUPS = {"coordinateSystem": "RAS", "controlPoints": [{"position": [1, 2, 3]}]}
ENDLESS = "[" * 200_000


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
        "spacing is 0 x 2 x 3 mm; expected numbers above 0: mend",
    ),
    Case(
        "nan_spacing",
        "adregnet info scan.nii",
        scan(pixdim=[1, 2, np.nan, 3, 1, 1, 1, 1]),
        "spacing is 2 x nan x 3 mm; expected numbers above 0: mend",
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
        r"affine has a spacing of \[0\. .*mend|two axes of the affine are parallel: mend",
    ),
    Case(
        "parallel_axes",
        "adregnet info scan.nii",
        scan(qform_code=0, srow_y=[2, 0, 0, 0]),
        r"affine has a spacing of \[.*mend|two axes of the affine are parallel: mend",
    ),
    Case(
        "nan_affine",
        "adregnet info scan.nii",
        scan(qform_code=0, srow_x=[np.nan, 0, 0, 0]),
        "affine .*mend the file's header",
    ),
    Case(
        "nan_origin",
        "adregnet info scan.nii",
        scan(qform_code=0, srow_x=[2, 0, 0, np.nan]),
        "affine .*mend the file's header",
    ),
    Case(
        "infinite_origin",
        "adregnet info scan.nii",
        scan(sform_code=0, qform_code=1, qoffset_x=np.inf),
        "affine .*mend the file's header",
    ),
    Case(
        "forms_disagree",
        "adregnet info scan.nii",
        scan(qform_code=1, qoffset_x=50),
        "sform and qform disagree by up to 50 mm: find out which",
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
        mha(more="ElementNumberOfChannels = 3\n", content=bytes(5000)),
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
    Case(
        "folder_without_dicom", "adregnet info .", nothing, "holds 0 DICOM series; expected the files of one"
    ),
]


POINTS = [
    Case(
        "empty_points",
        "adregnet info p.csv",
        text("p.csv", ""),
        "columns are none; expected x, y, z in RAS mm",
    ),
    Case(
        "points_without_rows",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n"),
        "has 0 points; expected at least",
    ),
    Case(
        "points_of_ants",
        "adregnet info p.csv",
        text("p.csv", "x,y,z,t\n1,2,3,0\n"),
        "columns are x, y, z, t; exp",
    ),
    Case(
        "words_as_points",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n1,2,three\n"),
        "line 2: expected three num",
    ),
    Case(
        "two_coordinates",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n1,2\n"),
        "line 2: expected three numbers",
    ),
    Case(
        "nan_point",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n1,nan,3\n"),
        "expected at least one, of finite",
    ),
    Case(
        "endless_cell", "adregnet info p.csv", text("p.csv", f"x,y,z\n{'1' * 200_000},2,3\n"), "p.csv.*field"
    ),
    Case(
        "latin1_points",
        "adregnet info p.csv",
        raw("p.csv", b"x,y,z\n1,2,3 \xb5m\n"),
        "not a text file that can",
    ),
    Case(
        "utf16_points",
        "adregnet info p.csv",
        raw("p.csv", "x,y,z\n1,2,3\n".encode("utf-16")),
        "not a text file",
    ),
    Case(
        "points_with_bom",
        "adregnet info p.csv",
        raw("p.csv", b"\xef\xbb\xbfx,y,z\n1,2,3\n"),
        r"points +1\n",
        0,
    ),
    Case("points_of_windows", "adregnet info p.csv", raw("p.csv", b"x,y,z\r\n1,2,3\r\n"), r"points +1\n", 0),
    Case("folder_as_points", "adregnet info p.csv", directory("p.csv"), "not a text file that can be read"),
    Case(
        "fcsv_of_no_world",
        "adregnet info p.fcsv",
        text("p.fcsv", "1,2,3,4\n"),
        "coordinates are not told; exp",
    ),
    Case(
        "empty_markups",
        "adregnet info p.mrk.json",
        text("p.mrk.json", ""),
        "not one list of markups of 3D Sli",
    ),
    Case(
        "endless_markups", "adregnet info p.mrk.json", text("p.mrk.json", ENDLESS), "not one list of markups"
    ),
    Case(
        "huge_coordinate",
        "adregnet info p.mrk.json",
        text("p.mrk.json", json.dumps({"markups": [MARKUPS]}).replace("[1,", f"[1{'0' * 400},")),
        "not one list of markups|finite numbers",
    ),
    Case(
        "two_coordinates_in_markups",
        "adregnet info p.mrk.json",
        text("p.mrk.json", json.dumps({"markups": [MARKUPS | {"controlPoints": [{"position": [1, 2]}]}]})),
        "expected points of three coordinates in mm",
    ),
]

ITK_MATRIX = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"

TRANSFORMS = [
    Case(
        "empty_matrix", "adregnet info m.txt", text("m.txt", ""), "not an ITK transform; expected '#Insight"
    ),
    Case(
        "matrix_of_fsl",
        "adregnet info m.txt",
        text("m.txt", "1 0 0 0\n" * 4),
        "not an ITK transform; expected",
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
        "affine has a spacing of .*mend",
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
        r"no displacement field; expected \(x,",
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
        "labels have to be whole numbers, found 0.5",
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
        "composed_on_two_grids",
        "adregnet compose field.nii.gz other.npz -o out.nii.gz",
        make_all(field(), npz("other.npz", displacement=np.zeros((4, 5, 6, 3)), affine=AFFINE)),
        "field.nii.gz and other.npz: ",
    ),
    Case("no_argument", "adregnet convert", nothing, "Missing argument"),
    Case("unknown_command", "adregnet regster", nothing, "No such command"),
    Case("unknown_option", "adregnet info scan.nii --jsn", scan(), "No such option"),
    Case(
        "format_of_matrix",
        "adregnet convert m.txt -o m.tfm --format itk",
        text("m.txt", ""),
        "this is a matrix",
    ),
]

REGISTER = [
    Case(
        "pair_with_nan",
        PAIR,
        pair(moving=scan("moving.nii.gz", with_value(np.nan))),
        "moving.nii.gz: 1 of 336",
    ),
    Case(
        "cut_pair",
        PAIR,
        pair(moving=scan("moving.nii.gz", noise(), share=0.5)),
        "moving.nii.gz: damaged or cut off",
    ),
    Case("no_moving", PAIR, scan("fixed.nii.gz"), "moving.nii.gz: no such file"),
    Case(
        "pair_of_4d",
        PAIR,
        pair(scan("fixed.nii.gz", ramp((4, 4, 4, 2)))),
        "fixed.nii.gz: shape is .*save one",
    ),
    Case(
        "scan_of_few_slices",
        f"{PAIR} --method network --no-affine",
        pair(*(scan(f"{name}.nii.gz", noise((120, 120, 2))) for name in ("fixed", "moving"))),
        "fixed.nii.gz: .* voxels on the grid of pretrained .* which takes 8 or more.*--method instance",
    ),
    Case(
        "worlds_apart",
        PAIR,
        pair(moving=scan("moving.nii.gz", affine=AFFINE + np.outer([9e5, 0, 0, 0], [0, 0, 0, 1]))),
        "overlap.*--apart",
    ),
    Case(
        "output_holds_files", PAIR, make_all(pair(), text("out/mine", "")), "exists and is not empty: choose"
    ),
    Case(
        "output_of_others",
        f"{PAIR} --overwrite",
        make_all(pair(), text("out/mine", "")),
        "out holds mine, which isn't ours to overwrite",
    ),
    Case("output_is_a_file", PAIR, make_all(pair(), text("out", "")), "out is a file; expected a folder"),
    Case(
        "output_below_a_file",
        f"{PAIR}/deep",
        make_all(pair(), text("out", "")),
        "out/deep: can't be written .Not a directory",
    ),
    Case("output_is_a_link_to_itself", PAIR, make_all(pair(), loop("out")), "out.*(loop|symbolic)"),
    Case(
        "one_of_two_labels",
        f"{PAIR} --fixed-labels fixed.nii.gz",
        pair(),
        "belong together: give both or none",
    ),
    Case(
        "labels_on_another_grid",
        f"{PAIR} --fixed-labels labels.nii --moving-labels labels.nii",
        make_all(pair(), scan("labels.nii", ramp((5, 5, 5)))),
        r"labels are \(5, 5, 5\) voxels, their scan fixed.nii.gz is \(6, 7, 8\).*expected one grid",
    ),
    Case(
        "numbers_of_landmarks",
        f"{PAIR} --fixed-landmarks a.csv --moving-landmarks b.csv",
        make_all(pair(), text("a.csv", "x,y,z\n-2,2,3\n"), text("b.csv", "x,y,z\n-2,2,3\n-2,2,3\n")),
        "a.csv has 1 landmarks, b.csv 2: expected pairs",
    ),
    Case(
        "landmarks_in_lps",
        f"{PAIR} --fixed-landmarks a.csv --moving-landmarks a.csv",
        make_all(pair(), text("a.csv", "x,y,z\n2,-2,3\n")),
        "1 of 1 landmarks lie outside of fixed.nii.gz.*expected RAS mm",
    ),
    Case(
        "weights_of_nothing",
        f"{PAIR} --weights run",
        pair(),
        "run holds no config.json: expected",
    ),
    Case(
        "packed_weights_of_another_version",
        f"{PAIR} --weights w",
        make_all(
            pair(),
            text("w/weights.json", '{"format": 2, "sha256": "", "adregnet_jax": "9.1"}'),
            text("w/weights.npz", ""),
        ),
        "w: weights of format 2, .* reads format 1: install the version that wrote them, 9.1",
    ),
    Case(
        "packed_weights_of_another_checksum",
        f"{PAIR} --weights w",
        make_all(
            pair(), text("w/weights.json", '{"format": 1, "sha256": "00"}'), text("w/weights.npz", "PK")
        ),
        "w: the weights or their record were changed or damaged: .*copy the folder again",
    ),
    Case(
        "packed_weights_without_arrays",
        f"{PAIR} --weights w",
        make_all(pair(), text("w/weights.json", '{"format": 1, "sha256": "00"}')),
        "weights.npz: can't be read .*expected a folder with weights.json and weights.npz",
    ),
    Case(
        "weights_of_text",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder("not json")),
        "run/config.json describes no model that this version knows",
    ),
    Case(
        "weights_of_endless_json",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder(ENDLESS)),
        "run/config.json describes no model that this version knows",
    ),
    Case(
        "weights_of_wrong_types",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder('{"config": {"model": {"channels": "wide"}}}')),
        "run/config.json describes no model",
    ),
    Case(
        "weights_of_negative_channels",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder('{"config": {"model": {"channels": [-4]}}}')),
        "run/config.json describes no model",
    ),
    Case(
        "weights_without_checkpoint",
        f"{PAIR} --weights run",
        make_all(pair(), config(), text("run/config.json", '{"config": {"model": {}}}')),
        "run holds no checkpoint: train first",
    ),
    Case(
        "weights_cut",
        f"{PAIR} --weights run",
        make_all(pair(), trained(cut_checkpoint)),
        "the checkpoint of step 1 in run can't be read .*restore a copy",
    ),
    Case(
        "weights_of_another_model",
        f"{PAIR} --weights run",
        make_all(pair(), trained(channels=(8,))),
        "the checkpoint in run has a different architecture: parameter .* is",
    ),
    Case(
        "no_such_device", f"{PAIR} --device tpu:7", pair(), "--device tpu:7: there is no such device; JAX has"
    ),
    Case("device_of_no_number", f"{PAIR} --device cpu:x", pair(), "--device cpu:x: there is no such device"),
    Case("unknown_setting", f"{PAIR} --set smothness=1", pair(), "did you mean smoothness"),
    Case("setting_without_value", f"{PAIR} --set smoothness", pair(), "expected NAME=VALUE"),
    Case("setting_of_wrong_type", f"{PAIR} --set factors=wide", pair(), "--set factors must be tuple"),
    Case("setting_cut_off", f"{PAIR} --set 'steps=(80,'", pair(), "--set|steps"),
    Case(
        "setting_of_nan",
        f"{PAIR} --set learning_rate=nan",
        pair(),
        "--set learning_rate is nan: expected a number above 0",
    ),
    Case("unknown_effort", f"{PAIR} --effort extreme", pair(), "'extreme' is not one of"),
    Case(
        "export_flat",
        "adregnet export -o p.bin --shape 8 8 0 --spacing 1 1 1",
        nothing,
        "expected 2 voxels or more",
    ),
    Case(
        "export_spacing",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 nan 1",
        nothing,
        "expected 2 voxels or",
    ),
    Case(
        "export_words",
        "adregnet export -o p.bin --shape a b c --spacing 1 1 1",
        nothing,
        "Invalid value for '--shape': .*valid integer",
    ),
    Case(
        "export_for_nothing",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 1 1 --platforms abacus",
        nothing,
        "'abacus' is none of cpu, cuda",
    ),
    Case(
        "export_over_a_file",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 1 1",
        text("p.bin", ""),
        "p.bin: exists already",
    ),
    Case(
        "export_of_no_run",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 1 1 --weights run --method network",
        nothing,
        "run holds no config.json",
    ),
]

BATCH = "adregnet batch pairs.csv --output out"
BATCHES = [
    Case("no_pairs", BATCH, nothing, "pairs.csv: no such file"),
    Case("empty_pairs", BATCH, text("pairs.csv", ""), "columns are none; expected fixed, moving"),
    Case(
        "batch_columns",
        BATCH,
        pairs_csv("a,b", columns="fixd,moving"),
        "columns are fixd, moving; expected fixed",
    ),
    Case("batch_without_rows", BATCH, pairs_csv(columns="fixed,moving"), "has no rows; expected one a pair"),
    Case(
        "batch_cells", BATCH, pairs_csv("a.nii", columns="fixed,moving"), "line 2: expected as many cells as"
    ),
    Case(
        "batch_encoding",
        BATCH,
        raw("pairs.csv", b"fixed,moving\n\xfc.nii,b.nii\n"),
        "not a CSV file that can be",
    ),
    Case(
        "batch_endless_cell",
        BATCH,
        pairs_csv(f"{'a' * 200_000},b", columns="fixed,moving"),
        "pairs.csv.*field",
    ),
    Case("batch_endless_column", BATCH, text("pairs.csv", "a" * 200_000), "pairs.csv.*field"),
    Case("batch_folder", BATCH, directory("pairs.csv"), "not a CSV file that can be read"),
    Case(
        "batch_twice",
        BATCH,
        pairs_csv("a.nii,b.nii", "a.nii,b.nii", columns="fixed,moving"),
        "two pairs are called a_b: add a column name",
    ),
    Case(
        "batch_name_leads_out",
        BATCH,
        pairs_csv("a.nii,b.nii,../away", columns="fixed,moving,name"),
        "name is '../away'; expected one that a folder can have",
    ),
    Case(
        "batch_output_is_a_file",
        BATCH,
        make_all(pairs_csv("a.nii,b.nii", columns="fixed,moving"), text("out", "")),
        "--output out: can't be written .*check the name",
    ),
    Case(
        "batch_pair_is_bad",
        BATCH,
        make_all(
            pairs_csv("fixed.nii.gz,moving.nii.gz,one", columns="fixed,moving,name"), scan("fixed.nii.gz")
        ),
        "^1/1 one: failed: moving.nii.gz: no such file",
        1,
        ("out", "out/results.csv"),
    ),
    Case(
        "batch_path_with_nul",
        BATCH,
        pairs_csv("a\0.nii,b.nii,one", columns="fixed,moving,name"),
        "^1/1 one: failed: a.*can't be read .embedded null byte",
        1,
        ("out", "out/results.csv"),
    ),
    Case(
        "batch_long_name",
        BATCH,
        make_all(pairs_csv(f"fixed.nii.gz,moving.nii.gz,{'n' * 300}", columns="fixed,moving,name"), pair()),
        "^1/1 n+: failed: .*/n+: can't be written .File name too long",
        1,
        ("out", "out/results.csv"),
    ),
]

TRAINING = [
    Case("no_config", TRAIN, nothing, "--config config.py: there is no such file"),
    Case("no_workdir", "train.py --config config.py", config(), "--workdir is missing: for instance"),
    Case("option_without_value", "train.py --config", nothing, "--config"),
    Case("empty_config", TRAIN, config(""), r"has no function get_config\(\)"),
    Case("config_syntax", TRAIN, config("def get_config(:\n"), "--config config.py: SyntaxError: "),
    Case("config_latin1", TRAIN, raw("config.py", b"x = '\xfc'\n"), "--config config.py: "),
    Case("config_binary", TRAIN, raw("config.py", b"\0" * 99), "--config config.py: "),
    Case(
        "config_of_dict", TRAIN, config("def get_config(): return {}\n"), "must return a Config, not a dict"
    ),
    Case("config_value", TRAIN, config("get_config = 3\n"), "--config config.py: TypeError: "),
    Case(
        "config_raises",
        TRAIN,
        config("raise RuntimeError('one\\ntwo')\n"),
        "--config config.py: RuntimeError: one two",
    ),
    Case("config_exits", TRAIN, config("import sys\nsys.exit(7)\n"), "--config config.py: SystemExit"),
    Case(
        "config_recurses",
        TRAIN,
        config("def get_config(): return get_config()\n"),
        "--config config.py: Recursion",
    ),
    Case(
        "config_field",
        TRAIN,
        config(
            "from adregnet_jax.config import *\n"
            "def get_config(): return Config(model=ModelConfig(chanels=(4,)))\n"
        ),
        "did you mean channels",
    ),
    Case(
        "config_type",
        TRAIN,
        config(
            "from adregnet_jax.config import *\n"
            "def get_config(): return Config(model=ModelConfig(channels='w'))\n"
        ),
        "config.model.channels must be tuple",
    ),
    Case(
        "config_group",
        TRAIN,
        config("from adregnet_jax.config import *\ndef get_config(): return Config(model=None)\n"),
        "config.model must be .*ModelConfig, not None",
    ),
    Case("config_is_a_folder", TRAIN, directory("config.py"), "--config config.py: there is no such file"),
    Case(
        "override_field",
        f"{TRAIN} --config.optimiser.epoch=3",
        config(),
        "no field epoch; did you mean epochs",
    ),
    Case("override_type", f"{TRAIN} --config.optimiser.epochs=many", config(), "many"),
    Case("override_cut", f"{TRAIN} --config.model.channels='(4,'", config(), "channels"),
    Case(
        "override_zero",
        f"{TRAIN} --config.optimiser.epochs=0",
        config(),
        "optimiser.epochs is 0: expected 1 or more",
    ),
    Case(
        "override_kind", f"{TRAIN} --config.data.kind=nii", config(), "data.kind is 'nii': expected phantom"
    ),
    Case("override_channels", f"{TRAIN} --config.model.channels='(-4,)'", config(), "model.channels"),
    Case(
        "override_no_channels",
        f"{TRAIN} --config.model.channels='()'",
        config(),
        "model.(finest_level|channels)",
    ),
    Case("override_rate", f"{TRAIN} --config.optimiser.learning_rate=nan", config(), "learning_rate"),
    Case(
        "workdir_is_a_file",
        TRAIN,
        make_all(config(), text("run", "")),
        "--workdir run: can't be written .*check the name",
    ),
    Case(
        "workdir_is_a_loop",
        TRAIN,
        make_all(config(), loop("run")),
        "--workdir run: can't be written .*check the name",
    ),
    Case(
        "train_no_pairs",
        f"{TRAIN} {FILES}=pairs.csv",
        config(),
        "data.files.pairs is 'pairs.csv': expected a CSV",
    ),
    Case(
        "train_columns",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv("a,b", columns="fixed;moving")),
        "columns are fixed;moving; expected split, fixed, moving.* with commas between",
    ),
    Case(
        "train_split",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv("tests,a.nii,b.nii")),
        "line 2: split is 'tests'; use one of train, validation, test",
    ),
    Case(
        "train_endless_cell",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv(f"train,{'a' * 200_000},b")),
        "pairs.csv.*field",
    ),
    Case(
        "train_missing",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv("train,a.nii,b.nii")),
        "line 2: fixed is a.nii, which isn't there",
    ),
    Case(
        "train_two_grids",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_moving=scan("train_moving.nii", ramp((5, 5, 5)))),
        r"train_fixed.nii is \(6, 7, 8\) and train_moving.nii \(5, 5, 5\).*expected one grid",
    ),
    Case(
        "train_nan",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_fixed=scan("train_fixed.nii", with_value(np.nan))),
        "train_fixed.nii: 1 of 336 voxels are NaN",
    ),
    Case(
        "train_cut",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_fixed=scan("train_fixed.nii", share=0.5)),
        "train_fixed.nii: damaged or cut off",
    ),
    Case(
        "train_constant",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_fixed=scan("train_fixed.nii", np.ones(SHAPE))),
        "train_fixed.nii: ",
    ),
    Case(
        "train_few_files",
        f"{TRAIN} {FILES}=.",
        make_all(config(), directory("images")),
        "0 NIfTI files in images/",
    ),
    Case(
        "train_on_the_run_of_another_record",
        TRAIN,
        run_folder("not json"),
        "run/config.json: not the record of a run .*restore a copy",
        leaves=("run/lock",),
    ),
    Case(
        "train_on_a_list",
        TRAIN,
        run_folder('{"config": {"model": [1]}}'),
        "run/config.json: not the record of a run .*restore a copy",
        leaves=("run/lock",),
    ),
    Case(
        "train_on_another_model",
        TRAIN,
        trained(),
        r"run holds a run with model.channels=\[4\], this config has \[32,",
        leaves=("run/lock",),
    ),
    Case(
        "pickle_runs_the_shell",
        f"{TRAIN} {IXI}",
        ixi_pickles(pickle.dumps(Shell())),
        "'posix.system', which isn't part of an array: don't trust it, nothing was run",
    ),
    Case(
        "pickle_runs_python",
        f"{TRAIN} {IXI}",
        ixi_pickles(pickle.dumps((Evaluated(), 1), 0)),
        "'builtins.eval'|'__builtin__.eval'",
    ),
    Case("pickle_of_text", f"{TRAIN} {IXI}", ixi_pickles(b"hello"), "a.pkl: not a pickle, or cut off"),
    Case(
        "pickle_of_one", f"{TRAIN} {IXI}", ixi_pickles(pickle.dumps(3)), "a.pkl: doesn't hold a tuple of two"
    ),
    Case(
        "ixi_without_atlas",
        f"{TRAIN} {IXI}",
        make_all(config(), raw("Train/a.pkl", b"")),
        "has no scans in val",
    ),
    Case(
        "dirlab_without_folder",
        f"{TRAIN} --config.data.kind=dirlab",
        config(),
        "DIR-Lab folder '' is not there",
    ),
    Case(
        "dirlab_empty",
        f"{TRAIN} --config.data.kind=dirlab --config.data.dirlab.root=.",
        config(),
        "DIR-Lab case 3 under '.' lacks case3_T00-ssm.img",
    ),
    Case(
        "processes_of_words",
        f"{TRAIN} --coordinator here --processes a --process b",
        config(),
        "expected HOST:PORT and two numbers",
    ),
]

EVALUATION = [
    Case("eval_of_nothing", EVAL, config(), "run holds no checkpoint: train first"),
    Case(
        "eval_figures",
        f"{EVAL} --figures few",
        config(),
        "--figures must be a whole number from 0, it is 'few'",
    ),
    Case(
        "eval_record",
        f"{EVAL} --mc-dropout 4 --config.model.dropout=0.1",
        run_folder("not json"),
        "run/config.json: not the record of a run .*restore",
    ),
    Case(
        "eval_checkpoint_of_text", EVAL, run_folder(None, "text"), "checkpoint of step 1 in run can't be read"
    ),
    Case(
        "eval_cut_checkpoint",
        f"{EVAL} {SMALL}",
        trained(cut_checkpoint),
        "checkpoint of step 1 in run can't be read",
    ),
    Case(
        "eval_another_model",
        f"{EVAL} --config.model.channels='(8,)'",
        trained(),
        "the checkpoint in run has a different architecture: parameter",
    ),
    Case(
        "eval_splits",
        EVAL,
        make_all(config(), text("run/splits.json", "[]")),
        "run/splits.json: not a record",
    ),
    Case(
        "eval_endless_splits",
        EVAL,
        make_all(config(), text("run/splits.json", ENDLESS)),
        "splits.json: not a rec",
    ),
    Case(
        "ablation_seeds",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --seeds 0",
        config(),
        "--seeds must be a whole number from 1, it is '0'",
    ),
    Case(
        "ablation_of_a_part",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run"
        " --config.model.cross_attention=false",
        config(),
        "the config must be of the full network",
    ),
    Case(
        "ablation_row_without_a_row",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --row",
        config(),
        "--row '': expected fields and values",
    ),
    Case(
        "ablation_row_of_no_field",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --row model.regions=8",
        config(),
        "no field regions",
    ),
    Case(
        "ablation_without_config",
        "adregnet_jax.evaluation.ablation --workdir run",
        nothing,
        "--config is missing",
    ),
    Case(
        "ablation_in_a_file",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run",
        make_all(config(), text("run", "")),
        "--workdir run/full-seed0: can't be written",
    ),
    Case(
        "ablation_record",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --seeds 1",
        make_all(
            config(),
            text("run/full-seed0/config.json", "x"),
            text("run/full-seed0/eval/summary.json", "{}"),
            text("run/full-seed0/checkpoints/1/x", "x"),
        ),
        "config.json: not the record of a run",
        leaves=("run/full-seed0/lock",),
    ),
    Case("benchmark_without_config", "adregnet_jax.benchmark", nothing, "required: --config"),
    Case(
        "benchmark_shape",
        "adregnet_jax.benchmark --config config.py --shape 8 8",
        config(),
        "--shape: expected 3",
    ),
    Case(
        "benchmark_flat",
        "adregnet_jax.benchmark --config config.py --shape 8 8 1",
        config(),
        "--shape is .8, 8, 1.",
    ),
    Case(
        "benchmark_rounds", "adregnet_jax.benchmark --config config.py --rounds 0", config(), "--rounds is 0"
    ),
    Case(
        "benchmark_json",
        "adregnet_jax.benchmark --config config.py --json no/t.json",
        config(),
        "there is no folder",
    ),
    Case(
        "benchmark_json_is_a_folder",
        "adregnet_jax.benchmark --config config.py --json no",
        make_all(config(), directory("no")),
        "--json no",
    ),
    Case(
        "benchmark_batch",
        "adregnet_jax.benchmark --config config.py --batch 0",
        config(),
        "optimiser.batch_size must be at least 1",
    ),
    Case(
        "benchmark_syntax", "adregnet_jax.benchmark --config config.py", config("("), "config.py: SyntaxError"
    ),
    Case("collect_nothing", COLLECT, nothing, "cases.csv: there is no such file: run eval.py"),
    Case("collect_without_output", "adregnet_jax.evaluation.collect run", nothing, "--output"),
    Case(
        "collect_empty",
        COLLECT,
        text("run/eval/cases.csv", ""),
        "no cases in it: expected the cases.csv of eval",
    ),
    Case(
        "collect_columns",
        COLLECT,
        text("run/eval/cases.csv", "case,tre\na,1\n"),
        "no cases in it|not a table",
    ),
    Case(
        "collect_words",
        COLLECT,
        text("run/eval/cases.csv", "name,tre_mm\na,x\n"),
        "is not a table of eval.py",
    ),
    Case(
        "collect_cut",
        COLLECT,
        text("run/eval/cases.csv", "tre_mm,name\n1,a\n1"),
        "cases.csv: .*evaluate the run",
    ),
    Case(
        "collect_cells",
        COLLECT,
        text("run/eval/cases.csv", "name,tre_mm\na,1,2\n"),
        "is not a table of eval.py",
    ),
    Case(
        "collect_encoding",
        COLLECT,
        raw("run/eval/cases.csv", b"name\n\xfc\n"),
        "not a CSV file that can be read",
    ),
    Case(
        "collect_endless_cell",
        COLLECT,
        text("run/eval/cases.csv", f"name\n{'a' * 200_000}\n"),
        "cases.csv.*field",
    ),
    Case("collect_twice", f"{COLLECT.replace('run', 'run run')}", ONE_CASE, "in more than one run"),
    Case(
        "collect_other_columns",
        COLLECT.replace("run", "run other"),
        make_all(ONE_CASE, cases_csv("other/eval/cases.csv", [measured("phantom_3", dice=0.5)])),
        "other/eval.*columns",
    ),
    Case(
        "collect_landmarks",
        COLLECT,
        make_all(ONE_CASE, text("run/eval/landmarks.csv", "name,before_mm\na,1\n")),
        "landmarks.csv: .*evaluate the run",
    ),
    Case(
        "collect_against_others",
        f"{COLLECT} --against other.csv",
        make_all(ONE_CASE, cases_csv("other.csv", [measured("phantom_9")])),
        "has other cases than these runs",
    ),
    Case(
        "collect_against_less",
        f"{COLLECT} --against other.csv",
        make_all(ONE_CASE, text("other.csv", "name,dice\nphantom_1,1\nphantom_2,1\n")),
        r"other.csv \(tre_mm\): tre_mm of no case is in both tables",
    ),
    Case(
        "collect_into_a_file",
        COLLECT,
        make_all(ONE_CASE, text("tables", "")),
        r"tables/[^ ]*: can't be written .*tables\): check",
    ),
    Case(
        "collect_record",
        COLLECT,
        make_all(ONE_CASE, text("run/config.json", '{"config": {"data": {"kind": "dirlab", "dirlab": 3}}}')),
        "Alignment",
        0,
        ("tables",),
    ),
]


def dirlab_case(size: int) -> Make:
    """Case 1 with images of so many bytes and one landmark outside of them."""
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
        "dirlab_no_root", lambda at: dirlab.find_cases(at / "no"), nothing, "DIR-Lab folder .* is not there"
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
        "1 of 1 landmarks are outside of 1..256",
    ),
    Case(
        "dirlab_report", "adregnet_jax.data.datasets.dirlab no", nothing, "DIR-Lab folder 'no' is not there"
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

CASES = [*NIFTI, *HUGE, *ITK, *POINTS, *TRANSFORMS, *REGISTER, *BATCHES, *TRAINING, *EVALUATION, *READERS]
