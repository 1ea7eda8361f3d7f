"""Planar contours as shares of pixels, and back.

Pixel (i, j) is the square of side 1 around the point (i, j). A point is inside a set of polygons if a ray
from it crosses their edges an odd number of times, so that holes may be polygons of their own or be cut open
by a keyhole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

LINES = 8  # scan lines per pixel, on each of which the covered length is exact


def coverage(
    polygons: Sequence[Float[np.ndarray, "_n 2"]], *, shape: tuple[int, int]
) -> Float[np.ndarray, "x y"]:
    """The share of each pixel that lies inside polygons.

    Args:
      polygons: corners [n, 2] of each, in pixels; the last is joined to the first.
      shape: of the image.

    Returns:
      [x, y] float32 in [0, 1].
    """
    width, height = shape
    starts = np.concatenate(polygons)
    ends = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    # In units of scan lines, of which line 0 is the first that crosses pixel 0.
    from_line, to_line = ((points[:, 1] + 0.5) * LINES - 0.5 for points in (starts, ends))
    first = np.clip(np.ceil(np.minimum(from_line, to_line)), 0, height * LINES).astype(int)
    after = np.clip(np.ceil(np.maximum(from_line, to_line)), 0, height * LINES).astype(int)
    counts = after - first  # lines that each edge crosses
    edge = np.repeat(np.arange(len(starts)), counts)
    line = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    along = (line - from_line[edge]) / (to_line[edge] - from_line[edge])
    crossing = starts[edge, 0] + along * (ends[edge, 0] - starts[edge, 0])
    crossing = np.clip(crossing, -0.5, width - 0.5)
    order = np.lexsort((crossing, line))
    line, crossing = line[order], crossing[order]
    # Every other crossing of a line enters; all lines have an even number of crossings.
    sign = np.where(np.arange(len(line)) % 2 == 0, 1.0, -1.0)
    pixel = np.floor(crossing + 0.5).astype(int)
    within = pixel + 0.5 - crossing  # the share of that pixel beyond the crossing
    changes = np.zeros((height, width + 2))
    np.add.at(changes, (line // LINES, pixel), sign * within)
    np.add.at(changes, (line // LINES, pixel + 1), sign * (1 - within))
    shares = np.cumsum(changes, axis=1)[:, :width] / LINES
    return np.clip(shares, 0, 1).T.astype(np.float32)


def outlines(shares: Float[np.ndarray, "x y"]) -> list[Float[np.ndarray, "_n 2"]]:
    """The polygons around shares of a half and more: one for each piece, with its holes cut open by keyholes.

    Args:
      shares: [x, y] in [0, 1].

    Returns:
      Corners [n, 2] of each polygon, in pixels.
    """
    from contourpy import FillType, contour_generator

    padded = np.pad(np.asarray(shares, np.float64), 1)
    generator = contour_generator(z=padded.T, fill_type=FillType.OuterOffset)
    found = []
    for points, offsets in zip(*generator.filled(0.5, 2), strict=True):
        rings = [points[begin : end - 1] - 1 for begin, end in itertools.pairwise(offsets)]
        found.append(with_keyholes(rings[0], rings[1:]))
    return [polygon for polygon in found if len(polygon) > 2]


def with_keyholes(
    outer: Float[np.ndarray, "_n 2"], holes: Sequence[Float[np.ndarray, "_m 2"]]
) -> Float[np.ndarray, "_k 2"]:
    """One polygon around a piece with holes, each joined to the outside by a slit of no width.

    A slit runs from the rightmost corner of a hole to the right, to the first edge that it meets. Holes are
    joined from right to left, so that no slit crosses a hole that isn't part of the polygon yet.
    """
    polygon = outer
    for hole in sorted(holes, key=lambda ring: -ring[:, 0].max()):
        begin = int(np.argmax(hole[:, 0]))
        x, y = hole[begin]
        ends = np.roll(polygon, -1, axis=0)
        low, high = np.minimum(polygon[:, 1], ends[:, 1]), np.maximum(polygon[:, 1], ends[:, 1])
        crossed = np.flatnonzero((low <= y) & (y < high))
        share = (y - polygon[crossed, 1]) / (ends[crossed, 1] - polygon[crossed, 1])
        meets = polygon[crossed, 0] + share * (ends[crossed, 0] - polygon[crossed, 0])
        right = np.flatnonzero(meets >= x)
        nearest = right[np.argmin(meets[right])]
        gate = np.array([[meets[nearest], y]])
        after = crossed[nearest] + 1
        ring = np.concatenate([hole[begin:], hole[: begin + 1]])
        polygon = np.concatenate([polygon[:after], gate, ring, gate, polygon[after:]])
    return polygon


def area(polygon: Float[np.ndarray, "_n 2"]) -> float:
    """The area of a polygon in pixels, without the holes behind its keyholes."""
    x, y = (polygon - polygon[0]).T
    return float(abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2)
