"""oneDNN's convolution, by a custom call that XLA for CPU contains but does not use itself.

jaxlib for Linux on x86 contains oneDNN (https://github.com/uxlfoundation/oneDNN), whose kernels PyTorch
convolves with too. XLA's custom calls for it, such as `__onednn$convolution`, are no promised interface:
settings of another version would end the process, and JAX's cache on disk would get a broken entry of such a
program. So it has to be asked for, is accepted only with the range of jaxlib versions that it was tried with,
and has to show first that it convolves.
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

from adregnet_jax.errors import UserError
from adregnet_jax.ops.cpu.budget import default_platform

# The first and the last version of jaxlib; of those between, 0.9.0, 0.9.2, 0.10.0 and 0.10.1 were tried.
_TRIED = ((0, 8, 2), (0, 10, 2))
_TARGET = "__onednn$convolution"


def prepare() -> None:
    """Checks that oneDNN convolves here, and turns off JAX's cache on disk for the rest of the process.

    The cache stays off: what is traced with oneDNN may be compiled again at any time. So every start of a
    program with it compiles anew. `jax.export` refuses such programs.

    Raises:
      UserError: the platform is not CPU, jaxlib is not one of those it was tried with, or its oneDNN does
        not convolve.
    """
    wrong = what_is_wrong()
    if wrong:
        raise UserError(f"{wrong}: set model.convolution=auto")
    _keep_off_disk()


def convolve(
    volume: jax.Array, kernel: jax.Array, padding: tuple[int, int, int], added: jax.Array | None = None
) -> jax.Array:
    """oneDNN's convolution of stride 1 on CPU, with as many zeros on either side; it has no derivative.

    Args:
      volume: [b, x, y, z, c], float32.
      kernel: [i, j, k, c, c'], float32.
      padding: voxels along x, y, z.
      added: of the shape of the result, to which it is added in the same pass; or None.

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
    if jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it asks once


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
        with jax.ensure_compile_time_eval():  # a model may be under way to be traced
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
