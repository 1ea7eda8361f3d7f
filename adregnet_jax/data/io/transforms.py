"""Displacement fields and world matrices on disk, in formats that other programs read. NumPy only.

Here a field is `displacement` [x, y, z, 3] in voxels of its grid and `affine` [4, 4] voxel -> RAS mm. It maps
the fixed to the moving world, which is how ITK and ANTs resample an image too. Suffix and format:

- `.nii`, `.nii.gz`, format "itk": (x, y, z, 1, 3), intent 1007 (vector), mm towards left, posterior,
  superior: for ITK, ANTs, 3D Slicer, nitransforms.
- `.nii`, `.nii.gz`, format "nifti": the same with intent 1006 (displacement vector), mm towards right,
  anterior, superior. SynthMorph's (x, y, z, 3) has no such intent, and is read if the format is given.
- `.nii`, `.nii.gz`, format "learn2reg": (x, y, z, 3) in voxels, for the evaluation of Learn2Reg.
- `.nii`, `.nii.gz`, format "spm": (x, y, z, 1, 3), intent 1007 with the name `Mapping`: positions in the
  moving world, mm towards right, anterior, superior, as in the `y_` files of SPM.
- `.nii`, `.nii.gz`, format "niftyreg": the same with the name `NREG_TRANS`: positions (parameter 0) or a
  displacement (parameter 1, which is written).
- `.npz`: the arrays `displacement` and `affine`, unchanged.
- `.mha`, `.mhd`, `.nrrd`, `.nhdr`: an image of vectors, mm towards left, posterior, superior, as elastix,
  plastimatch and 3D Slicer write it. Needs SimpleITK.
- `.h5`, `.tfm`: an ITK transform: the field, followed by a world matrix if there is one. Needs SimpleITK.

World matrices are ITK affine transforms: text in `.txt` and `.tfm`, binary in `.mat` (needs SimpleITK).
ITK's composites may hold fields, matrices and B-splines in any order: `read_transform` returns all of them.
"""

from __future__ import annotations

import dataclasses
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float

from adregnet_jax.atomic import new_file
from adregnet_jax.data.io import nifti
from adregnet_jax.data.io.images import ITK_SUFFIXES, NIFTI_SUFFIXES
from adregnet_jax.data.io.itk import (
    LPS_TO_RAS,
    from_itk,
    is_vector_image,
    itk_errors_as_os_errors,
    read_itk_file,
    simpleitk,
    to_itk,
)
from adregnet_jax.errors import UserError, one_line

Format = Literal["itk", "nifti", "learn2reg", "spm", "niftyreg"]
FIELD_SUFFIXES = (*NIFTI_SUFFIXES, ".npz", *ITK_SUFFIXES, ".h5", ".tfm")
WRITTEN_SUFFIXES = (*NIFTI_SUFFIXES, ".npz", ".mha", ".nrrd", ".h5", ".tfm")
MATRIX_SUFFIXES = (".txt", ".tfm", ".mat")
TRANSFORM_SUFFIXES = (*FIELD_SUFFIXES, ".txt", ".mat")
ITK_TRANSFORM_SUFFIXES = (".h5", ".tfm", ".txt", ".mat")
SLAB = 16  # planes of a field that are converted at once
SPLINE_SAMPLES = 8  # of a B-spline between its control points, along each axis
INTENTS: dict[Format, int] = {"itk": 1007, "nifti": 1006, "learn2reg": 0, "spm": 1007, "niftyreg": 1007}
# The programs name their files; NiftyReg's first parameter of the intent is the kind of transform.
IN_VOXELS = "displacement in voxels"  # our files' description: neither Learn2Reg's nor SynthMorph's say so
SPM_NAME, NIFTYREG_NAME = "Mapping", "NREG_TRANS"
FSL_INTENTS = {2006: "displacements", 2007: "splines", 2008: "cosines", 2009: "quadratic splines"}
NIFTYREG_POSITIONS, NIFTYREG_DISPLACEMENT = 0, 1
NIFTYREG_OTHERS = {
    2: "a grid of spline control points",
    3: "a field of velocities",
    4: "a field of velocities",
    5: "a grid of spline control points of velocities",
    6: "a grid of linear spline control points",
}
LPS = np.diag(LPS_TO_RAS)[:3]
# Files of programs that convert them to a kind that is read, by their suffixes.
CONVERTED = {
    ".m3z": "a warp of FreeSurfer: convert it by mri_warp_convert --inm3z ... --outitk",
    ".mgz": "an image or a warp of FreeSurfer: convert a warp by mri_warp_convert ... --outitk",
    ".mgh": "an image or a warp of FreeSurfer: convert a warp by mri_warp_convert ... --outitk",
    ".lta": "a matrix of FreeSurfer: convert it by lta_convert --inlta ... --outitk",
    ".xfm": "a transform of MINC: convert it by itk_convert_xfm",
    ".x5": "a transform of X5: convert it to one of ITK first",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """A displacement on a grid.

    Attributes:
      displacement: [x, y, z, 3] float32 in voxels of its grid.
      affine: [4, 4] voxel -> RAS mm.
    """

    displacement: Float[np.ndarray, "x y z 3"]
    affine: Float[np.ndarray, "4 4"]


# A world matrix [4, 4] RAS mm, or a field.
Part = Field | Float[np.ndarray, "4 4"]


def read_transform(path: str | Path, *, format: Format | None = None) -> tuple[Part, ...]:
    """Reads a transform of any kind.

    Args:
      path: a field, a matrix or an ITK composite.
      format: of a NIfTI field; None infers it from shape and intent.

    Returns:
      World matrices and fields in the order in which fixed points pass through them.

    Raises:
      UserError: not a transform, damaged, not in 3-D, not finite, or SimpleITK is needed but missing.
    """
    path = Path(path)
    if not path.name.endswith(TRANSFORM_SUFFIXES):
        if known := CONVERTED.get(path.suffix.lower()):
            raise UserError(f"{path}: {known}")
        raise UserError(
            f"{path}: kind of file not known; expected a transform: {', '.join(TRANSFORM_SUFFIXES)}"
        )
    if not path.name.endswith(ITK_TRANSFORM_SUFFIXES):
        return (Field(*read_field(path, format=format)),)
    matrix = _parse_affine(path) if path.name.endswith((".txt", ".tfm")) else None
    parts = [matrix] if matrix is not None else [_itk_part(path, part) for part in _itk_parts(path)]
    for part in parts:
        if isinstance(part, Field):
            nifti.volume_shape(path, part.displacement.shape[:3])
        elif not np.isfinite(part).all():
            raise UserError(f"{path}: the matrix has numbers that are NaN or infinite: write it again")
        elif not abs(np.linalg.det(part[:3, :3])) > 0:
            raise UserError(f"{path}: the matrix can't be inverted: write it again")
    return tuple(parts)


def read_fsl_warp(path: str | Path, *, moving: str | Path) -> Field:
    """Reads a warp of FSL, whose numbers are mm in FSL's coordinates: voxel times spacing.

    Their first axis is reversed where an affine doesn't mirror. Numbers that vary less without the positions
    of their own voxels are taken for positions, others for displacements.

    Args:
      path: a warp as written by `fnirt --fout`, with the header of its reference.
      moving: the moving image, whose grid the warp depends on.

    Raises:
      UserError: not such a warp, splines instead of a field, or an image that can't be read.
    """
    path, moving = Path(path), Path(moving)
    image, other = nifti.open_image(path), nifti.open_image(moving)
    intent = int(image.header["intent_code"])
    if intent in FSL_INTENTS and intent != 2006:
        raise UserError(
            f"{path}: holds coefficients of {FSL_INTENTS[intent]}: write a field by fnirtfileutils"
        )
    if len(image.shape) != 4 or image.shape[3] != 3:
        raise UserError(f"{path}: shape is {image.shape}; expected a warp of FSL, (x, y, z, 3)")
    vectors = nifti.voxels(path, image).astype(np.float64)
    shape = nifti.volume_shape(path, image.shape[:3])
    moving_shape = nifti.volume_shape(moving, other.shape[:3])
    fixed_mm = _positions_mm(shape, _fsl_affine(shape, image.affine))
    relative = (
        vectors.reshape(-1, 3).std(axis=0).sum() <= (vectors - fixed_mm).reshape(-1, 3).std(axis=0).sum()
    )
    there = np.linalg.inv(_fsl_affine(moving_shape, other.affine))
    moving_voxels = nib.affines.apply_affine(there, vectors + fixed_mm if relative else vectors)
    shift_mm = nib.affines.apply_affine(other.affine, moving_voxels) - _positions_mm(shape, image.affine)
    return Field(nifti.image_values(path, _to_voxels(shift_mm, image.affine)), image.affine)


def _fsl_affine(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """[4, 4] voxel -> mm of FSL."""
    scale = np.diag([*nib.affines.voxel_sizes(affine), 1.0])
    if np.linalg.det(affine[:3, :3]) > 0:
        scale[0] = [-scale[0, 0], 0, 0, (shape[0] - 1) * scale[0, 0]]
    return scale


def write_field(
    path: str | Path,
    displacement: Float[np.ndarray, "x y z 3"],
    affine: Float[np.ndarray, "4 4"],
    *,
    format: Format = "itk",
    matrix: Float[np.ndarray, "4 4"] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a field.

    Args:
      path: its suffix determines the kind of file, as described at the top of this module.
      displacement: [x, y, z, 3] in voxels.
      affine: [4, 4] voxel -> RAS mm.
      format: of a NIfTI file.
      matrix: [4, 4] RAS mm, applied to points after the field; only `.h5` and `.tfm` hold it.
      overwrite: replace an existing file.

    Raises:
      UserError: unknown suffix, SimpleITK is needed but missing, the file exists, or it can't be written.
      ValueError: wrong shapes, an unknown format, or a matrix for a file that can't hold it.
    """
    path = Path(path)
    if displacement.ndim != 4 or displacement.shape[-1] != 3 or affine.shape != (4, 4):
        raise ValueError(
            f"expected a displacement [x, y, z, 3] and an affine [4, 4], "
            f"got {displacement.shape} and {affine.shape}"
        )
    if format not in INTENTS:
        raise ValueError(f"format must be one of {', '.join(INTENTS)}, got {format!r}")
    if matrix is not None and path.suffix not in (".h5", ".tfm"):
        raise ValueError(f"{path}: only .h5 can hold a matrix with the field: compose them first")
    _check_suffix(path, WRITTEN_SUFFIXES)

    if path.suffix == ".npz":
        with new_file(path, overwrite=overwrite) as temporary:
            np.savez_compressed(temporary, displacement=displacement.astype(np.float32), affine=affine)
    elif path.suffix in ITK_SUFFIXES:
        vectors = to_itk(path, _through(displacement, LPS[:, None] * affine[:3, :3]), affine)
        with new_file(path, overwrite=overwrite) as temporary, itk_errors_as_os_errors():
            simpleitk(path).WriteImage(vectors, str(temporary), useCompression=True)
    elif path.suffix in (".h5", ".tfm"):
        transform = _composite(path, displacement, affine, matrix)
        with new_file(path, overwrite=overwrite) as temporary, itk_errors_as_os_errors():
            simpleitk(path).WriteTransform(transform, str(temporary))
    else:
        image = _nifti_field(displacement, affine, format)
        with new_file(path, overwrite=overwrite) as temporary:
            nifti.save(image, temporary)


def read_field(
    path: str | Path, *, format: Format | None = None
) -> tuple[Float[np.ndarray, "x y z 3"], Float[np.ndarray, "4 4"]]:
    """Reads a field.

    Matrices after the field, in an `.h5` or `.tfm` file, become part of it.

    Args:
      path: see the top of this module.
      format: of a NIfTI file; None infers it from shape and intent code.

    Returns:
      displacement [x, y, z, 3] float32 in voxels, affine [4, 4] voxel -> RAS mm.

    Raises:
      UserError: not a field, damaged, in another format, not finite, or SimpleITK is needed but missing.
    """
    path = Path(path)
    _check_suffix(path, FIELD_SUFFIXES)
    if path.suffix == ".npz":
        displacement, affine = _read_npz(path)
    elif path.suffix in (".h5", ".tfm"):
        displacement, affine = _read_composite(path)
    elif path.suffix in ITK_SUFFIXES:
        displacement, affine = _read_vectors(path)
    else:
        displacement, affine = _read_nifti(path, format)
    nifti.volume_shape(path, displacement.shape[:3])
    return nifti.image_values(path, displacement), affine


def write_matrix(path: str | Path, matrix: Float[np.ndarray, "4 4"], *, overwrite: bool = False) -> None:
    """Writes a world matrix [4, 4], fixed RAS mm -> moving RAS mm, as an ITK affine transform.

    Raises:
      UserError: unknown suffix, SimpleITK is needed (`.mat`) but missing, the file exists, or it can't be
        written.
      ValueError: wrong shape.
    """
    path = Path(path)
    if matrix.shape != (4, 4):
        raise ValueError(f"matrix must be [4, 4], got shape {matrix.shape}")
    _check_suffix(path, MATRIX_SUFFIXES)
    if path.suffix == ".mat":
        transform = _itk_affine(path, matrix)
        with new_file(path, overwrite=overwrite) as temporary, itk_errors_as_os_errors():
            simpleitk(path).WriteTransform(transform, str(temporary))
        return
    lps = _flip(matrix)
    numbers = " ".join(repr(float(value)) for value in (*lps[:3, :3].ravel(), *lps[:3, 3]))
    text = (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
    )
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="ascii")


def read_matrix(path: str | Path) -> Float[np.ndarray, "4 4"]:
    """Reads a linear ITK transform as a world matrix [4, 4], fixed RAS mm -> moving RAS mm.

    Affine transforms in text files are read without SimpleITK, all others with it.

    Raises:
      UserError: not a linear 3-D ITK transform, or SimpleITK is needed but missing.
    """
    path = Path(path)
    _check_suffix(path, MATRIX_SUFFIXES)
    matrix = None if path.suffix == ".mat" else _parse_affine(path)
    if matrix is None:
        matrix = _linear_matrix(path, _read_transform(path))
    if not np.isfinite(matrix).all():
        raise UserError(f"{path}: the matrix has numbers that are NaN or infinite: write it again")
    return matrix


def _check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if not path.name.endswith(suffixes):
        if known := CONVERTED.get(path.suffix.lower()):
            raise UserError(f"{path}: {known}")
        raise UserError(f"{path}: kind of file not known; expected one of {', '.join(suffixes)}")


def _to_mm(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return displacement.astype(np.float64) @ affine[:3, :3].T


def _to_voxels(displacement_mm: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return displacement_mm.astype(np.float64) @ np.linalg.inv(affine[:3, :3]).T


def _through(vectors: np.ndarray, matrix: np.ndarray, *, order: Literal["C", "F"] = "C") -> np.ndarray:
    """Vectors [x, y, z, 3] through a matrix [3, 3], in float64 slab by slab, as float32."""
    found = np.empty(vectors.shape, np.float32, order=order)
    diagonal = np.array_equal(matrix, np.diag(np.diag(matrix)))

    def convert(start: int) -> None:
        slab = vectors[start : start + SLAB].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # the reader refuses infinities
            found[start : start + SLAB] = slab * np.diag(matrix) if diagonal else slab @ matrix.T

    with ThreadPoolExecutor() as threads:
        list(threads.map(convert, range(0, len(vectors), SLAB)))
    return found


def _nifti_field(displacement: np.ndarray, affine: np.ndarray, format: Format) -> nib.Nifti1Image:
    if format == "learn2reg":
        image = nifti.make_image(displacement.astype(np.float32), affine)
        image.header["descrip"] = IN_VOXELS
        return image
    if format == "spm":
        positions_mm = _positions_mm(displacement.shape[:3], affine)
        vectors_mm = (_to_mm(displacement, affine) + positions_mm).astype(np.float32)
    else:
        signs = LPS if format == "itk" else np.ones(3)
        # In the order of the file.
        vectors_mm = _through(displacement, signs[:, None] * affine[:3, :3], order="F")
    # [x, y, z, 1, 3]: the fourth axis is time
    image = nifti.make_image(vectors_mm[:, :, :, None], affine)
    if format == "spm":
        image.header.set_intent(INTENTS[format], name=SPM_NAME)
    elif format == "niftyreg":
        image.header.set_intent(INTENTS[format], name=NIFTYREG_NAME)
        image.header["intent_p1"] = NIFTYREG_DISPLACEMENT
    else:
        image.header.set_intent(INTENTS[format])
    return image


def _positions_mm(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """[x, y, z, 3] RAS mm of a grid's voxels."""
    return nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))


def _nifti_format(path: Path, image: Any) -> Format | None:
    """The format by intent and name; None for other images."""
    intent = int(image.header["intent_code"])
    name = image.header["intent_name"].item().decode("latin-1").strip("\0 ")
    if intent in (1006, 1007) and name == SPM_NAME:
        return "spm"
    if intent in (1006, 1007) and name.startswith("NREG"):
        kind = float(image.header["intent_p1"])
        if name != NIFTYREG_NAME or kind not in (NIFTYREG_POSITIONS, NIFTYREG_DISPLACEMENT):
            what = NIFTYREG_OTHERS.get(int(kind), f"a transform of kind {kind:g}") if kind == kind else name
            raise UserError(
                f"{path}: holds {what} of NiftyReg; expected a field of positions or displacements: "
                "convert it with reg_transform -def"
            )
        return "spm" if kind == NIFTYREG_POSITIONS else "niftyreg"
    return next((format for format, code in INTENTS.items() if code == intent), None)


def _read_nifti(path: Path, format: Format | None) -> tuple[np.ndarray, np.ndarray]:
    image = nifti.open_image(path)
    shape, intent = image.shape, int(image.header["intent_code"])
    given = format is not None
    if format in (None, "niftyreg"):
        format = _nifti_format(path, image) or format
    expected = [(*shape[:3], 3) if format == "learn2reg" else (*shape[:3], 1, 3)]
    if format == "nifti":  # SynthMorph leaves the axis of time out
        expected.append((*shape[:3], 3))
    if format is None and intent in FSL_INTENTS:
        raise UserError(
            f"{path}: a warp of FSL is not a displacement field by itself: it depends on the moving image: "
            "convert it first (adregnet convert --moving IMAGE)"
        )
    if format is None or shape not in expected:
        raise UserError(
            f"{path}: shape {shape} with intent {intent} is not a displacement field; expected"
            " (x, y, z, 1, 3) with intent 1007 (ITK, LPS mm) or 1006 (RAS mm), (x, y, z, 3) with intent 0"
            " (Learn2Reg, voxels)"
        )
    values = nifti.voxels(path, image).reshape(*shape[:3], 3)
    if format == "learn2reg":
        if not given and image.header["descrip"].item().decode("latin-1") != IN_VOXELS:
            warnings.warn(
                f"{path}: nothing says in which unit its displacements are: they are read as voxels, as in "
                "Learn2Reg and VoxelMorph; for mm, as in SynthMorph, give the format nifti",
                stacklevel=2,
            )
        return values, image.affine
    if format == "spm":
        values = values - _positions_mm(shape[:3], image.affine)
    signs = LPS if format == "itk" else np.ones(3)
    return _through(values, np.linalg.inv(image.affine[:3, :3]) * signs), image.affine


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            expanded_bytes = sum(member.file_size for member in archive.infolist())
        nifti.check_expansion(path, path.stat().st_size, expanded_bytes)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if set(arrays) == {"vol"}:
                raise UserError(
                    f"{path}: a volume or a warp of VoxelMorph, without its place in the world: write the "
                    "warp as .nii.gz"
                )
            displacement, affine = np.array(arrays["displacement"]), np.array(arrays["affine"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        MemoryError,
        RuntimeError,  # a compression or encryption that Python doesn't support
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            f"{path}: not a field ({one_line(error)}); expected arrays named displacement and affine"
        ) from None
    real = displacement.dtype.kind == affine.dtype.kind == "f"
    if not real or displacement.ndim != 4 or displacement.shape[-1] != 3 or affine.shape != (4, 4):
        raise UserError(
            f"{path}: expected floats displacement (x, y, z, 3) and affine (4, 4), got "
            f"{displacement.dtype} {displacement.shape} and {affine.dtype} {affine.shape}"
        )
    nifti.check_affine(path, affine)
    return displacement, affine


def _read_vectors(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    image = read_itk_file(path)
    if image.GetDimension() != 3 or not is_vector_image(image):
        raise UserError(
            f"{path}: {image.GetDimension()}-D with voxels of {image.GetPixelIDTypeAsString()} is not a "
            "displacement field; expected 3-D vectors of fractions, in mm"
        )
    displacement_mm, affine = from_itk(path, image)
    nifti.check_affine(path, affine)
    return _to_voxels(displacement_mm * LPS, affine), affine


def _composite(path: Path, displacement: np.ndarray, affine: np.ndarray, matrix: np.ndarray | None) -> Any:
    itk = simpleitk(path)
    field = itk.DisplacementFieldTransform(to_itk(path, _to_mm(displacement, affine) * LPS, affine))
    if matrix is None and path.suffix == ".tfm":
        return field  # 3D Slicer reads one transform
    composite = itk.CompositeTransform(3)
    # The transform that was added last is applied first.
    if matrix is not None:
        composite.AddTransform(_itk_affine(path, matrix))
    composite.AddTransform(field)
    return composite


def _read_composite(path: Path) -> tuple[np.ndarray, np.ndarray]:
    parts = _itk_parts(path)
    first = _itk_part(path, parts[0]) if parts and not parts[0].IsLinear() else None
    if not isinstance(first, Field) or not all(part.IsLinear() for part in parts[1:]):
        names = ", ".join(part.GetName() for part in parts) or "nothing"
        raise UserError(
            f"{path}: holds {names}; expected a 3-D displacement field, and linear transforms after it"
        )
    matrix = np.eye(4)
    for part in parts[1:]:
        matrix = _linear_matrix(path, part) @ matrix
    displacement, affine = first.displacement, first.affine
    if len(parts) == 1:
        return displacement, affine
    before_mm = _positions_mm(displacement.shape[:3], affine)
    after_mm = nib.affines.apply_affine(matrix, before_mm + _to_mm(displacement, affine))
    return _to_voxels(after_mm - before_mm, affine), affine


def _itk_parts(path: Path) -> list[Any]:
    """The transforms in a file of ITK, in the order in which points pass through them."""
    transform = _read_transform(path)
    if not isinstance(transform, simpleitk(path).CompositeTransform):
        return [transform]
    transform.FlattenTransform()
    # The transform that was added last is applied first.
    return [
        transform.GetNthTransform(k).Downcast() for k in reversed(range(transform.GetNumberOfTransforms()))
    ]


def _itk_part(path: Path, transform: Any) -> Part:
    itk = simpleitk(path)
    if transform.GetDimension() != 3:
        raise UserError(f"{path}: {transform.GetName()} is {transform.GetDimension()}-D; expected 3-D")
    if isinstance(transform, itk.DisplacementFieldTransform):
        vectors = transform.GetDisplacementField()
    elif isinstance(transform, itk.BSplineTransform):
        mesh = np.array(transform.GetTransformDomainMeshSize())
        size_mm = np.array(transform.GetTransformDomainPhysicalDimensions())
        vectors = itk.TransformToDisplacementField(
            transform,
            itk.sitkVectorFloat64,
            (mesh * SPLINE_SAMPLES + 1).tolist(),
            transform.GetTransformDomainOrigin(),
            (size_mm / (mesh * SPLINE_SAMPLES)).tolist(),
            transform.GetTransformDomainDirection(),
        )
    else:
        return _linear_matrix(path, transform)
    displacement_mm, affine = from_itk(path, vectors)
    nifti.check_affine(path, affine)
    displacement = nifti.image_values(path, _to_voxels(displacement_mm * LPS, affine))
    return Field(displacement, affine)


def _read_transform(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return simpleitk(path).ReadTransform(str(path)).Downcast()
    except RuntimeError:
        _refuse_other_text(path)
        raise UserError(f"{path}: not an ITK transform that can be read: write or copy it again") from None


def _itk_affine(path: Path, matrix: np.ndarray) -> Any:
    lps = _flip(matrix)
    transform = simpleitk(path).AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def _linear_matrix(path: Path, transform: Any) -> np.ndarray:
    """The matrix of a linear transform of any kind, from its effect on four points."""
    if not transform.IsLinear() or transform.GetDimension() != 3:
        raise UserError(f"{path}: {transform.GetName()} is not linear; expected a linear transform in 3-D")
    lps = np.eye(4)
    lps[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    for axis, unit in enumerate(np.eye(3).tolist()):
        lps[:3, axis] = np.subtract(transform.TransformPoint(unit), lps[:3, 3])
    return _flip(lps)


def _parse_affine(path: Path) -> np.ndarray | None:
    """The matrix of a text file with one affine transform; None if it holds another kind."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file that can be read ({error})") from None
    if not lines or not lines[0].startswith("#Insight Transform File"):
        _refuse_other_text(path)
        raise UserError(f"{path}: not an ITK transform; expected '#Insight Transform File V1.0' at its top")
    entries = [line.split(":", 1) for line in lines if ":" in line and not line.startswith("#")]
    values = {key.strip(): value.split() for key, value in entries}
    one = sum(key.strip() == "Transform" for key, _ in entries) == 1
    kind = "".join(values.get("Transform", [])).split("_")[0]
    if not one or kind not in ("AffineTransform", "MatrixOffsetTransformBase"):
        return None
    try:
        numbers = np.array(values["Parameters"], float)
        centre = np.array(values["FixedParameters"], float).reshape(3)
        linear, translation = numbers[:9].reshape(3, 3), numbers[9:].reshape(3)
    except (KeyError, ValueError):
        raise UserError(f"{path}: expected 12 Parameters and 3 FixedParameters: write it again") from None
    lps = np.eye(4)
    lps[:3, :3] = linear
    lps[:3, 3] = translation + centre - linear @ centre
    return _flip(lps)


def _refuse_other_text(path: Path) -> None:
    """Names the transforms of other programs that are text but not of ITK."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return
    if text.lstrip().startswith("(") and "(Transform " in text:
        raise UserError(
            f"{path}: parameters of elastix: write their field by transformix -def all, and give that"
        )
    try:
        numbers = [[float(number) for number in line.split()] for line in text.splitlines() if line.strip()]
    except ValueError:
        return
    if [len(row) for row in numbers] == [4, 4, 4, 4]:
        raise UserError(
            f"{path}: a bare matrix, whose coordinates depend on the program: convert it to one of ITK "
            "(FLIRT's by c3d_affine_tool -fsl2ras -oitk)"
        )


def _flip(matrix: np.ndarray) -> np.ndarray:
    """Converts a world matrix from RAS to LPS, or from LPS to RAS."""
    return LPS_TO_RAS @ matrix @ LPS_TO_RAS
