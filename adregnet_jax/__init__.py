"""AD-RegNet: attention-driven deformable registration of 3-D medical images, in JAX.

The coordinate law that all of it obeys is in `adregnet_jax.ops.grid`.
"""

from adregnet_jax.config import Config, ModelConfig, paper_model
from adregnet_jax.nn.adregnet import AdRegNet, Prediction
from adregnet_jax.ops.attention import blocked_attention
from adregnet_jax.ops.composition import compose
from adregnet_jax.ops.convolution import conv3d
from adregnet_jax.ops.filters import box_mean, gaussian_filter
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.jacobian import jacobian_determinant, spatial_gradient
from adregnet_jax.ops.neighbourhood import neighbourhood_attention
from adregnet_jax.ops.resampling import resize, resize_displacement
from adregnet_jax.ops.sampling import sample, sample_at_points, warp
from adregnet_jax.registration import Registration, register
from adregnet_jax.version import __version__

__all__ = [
    "AdRegNet",
    "Config",
    "ModelConfig",
    "Prediction",
    "Registration",
    "__version__",
    "blocked_attention",
    "box_mean",
    "compose",
    "conv3d",
    "gaussian_filter",
    "identity_grid",
    "jacobian_determinant",
    "neighbourhood_attention",
    "paper_model",
    "register",
    "resize",
    "resize_displacement",
    "sample",
    "sample_at_points",
    "spatial_gradient",
    "warp",
]
