"""Registers the scans of a folder by ANTs and by elastix, and writes what they do with their transforms.

    python tests/registration/other_programs.py FOLDER

Reads fixed.nii.gz, moving.nii.gz and points.txt (x y z, LPS mm, a point per line). A program of its own,
because the two bring an ITK that doesn't bear another one in its process.
"""

import json
import sys
from pathlib import Path

import ants
import itk
import numpy as np
import pandas

FEW = {"aff_iterations": (30, 10), "aff_shrink_factors": (2, 1), "aff_smoothing_sigmas": (1, 0)}


def by_ants(folder):
    """For each chain: its files, which of them are inverted, the warped image, and the points it leads to."""
    scans = {name: ants.image_read(str(folder / f"{name}.nii.gz")) for name in ("fixed", "moving")}

    def register(name, kind, **options):
        prefix = str(folder / name)
        return ants.registration(*scans.values(), kind, outprefix=prefix, random_seed=1, **options)

    syn = register("syn", "SyN", reg_iterations=(10, 5), **FEW)
    rigid = register("rigid", "Rigid", **FEW)["fwdtransforms"]
    begun = register("begun", "SyNOnly", reg_iterations=(10, 5), initial_transform=rigid[0])
    chains = {
        "forth": (syn["fwdtransforms"], [False, False]),
        "back": (syn["invtransforms"], [True, False]),
        "forth after a matrix": (begun["fwdtransforms"], [False, False]),
        "back to a matrix": (begun["invtransforms"], [True, False]),
        "forth by three": ([*syn["fwdtransforms"], *rigid], [False, False, True]),
    }
    points = pandas.DataFrame(np.loadtxt(folder / "points.txt"), columns=["x", "y", "z"])
    for name, (paths, inverted) in chains.items():
        fixed, moving = scans.values() if name.startswith("forth") else reversed(scans.values())
        warped = ants.apply_transforms(fixed, moving, paths, whichtoinvert=inverted).numpy()
        moved = ants.apply_transforms_to_points(3, points, paths, whichtoinvert=inverted)
        np.savez(folder / f"ants {name}.npz", image=warped, points=moved[["x", "y", "z"]].to_numpy())
    (folder / "chains.json").write_text(json.dumps(chains), encoding="utf-8")


def by_elastix(folder):
    """An affine and a B-spline transform: as fields, as composites of ITK, and what transformix does."""
    fixed, moving = (itk.imread(str(folder / f"{name}.nii.gz"), itk.F) for name in ("fixed", "moving"))
    parameters = itk.ParameterObject.New()
    for kind in ("affine", "bspline"):
        settings = parameters.GetDefaultParameterMap(kind, 1, 20.0)
        settings["MaximumNumberOfIterations"], settings["RandomSeed"] = ["30"], ["1"]
        parameters.AddParameterMap(settings)
    method = itk.ElastixRegistrationMethod.New(fixed, moving)
    method.SetParameterObject(parameters)
    method.SetLogToConsole(False)
    method.UpdateLargestPossibleRegion()
    found = method.GetTransformParameterObject()
    for name in ("field.nii.gz", "field.mha"):
        itk.imwrite(itk.transformix_deformation_field(moving, found), str(folder / name))
    for name in ("both.h5", "both.tfm"):
        both = method.ConvertToItkTransform(method.GetCombinationTransform())
        itk.transformwrite([both], str(folder / name))

    warped = itk.array_from_image(itk.transformix_filter(moving, found)).transpose(2, 1, 0)
    rows = (folder / "points.txt").read_text(encoding="ascii").splitlines()
    (folder / "for_transformix.txt").write_text("\n".join(["point", str(len(rows)), *rows]), encoding="ascii")
    transformix = itk.TransformixFilter.New(moving)
    transformix.SetFixedPointSetFileName(str(folder / "for_transformix.txt"))
    transformix.SetTransformParameterObject(found)
    transformix.SetOutputDirectory(str(folder))
    transformix.Update()
    lines = (folder / "outputpoints.txt").read_text(encoding="ascii").splitlines()
    moved = np.array([line.split("OutputPoint = [")[1].split("]")[0].split() for line in lines], float)
    np.savez(folder / "elastix.npz", image=warped, points=moved)


if __name__ == "__main__":
    by_ants(Path(sys.argv[1]))
    by_elastix(Path(sys.argv[1]))
