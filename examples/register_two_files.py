"""Two scans of any grids, registered from files to a folder of files that ITK, ANTs and Slicer read.

python examples/register_two_files.py FIXED.nii.gz MOVING.nii.gz FOLDER [fast|default|thorough]
"""

import sys
from pathlib import Path

from adregnet_jax import RegistrationOptions, register_files

fixed, moving, folder, *effort = sys.argv[1:]
Path(folder).mkdir(parents=True)  # before minutes of work: results of another run would be refused at the end
options = RegistrationOptions(method="instance", effort=effort[0] if effort else "default")  # type: ignore[arg-type]
registered = register_files(fixed, moving, options=options, on_stage=print)
registered.write(folder)

row = registered.measurement.row
print(f"{row['similarity_measure']} {row['similarity_before']:.3f} before, {row['similarity']:.3f} after")
print(f"volume ratio {row['jacobian_min']:.2f} to {row['jacobian_max']:.2f}")
print(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in registered.seconds.items()))
