"""The paper's preprocessing of raw brain scans, for T1 and T2 alike.

    python -m adregnet_jax.data.datasets.prepare_ixi INPUT OUTPUT --masks MASKS [--no-bias-correction]

Brain extraction by given masks, N4 bias field correction, z-score within the mask, resampling to 1 mm and
cropping to 160 x 192 x 224 mm around the brain. INPUT holds NIfTI files, directly or in subfolders such as
IXI-T1 and IXI-T2; OUTPUT gets them under the same names. MASKS has a mask for each, under the same name or
with the suffix _mask, _brain_mask, _bet or _bet_mask; a skull-stripped brain also works. Running the same
command again continues where it stopped. A scan that can't be prepared is reported in one line, and the
others are still prepared.

Axes stay as the file has them: nothing is flipped or rotated. The sides of the window follow the file's axes:
160 mm left to right, 192 mm up and down, 224 mm front to back.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from adregnet_jax.data.io import images
from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.preprocessing import resample
from adregnet_jax.errors import OneLineParser, UserError

# Left-right, front-back, feet-head. The paper takes 160 x 192 x 224 from TransMorph's files, whose axes run
# left, inferior, anterior.
WINDOW_MM = (160, 224, 192)
MASK_ENDINGS = ("", "_mask", "_brain_mask", "_bet_mask", "_bet")
SUFFIXES = (".nii.gz", ".nii")
# The paper gives no settings for N4. These are the defaults of N4's authors (Tustison et al., "N4ITK", IEEE
# TMI 2010): the field is fitted on every fourth voxel, at about 4 mm.
BIAS_GRID_MM = 4.0
BIAS_ITERATIONS = (50, 50, 50, 50)
MASKS_FIRST = (
    "no brain masks: give --masks FOLDER with one per scan. Make them first, for example by HD-BET (hd-bet -i"
    " INPUT -o MASKS --save_bet_mask) or SynthStrip (mri_synthstrip -i SCAN -m MASK)"
)


def prepare(scan: Image, mask: Image, *, bias_correction: bool = True) -> Image:
    """Prepares one scan as in section IV-B: brain extraction, N4, z-score, resampling to 1 mm.

    Args:
      scan: on any grid.
      mask: above 0 in the brain, on the grid of the scan.
      bias_correction: False skips N4, which needs SimpleITK.

    Returns:
      float32 on a grid of 1 mm, with axes in the order and direction of the scan's.

    Raises:
      UserError: the mask is empty or on another grid, the brain has a single value or is larger than the
        window, or SimpleITK is missing.
    """
    if scan.shape != mask.shape or not np.allclose(scan.affine, mask.affine, atol=1e-3):
        raise UserError(f"{mask.name}: is {mask.shape}, not on the grid of its scan, {scan.shape}")
    brain = mask.values > 0
    if not brain.any():
        raise UserError(f"{mask.name}: the mask is empty: expected values above 0 in the brain")
    values = scan.values.astype(np.float64)
    if bias_correction:
        values = values / _bias_field(scan, brain)
    sd = values[brain].std()
    if not sd > 0:
        raise UserError(
            f"{scan.name}: every voxel in the mask is {values[brain][0]:g}: is it the right mask?"
        )
    normal = (values - values[brain].mean()) / sd
    # Not in the paper: the value outside the brain. 0, the mean of the brain, would hide its border.
    lowest = normal[brain].min()
    return _around(brain, np.where(brain, normal - lowest, 0), lowest, scan)


def prepare_folder(
    source: Path, output: Path, masks: Path | None, *, bias_correction: bool = True
) -> tuple[Counter[tuple[int, int, int]], int]:
    """Prepares all scans of a folder that are not in `output` yet; prints a line for each refused one.

    Returns:
      The number of scans written, by shape, and the number refused.

    Raises:
      UserError: nothing can be prepared: there are no scans, no masks, or no SimpleITK for N4.
    """
    if masks is None:
        raise UserError(MASKS_FIRST)
    for folder in (source, masks):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
    paths = [path for path in sorted(source.rglob("*")) if path.name.endswith(SUFFIXES)]
    others = {masks.resolve(), output.resolve()}  # may lie within
    paths = [p for p in paths if not (p.name.startswith(".") or others & set(p.resolve().parents))]
    if not paths:
        raise UserError(f"{source}: has no scans; expected .nii or .nii.gz files in it or in its folders")
    if bias_correction:
        images.simpleitk(source)  # else each scan would be refused for it
    shapes: Counter[tuple[int, int, int]] = Counter()
    refused = 0
    for path in paths:
        target = output / path.relative_to(source)
        if target.exists():
            continue
        try:
            mask = read_image(_mask_path(path, masks / path.parent.relative_to(source), masks))
            prepared = prepare(read_image(path), mask, bias_correction=bias_correction)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_image(target, prepared)
        except (UserError, OSError) as error:
            refused += 1
            print(f"refused: {error}", file=sys.stderr)
            continue
        shapes[prepared.shape] += 1
        print(f"{target}: {prepared.shape}", flush=True)
    return shapes, refused


def _mask_path(scan: Path, *folders: Path) -> Path:
    """The mask of a scan in the first folder that has one."""
    stem = scan.name.removesuffix(".gz").removesuffix(".nii")
    for folder in folders:
        for name in (stem + ending + suffix for ending in MASK_ENDINGS for suffix in SUFFIXES):
            if (folder / name).is_file() and (folder / name).resolve() != scan.resolve():
                return folder / name
    raise UserError(f"{scan}: no mask in {folders[-1]}: expected {stem}_mask.nii.gz or {stem}.nii.gz there")


def _bias_field(scan: Image, brain: np.ndarray) -> np.ndarray:
    """[x, y, z], the factor by which the scan is too bright: N4 within the brain, at full resolution."""
    itk = images.simpleitk(Path(scan.name))
    image = images.to_itk(Path(scan.name), scan.values.astype(np.float32), scan.affine)
    inside = images.to_itk(Path(scan.name), brain.astype(np.uint8), scan.affine)
    factors = [max(1, round(BIAS_GRID_MM / size)) for size in scan.spacing_mm]
    corrector = itk.N4BiasFieldCorrectionImageFilter()
    corrector.SetMaximumNumberOfIterations(BIAS_ITERATIONS)
    try:
        corrector.Execute(itk.Shrink(image, factors), itk.Shrink(inside, factors))
        field, _ = images.from_itk(Path(scan.name), itk.Exp(corrector.GetLogBiasFieldAsImage(image)))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{scan.name}: N4 can't correct it ({reason}): look at the scan and its mask"
        ) from None
    return field.astype(np.float64)


def _around(brain: np.ndarray, values: np.ndarray, background: float, scan: Image) -> Image:
    """Resamples values, given relative to the background, to 1 mm with the brain at the centre."""
    body_axes = nib.io_orientation(scan.affine)[:, 0].astype(int)  # along which each axis of the file runs
    nx, ny, nz = (WINDOW_MM[axis] for axis in body_axes)
    shape = (nx, ny, nz)
    where = np.nonzero(brain)
    low, high = (np.array([function(axis) for axis in where]) for function in (np.min, np.max))
    extent_mm = (high - low + 1) * scan.spacing_mm
    if (extent_mm > shape).any():
        raise UserError(
            f"{scan.name}: the mask is {' x '.join(f'{size:.0f}' for size in extent_mm)} mm, the window"
            f" {' x '.join(map(str, shape))}: expected a brain without skull"
        )
    scale = 1 / scan.spacing_mm
    offset = (low + high) / 2 - scale * (np.array(shape) - 1) / 2
    offset = np.where(np.isclose(scale, 1), np.floor(offset), offset)  # 1 mm stays as it is
    resampled, _ = resample(values.astype(np.float32), scale, offset, shape)
    to_scan = np.diag([*scale, 1.0])
    to_scan[:3, 3] = offset
    return Image((resampled + background).astype(np.float32), scan.affine @ to_scan, scan.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--masks", type=Path, metavar="MASKS")
    parser.add_argument("--no-bias-correction", action="store_true")
    try:
        options = parser.parse_args(argv)
        shapes, refused = prepare_folder(
            options.input, options.output, options.masks, bias_correction=not options.no_bias_correction
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = ", ".join(f"{count} of {shape}" for shape, count in shapes.items())
    print(f"{shapes.total()} scans written{': ' if found else ''}{found}; {refused} refused.")
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
