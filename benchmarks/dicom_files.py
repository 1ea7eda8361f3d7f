"""Measures reading and writing around the registration of two DICOM series, without the registration.

    python benchmarks/dicom_files.py FIXED MOVING [--structures RTSTRUCT] [--json FILE]

The field is made up: smooth, a few voxels. The parts: "reading" both series, their pixels and headers;
"NIfTI", the images and fields of a result as `adregnet register` writes them; "DICOM", what `--dicom` adds;
"contours", as by `adregnet contours`, from reading the field on. Prints the seconds of each, their sum, and
the most memory that the process had. `--rounds` is not used.
"""

import resource
import tempfile
import time
from pathlib import Path

import comparison
import numpy as np

from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.transforms import write_field
from adregnet_jax.registration.carried_structures import write_carried_structures
from adregnet_jax.registration.dicom import read_dicom_pair, write_dicom
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.registration.measure import ScanPair
from adregnet_jax.registration.options import ScanFiles
from adregnet_jax.registration.results import RegisteredScans
from adregnet_jax.registration.series_field import read_series_field

WAVES, LARGEST = 3.0, 4.0  # of the field: waves along each axis, and voxels


def made_up(scans):
    """A result with a smooth field, and the moving scan for a warped one."""
    fixed, moving = scans.fixed, scans.moving
    displacement = np.empty((*fixed.shape, 3), np.float32)
    along = np.meshgrid(
        *(np.linspace(0, WAVES, n, dtype=np.float32) for n in fixed.shape), sparse=True, indexing="ij"
    )
    for axis in range(3):
        displacement[..., axis] = LARGEST * np.sin(along[axis] + along[axis - 1]) * np.cos(along[axis - 2])
    field = DisplacementField(displacement, fixed.affine)
    back = DisplacementField(-displacement, moving.affine)
    return RegisteredScans(scans, field, back, np.eye(4), Image(fixed.values, fixed.affine), "mono", {})


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("fixed", type=Path, metavar="FIXED")
    parser.add_argument("moving", type=Path, metavar="MOVING")
    parser.add_argument("--structures", type=Path, metavar="RTSTRUCT", help="drawn on the moving series")
    arguments = parser.parse_args()
    folders = {"fixed": arguments.fixed, "moving": arguments.moving}
    seconds = {}

    def timed(name, part):
        began = time.perf_counter()
        found = part()
        seconds[name] = round(time.perf_counter() - began, 2)
        return found

    def read():
        scans = ScanPair(read_image(arguments.fixed), read_image(arguments.moving))
        return scans, read_dicom_pair(ScanFiles(**folders), anonymize=False)

    scans, pair = timed("reading", read)
    registered = made_up(scans)
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)

        def write_nifti():
            write_image(output / "warped.nii.gz", registered.warped)
            for file, field in (("field", registered.field), ("inverse", registered.inverse)):
                write_field(
                    output / f"{file}.nii.gz", np.asarray(field.displacement), np.asarray(field.affine)
                )

        def carry():
            between = read_series_field(output / "field.nii.gz", **folders)
            write_carried_structures(arguments.structures, between, output / "carried")

        timed("NIfTI", write_nifti)
        timed("DICOM", lambda: write_dicom(output / "dicom", registered, pair))
        if arguments.structures:
            timed("contours", carry)
    row = {
        "voxels": " x ".join(map(str, scans.fixed.shape)),
        **{f"{part}, s": spent for part, spent in seconds.items()},
        "sum, s": round(sum(seconds.values()), 1),
        "memory, GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    comparison.report([row], arguments.json)


if __name__ == "__main__":
    main()
