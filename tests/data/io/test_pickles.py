"""Pickled scans: every protocol that NumPy writes is read, and nothing that a pickle names is run."""

import collections
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adregnet_jax.data.io.pickles import read_pickle
from adregnet_jax.errors import UserError

IMAGE = np.random.default_rng(0).uniform(0, 1, (4, 3, 2)).astype(np.float32)
LABELS = np.arange(24, dtype=np.int16).reshape(4, 3, 2)


class Call:
    """An object that pickles as a call, which the usual loader runs."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refusal(tmp_path, content):
    path = tmp_path / "subject_1.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(UserError) as error:
        read_pickle(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


# Bytes of NumPy 1 are made from ours by renaming the module, which protocols 4 and 5 don't allow for.
@pytest.mark.parametrize(
    ("protocol", "module"),
    [(protocol, b"numpy._core.") for protocol in range(6)]
    + [(protocol, b"numpy.core.") for protocol in range(4)],
)
def test_arrays_come_back_as_they_were(tmp_path, protocol, module):
    """Byte order, Fortran order, doubles; from NumPy 1 (numpy.core) and 2 (numpy._core)."""
    path = tmp_path / "subject_1.pkl"
    for image, labels in [
        (IMAGE, LABELS),
        (IMAGE.astype(">f8"), LABELS.astype(np.uint8)),
        (np.asfortranarray(IMAGE), LABELS.astype(np.float64)),
        (IMAGE[::2], LABELS[::2]),
    ]:
        path.write_bytes(pickle.dumps((image, labels), protocol).replace(b"numpy._core.", module))
        read_image, read_labels = read_pickle(path)
        assert (read_image.dtype, read_labels.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(read_image, image.astype(np.float32))
        np.testing.assert_array_equal(read_labels, labels)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    attacks = [
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(getattr, "text", "upper"),
        Call(np.save, str(marker), IMAGE),
        Call(IMAGE.tofile, str(marker)),  # builtins.getattr of an array
    ]
    for attack in attacks:
        for content in (attack, (IMAGE, attack), (IMAGE, LABELS, attack), [IMAGE, {"labels": attack}]):
            message = refusal(tmp_path, pickle.dumps(content, protocol))
            assert "isn't part of an array" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "subject_1.pkl"]


def test_names_near_the_allowed_ones_are_refused(tmp_path):
    for name in (
        b"numpy\nload",
        b"numpy\nndarray.tofile",
        b"numpy._core.multiarray\nfromfile",
        b"_codecs\ndecode",
        b"builtins\nbytes",
        b"adregnet_jax.data.io.pickles\npickle.loads",
    ):
        assert "isn't part of an array" in refusal(tmp_path, b"c" + name + b"\n.")
    assert "isn't part of an array" in refusal(tmp_path, (collections.OrderedDict(), LABELS))


def test_forged_arrays(tmp_path):
    """The allowed names can only be used to make arrays of numbers that are in the file."""
    objects = np.array([[[IMAGE]]], dtype=object)
    assert "array of type 'O8'" in refusal(tmp_path, (objects, LABELS))
    assert "array of type 'U1'" in refusal(tmp_path, (IMAGE, np.full((4, 3, 2), "a")))
    assert "array of type 'V6'" in refusal(tmp_path, (np.zeros((4, 3, 2), "f4,i2"), LABELS))
    assert "array of type 'c8'" in refusal(tmp_path, (IMAGE.astype(np.complex64), LABELS))

    reconstruct = b"cnumpy._core.multiarray\n_reconstruct\n"
    array = reconstruct + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'f4'\nI00\nI01\ntR"
    huge = b"(I1\n(I1000000\nI1000000\nI1000000\nt" + dtype + b"I00\nC\x04\0\0\0\0tb."
    assert "data has another size" in refusal(tmp_path, array + huge)
    listed = b"(I1\n(I1\nt" + dtype + b"I00\n]tb."
    assert "data has another size" in refusal(tmp_path, array + listed)
    assert "doesn't hold a tuple" in refusal(tmp_path, array + b".")  # made, never filled
    assert "image isn't an array" in refusal(tmp_path, b"(" + (array + b"p0\n") + b"g0\nt.")
    assert "cut off" in refusal(tmp_path, b"cnumpy\nndarray\n(I1000000000000\ntR.")  # not called
    assert "damaged: entry" in refusal(tmp_path, b"Nr\xff\xff\xff\xff.")
    assert "cut off" in refusal(tmp_path, b"\x80\x05\x96" + b"\xff" * 5 + b"\0\0\0.")  # a terabyte
    assert "encoding" in refusal(tmp_path, b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.")


def test_tuples_of_another_form(tmp_path):
    assert "doesn't hold a tuple of two" in refusal(tmp_path, IMAGE)
    assert "doesn't hold a tuple of two" in refusal(tmp_path, (IMAGE,))
    assert "doesn't hold a tuple of two" in refusal(tmp_path, {"image": IMAGE, "labels": LABELS})
    assert "image isn't an array" in refusal(tmp_path, ((IMAGE, LABELS), LABELS))
    assert "labels isn't an array" in refusal(tmp_path, (IMAGE, "labels"))
    assert "image is float32, labels" not in refusal(tmp_path, (IMAGE[0], LABELS))
    assert "image is (3, 2); expected 3-D" in refusal(tmp_path, (IMAGE[0], LABELS))
    assert "labels is (4, 3, 1); expected 3-D" in refusal(tmp_path, (IMAGE, LABELS[..., :1]))
    assert "image is (4, 3, 2), labels are (3, 3, 2)" in refusal(tmp_path, (IMAGE, LABELS[:3]))


def test_values_of_another_form(tmp_path):
    for value in (np.nan, np.inf):
        image = IMAGE.copy()
        image[0, 1, 1] = value
        assert "1 of 24 voxels of image are NaN" in refusal(tmp_path, (image, LABELS))
        assert "1 of 24 voxels of labels are NaN" in refusal(tmp_path, (IMAGE, image))
    assert "image is int16; expected float" in refusal(tmp_path, (LABELS, LABELS))
    assert "image is bool; expected float" in refusal(tmp_path, (LABELS > 0, LABELS))
    assert "whole numbers" in refusal(tmp_path, (IMAGE, IMAGE))


def test_files_that_are_not_pickles(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_pickle(tmp_path / "none.pkl")
    for content in (b"", b"\x1f\x8b\x08", b"not a pickle", b"\x80\x04.", b"I1\n.", b"\x80\x63."):
        refusal(tmp_path, content)
    with pytest.raises(UserError, match="not a pickle"):
        read_pickle(tmp_path)  # a folder


def test_truncated_files(tmp_path):
    content = pickle.dumps((IMAGE, LABELS))
    for length in range(len(content)):
        assert "not a pickle, or cut off" in refusal(tmp_path, content[:length])


@given(st.data())
def test_damaged_files_raise_nothing_but_user_errors(tmp_path_factory, data):
    content = bytearray(pickle.dumps((IMAGE, LABELS), data.draw(st.sampled_from([2, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(content)
    try:
        image, labels = read_pickle(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert image.shape == labels.shape
