"""oneDNN's convolution, by a custom call that XLA for CPU contains but does not use itself.

jaxlib for Linux on x86 contains oneDNN (https://github.com/uxlfoundation/oneDNN), whose kernels PyTorch uses
for convolutions. XLA's custom calls for it, such as `__onednn$convolution`, are not a stable interface: with
the settings of another version the process would crash, and JAX's cache on disk would store a broken program.
So oneDNN is used only on request, with jaxlib versions that it was tried with, and after a first convolution
has given the right values.
"""

from __future__ import annotations

import functools
import json
import platform
import re

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, Float

from adregnet_jax.errors import UserError
from adregnet_jax.ops.cpu.budget import default_platform

# The first and the last version of jaxlib; of those between, 0.9.0, 0.9.2, 0.10.0 and 0.10.1 were tried.
_TRIED = ((0, 8, 2), (0, 10, 2))
_TARGET = "__onednn$convolution"


def prepare() -> None:
    """Checks that oneDNN works here, and turns off JAX's cache on disk for the rest of the process.

    The cache stays off because a function traced with oneDNN may be compiled again at any time. Every start
    of a program with oneDNN therefore compiles anew. `jax.export` refuses such programs.

    Raises:
      UserError: the platform is not CPU, oneDNN was not tried with this jaxlib, or it gives wrong values.
    """
    wrong = what_is_wrong()
    if wrong:
        raise UserError(f"{wrong}: set model.convolution=auto")
    _keep_off_disk()


def convolve(
    volume: Float[Array, "b x y z c"],
    kernel: Float[Array, "i j k c out"],
    padding: tuple[int, int, int],
    added: Float[Array, "b u v w out"] | None = None,
) -> Float[Array, "b u v w out"]:
    """oneDNN's float32 convolution of stride 1 on CPU, without a derivative.

    Args:
      volume: [b, x, y, z, c].
      kernel: [i, j, k, c, c'].
      padding: zeros along x, y and z, as many on either side.
      added: an array of the shape of the result that is added to it in the same pass, or None.

    Returns:
      [b, x + 2 * padding[0] - i + 1, ..., c'].
    """
    sizes = [n + 2 * p - k + 1 for n, p, k in zip(volume.shape[1:4], padding, kernel.shape, strict=False)]
    shape = (volume.shape[0], *sizes, kernel.shape[-1])
    features = {"batch_dim": "0", "spatial_dims": ["1", "2", "3"], "feature_dim": "4"}
    weights = {"spatial_dims": ["0", "1", "2"], "input_feature_dim": "3", "output_feature_dim": "4"}
    settings = {
        "dims": "5",
        "input": {"dims": "5", "data": features},
        "kernel": {"dims": "5", "filter": weights},
        "output": {"dims": "5", "data": features},
        "window": {
            "pad_left": [str(p) for p in padding],
            "pad_right": [str(p) for p in padding],
            "strides": ["1"] * 3,
            "window_dilations": ["1"] * 3,
        },
        "feature_groups": "1",
    }
    if added is not None:
        settings["fusions"] = {"ops": ["BINARY_ADD"]}
    call = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        vmap_method="sequential",
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"onednn_conv_config": settings}),
    )
    return call(volume, kernel, *([] if added is None else [added]))


def _keep_off_disk() -> None:
    # The cache reads the setting once, so it is reset even if somebody else has turned the setting off.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def what_is_wrong() -> str | None:
    """Why oneDNN can't be used in this process, or None if it can."""
    if default_platform() != "cpu":
        return f"oneDNN convolves on CPU, and JAX computes on {default_platform()} here"
    return _what_is_wrong_with_jaxlib()


@functools.cache
def _what_is_wrong_with_jaxlib() -> str | None:
    here, machine = jaxlib.version.__version__, (platform.system(), platform.machine())
    version = tuple(int(number) for number in re.findall(r"\d+", here)[:3])
    if not _TRIED[0] <= version <= _TRIED[1] or machine != ("Linux", "x86_64"):
        first, last = (".".join(map(str, tried)) for tried in _TRIED)
        tried = f"oneDNN was tried with jaxlib {first} to {last} for Linux on x86_64"
        return f"{tried}, this is jaxlib {here} for {' on '.join(machine)}"
    return None if _convolves() else f"jaxlib {here} has no oneDNN that convolves"


def _convolves() -> bool:
    """Whether a single voxel of each of two channels spreads into the mirrored kernel, added to ones."""
    kernel = np.arange(3 * 2 * 1 * 2 * 3, dtype=np.float32).reshape(3, 2, 1, 2, 3)
    volume = np.zeros((2, 3, 3, 2, 2), np.float32)
    volume[0, 1, 1, 1, 0] = volume[1, 1, 1, 1, 1] = 1
    expected = np.ones((2, 3, 4, 2, 3), np.float32)
    expected[:, :, 1:3, 1] += np.moveaxis(kernel[::-1, ::-1, 0], 2, 0)
    enabled = jax.config.values["jax_enable_compilation_cache"]
    _keep_off_disk()
    try:
        with jax.ensure_compile_time_eval():  # the caller may be tracing a model
            result = jax.jit(lambda v, k, one: convolve(v, k, (1, 1, 0), one))(
                volume, kernel, np.ones_like(expected)
            )
        return np.array_equal(result, expected)
    except (RuntimeError, NotImplementedError):  # a jaxlib without oneDNN
        return False
    finally:
        if enabled:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()
