"""The networks by name."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.adregnet import AdRegNet
from adregnet_jax.nn.voxelmorph import VOXELMORPH_1, VOXELMORPH_2, VoxelMorph


def make_model(config: ModelConfig) -> nn.Module:
    """The network of `config`.

    Args:
      config: architecture and settings.

    Returns:
      A module from (fixed, moving) to a `Prediction`.

    Raises:
      UserError: settings that no network can be built with.
    """
    config.check()
    common: dict[str, Any] = {
        "dropout": config.dropout,
        "dtype": config.dtype,
        "convolution": config.convolution,
    }
    match config.architecture:
        case "adregnet":
            return AdRegNet(config)
        case "voxelmorph-1":
            return VoxelMorph(decoder=VOXELMORPH_1, **common)
        case "voxelmorph-2":
            return VoxelMorph(decoder=VOXELMORPH_2, **common)
    raise ValueError(f"unknown architecture {config.architecture!r}")


def model_from_record(settings: dict[str, Any]) -> nn.Module:
    """The network of a `ModelConfig` that was written as JSON, where tuples are lists.

    It convolves by the default implementation: the machine that trained it may have had another one.

    Raises:
        UserError, TypeError: settings that no network of this version has.
    """
    tuples = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    return make_model(ModelConfig(**(settings | tuples | {"convolution": "auto"})))
