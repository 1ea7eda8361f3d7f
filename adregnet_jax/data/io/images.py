"""Images with their position in the world: NIfTI and MGH by nibabel; MetaImage, NRRD, DICOM by SimpleITK.

NumPy only.

SimpleITK is an extra: `pip install 'adregnet-jax[itk]'`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped

from adregnet_jax.atomic import new_file
from adregnet_jax.data.io import nifti
from adregnet_jax.data.io.dicom import read_dicom
from adregnet_jax.data.io.itk import from_itk, itk_errors_as_os_errors, read_itk_file, simpleitk, to_itk
from adregnet_jax.data.io.nifti import Prefer
from adregnet_jax.errors import UserError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
DICOM_SUFFIX = ".dcm"
NIBABEL_SUFFIXES = (*NIFTI_SUFFIXES, *nifti.MGH_SUFFIXES)
SINGLE_FILE_SUFFIXES = (*NIBABEL_SUFFIXES, ".mha", ".nrrd")  # can be written under one name at once


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A scan or a label map, with its position in the world.

    Attributes:
      values: [x, y, z], in the index order of the file.
      affine: [4, 4] voxel -> RAS mm.
      name: used in messages.

    Raises:
      ValueError: wrong shapes.
    """

    values: Shaped[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]
    name: str = "image"

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.affine.shape != (4, 4):
            raise ValueError(
                f"{self.name}: expected values [x, y, z] and an affine [4, 4], "
                f"got {self.values.shape} and {self.affine.shape}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.values.shape
        return x, y, z

    @property
    def spacing_mm(self) -> Float[np.ndarray, " 3"]:
        """The distance between neighbouring voxels along each axis."""
        return nib.affines.voxel_sizes(self.affine)


def read_image(
    path: str | Path,
    *,
    labels: bool = False,
    exact: bool = False,
    prefer: Prefer | None = None,
    series: str | None = None,
) -> Image:
    """Reads a 3-D image: NIfTI, MGH, MetaImage (.mha, .mhd), NRRD, a folder with one DICOM series, or a .dcm.

    Args:
      path: the file or the folder.
      labels: True for label maps.
      exact: keep whole numbers in the type they are stored in, where float32 would round those above 2^24.
      prefer: the form that places a NIfTI image whose sform and qform disagree; None: ITK's choice, with a
        warning.
      series: UID of the series to read from a DICOM folder with several.

    Returns:
      The image with float32 values, or for labels int32, or int64 where they exceed 2^31.

    Raises:
      UserError: SimpleITK is needed but missing, the file can't be read or isn't one 3-D volume in mm, values
        are NaN or infinite, labels are not whole numbers, sform and qform describe different orientations,
        the affine can't be inverted, or a DICOM folder holds several series or lacks slices.
    """
    path = Path(path)
    if not path.is_dir() and not path.name.lower().endswith((*ITK_SUFFIXES, DICOM_SUFFIX)):
        if labels:
            values, affine, _ = nifti.read_labels(path, prefer=prefer)
        else:
            values, affine, _ = nifti.read_volume(path, prefer=prefer, exact=exact)
        return Image(values, affine, str(path))
    values, affine = _read_itk(path, series)
    values = nifti.label_values(path, values) if labels else nifti.image_values(path, values, exact=exact)
    return Image(values, affine, str(path))


def write_image(path: str | Path, image: Image, *, overwrite: bool = False) -> None:
    """Writes NIfTI, .mgz, .mgh, .mha or .nrrd: floats as float32, whole numbers as int32 or, where they don't
    fit, int64, bool as uint8.

    Args:
      path: its suffix determines the format.
      image: the values and their position in the world.
      overwrite: replace a file that is there.

    Raises:
      UserError: unknown suffix, SimpleITK is needed but missing, numbers or a grid that the format can't
        hold, the file exists, or it can't be written.
    """
    path = Path(path)
    if not path.name.endswith(SINGLE_FILE_SUFFIXES):
        raise UserError(f"{path}: can't write this kind; expected one of {', '.join(SINGLE_FILE_SUFFIXES)}")
    values = nifti.stored(image.values)
    if path.name.endswith(NIBABEL_SUFFIXES):
        if values.dtype == np.int64 and path.name.endswith(nifti.MGH_SUFFIXES):
            raise UserError(f"{path}: the format holds whole numbers up to 2^31 only: write .nii.gz instead")
        written = nifti.make_image(values, image.affine, path=path)
        with new_file(path, overwrite=overwrite) as temporary:
            nifti.save(written, temporary)
        return
    itk_image = to_itk(path, values, image.affine)
    with new_file(path, overwrite=overwrite) as temporary, itk_errors_as_os_errors():
        simpleitk(path).WriteImage(itk_image, str(temporary), useCompression=True)


def _read_itk(path: Path, series: str | None) -> tuple[np.ndarray, np.ndarray]:
    if path.is_dir() or path.name.lower().endswith(DICOM_SUFFIX):
        values, affine = read_dicom(path, series=series)
        nifti.volume_shape(path, values.shape)
    else:
        image = read_itk_file(path)
        nifti.volume_shape(path, image.GetSize())
        while image.GetDimension() > 3:
            image = image[(..., 0)]
        if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
            kind = image.GetPixelIDTypeAsString()
            raise UserError(f"{path}: voxels are {kind}; expected one real number each")
        values, affine = from_itk(path, image)
    nifti.check_affine(path, affine)
    return values, affine
