"""DICOM series and multi-frame files as volumes: by SimpleITK, and by pydicom where ITK ignores the header.

Both belong to the extra `dicom`; SimpleITK alone, to the extra `itk`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adregnet_jax.data.io.itk import LPS_TO_RAS, from_itk, last_line, simpleitk
from adregnet_jax.errors import UserError, one_line

SLICE_TOLERANCE = 0.05  # of the distance between slices
TURN_TOLERANCE = 1e-3  # largest difference between direction cosines of frames of one volume
# What may differ between slices of a series, and decides what their stored numbers mean.
SCALING_TAGS = ("0028|1052", "0028|1053", "0028|0100", "0028|0103")
POSITION_TAG, FRAMES_TAG = "0020|0032", "0028|0008"


def read_dicom(path: Path, *, series: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads a folder with one series, or a file with one or more frames.

    Args:
      path: the folder or the file.
      series: UID of the series to read from a folder with several.

    Returns:
      values [x, y, z], rescaled slice by slice, and affine [4, 4] voxel -> RAS mm.

    Raises:
      UserError: several series or none, slices that aren't evenly spaced and aligned, several images at one
        position, colour, or pixels that can't be read.
    """
    itk = simpleitk(path)
    files: Sequence[str] = []
    try:
        files = _series_files(path, itk, series) if path.is_dir() else [str(path)]
        if many := [name for name in files if _frames(name, itk) > 1]:
            if len(files) > 1:
                raise UserError(
                    f"{path}: {len(many)} of {len(files)} files of its series hold several slices each; "
                    "expected one such file: give the file itself, not its folder"
                )
            return _read_frames(Path(many[0]))
        return _read_slices(path, files, itk)
    except RuntimeError as error:
        if len(files) and (kind := _compression(files[0])):
            raise UserError(
                f"{path}: compressed as {kind}, and its pixels can't be decoded: pip install pylibjpeg[all], "
                "and convert the files by `pydicom decompress`"
            ) from None
        raise UserError(f"{path}: not an image that can be read ({last_line(error)})") from None


def _compression(name: str) -> str | None:
    """How the pixels of a file are compressed, in words; None if they aren't, or if that can't be said."""
    try:
        import pydicom

        syntax = pydicom.dcmread(name, stop_before_pixels=True).file_meta.TransferSyntaxUID
    except Exception:  # a damaged file, or no pydicom: the first message stays
        return None
    return syntax.name if syntax.is_compressed else None


def _series_files(path: Path, itk: Any, chosen: str | None) -> Sequence[str]:
    series = itk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    names = f" ({', '.join(series)})" if series else ""
    if chosen is not None and chosen not in series:
        raise UserError(f"{path}: has no series {chosen}; it holds {len(series)} DICOM series{names}")
    if chosen is None and len(series) != 1:
        raise UserError(
            f"{path}: holds {len(series)} DICOM series{names}; expected the files of a single scan"
            + (": choose one by its UID" if series else "")
        )
    return itk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), chosen or series[0])


def _frames(name: str, itk: Any) -> int:
    reader = itk.ImageFileReader()
    reader.SetFileName(name)
    reader.SetImageIO("GDCMImageIO")
    reader.ReadImageInformation()
    frames = reader.GetMetaData(FRAMES_TAG) if reader.HasMetaDataKey(FRAMES_TAG) else "1"
    return int(frames) if frames.strip().isdecimal() else 1


def _read_slices(path: Path, files: Sequence[str], itk: Any) -> tuple[np.ndarray, np.ndarray]:
    reader = itk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: voxels are {image.GetPixelIDTypeAsString()}; expected one real number each")
    if len(files) > 2:  # ITK spaces the slices evenly, wherever they were
        positions = [reader.GetMetaData(k, POSITION_TAG).split("\\") for k in range(len(files))]
        normal = np.reshape(image.GetDirection(), (3, 3))[:, 2]
        _check_even(path, np.array(positions, float), normal)
    values, affine = from_itk(path, image)
    scalings = {
        tuple(reader.GetMetaData(k, tag) if reader.HasMetaDataKey(k, tag) else "" for tag in SCALING_TAGS)
        for k in range(len(files))
    }
    if len(scalings) > 1:  # ITK would convert every slice to the type of the first one
        slices = [itk.GetArrayFromImage(itk.ReadImage(name)).squeeze(0).T for name in files]
        values = np.stack([plane.astype(np.float64) for plane in slices], axis=-1)
    return values, affine


def _read_frames(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A multi-frame file, whose frames lie where its functional groups put them."""
    pydicom = _pydicom(path)
    try:
        data = pydicom.dcmread(path)
        pixels = data.pixel_array  # [frame, row, column]
    except ImportError as error:  # no decoder
        raise UserError(f"{path}: {one_line(error)}: pip install it, or convert the file first") from None
    except Exception as error:  # pydicom and its decoders raise many kinds
        missing = "pylibjpeg" in str(error) or "missing" in str(error).lower()
        advice = (
            ": pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or convert it" if missing else ""
        )
        raise UserError(f"{path}: its pixels can't be read ({one_line(error)}){advice}") from None
    if int(data.get("SamplesPerPixel", 1)) != 1 or pixels.ndim != 3:
        raise UserError(f"{path}: voxels are colours; expected one real number each")
    positions, turns, spacings, scales = _frame_geometry(path, data, len(pixels))
    if np.ptp(turns, axis=0).max() > TURN_TOLERANCE or np.ptp(spacings, axis=0).max() > 0:
        raise UserError(f"{path}: its frames differ in orientation or spacing; expected one stack of slices")
    along_columns, along_rows = turns[0, :3], turns[0, 3:]  # where column and row numbers grow
    normal = np.cross(along_columns, along_rows)
    order = np.argsort(positions @ normal, kind="stable")
    positions, scales = positions[order], scales[order]
    _check_even(path, positions, normal)
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([along_columns * spacings[0, 1], along_rows * spacings[0, 0], step], axis=-1)
    lps[:3, 3] = positions[0]
    values = pixels[order].astype(np.float64) * scales[:, :1, None] + scales[:, 1:, None]
    return values.transpose(2, 1, 0), LPS_TO_RAS @ lps


def _pydicom(path: Path) -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: this needs pydicom: pip install 'adregnet-jax[dicom]'") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # errors are raised and reported in one line
    return pydicom


def _frame_geometry(
    path: Path, data: Any, frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each frame's position [n, 3], orientation [n, 6], spacing [n, 2] in LPS mm; slope, intercept [n, 2]."""
    own = list(data.get("PerFrameFunctionalGroupsSequence", [])) or [None] * frames
    shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
    if len(own) != frames:
        raise UserError(f"{path}: has {frames} frames, and its header describes {len(own)}: copy it again")

    def find(frame: Any, group: str, name: str, default: Any = None) -> Any:
        """A value of a frame: its own, or one for all frames."""
        for source in (frame, shared):
            items = source.get(group) if source is not None else None
            if items and items[0].get(name) is not None:
                return items[0].get(name)
        found = data.get(name)
        if found is None and default is None:
            raise UserError(f"{path}: its header lacks {name} of the frames: convert the file first")
        return default if found is None else found

    try:
        turns = [find(frame, "PlaneOrientationSequence", "ImageOrientationPatient") for frame in own]
        spacings = [find(frame, "PixelMeasuresSequence", "PixelSpacing") for frame in own]
        if own[0] is None:
            positions = _offset_positions(path, data, np.array(turns[0], float), frames)
        else:
            positions = [find(frame, "PlanePositionSequence", "ImagePositionPatient") for frame in own]
        scaling = "PixelValueTransformationSequence"
        dose = float(data.get("DoseGridScaling") or 1)
        scales = [
            [find(frame, scaling, "RescaleSlope", dose), find(frame, scaling, "RescaleIntercept", 0.0)]
            for frame in own
        ]
        arrays = [np.array(values, float) for values in (positions, turns, spacings, scales)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its header can't be understood ({one_line(error)})") from None
    if [array.shape for array in arrays] != [(frames, 3), (frames, 6), (frames, 2), (frames, 2)]:
        raise UserError(f"{path}: positions, orientations or spacings of its frames are incomplete")
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _offset_positions(path: Path, data: Any, turn: np.ndarray, frames: int) -> list[np.ndarray]:
    """Positions of frames without functional groups: by their offsets or by the spacing between slices."""
    normal = np.cross(turn[:3], turn[3:])
    first, spacing_mm = data.get("ImagePositionPatient"), data.get("SpacingBetweenSlices")
    offsets = data.get("GridFrameOffsetVector")
    if offsets is None and spacing_mm is not None:
        offsets = float(spacing_mm) * np.arange(frames)
    if first is None or offsets is None:
        raise UserError(f"{path}: its header doesn't say where its {frames} frames lie: convert it first")
    return [np.array(first, float) + float(offset) * normal for offset in offsets]


def _check_even(path: Path, positions: np.ndarray, normal: np.ndarray) -> None:
    """Refuses slices at positions [n, 3] that aren't evenly spaced along their normal."""
    steps = np.diff(positions, axis=0)
    steps_mm = np.linalg.norm(steps, axis=1)
    tolerance_mm = SLICE_TOLERANCE * np.median(steps_mm)
    aside_mm = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max()
    if aside_mm > tolerance_mm:  # ITK would ignore the tilt
        raise UserError(
            f"{path}: each slice is shifted {aside_mm:.3g} mm sideways from the previous one (tilted "
            "gantry); expected aligned slices: resample the series first"
        )
    if not steps_mm.min() > 0 or np.ptp(steps_mm) > tolerance_mm:
        raise UserError(
            f"{path}: slices lie {steps_mm.min():.4g} to {steps_mm.max():.4g} mm apart; expected even "
            "steps: is a slice missing, or are there several time points?"
        )
