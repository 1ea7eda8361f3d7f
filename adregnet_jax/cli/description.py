"""Descriptions of files and workdirs, as names and values that JSON can store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from adregnet_jax.data.io import nifti, points, transforms
from adregnet_jax.data.io.images import ITK_SUFFIXES, NIFTI_SUFFIXES, read_image
from adregnet_jax.data.io.itk import is_vector_image, read_itk_file
from adregnet_jax.data.io.nifti import Prefer
from adregnet_jax.errors import UserError

DIGITS = 6  # significant digits of printed numbers


def describe(path: Path, *, prefer: Prefer | None = None, series: str | None = None) -> dict[str, Any]:
    """Describes an image, a field, a matrix, points, or the workdir of a training run.

    Raises:
      UserError: it is none of these, or damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if (path / "config.json").is_file():
        return _describe_run(path)
    if path.name.endswith(points.SUFFIXES):
        return _describe_points(points.read_points(path))
    if path.name.endswith(transforms.ITK_TRANSFORM_SUFFIXES):
        return _describe_transform(path)
    if _is_field(path, prefer):
        return _describe_field(*transforms.read_field(path))
    return _describe_image(path, prefer, series)


def as_text(description: dict[str, Any]) -> str:
    """The description, one value per line."""
    return "\n".join(f"{name:<15} {_text(value)}" for name, value in description.items())


def _is_field(path: Path, prefer: Prefer | None) -> bool:
    if path.name.endswith(NIFTI_SUFFIXES):
        image = nifti.open_image(path, prefer=prefer)
        vectors = int(image.header["intent_code"]) in (1006, 1007)
        return vectors or (len(image.shape) == 4 and image.shape[3] == 3)
    if path.name.endswith(ITK_SUFFIXES) and path.is_file():
        return is_vector_image(read_itk_file(path))
    return path.name.endswith(".npz")


def _describe_transform(path: Path) -> dict[str, Any]:
    """Describes a matrix, a field, or the parts of a composite that is neither."""
    parts = transforms.read_transform(path)
    matrices = [part for part in parts if not isinstance(part, transforms.Field)]
    if len(matrices) == len(parts):
        matrix = np.eye(4)
        for part in matrices:
            matrix = part @ matrix
        return _describe_matrix(matrix)
    if [isinstance(part, transforms.Field) for part in parts] == [True] + [False] * (len(parts) - 1):
        return _describe_field(*transforms.read_field(path))
    names = ["field" if isinstance(part, transforms.Field) else "matrix" for part in parts]
    return {"kind": "composite", "parts": names}


def _grid(shape: tuple[int, ...], affine: np.ndarray) -> dict[str, Any]:
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in shape))).reshape(3, -1).T
    corners_mm = nib.affines.apply_affine(affine, corners)
    return {
        "shape": list(shape),
        "spacing_mm": _list(nib.affines.voxel_sizes(affine)),
        "orientation": "".join(nib.aff2axcodes(affine)),
        "from_mm": _list(corners_mm.min(axis=0)),
        "to_mm": _list(corners_mm.max(axis=0)),
        "affine": _list(affine),
    }


def _describe_image(path: Path, prefer: Prefer | None, series: str | None) -> dict[str, Any]:
    image = read_image(path, exact=True, prefer=prefer, series=series)
    return {
        "kind": "image",
        **_grid(image.shape, image.affine),
        "minimum": image.values.min().item(),
        "maximum": image.values.max().item(),
        "mean": float(image.values.mean(dtype=np.float64)),
    }


def _describe_field(displacement: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    from adregnet_jax.launch.process import check_jax_version

    check_jax_version()
    import jax.numpy as jnp  # nothing else here needs JAX

    from adregnet_jax.registration.field import DisplacementField, field_jacobian

    determinant = np.asarray(
        field_jacobian(DisplacementField(jnp.asarray(displacement), jnp.asarray(affine)))
    )
    motion_mm = np.linalg.norm(displacement @ affine[:3, :3].T, axis=-1)
    return {
        "kind": "field",
        **_grid(displacement.shape[:3], affine),
        "motion_mean_mm": float(motion_mm.mean()),
        "motion_95_mm": float(np.percentile(motion_mm, 95)),
        "motion_max_mm": float(motion_mm.max()),
        "jacobian_min": float(determinant.min()),
        "jacobian_max": float(determinant.max()),
        "folded_percent": 100 * float(np.mean(determinant <= 0)),
    }


def _describe_run(workdir: Path) -> dict[str, Any]:
    """Describes a training run from the files in its workdir, of which older versions wrote fewer."""
    try:
        record = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        config = record["config"]
        description = {
            "kind": "run",
            "data": config["data"]["kind"],
            "architecture": config["model"].get("architecture", "adregnet"),
            "channels": config["model"]["channels"],
            "trained_mm": record.get("spacing_mm"),
            **{
                name: version
                for name, version in record["versions"].items()
                if name in ("adregnet_jax", "jax")
            },
        }
        splits = workdir / "splits.json"
        if splits.is_file():
            parts = json.loads(splits.read_text(encoding="utf-8"))
            description |= {
                f"{name}_pairs": len(part["pairs"]) for name, part in parts.items() if name != "data"
            }
        steps = [int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()]
        description["checkpoints"] = sorted(steps)
        starts = workdir / "starts.jsonl"
        lines = starts.read_text(encoding="utf-8").splitlines() if starts.is_file() else []
        for number, start in enumerate(map(json.loads, lines), 1):
            what = f"{start['date']} at step {start['step']}, commit {start['commit']}: {start['command']}"
            description[f"start_{number}"] = what
            if data := start.get("data"):
                described = f"{data['files']} files, {data['bytes']} bytes, sha256 {data['sha256']}"
                description[f"start_{number}_data"] = described
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{workdir}: not a workdir of train.py that can be read ({type(error).__name__}: {error})"
        ) from None
    return description


def _describe_matrix(matrix: np.ndarray) -> dict[str, Any]:
    left, scales, right = np.linalg.svd(matrix[:3, :3])
    cosine = (np.trace(left @ right) - 1) / 2
    return {
        "kind": "matrix",
        "matrix": _list(matrix),
        "rotation_deg": float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
        "stretches": _list(scales),
        "translation_mm": _list(matrix[:3, 3]),
        "determinant": float(np.linalg.det(matrix[:3, :3])),
    }


def _describe_points(points_mm: np.ndarray) -> dict[str, Any]:
    return {
        "kind": "points",
        "points": len(points_mm),
        "from_mm": _list(points_mm.min(axis=0)),
        "to_mm": _list(points_mm.max(axis=0)),
        "centre_mm": _list(points_mm.mean(axis=0)),
    }


def _list(values: np.ndarray) -> list:
    return np.asarray(values, np.float64).round(6).tolist()


def _text(value: Any) -> str:
    if isinstance(value, list):
        rows = value and isinstance(value[0], list)
        return ("; " if rows else " ").join(_text(entry) for entry in value)
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
