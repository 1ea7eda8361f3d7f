"""DIR-Lab 4DCT: ten chest CTs of breathing patients with 300 landmark pairs each, read as they unpack.

    python -m adregnet_jax.data.datasets.dirlab ROOT

lists which cases under ROOT are complete. Files are found by name, in any letter case, up to four folders
deep. The names of the folders don't matter: packs, nested packs and flat folders all work.

T00 (end-inhale) is the fixed scan, T50 (end-exhale) the moving one. The files hold no geometry, so it is
tabulated here. Images are little-endian int16 without a header, x fastest, and store HU + 1000. Landmarks are
1-based. Slice 1 is cranial. The files don't record the directions of x and y; the usual axial display is
assumed, with x towards the patient's left and y towards the back. Voxel axes thus run to L, P, I, and the
affine to RAS mm has a negative diagonal.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path

import numpy as np

from adregnet_jax.config import DirLabConfig
from adregnet_jax.data import preprocessing
from adregnet_jax.data.datasets.files import read_voxel_points
from adregnet_jax.data.pair import Pair
from adregnet_jax.errors import OneLineParser, UserError

GEOMETRY = {  # case: voxels, mm
    1: ((256, 256, 94), (0.97, 0.97, 2.5)),
    2: ((256, 256, 112), (1.16, 1.16, 2.5)),
    3: ((256, 256, 104), (1.15, 1.15, 2.5)),
    4: ((256, 256, 99), (1.13, 1.13, 2.5)),
    5: ((256, 256, 106), (1.10, 1.10, 2.5)),
    6: ((512, 512, 128), (0.97, 0.97, 2.5)),
    7: ((512, 512, 136), (0.97, 0.97, 2.5)),
    8: ((512, 512, 128), (0.97, 0.97, 2.5)),
    9: ((512, 512, 128), (0.97, 0.97, 2.5)),
    10: ((512, 512, 120), (0.97, 0.97, 2.5)),
}
STORED_OFFSET_HU = 1000
LUNG_WINDOW_HU = (-1000.0, -200.0)  # section IV-B
DEPTH_MULTIPLE = 8  # section IV-A
FOLDER_DEPTH = 4
REQUEST = "the data is free on request, by the form on https://www.dir-lab.com/ReferenceData.html"

IMAGE_NAME = re.compile(r"case(\d+)_(t00|t50)(_s|-ssm)?\.img", re.IGNORECASE)
LANDMARK_NAME = re.compile(r"case(\d+)_(?:dirlab)?300_(t00|t50)_xyz\.txt", re.IGNORECASE)


@dataclasses.dataclass
class CaseFiles:
    """The files of one case by phase, "T00" or "T50"."""

    images: dict[str, Path] = dataclasses.field(default_factory=dict)
    landmarks: dict[str, Path] = dataclasses.field(default_factory=dict)

    def missing(self, case: int) -> list[str]:
        """Names of the missing files."""
        suffix = "_s" if case == 1 else "-ssm" if case <= 5 else ""
        return [f"case{case}_{phase}{suffix}.img" for phase in ("T00", "T50") if phase not in self.images] + [
            f"Case{case}_300_{phase}_xyz.txt" for phase in ("T00", "T50") if phase not in self.landmarks
        ]


def find_cases(root: str | Path) -> dict[int, CaseFiles]:
    """Every DIR-Lab file under `root` by case; of duplicates, the one in fewer folders."""
    if not root or not Path(root).is_dir():
        raise UserError(f"DIR-Lab folder '{root}' doesn't exist (data.dirlab.root): {REQUEST}")
    cases: dict[int, CaseFiles] = {}
    for depth in range(FOLDER_DEPTH + 1):
        for path in sorted(Path(root).glob("*/" * depth + "*")):
            image, landmark = IMAGE_NAME.fullmatch(path.name), LANDMARK_NAME.fullmatch(path.name)
            if match := image or landmark:
                found = cases.setdefault(int(match[1]), CaseFiles())
                (found.images if image else found.landmarks).setdefault(match[2].upper(), path)
    return {case: files for case, files in sorted(cases.items()) if case in GEOMETRY}


def read_image(path: Path, case: int) -> np.ndarray:
    """One phase of a case: [x, y, z] float32, Hounsfield units."""
    _check_size(path, case)
    stored = np.fromfile(path, "<i2").reshape(GEOMETRY[case][0], order="F")
    return np.ascontiguousarray(stored, np.float32) - STORED_OFFSET_HU


def _check_size(path: Path, case: int) -> None:
    shape, _ = GEOMETRY[case]
    expected, got = 2 * int(np.prod(shape)), path.stat().st_size
    if got != expected:
        raise UserError(
            f"{path}: case {case} has {' x '.join(map(str, shape))} voxels of 2 bytes, "
            f"expected {expected} bytes, got {got}: unpack the case again, or check its number"
        )


def read_landmarks(files: CaseFiles, case: int) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks of T00 and of T50, [n, 3] each: 0-based voxels of the scan on disk."""
    shape, _ = GEOMETRY[case]
    points = []
    for phase in ("T00", "T50"):
        path = files.landmarks[phase]
        one_based = read_voxel_points(path)
        if (one_based == 0).any() and (one_based >= 0).all():
            raise UserError(
                f"{path}: has a coordinate 0, but DIR-Lab voxels count from 1: add 1 to all coordinates"
            )
        outside = ((one_based < 1) | (one_based > shape)).any(axis=1)
        if outside.any():
            raise UserError(
                f"{path}: {outside.sum()} of {len(one_based)} landmarks are outside 1..{shape[0]}, "
                f"1..{shape[1]}, 1..{shape[2]}, the voxels of case {case}; the first is "
                f"{_numbers(one_based[outside][0])}: check the case's number"
            )
        points.append(one_based - 1)
    if len(points[0]) != len(points[1]):
        raise UserError(
            f"{files.landmarks['T50']}: {len(points[1])} landmarks, but T00 has {len(points[0])}; "
            "expected pairs: unpack the case again"
        )
    return points[0], points[1]


def dirlab_pair(config: DirLabConfig, case: int) -> Pair:
    """One case, preprocessed for the network: T00 is fixed, T50 moving.

    `config.preprocessing` is one of the paper's two descriptions:

    - `native` (section IV-A): the scan's own voxels, cropped or padded to `config.shape`, where a third entry
      of 0 stands for the smallest multiple of 8 that holds all of `config.cases`; each scan's 0.5 and 99.5
      percentiles are mapped to 0 and 1.
    - `isotropic` (section IV-B): HU -1000..-200 are mapped to [0, 1]; then the scan is resampled to
      `config.spacing_mm` and cropped or padded to `config.shape`.

    Both crop the two scans to one window around the body. If the body doesn't fit, its rim is cut off, but
    never lung or a landmark.

    Raises:
      UserError: a file is missing or damaged, or the lungs don't fit into `config.shape`.
    """
    config.check()
    if case not in GEOMETRY:
        raise UserError(f"there is no DIR-Lab case {case}: data.dirlab.cases must be numbers from 1 to 10")
    files = find_cases(config.root).get(case, CaseFiles())
    if missing := files.missing(case):
        raise UserError(
            f"DIR-Lab case {case} under '{config.root}' lacks {', '.join(missing)}: "
            f"unpack the whole Case{case}Pack; {REQUEST}"
        )
    fixed_hu, moving_hu = (read_image(files.images[phase], case) for phase in ("T00", "T50"))
    fixed_landmarks, moving_landmarks = read_landmarks(files, case)
    native_spacing_mm = np.array(GEOMETRY[case][1])

    boxes = [preprocessing.thorax_boxes(hu, native_spacing_mm) for hu in (fixed_hu, moving_hu)]
    landmarks = np.concatenate([fixed_landmarks, moving_landmarks])
    scored = np.array([landmarks.min(0), landmarks.max(0)])
    lungs = preprocessing.join_boxes(*(lungs for _, lungs in boxes), scored)
    body = preprocessing.join_boxes(*(body for body, _ in boxes), lungs)
    shape, scale, offset = _crop(config, case, body, lungs)

    if config.preprocessing == "native":
        fixed = preprocessing.rescale_percentiles(fixed_hu, str(files.images["T00"]))
        moving = preprocessing.rescale_percentiles(moving_hu, str(files.images["T50"]))
    else:
        fixed = preprocessing.rescale_window(fixed_hu, *LUNG_WINDOW_HU)
        moving = preprocessing.rescale_window(moving_hu, *LUNG_WINDOW_HU)
    fixed, mask = preprocessing.resample(fixed, scale, offset, shape)
    moving, _ = preprocessing.resample(moving, scale, offset, shape)
    affine = np.diag([*-native_spacing_mm, 1.0])  # L, P, I -> RAS
    return Pair(
        name=f"case{case}",
        fixed=fixed,
        moving=moving,
        spacing_mm=scale * native_spacing_mm,
        affine=affine @ np.block([[np.diag(scale), offset[:, None]], [np.zeros(3), np.ones(1)]]),
        mask=mask,
        fixed_landmarks=(fixed_landmarks - offset) / scale,
        moving_landmarks=(moving_landmarks - offset) / scale,
        native_scale=scale,
        native_offset=offset,
        native_spacing_mm=native_spacing_mm,
    )


def _crop(
    config: DirLabConfig, case: int, body: np.ndarray, lungs: np.ndarray
) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
    """The grid for the network: shape, and `native voxel = scale * voxel + offset`."""
    native_shape, native_spacing_mm = (np.array(value) for value in GEOMETRY[case])
    nx, ny, nz = config.shape
    if config.preprocessing == "native":
        deepest = max(GEOMETRY[other][0][2] for other in (*config.cases, case))
        nz = nz or math.ceil(deepest / DEPTH_MULTIPLE) * DEPTH_MULTIPLE
        scale = np.ones(3)
    else:
        scale = config.spacing_mm / native_spacing_mm

    shape = np.array([nx, ny, nz])
    window = shape * scale
    # Half a new voxel around the lungs, so that they lie between voxel centres of the new grid.
    margin = np.maximum(scale - 1, 0) / 2
    needed = lungs[1] - lungs[0] + 1 + 2 * margin
    if (needed > window + 1e-6).any():
        raise UserError(_what_would_hold(config, case, shape, scale, lungs[1] - lungs[0] + 1))
    lungs = lungs + np.array([-margin, margin])
    body = preprocessing.join_boxes(body, lungs)
    start = preprocessing.window_start(native_shape, window, body, lungs)
    if config.preprocessing == "native":
        start = np.floor(start)
    return (nx, ny, nz), scale, start + (scale - 1) / 2  # voxel centres


def _what_would_hold(
    config: DirLabConfig, case: int, shape: np.ndarray, scale: np.ndarray, lungs: np.ndarray
) -> str:
    """The message for lungs that don't fit `shape`, with a shape and a spacing that would hold them."""
    spacing_mm = np.array(GEOMETRY[case][1])
    margin = np.maximum(scale - 1, 0)
    enough = np.ceil(np.maximum((lungs + margin) / scale, shape) / 8) * 8
    message = (
        f"case {case}: lungs and landmarks take {_numbers(lungs * spacing_mm)} mm, data.dirlab.shape="
        f"{tuple(shape.tolist())} holds {_numbers((shape * scale - margin) * spacing_mm)}: "
        f"set data.dirlab.shape={tuple(enough.astype(int).tolist())}"
    )
    if config.preprocessing == "isotropic":
        coarser = np.maximum(lungs / shape, (lungs - 1) / np.maximum(shape - 1, 1)) * spacing_mm
        message += f" or data.dirlab.spacing_mm={np.ceil(coarser.max() * 100) / 100:g}"
    return message


def split_cases(config: DirLabConfig) -> tuple[tuple[int, ...], int, int]:
    """The training cases, the validation case and the test case.

    They are disjoint, unless `config.protocol` is "paper": then the test case is also trained on.
    """
    config.check()
    cases, test = tuple(config.cases), config.test_case
    validation = config.validation_case or cases[(cases.index(test) + 1) % len(cases)]
    left_out = (validation,) if config.protocol == "paper" else (test, validation)
    return tuple(case for case in cases if case not in left_out), validation, test


def report(root: str | Path) -> str:
    """A table of the cases under `root`, one line each, followed by missing or damaged files."""
    cases = find_cases(root)
    lines = [f"case  {'voxels':<13} {'mm':<17} {'images':<8} landmarks  distance before, mean (SD) mm"]
    problems, usable = [], False
    for case, (shape, spacing_mm) in GEOMETRY.items():
        files = cases.get(case, CaseFiles())
        images, landmarks, distance = "missing", "missing", "-"
        try:
            for path in files.images.values():
                _check_size(path, case)
            images = "complete" if len(files.images) == 2 else images
            if len(files.landmarks) == 2:
                fixed, moving = read_landmarks(files, case)
                distance_mm = np.linalg.norm((fixed - moving) * spacing_mm, axis=1)
                landmarks, distance = (
                    str(len(fixed)),
                    f"{distance_mm.mean():.2f} ({distance_mm.std(ddof=1):.2f})",
                )
            usable = usable or images == "complete" or landmarks != "missing"
            if case in cases and (missing := files.missing(case)):
                problems.append(f"case {case} lacks {', '.join(missing)}")
        except UserError as error:
            problems.append(f"case {case}: {error}")
        lines.append(
            f"{case:>4}  {'x'.join(map(str, shape)):<13} {' x '.join(map(str, spacing_mm)):<17} "
            f"{images:<8} {landmarks:<9}  {distance}"
        )
    if absent := [str(case) for case in GEOMETRY if case not in cases]:
        problems.append(f"cases {', '.join(absent)}: nothing found")
    if not usable:
        raise UserError(f"'{root}' has no usable DIR-Lab case ({'; '.join(problems)}): {REQUEST}")
    return "\n".join([*lines, *problems, *([REQUEST] if problems else [])])


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def main() -> None:
    parser = OneLineParser(description="Lists which DIR-Lab cases are complete, and what is missing.")
    parser.add_argument("root", help="folder with the unpacked cases")
    try:
        print(report(parser.parse_args().root))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
