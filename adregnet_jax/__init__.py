"""AD-RegNet: attention-driven deformable registration of 3-D medical images, in JAX.

The coordinate law that all of it obeys is in `adregnet_jax.ops.grid`. The names below are loaded when they
are first used, so that reading a config or a scan doesn't load JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from adregnet_jax.config import AffineConfig, Config, InstanceConfig, LossConfig, ModelConfig, paper_model
from adregnet_jax.version import __version__

if TYPE_CHECKING:
    from adregnet_jax.affine import align_affine
    from adregnet_jax.instance import Alignment, align
    from adregnet_jax.nn.adregnet import AdRegNet
    from adregnet_jax.nn.models import make_model
    from adregnet_jax.nn.prediction import Prediction
    from adregnet_jax.nn.voxelmorph import VoxelMorph
    from adregnet_jax.ops.attention import blocked_attention
    from adregnet_jax.ops.composition import compose, exponential, invert
    from adregnet_jax.ops.convolution import conv3d
    from adregnet_jax.ops.filters import box_mean, gaussian_filter
    from adregnet_jax.ops.grid import identity_grid
    from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant, spatial_gradient
    from adregnet_jax.ops.mind import mind_ssc
    from adregnet_jax.ops.neighbourhood import neighbourhood_attention
    from adregnet_jax.ops.resampling import resize, resize_displacement
    from adregnet_jax.ops.sampling import sample, sample_at_points, warp, warp_labels
    from adregnet_jax.registration import Registration, dropout_sd_mm, register

_MODULE_OF = {
    "AdRegNet": "nn.adregnet",
    "Alignment": "instance",
    "Prediction": "nn.prediction",
    "Registration": "registration",
    "VoxelMorph": "nn.voxelmorph",
    "align": "instance",
    "align_affine": "affine",
    "blocked_attention": "ops.attention",
    "box_mean": "ops.filters",
    "compose": "ops.composition",
    "exponential": "ops.composition",
    "invert": "ops.composition",
    "mind_ssc": "ops.mind",
    "conv3d": "ops.convolution",
    "dropout_sd_mm": "registration",
    "folded_volume": "ops.jacobian",
    "gaussian_filter": "ops.filters",
    "identity_grid": "ops.grid",
    "jacobian_determinant": "ops.jacobian",
    "make_model": "nn.models",
    "neighbourhood_attention": "ops.neighbourhood",
    "register": "registration",
    "resize": "ops.resampling",
    "resize_displacement": "ops.resampling",
    "sample": "ops.sampling",
    "sample_at_points": "ops.sampling",
    "spatial_gradient": "ops.jacobian",
    "warp": "ops.sampling",
    "warp_labels": "ops.sampling",
}

__all__ = [
    "AdRegNet",
    "AffineConfig",
    "Alignment",
    "Config",
    "InstanceConfig",
    "LossConfig",
    "ModelConfig",
    "Prediction",
    "Registration",
    "VoxelMorph",
    "__version__",
    "align",
    "align_affine",
    "blocked_attention",
    "box_mean",
    "compose",
    "conv3d",
    "dropout_sd_mm",
    "exponential",
    "folded_volume",
    "gaussian_filter",
    "identity_grid",
    "invert",
    "jacobian_determinant",
    "make_model",
    "mind_ssc",
    "neighbourhood_attention",
    "paper_model",
    "register",
    "resize",
    "resize_displacement",
    "sample",
    "sample_at_points",
    "spatial_gradient",
    "warp",
    "warp_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
