"""Meaning of `config.model.dtype`: how activations are stored, and how precisely they are multiplied.

| setting | activations | products of float32, on NVIDIA cards since Ampere |
|---|---|---|
| float32 | float32 | float32 |
| tf32 | float32 | rounded to TF32, 10 bits of mantissa, and added in float32 |
| bfloat16 | bfloat16 | as with tf32, where activations meet float32 |

Other platforms multiply float32 as it is. Parameters, norms, softmax, sums over voxels, displacements, warps,
Jacobians and losses are float32 with every setting.
"""

from __future__ import annotations

import jax

PRODUCTS = {
    "float32": jax.lax.Precision.HIGHEST,
    "tf32": jax.lax.Precision.HIGH,
    "bfloat16": jax.lax.Precision.DEFAULT,
}


def stored(dtype: str) -> str:
    """The dtype of activations, for a setting of `config.model.dtype`."""
    return "float32" if dtype == "tf32" else dtype


def products(dtype: str) -> jax.lax.Precision:
    """The precision of convolutions and matrix products, for a setting of `config.model.dtype`."""
    return PRODUCTS[dtype]
