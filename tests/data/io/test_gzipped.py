"""Gzip files written in blocks, next to Python's own reader."""

import gzip
import io
import zlib

import numpy as np
import pytest

from adregnet_jax.data.io import gzipped
from adregnet_jax.data.io.gzipped import GzipWriter


def written(parts, file=None, **options):
    file = file or io.BytesIO()
    with GzipWriter(file, **options) as packed:
        for part in parts:
            packed.write(part)
    return file.getvalue()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000, 12345])
def test_what_is_written_comes_back(monkeypatch, size):
    monkeypatch.setattr(gzipped, "BLOCK_BYTES", 1000)
    content = np.random.default_rng(0).integers(0, 9, size, np.uint8).tobytes()
    whole = written([content])
    assert gzip.decompress(whole) == content
    assert gzip.decompress(written([content], strategy=zlib.Z_RLE)) == content
    # The same bytes, however they come.
    for step in (1, 7, 1500):
        assert written([content[start : start + step] for start in range(0, size, step)]) == whole
    assert len(gzip.compress(content, 1)) < 400 or len(whole) < 1.2 * len(gzip.compress(content, 1))


def test_a_file_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(gzipped, "BLOCK_BYTES", 1000)

    class Full(io.BytesIO):
        def write(self, data):
            if len(data) > 100:
                raise OSError("no space left")
            return super().write(data)

    with pytest.raises(OSError, match="no space left"):
        written([np.random.default_rng(0).bytes(100_000)], Full())


def test_files_are_written_from_front_to_back():
    with GzipWriter(io.BytesIO()) as packed:
        packed.write(np.arange(3, dtype=np.int16))
        assert packed.tell() == packed.seek(6) == 6
        with pytest.raises(io.UnsupportedOperation):
            packed.seek(0)
