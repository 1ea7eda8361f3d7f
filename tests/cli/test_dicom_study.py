"""A study of a real chest CT through `register`, `contours` and `dose`, compared with other programs."""

import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from scipy import ndimage

from adregnet_jax.data.dicom.polygons import outlines
from adregnet_jax.data.dicom.series import read_series
from adregnet_jax.data.dicom.structures import label_map, read_structures
from adregnet_jax.data.io.images import read_image
from tests.data.dicom import studies
from tests.test_docs import run

pytestmark = pytest.mark.program

ADREGNET = [sys.executable, "-c", "from adregnet_jax.cli.app import main; main()"]
COARSER = 2  # voxels are averaged, so that a registration takes seconds
DOSE_SHAPE = (40, 36, 24)


def breathing(shape, spacing_mm):
    """A displacement [3, x, y, z] in voxels: down by up to 12 mm in the lower chest, and forwards by 4 mm."""
    _, y, z = (np.linspace(0, 1, n) for n in shape)
    wave = np.sin(np.pi * y)[None, :, None] * np.ones(shape)
    down = 12 * np.sin(0.7 * np.pi * (1 - z)) * wave
    forwards = 4 * np.sin(np.pi * z) * wave
    return np.stack([np.zeros(shape), forwards / spacing_mm[1], down / spacing_mm[2]])


def regions(values):
    """Body and lungs, by thresholds."""
    parts, count = ndimage.label(values > -400)
    sizes = ndimage.sum_labels(np.ones(values.shape), parts, np.arange(1, count + 1))
    body = parts == 1 + np.argmax(sizes)
    body = np.stack([ndimage.binary_fill_holes(body[..., k]) for k in range(values.shape[2])], axis=-1)
    lungs = (values < -500) & ndimage.binary_erosion(body)
    return body, ndimage.binary_opening(lungs)


def contours_of(region, lps):
    smooth = ndimage.gaussian_filter(region.astype(np.float32), [0.7, 0.7, 0])
    return [
        nib.affines.apply_affine(lps, np.c_[polygon, np.full(len(polygon), k)])
        for k in range(region.shape[2])
        for polygon in outlines(smooth[..., k])
    ]


def make_study(folder, chest):
    """Two series, with structures and a dose on the moving one."""
    fixed = ndimage.uniform_filter(chest.values, COARSER)[::COARSER, ::COARSER, ::COARSER]
    spacing = chest.spacing_mm * COARSER
    lps = nib.affines.from_matvec(np.diag(spacing), [-150, -150, -120])
    coordinates = np.indices(fixed.shape) + breathing(fixed.shape, spacing)
    moving = ndimage.map_coordinates(fixed, coordinates, order=1, mode="nearest")
    for name, values in (("fixed", fixed), ("moving", moving)):
        studies.write_ct(folder / name, np.round(np.clip(values, -1000, 3000)).astype(int), lps)
    body, lungs = (contours_of(region, lps) for region in regions(moving))
    drawn = [("Body", [0, 255, 0], body, "EXTERNAL"), ("Lungs", [0, 0, 255], lungs, "ORGAN")]
    studies.write_rtstruct(folder / "structures.dcm", drawn, studies.headers_of(folder / "moving"))
    dose_lps = nib.affines.from_matvec(np.diag([5.0, 5.0, 8.0]), lps[:3, 3] + 10)
    positions = np.moveaxis(np.indices(DOSE_SHAPE), 0, -1) * np.diag(dose_lps)[:3] + dose_lps[:3, 3]
    target = nib.affines.apply_affine(lps, np.array(fixed.shape) * [0.35, 0.5, 0.5])
    doses = 60 * np.exp(-np.sum(((positions - target) / [50, 40, 45]) ** 2, axis=-1))
    studies.write_rtdose(folder / "dose.dcm", doses, dose_lps, scaling=0.001)


def series_image(folder):
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    return SimpleITK.Cast(SimpleITK.ReadImage(names), SimpleITK.sitkFloat32)


def array(image):
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)


def surface_distance(one, other, spacing):
    """The mean distance in mm between two regions' borders, both ways."""
    borders = [region & ~ndimage.binary_erosion(region) for region in (one, other)]
    away = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    return np.concatenate([away[1][borders[0]], away[0][borders[1]]]).mean()


def test_a_chest_through_the_commands(real_data, tmp_path):
    chest = read_image(real_data("breathing_ct") / "chest_ct.mha")
    make_study(tmp_path, chest)
    fast = ["--method", "instance", "--effort", "fast", "--subjects", "same"]
    run([*ADREGNET, "register", "fixed", "moving", "--output", "out", "--dicom", *fast], tmp_path)
    between = ["out/field.nii.gz", "--fixed", "fixed", "--moving", "moving"]
    run([*ADREGNET, "contours", "structures.dcm", *between, "-o", "carried"], tmp_path)
    run(
        [*ADREGNET, "dose", "dose.dcm", *between, "--structures", "structures.dcm", "-o", "dosed"],
        tmp_path,
    )

    vectors = SimpleITK.ReadImage(str(tmp_path / "out" / "field.nii.gz"), SimpleITK.sitkVectorFloat64)
    spacing = np.array(vectors.GetSpacing())
    field = SimpleITK.DisplacementFieldTransform(SimpleITK.Image(vectors))
    moving = series_image(tmp_path / "moving")
    reach = SimpleITK.Resample(moving * 0 + 1, vectors, field, SimpleITK.sitkLinear)
    inside = ndimage.binary_erosion(array(reach) == 1)  # ITK also takes half a voxel beyond the border
    by_itk = array(SimpleITK.Resample(moving, vectors, field, SimpleITK.sitkLinear, -1000.0))
    ours = array(series_image(tmp_path / "out" / "dicom" / "warped"))
    fixed = array(series_image(tmp_path / "fixed"))
    assert np.abs(ours - by_itk)[inside].max() < 0.005 * np.ptp(by_itk)
    assert np.abs(ours - fixed)[inside].mean() < 0.7 * np.abs(array(moving) - fixed)[inside].mean()

    series = {name: read_series(tmp_path / name) for name in ("fixed", "moving")}
    _, before = read_structures(tmp_path / "structures.dcm")
    _, after = read_structures(tmp_path / "carried" / "structures.dcm")
    for old, new in zip(before, after, strict=True):
        labels = label_map([old], series["moving"], numbers={old.name: 1}).astype(np.float32)
        image = SimpleITK.GetImageFromArray(labels.transpose(2, 1, 0))
        image.CopyInformation(moving)
        warped = array(SimpleITK.Resample(image, vectors, field, SimpleITK.sitkLinear)) > 0.5
        carried = label_map([new], series["fixed"], numbers={new.name: 1}) > 0
        assert carried.sum() > 1000
        assert surface_distance(carried, warped, spacing) < 0.5 * spacing.min()

    found = [pydicom.dcmread(tmp_path / name) for name in ("dose.dcm", "dosed/dose.dcm")]
    doses = [made.pixel_array * float(made.DoseGridScaling) for made in found]
    image = SimpleITK.GetImageFromArray(doses[0])
    image.SetOrigin([float(value) for value in found[0].ImagePositionPatient])
    image.SetSpacing([5.0, 5.0, 8.0])
    expected = SimpleITK.GetArrayFromImage(SimpleITK.Resample(image, image, field, SimpleITK.sitkLinear))
    assert np.abs(doses[1] - expected)[2:-2, 2:-2, 2:-2].max() < 0.01 * expected.max()

    studies.needs("dciodvfy")
    for path in studies.written(tmp_path):
        if path.parts[-2] not in ("fixed", "moving") and path.parent != tmp_path:
            assert studies.problems(path) == [], path
