"""AD-RegNet: attention-driven deformable registration of 3-D medical images, in JAX.

The coordinate law that all of it obeys is in `adregnet_jax.ops.grid`. The names below are loaded when they
are first used, so that reading a config or a scan doesn't load JAX.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036 -- run from a checkout; older ones can't import the rest
    print(
        "error: adregnet_jax needs Python 3.11 or newer, and this is Python "
        + ".".join(map(str, sys.version_info[:3]))
        + ": run it with a newer one",
        file=sys.stderr,
    )
    raise SystemExit(2)

from adregnet_jax.config import (
    AffineConfig,
    Config,
    InstanceConfig,
    LossConfig,
    ModelConfig,
    SyntheticConfig,
    instance_preset,
    paper_model,
)
from adregnet_jax.provenance import __version__

if TYPE_CHECKING:
    from adregnet_jax.data.io.images import Image, read_image, write_image
    from adregnet_jax.data.io.transforms import read_field, write_field
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
    from adregnet_jax.registration.affine import align_affine
    from adregnet_jax.registration.assessment.assess import assess
    from adregnet_jax.registration.assessment.verdict import Assessment
    from adregnet_jax.registration.field import (
        DisplacementField,
        compose_fields,
        field_jacobian,
        invert_field,
        resample_field,
        warp_image,
        warp_points,
    )
    from adregnet_jax.registration.files import register_files
    from adregnet_jax.registration.instance import align
    from adregnet_jax.registration.network import dropout_sd_mm, register, register_sharded
    from adregnet_jax.registration.options import RegistrationOptions
    from adregnet_jax.registration.results import RegisteredScans, Registration
    from adregnet_jax.registration.scans import register_scans
    from adregnet_jax.synthesis.pairs import SyntheticPair, synthesise
    from adregnet_jax.weights.packed import load_pretrained
    from adregnet_jax.weights.trained_network import TrainedNetwork, TrainingDomain


_MODULE_OF = {
    "AdRegNet": "nn.adregnet",
    "Assessment": "registration.assessment.verdict",
    "DisplacementField": "registration.field",
    "Image": "data.io.images",
    "Prediction": "nn.prediction",
    "RegisteredScans": "registration.results",
    "Registration": "registration.results",
    "RegistrationOptions": "registration.options",
    "SyntheticPair": "synthesis.pairs",
    "TrainedNetwork": "weights.trained_network",
    "TrainingDomain": "weights.trained_network",
    "VoxelMorph": "nn.voxelmorph",
    "align": "registration.instance",
    "align_affine": "registration.affine",
    "assess": "registration.assessment.assess",
    "blocked_attention": "ops.attention",
    "box_mean": "ops.filters",
    "compose": "ops.composition",
    "compose_fields": "registration.field",
    "conv3d": "ops.convolution",
    "dropout_sd_mm": "registration.network",
    "exponential": "ops.composition",
    "field_jacobian": "registration.field",
    "folded_volume": "ops.jacobian",
    "gaussian_filter": "ops.filters",
    "identity_grid": "ops.grid",
    "invert": "ops.composition",
    "invert_field": "registration.field",
    "jacobian_determinant": "ops.jacobian",
    "load_pretrained": "weights.packed",
    "make_model": "nn.models",
    "mind_ssc": "ops.mind",
    "neighbourhood_attention": "ops.neighbourhood",
    "read_field": "data.io.transforms",
    "read_image": "data.io.images",
    "register": "registration.network",
    "register_files": "registration.files",
    "register_scans": "registration.scans",
    "register_sharded": "registration.network",
    "resample_field": "registration.field",
    "resize": "ops.resampling",
    "resize_displacement": "ops.resampling",
    "sample": "ops.sampling",
    "sample_at_points": "ops.sampling",
    "spatial_gradient": "ops.jacobian",
    "synthesise": "synthesis.pairs",
    "warp": "ops.sampling",
    "warp_image": "registration.field",
    "warp_labels": "ops.sampling",
    "warp_points": "registration.field",
    "write_field": "data.io.transforms",
    "write_image": "data.io.images",
}

__all__ = [
    "AdRegNet",
    "AffineConfig",
    "Assessment",
    "Config",
    "DisplacementField",
    "Image",
    "InstanceConfig",
    "LossConfig",
    "ModelConfig",
    "Prediction",
    "RegisteredScans",
    "Registration",
    "RegistrationOptions",
    "SyntheticConfig",
    "SyntheticPair",
    "TrainedNetwork",
    "TrainingDomain",
    "VoxelMorph",
    "__version__",
    "align",
    "align_affine",
    "assess",
    "blocked_attention",
    "box_mean",
    "compose",
    "compose_fields",
    "conv3d",
    "dropout_sd_mm",
    "exponential",
    "field_jacobian",
    "folded_volume",
    "gaussian_filter",
    "identity_grid",
    "instance_preset",
    "invert",
    "invert_field",
    "jacobian_determinant",
    "load_pretrained",
    "make_model",
    "mind_ssc",
    "neighbourhood_attention",
    "paper_model",
    "read_field",
    "read_image",
    "register",
    "register_files",
    "register_scans",
    "register_sharded",
    "resample_field",
    "resize",
    "resize_displacement",
    "sample",
    "sample_at_points",
    "spatial_gradient",
    "synthesise",
    "warp",
    "warp_image",
    "warp_labels",
    "warp_points",
    "write_field",
    "write_image",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
