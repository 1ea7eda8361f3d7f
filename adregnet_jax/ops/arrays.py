"""The arrays that functions of this package accept."""

from __future__ import annotations

import jax
import numpy as np

# NumPy arrays become JAX arrays in the first operation on them.
AnyArray = jax.Array | np.ndarray
