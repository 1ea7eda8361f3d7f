"""Packs a registered pair for the interactive report: small volumes as base64.

Everything lies on the fixed grid, turned so that axes 0, 1, 2 are right, anterior, superior. The three scans
are NIfTI files of uint8, which NiiVue reads; maps and labels are bare arrays, which the page draws itself.
All are compressed by gzip. A grid too large for the page is made coarser by whole factors, axis by axis.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import matplotlib
import nibabel as nib
import numpy as np
from jaxtyping import Float, Integer, Real, Shaped, UInt8
from scipy import ndimage

from adregnet_jax.report.figures import central_point

MAP_COARSER = 8  # voxels of the scans for each voxel of a map
LEVEL = 6  # of gzip
SAMPLED = 8  # slices of each scan by which its compressed size is estimated
MARGIN = 0.92  # of the limit, which the estimate may miss
LABEL_BYTES = 0.02  # of each voxel of a label map, compressed
MAP_BYTES = 0.8  # of each voxel of a map, compressed
BLACK = 0.05  # intensities up to this are background
MOST_VOLUME_RATIO = 4.0  # Jacobian determinants above it look alike in the map


@dataclasses.dataclass(frozen=True, eq=False)
class ViewedPair:
    """A registered pair as the page shows it; everything on the fixed grid.

    Attributes:
      name: shown where a page has several pairs.
      affine: [4, 4] voxel -> RAS mm.
      fixed, moving, warped: [x, y, z] in [0, 1]; moving where its header puts it.
      displacement: [x, y, z, 3] in voxels.
      jacobian: [x, y, z], determinant of the map.
      error_mm: [x, y, z], the predicted error.
      fixed_labels, moving_labels, warped_labels: [x, y, z], moving as the scan.
      label_names: by label.
      fixed_landmarks_mm, moving_landmarks_mm: [n, 3] RAS mm.
      mapped_landmarks_mm: [n, 3] RAS mm, where the field leads the fixed ones.
      fixed_window, moving_window: the intensities that 0 and 1 stand for.
    """

    name: str
    affine: Real[np.ndarray, "4 4"]
    fixed: Float[np.ndarray, "x y z"]
    moving: Float[np.ndarray, "x y z"]
    warped: Float[np.ndarray, "x y z"]
    displacement: Float[np.ndarray, "x y z 3"]
    jacobian: Float[np.ndarray, "x y z"]
    error_mm: Float[np.ndarray, "x y z"] | None = None
    fixed_labels: Integer[np.ndarray, "x y z"] | None = None
    moving_labels: Integer[np.ndarray, "x y z"] | None = None
    warped_labels: Integer[np.ndarray, "x y z"] | None = None
    label_names: Mapping[int, str] = dataclasses.field(default_factory=dict)
    fixed_landmarks_mm: Float[np.ndarray, "n 3"] | None = None
    moving_landmarks_mm: Float[np.ndarray, "n 3"] | None = None
    mapped_landmarks_mm: Float[np.ndarray, "n 3"] | None = None
    fixed_window: tuple[float, float] = (0.0, 1.0)
    moving_window: tuple[float, float] = (0.0, 1.0)


class PackedPair(NamedTuple):
    """A pair for the page: what JSON describes, and volumes in base64 by their names."""

    record: dict[str, Any]
    volumes: dict[str, str]

    def size_bytes(self) -> int:
        return sum(map(len, self.volumes.values())) + len(json.dumps(self.record))


class MapKind(NamedTuple):
    """A map that can be laid over the scans."""

    name: str
    title: str
    unit: str
    colours: str  # of matplotlib


MAPS = (
    MapKind("displacement", "displacement", "mm", "viridis"),
    MapKind("jacobian", "Jacobian determinant", "", "coolwarm"),
    MapKind("error", "predicted error", "mm", "inferno"),
)


def pack(pair: ViewedPair, *, limit_bytes: float) -> PackedPair:
    """Packs a pair into a limited number of bytes.

    Args:
      pair: the arrays.
      limit_bytes: for the base64 and the JSON together. A pair whose landmarks alone exceed it stays larger.
    """
    most_voxels = _fitting_voxels(pair, limit_bytes)
    while True:
        packed = _pack(pair, coarsening(pair.fixed.shape, _spacing_mm(pair.affine), most_voxels))
        voxels = math.prod(packed.record["shape"])
        if packed.size_bytes() <= limit_bytes or voxels <= 2**12:
            return packed
        most_voxels = voxels * min(0.9, MARGIN * limit_bytes / packed.size_bytes())


def coarsening(shape: Sequence[int], spacing_mm: Sequence[float], most_voxels: float) -> tuple[int, int, int]:
    """Whole factors, one an axis, that leave at most `most_voxels` voxels, as close to cubes as possible."""
    factors = [1, 1, 1]
    while math.prod(-(-n // f) for n, f in zip(shape, factors, strict=True)) > most_voxels:
        thick = [f * mm if f < n else math.inf for n, f, mm in zip(shape, factors, spacing_mm, strict=True)]
        if math.isinf(min(thick)):
            break
        factors[int(np.argmin(thick))] += 1
    return factors[0], factors[1], factors[2]


def _spacing_mm(affine: np.ndarray) -> list[float]:
    return nib.affines.voxel_sizes(affine).tolist()


def _fitting_voxels(pair: ViewedPair, limit_bytes: float) -> float:
    """How many voxels of the scans fit, estimated from some slices."""
    rate = 3 * MAP_BYTES / MAP_COARSER
    for scan in (pair.fixed, pair.moving, pair.warped):
        axis = int(np.argmax(scan.shape))
        chosen = np.unique(np.linspace(0, scan.shape[axis] - 1, SAMPLED).astype(int))
        slices = _as_bytes(scan.take(chosen, axis))
        rate += len(gzip.compress(slices.tobytes(), LEVEL)) / slices.size
    rate += LABEL_BYTES * sum(
        labels is not None for labels in (pair.fixed_labels, pair.moving_labels, pair.warped_labels)
    )
    return MARGIN * limit_bytes / (rate * 4 / 3)


class _Turn(NamedTuple):
    """From the arrays of a pair to those of the page: turned to the patient, and coarser by whole factors."""

    orientation: Integer[np.ndarray, "3 2"]  # of nibabel
    factors: tuple[int, ...]  # of the turned axes

    def __call__(self, values: np.ndarray, further: Sequence[int] = (1, 1, 1)) -> np.ndarray:
        """The means over blocks; `further` makes them larger."""
        factors = [f * g for f, g in zip(self.factors, further, strict=True)]
        return _block_means(nib.apply_orientation(values, self.orientation), factors)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """The values in the middle of the blocks."""
        turned = nib.apply_orientation(values, self.orientation)
        padding = [(0, -n % f) for n, f in zip(turned.shape, self.factors, strict=True)]
        return np.pad(turned, padding, mode="edge")[tuple(slice((f - 1) // 2, None, f) for f in self.factors)]

    def grid(self, affine: np.ndarray, shape: Sequence[int]) -> Float[np.ndarray, "4 4"]:
        """[4, 4] voxel of the page's arrays -> RAS mm, of a pair's affine and shape."""
        turned = np.asarray(affine, np.float64) @ nib.orientations.inv_ornt_aff(self.orientation, shape)
        return turned @ _coarser_grid(self.factors)


def _pack(pair: ViewedPair, factors: tuple[int, int, int]) -> PackedPair:
    orientation = nib.io_orientation(pair.affine).astype(int)
    turn = _Turn(orientation, tuple(factors[axis] for axis in np.argsort(orientation[:, 0])))
    grid = turn.grid(pair.affine, pair.fixed.shape)
    scans = {name: _as_bytes(turn(getattr(pair, name))) for name in ("fixed", "moving", "warped")}
    shape = scans["fixed"].shape
    contents = {name: _nifti(scan, grid) for name, scan in scans.items()}
    coarser = coarsening(shape, _spacing_mm(grid), math.prod(shape) / MAP_COARSER)
    maps = _coded_maps(pair, turn, coarser)
    contents |= {name: found.codes.tobytes("F") for name, found in maps.items()}
    labels = _labels(pair)
    contents |= {name: turn.nearest(ranks).tobytes("F") for name, ranks in labels.ranks.items()}
    with ThreadPoolExecutor(4) as threads:
        compressed = threads.map(lambda one: gzip.compress(one, LEVEL, mtime=0), contents.values())
        volumes = {
            name: base64.b64encode(one).decode() for name, one in zip(contents, compressed, strict=True)
        }
    record = {
        "name": pair.name,
        "shape": list(shape),
        "spacing_mm": _spacing_mm(grid),
        "affine": grid.tolist(),
        "to_file": (np.linalg.inv(pair.affine) @ grid).tolist(),
        "windows": {"fixed": pair.fixed_window, "moving": pair.moving_window, "warped": pair.moving_window},
        "start": _start(maps["displacement"], coarser, shape),
        "maps": [found.described | {"factors": list(coarser)} for found in maps.values()],
        "labels": labels.described,
        "label_bytes": labels.bytes_each,
        "landmarks": _landmarks(pair, grid),
        "note": _note(pair.fixed.shape, factors, _spacing_mm(pair.affine), coarser),
    }
    return PackedPair(record, volumes)


class _CodedMap(NamedTuple):
    codes: UInt8[np.ndarray, "x y z"]
    described: dict[str, Any]


def _coded_maps(pair: ViewedPair, turn: _Turn, coarser: Sequence[int]) -> dict[str, _CodedMap]:
    """The maps of a pair by name: coarse, in 255 steps, with their scales."""
    body = _body(np.maximum(turn(pair.fixed, coarser), turn(pair.warped, coarser)))
    coded = {}
    for kind, values in _maps(pair):
        coarse = turn(values, coarser)
        if kind.name == "jacobian":
            folded = turn((values <= 0).astype(np.float32), coarser) > 0  # none may vanish in a mean
            codes, scale = _jacobian_codes(coarse, folded)
        else:
            codes, scale = _codes(coarse, body)
        named = {"name": kind.name, "title": kind.title, "unit": kind.unit, "shape": list(codes.shape)}
        coded[kind.name] = _CodedMap(codes, named | scale | {"colours": _lookup(kind.colours)})
    return coded


def _body(scan: np.ndarray) -> np.ndarray:
    """[x, y, z], True in the body: the voxels that aren't black, with the holes in their axial slices."""
    in_plane = ndimage.generate_binary_structure(2, 1)[..., None]
    bright = scan > BLACK
    closed = ndimage.binary_closing(bright, in_plane) | bright  # closing removes voxels at the border
    body = ndimage.binary_fill_holes(closed, in_plane)
    return body if body.any() else np.ones_like(body)


def _start(displacement: _CodedMap, coarser: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The voxel of the page's scans where the page opens: where most moves in the body."""
    moved = displacement.codes.astype(np.float32)  # 0 outside of it
    place = central_point(moved, moved, np.repeat(moved[..., None], 3, axis=-1))
    return [min(p * f + f // 2, n - 1) for p, f, n in zip(place, coarser, shape, strict=True)]


def _note(
    shape: Sequence[int], factors: Sequence[int], spacing_mm: Sequence[float], maps: Sequence[int]
) -> str:
    """Says how the scans and the maps were resampled for the page."""
    size = " × ".join(map(str, shape))
    per_map = " × ".join(map(str, maps))
    if max(factors) == 1:
        scans = f"The scans have the {size} voxels of the fixed scan, in 256 steps of grey"
    else:
        shown = " × ".join(str(-(-n // f)) for n, f in zip(shape, factors, strict=True))
        mm = " × ".join(f"{f * s:.3g}" for f, s in zip(factors, spacing_mm, strict=True))
        scans = (
            f"The fixed scan's {size} voxels were averaged to {shown} of {mm} mm for this page, in 256 steps"
            " of grey"
        )
    return f"{scans}; maps are averages over {per_map} of these."


def _as_bytes(values: np.ndarray) -> UInt8[np.ndarray, "x y z"]:
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def _coarser_grid(factors: Sequence[int]) -> Float[np.ndarray, "4 4"]:
    """[4, 4] voxel of the coarser grid -> voxel."""
    matrix = np.diag([*map(float, factors), 1.0])
    matrix[:3, 3] = [(f - 1) / 2 for f in factors]
    return matrix


def _block_means(values: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Means over blocks of voxels; the last ones of an axis are continued by its last voxels."""
    if max(factors) == 1:
        return values
    padding = [(0, -n % f) for n, f in zip(values.shape, factors, strict=True)]
    values = np.pad(values, padding, mode="edge")
    blocks = [part for n, f in zip(values.shape, factors, strict=True) for part in (n // f, f)]
    return values.reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float32)


def _nifti(values: np.ndarray, affine: np.ndarray) -> bytes:
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.header["cal_max"] = 255
    return image.to_bytes()


def _maps(pair: ViewedPair) -> list[tuple[MapKind, np.ndarray]]:
    squared_mm = np.zeros(pair.fixed.shape, np.float32)
    for row in pair.affine[:3, :3].astype(np.float32):  # one at a time, to save memory
        squared_mm += (pair.displacement @ row) ** 2
    values = {"displacement": np.sqrt(squared_mm), "jacobian": pair.jacobian, "error": pair.error_mm}
    return [(kind, found) for kind in MAPS if (found := values[kind.name]) is not None]


def _codes(values: np.ndarray, body: np.ndarray) -> tuple[UInt8[np.ndarray, "x y z"], dict[str, Any]]:
    """Values from 0 on in steps from code 1, with 0 outside of the body, and their scale."""
    step = max(float(values[body].max()), 1e-3) / 254
    codes = np.where(body, 1 + np.clip(np.rint(values / step), 0, 254), 0).astype(np.uint8)
    high = max(float(np.percentile(values[body], 99.5)), 2 * step)
    return codes, {"zero": "outside", "first": 0.0, "step": step, "low": 0.0, "high": high}


def _jacobian_codes(
    values: np.ndarray, folded: np.ndarray
) -> tuple[UInt8[np.ndarray, "x y z"], dict[str, Any]]:
    """Determinants in steps from code 1, with 0 where folded, and their scale."""
    step = min(max(float(values.max()), 2.0), MOST_VOLUME_RATIO) / 255
    change = float(np.clip(np.percentile(np.abs(values - 1), 99.5), 0.1, 1.0))
    codes = np.where(folded, 0, np.clip(np.rint(values / step), 1, 255)).astype(np.uint8)
    scale = {"zero": "folded", "first": step, "step": step, "low": 1 - change, "high": 1 + change}
    return codes, scale


def _lookup(name: str) -> str:
    """256 colours as hexadecimal digits, six each."""
    colours = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    return colours.tobytes().hex()


class _Labels(NamedTuple):
    ranks: dict[str, Shaped[np.ndarray, "x y z"]]  # 0 is the background
    described: list[dict[str, Any]]  # of ranks 1, 2, ...
    bytes_each: int


def _labels(pair: ViewedPair) -> _Labels:
    names = ("fixed_labels", "moving_labels", "warped_labels")
    maps = {name: found for name in names if (found := getattr(pair, name)) is not None}
    if not maps:
        return _Labels({}, [], 1)
    present = sorted({int(label) for found in maps.values() for label in _values_in(found)} - {0})
    kind: Any = np.uint8 if len(present) < 2**8 else np.uint16
    ranks = {name: _ranks(found, present, kind) for name, found in maps.items()}
    described = [{"label": label, "name": pair.label_names.get(label, str(label))} for label in present]
    return _Labels(ranks, described, np.dtype(kind).itemsize)


def _values_in(labels: np.ndarray) -> np.ndarray:
    """The labels present; without sorting all voxels, where they are small."""
    if labels.min() >= 0 and labels.max() < 2**16:
        return np.flatnonzero(np.bincount(labels.ravel()))
    return np.unique(labels)


def _ranks(labels: np.ndarray, present: Sequence[int], kind: Any) -> np.ndarray:
    """Each label's place among those present, from 1 on; 0 for the background."""
    found = np.searchsorted(np.asarray(present, np.int64), labels) + 1
    return np.where(labels == 0, 0, found).astype(kind)


def _landmarks(pair: ViewedPair, grid: np.ndarray) -> list[dict[str, Any]]:
    """The place of each landmark, its partner's and the residual, in voxels; its distances in mm."""
    fixed, moving, mapped = pair.fixed_landmarks_mm, pair.moving_landmarks_mm, pair.mapped_landmarks_mm
    if fixed is None or moving is None or mapped is None:
        return []
    inverse = np.linalg.inv(grid)
    at, to = (nib.affines.apply_affine(inverse, points).round(3) for points in (fixed, moving))
    residual = ((moving - mapped) @ inverse[:3, :3].T).round(3)
    before, after = np.linalg.norm(moving - fixed, axis=1), np.linalg.norm(moving - mapped, axis=1)
    return [
        {"at": a, "moving": m, "residual": r, "before_mm": round(b, 3), "after_mm": round(e, 3)}
        for a, m, r, b, e in zip(
            at.tolist(), to.tolist(), residual.tolist(), before.tolist(), after.tolist(), strict=True
        )
    ]
