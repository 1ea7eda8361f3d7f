"""Reads pickled scans without running any code that a pickle names. NumPy only.

TransMorph distributes brain scans as pickles of a tuple (image, labels). A pickle is a program: it names
functions, and the usual loader imports and calls them. Here the few names that NumPy arrays need are mapped
to functions of this module, which check their arguments and take all values from the file itself. Every other
name is refused before anything is imported.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adregnet_jax.errors import UserError

REAL_DTYPE = re.compile("[biuf][0-9]{1,2}")  # as NumPy pickles them: b1, u1, i2, f4, ...


def read_pickle(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a pickled tuple (image, labels) of NumPy arrays, in any pickle protocol of Python 3.

    Returns:
      image [x, y, z] float32, labels [x, y, z] int32.

    Raises:
      UserError: the file isn't such a pickle, is cut off, or holds anything but arrays of numbers; arrays are
        not 3-D or differ in shape, values are NaN or infinite, or labels aren't whole numbers.
    """
    try:
        content = _load(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # Python documents that damaged pickles may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a pickle, or cut off ({reason}): copy or download it again") from None

    if not isinstance(content, tuple | list) or len(content) != 2:
        raise UserError(f"{path}: doesn't hold a tuple of two; expected the arrays (image, labels)")
    image, labels = (
        _array(path, name, part) for name, part in zip(("image", "labels"), content, strict=True)
    )
    if image.shape != labels.shape:
        raise UserError(f"{path}: image is {image.shape}, labels are {labels.shape}: expected one grid")
    if image.dtype.kind != "f":
        raise UserError(
            f"{path}: image is {image.dtype}; expected float: does the file hold (labels, image)?"
        )
    if (labels != np.round(labels)).any():
        raise UserError(f"{path}: labels must be whole numbers: does the file hold (labels, image)?")
    if (np.abs(labels.astype(np.float64)) >= 2**31).any():
        raise UserError(f"{path}: has labels beyond 2^31: does the file hold (labels, image)?")
    return image.astype(np.float32), labels.astype(np.int32)


def _load(program: bytes) -> Any:
    # The unpickler allocates memory before checking that the file holds as much. Walking through the
    # instructions first reveals lengths beyond the end and memo entries that aren't consecutive.
    for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        if instruction.name.endswith("PUT") and (argument or 0) > count:
            raise UserError(f"not a pickle, or damaged: entry {argument} after {count} instructions")
    return _ArraysOnly(io.BytesIO(program)).load()


def _array(path: str | Path, name: str, part: Any) -> np.ndarray:
    values = part.values if isinstance(part, _Array) else None
    if values is None:
        raise UserError(f"{path}: {name} isn't an array; expected the arrays (image, labels)")
    if values.ndim != 3 or min(values.shape) < 2:
        raise UserError(f"{path}: {name} is {values.shape}; expected 3-D, at least 2 voxels along each axis")
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise UserError(f"{path}: {bad} of {values.size} voxels of {name} are NaN or infinite: replace them")
    return values


class _Ndarray:
    """Stands in for the class `numpy.ndarray`, which pickles name but don't call."""


class _Dtype:
    """Stands in for `numpy.dtype`: a type of real numbers, made from a code and a byte order."""

    def __init__(self, code: str, *_flags: Any) -> None:
        if not REAL_DTYPE.fullmatch(code):
            raise UserError(f"holds an array of type {str(code)[:20]!r}; expected real numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for an array, which NumPy creates empty and then fills from its state."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran_order, data = state
        self.fill(data, dtype, shape, "F" if fortran_order else "C")

    def fill(self, data: object, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
        # An array that claims to be larger than its data is refused, not allocated.
        if not isinstance(data, bytes | bytearray) or math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise UserError(f"holds an array of shape {str(shape)[:60]} whose data has another size")
        self.values = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _empty_array(*_kind_and_shape: Any) -> _Array:
    return _Array()


def _filled_array(data: object, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape, order)
    return array


def _bytes_from_text(text: str, encoding: str) -> bytes:
    """Decodes bytes as written by protocols 0 to 2: one character per byte."""
    if encoding != "latin1":
        raise UserError(f"holds text in the encoding {str(encoding)[:20]!r}; expected arrays only")
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _bytes_from_text,
    # NumPy 1 has numpy.core, NumPy 2 numpy._core; numeric._frombuffer is what protocol 5 writes.
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.numeric", "_frombuffer"): _filled_array,
    ("numpy._core.numeric", "_frombuffer"): _filled_array,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in STAND_INS:
            name = f"{module_name}.{global_name}"[:80]
            raise UserError(
                f"the pickle asks for {name!r}, which isn't part of an array: don't trust it, nothing was run"
            )
        return STAND_INS[module_name, global_name]
