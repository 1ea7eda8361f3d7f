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
TURN_TOLERANCE = 1e-3  # largest difference between direction cosines of slices of one volume
SPACING_TOLERANCE = 1e-3  # of the spacing
# What may differ between slices of a series, and decides what their stored numbers mean.
SCALING_TAGS = ("0028|1052", "0028|1053", "0028|0100", "0028|0103")
GEOMETRY_TAGS = ("0020|0032", "0020|0037", "0028|0030")  # position, orientation, spacing
FRAMES_TAG, PHOTOMETRIC_TAG, STORED_TAG, HIGH_TAG = "0028|0008", "0028|0004", "0028|0101", "0028|0102"


def read_dicom(path: Path, *, series: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads a folder with one series, or a file with one or more frames.

    Args:
      path: the folder or the file.
      series: UID of the series to read from a folder with several.

    Returns:
      values [x, y, z], rescaled slice by slice, and affine [4, 4] voxel -> RAS mm.

    Raises:
      UserError: several series or none, slices that aren't evenly spaced and aligned or differ in orientation
        or spacing, several images at one position, colour, or pixels that can't be read.
    """
    itk = simpleitk(path)
    files: Sequence[str] = []
    try:
        files = _series_files(path, itk, series) if path.is_dir() else [str(path)]
        if any(_frames(name, itk) > 1 for name in files):
            return _read_frames(path, files)
        return _read_slices(path, files, itk)
    except RuntimeError as error:
        message = f"not an image that can be read ({last_line(error)})"
        if len(files) and (header := _header(files[0])) is not None:
            if "Rows" not in header:
                message = f"a DICOM object of modality {header.get('Modality', '?')}; expected an image"
            else:
                try:
                    return _read_frames(path, files)  # pydicom has decoders that ITK lacks
                except UserError as second:
                    syntax = header.file_meta.get("TransferSyntaxUID")
                    if syntax is None or not syntax.is_compressed:
                        raise second from None
                    message = (
                        f"compressed as {syntax.name}, and its pixels can't be decoded: pip install "
                        "pylibjpeg[all], or convert the files by `pydicom decompress`"
                    )
        raise UserError(f"{path}: {message}") from None


def _header(name: str) -> Any:
    """The header of a file without its pixels; None if it isn't DICOM, is damaged, or without pydicom."""
    try:
        import pydicom

        return pydicom.dcmread(name, stop_before_pixels=True)
    except Exception:  # the first message stays
        return None


def _series_files(path: Path, itk: Any, chosen: str | None) -> Sequence[str]:
    series = itk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    names = f" ({', '.join(series)})" if series else ""
    if chosen is not None and chosen not in series:
        raise UserError(f"{path}: has no series {chosen}; it holds {len(series)} DICOM series{names}")
    if chosen is None and len(series) != 1:
        raise UserError(
            f"{path}: holds {len(series)} DICOM series{names}; expected the files of a single scan"
            + (": choose one by its UID (series=UID)" if series else "")
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

    def tags(*names: str) -> list[tuple[str, ...]]:
        """Attributes of every slice, empty where they are missing."""
        return [
            tuple(reader.GetMetaData(k, name) if reader.HasMetaDataKey(k, name) else "" for name in names)
            for k in range(len(files))
        ]

    geometry = tags(*GEOMETRY_TAGS)
    inverted = any(kind.strip() == "MONOCHROME1" for (kind,) in tags(PHOTOMETRIC_TAG))
    for stored, high in set(tags(STORED_TAG, HIGH_TAG)):
        _check_bits(path, stored, high)
    table = "ModalityLUTSequence" in (_header(files[0]) or ())
    if inverted or table or not all(map(all, geometry)):
        # ITK would invert what is shown inverted, ignore tables, and guess what is missing.
        return _read_frames(path, files)
    # ITK takes the geometry of the first slice, and spaces the slices evenly, wherever they were.
    positions, turns, spacings = (
        np.array([attribute.split("\\") for attribute in column], float)
        for column in zip(*geometry, strict=True)
    )
    check_alike(path, turns, spacings)
    normal = np.cross(turns[0, :3], turns[0, 3:])
    _check_even(path, positions, normal)
    values, affine = from_itk(path, image)
    if len(set(tags(*SCALING_TAGS))) > 1:  # ITK would convert every slice to the type of the first one
        slices = [itk.GetArrayFromImage(itk.ReadImage(name)).squeeze(0).T for name in files]
        values = np.stack([plane.astype(np.float64) for plane in slices], axis=-1)
    return values, affine


def _check_bits(path: Path, stored: Any, high: Any) -> None:
    """Refuses pixels whose bits don't begin at the lowest, as files from before 2000 have them."""
    if stored and high and int(high) != int(stored) - 1:
        raise UserError(
            f"{path}: pixels of {int(stored)} bits whose highest is number {int(high)}, a retired encoding: "
            "convert the files first"
        )


def _read_frames(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The frames of one or more files, each where its header puts it."""
    module = _pydicom(path)
    read = [_read_file(path, module, name) for name in names]
    if len(shapes := {values.shape[1:] for values, _ in read}) > 1:
        raise UserError(f"{path}: slices have {len(shapes)} sizes; expected one stack of slices")
    values = np.concatenate([values for values, _ in read])
    positions, turns, spacings = (
        np.concatenate(parts) for parts in zip(*(by for _, by in read), strict=True)
    )
    check_alike(path, turns, spacings)
    along_columns, along_rows = turns[0, :3], turns[0, 3:]  # where column and row numbers grow
    normal = np.cross(along_columns, along_rows)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    _check_even(path, positions, normal)
    lps = np.eye(4)
    lps[:3, :2] = np.stack([along_columns * spacings[0, 1], along_rows * spacings[0, 0]], axis=-1)
    lps[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1) if len(positions) > 1 else normal
    lps[:3, 3] = positions[0]
    return values[order].transpose(2, 1, 0), LPS_TO_RAS @ lps


def _read_file(path: Path, module: Any, name: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Rescaled frames [frame, row, column], and their positions, orientations and spacings."""
    try:
        data = module.dcmread(name)
        pixels = data.pixel_array
    except ImportError as error:  # no decoder
        raise UserError(f"{path}: {one_line(error)}: pip install it, or convert the file first") from None
    except Exception as error:  # pydicom and its decoders raise many kinds
        missing = "pylibjpeg" in str(error) or "missing" in str(error).lower()
        advice = (
            ": pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or convert it" if missing else ""
        )
        raise UserError(f"{path}: its pixels can't be read ({one_line(error)}){advice}") from None
    if int(data.get("SamplesPerPixel", 1)) != 1:
        raise UserError(f"{path}: voxels are colours; expected one real number each")
    _check_bits(path, data.get("BitsStored"), data.get("HighBit"))
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    *geometry, scales = _frame_geometry(path, data, len(pixels))
    if "ModalityLUTSequence" in data:
        return module.pixels.apply_modality_lut(pixels, data), tuple(geometry)
    return pixels.astype(np.float64) * scales[:, :1, None] + scales[:, 1:, None], tuple(geometry)


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
    detector = (data.get("DetectorInformationSequence") or [{}])[0]  # of nuclear medicine
    if len(own) != frames:
        raise UserError(f"{path}: has {frames} frames, and its header describes {len(own)}: copy it again")

    def find(frame: Any, group: str, name: str, default: Any = None) -> Any:
        """A value of a frame: its own, or one for all frames."""
        for source in (frame, shared):
            items = source.get(group) if source is not None else None
            if items and items[0].get(name) is not None:
                return items[0].get(name)
        found = data.get(name) or detector.get(name)
        if found is None and default is None:
            raise UserError(f"{path}: its header lacks {name} of the frames: convert the file first")
        return default if found is None else found

    try:
        turns = [find(frame, "PlaneOrientationSequence", "ImageOrientationPatient") for frame in own]
        spacings = [find(frame, "PixelMeasuresSequence", "PixelSpacing") for frame in own]
        if own[0] is None:
            first = data.get("ImagePositionPatient") or detector.get("ImagePositionPatient")
            positions = _offset_positions(path, data, first, np.array(turns[0], float), frames)
        else:
            positions = np.array(
                [find(frame, "PlanePositionSequence", "ImagePositionPatient") for frame in own], float
            )
        scaling = "PixelValueTransformationSequence"
        dose = float(data.get("DoseGridScaling") or 1)
        scales = [
            [find(frame, scaling, "RescaleSlope", dose), find(frame, scaling, "RescaleIntercept", 0.0)]
            for frame in own
        ]
        segments = {
            find(frame, "SegmentIdentificationSequence", "ReferencedSegmentNumber", 1) for frame in own
        }
        arrays = [np.array(values, float) for values in (positions, turns, spacings, scales)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its header can't be understood ({one_line(error)})") from None
    if len(segments) > 1:
        raise UserError(f"{path}: holds {len(segments)} segments; expected one: convert it to a label map")
    if [array.shape for array in arrays] != [(frames, 3), (frames, 6), (frames, 2), (frames, 2)]:
        raise UserError(f"{path}: positions, orientations or spacings of its frames are incomplete")
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _offset_positions(path: Path, data: Any, first: Any, turn: np.ndarray, frames: int) -> np.ndarray:
    """Positions of frames without functional groups: by their offsets or by the spacing between slices."""
    offsets, spacing_mm = data.get("GridFrameOffsetVector"), data.get("SpacingBetweenSlices")
    if offsets is None and spacing_mm is not None:
        offsets = float(spacing_mm) * np.arange(frames)
    if offsets is None and frames == 1:
        offsets = [0.0]
    if first is None or offsets is None:
        raise UserError(f"{path}: its header doesn't say where its frames lie: convert it first")
    shifts_mm = frame_shifts_mm(np.atleast_1d(np.array(offsets, float)), np.cross(turn[:3], turn[3:]))
    return np.array(first, float) + shifts_mm


def frame_shifts_mm(offsets_mm: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """[n, 3] LPS mm, from the first frame of a dose to each, by its GridFrameOffsetVector.

    Offsets that begin with 0 run along the normal of the frames; others are heights in the patient
    (PS3.3 C.8.8.3.2).
    """
    along = normal if offsets_mm[0] == 0 else np.array([0.0, 0.0, 1.0])
    return np.outer(offsets_mm - offsets_mm[0], along)


def check_alike(path: Path, turns: np.ndarray, spacings: np.ndarray) -> None:
    """Refuses slices with different orientations [n, 6] or spacings [n, 2]."""
    for name, unlike in (
        ("ImageOrientationPatient", np.ptp(turns, axis=0).max() > TURN_TOLERANCE),
        ("PixelSpacing", np.ptp(spacings, axis=0).max() > SPACING_TOLERANCE * spacings.min()),
    ):
        if unlike:
            raise UserError(f"{path}: its slices differ in {name}; expected one stack of slices")


def _check_even(path: Path, positions: np.ndarray, normal: np.ndarray) -> None:
    """Refuses slices at positions [n, 3] that aren't evenly spaced along their normal."""
    if len(positions) < 2:
        return
    steps = np.diff(positions, axis=0)
    steps_mm = np.linalg.norm(steps, axis=1)
    tolerance_mm = SLICE_TOLERANCE * np.median(steps_mm)
    if not steps_mm.min() > 0 or np.ptp(steps_mm) > tolerance_mm:
        raise UserError(
            f"{path}: slices lie {steps_mm.min():.4g} to {steps_mm.max():.4g} mm apart; expected even "
            "steps: is a slice missing, or are there several time points?"
        )
    away = positions - positions[0]
    aside_mm = np.linalg.norm(away - np.outer(away @ normal, normal), axis=1).max()
    if aside_mm > tolerance_mm:  # ITK would ignore the tilt
        raise UserError(
            f"{path}: its slices are shifted sideways, by up to {aside_mm:.3g} mm from the first one (tilted "
            "gantry); expected aligned slices: resample the series first"
        )
