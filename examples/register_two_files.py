"""Two scans of any grids, from files to files that ITK, ANTs and Slicer read, in a few lines.

python examples/register_two_files.py FIXED.nii.gz MOVING.nii.gz FOLDER [fast|default|thorough]
"""

import sys
from pathlib import Path

import numpy as np

from adregnet_jax.config import instance_preset
from adregnet_jax.data.io.images import read_image, write_image
from adregnet_jax.data.io.transforms import write_field, write_matrix
from adregnet_jax.registration.field import field_jacobian
from adregnet_jax.registration.scans import register_scans

fixed_path, moving_path, folder, *effort = sys.argv[1:]
out = Path(folder)
out.mkdir(parents=True)  # before minutes of work: another run's results are not to be mixed with these
fixed, moving = read_image(fixed_path), read_image(moving_path)
registered = register_scans(
    fixed, moving, instance=instance_preset(effort[0] if effort else "default"), on_stage=print
)

write_image(out / "warped.nii.gz", registered.warped)
write_field(out / "field.nii.gz", np.asarray(registered.field.displacement), fixed.affine)
write_field(out / "inverse.nii.gz", np.asarray(registered.inverse.displacement), moving.affine)
write_matrix(out / "affine.txt", registered.matrix)

determinant = field_jacobian(registered.field)
print(f"volume ratio {determinant.min():.2f} to {determinant.max():.2f}")
print(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in registered.seconds.items()))
