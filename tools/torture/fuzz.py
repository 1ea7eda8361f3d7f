"""Fuzzes the readers, guided by coverage.

    python -m tools.torture.fuzz [--seconds 60] [--readers NAME ...] [--json FILE] [--keep DIR]

Atheris (`pip install 'atheris>=2.3,<4'`, needed by nothing else) starts from files of our own writers and
looks for inputs that reach other lines. A reader may return or raise UserError with one line; anything else
is a fault, and so are 20 seconds or 2 GiB for a file of a few kilobytes. Compressed files are compressed
after the mutation: otherwise only their checksum would be tested. Prints a row a reader; --keep DIR keeps
the files that caused faults, which can become test cases.
"""

import argparse
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
MOST_BYTES = 8192
MOST_MIB = 2048
MOST_SECONDS_A_FILE = 20
VALUES = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
POINTS = np.array([[1.0, 2.0, 3.0], [-4.5, 0.0, 1e-3]])


class Reader(NamedTuple):
    """A reader of files with this suffix, and a writer of a valid one."""

    suffix: str
    read: Callable[[Path], object]
    write: Callable[[Path], object]


def readers() -> dict[str, Reader]:
    from adregnet_jax.cli.batch import read_pairs
    from adregnet_jax.config import FilesConfig
    from adregnet_jax.data.datasets import files
    from adregnet_jax.data.io import images, nifti, pickles, points, transforms
    from adregnet_jax.evaluation import ixi_dice
    from adregnet_jax.report import tables

    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    image = images.Image(VALUES, affine, "seed")
    field = np.stack([VALUES] * 3, axis=-1)

    def write_image(path: Path) -> None:
        images.write_image(path, image, overwrite=True)

    def write_points(path: Path) -> None:
        points.write_points(path, POINTS, overwrite=True)

    def write_field(path: Path) -> None:
        transforms.write_field(path, field, affine, overwrite=True)

    def write_matrix(path: Path) -> None:
        transforms.write_matrix(path, affine, overwrite=True)

    def text(content: str) -> Callable[[Path], object]:
        return lambda path: path.write_text(content)

    pairs = "split,fixed,moving,fixed_labels,moving_labels\ntrain,a.nii,b.nii,,\n"
    dice = "name,dice_1,dice_2,folded_percent\na,0.5,0.25,0.0\n"
    return {
        "image .nii": Reader(".nii", nifti.read_volume, write_image),
        "image .nii.gz": Reader(".nii.gz", nifti.read_volume, write_image),
        "labels .nii": Reader(".nii", nifti.read_labels, write_image),
        "image .mha": Reader(".mha", images.read_image, write_image),
        "image .nrrd": Reader(".nrrd", images.read_image, write_image),
        "pickle": Reader(
            ".pkl",
            pickles.read_pickle,
            lambda path: path.write_bytes(pickle.dumps((VALUES, VALUES.astype(np.int16)))),
        ),
        "points .csv": Reader(".csv", points.read_points, write_points),
        "points .fcsv": Reader(".fcsv", points.read_points, write_points),
        "points .mrk.json": Reader(".mrk.json", points.read_points, write_points),
        "voxel points": Reader(".txt", files.read_voxel_points, text("x y z\n1 2 3\n4.5,6,7e0\n")),
        "field .nii": Reader(".nii", transforms.read_field, write_field),
        "field .npz": Reader(".npz", transforms.read_field, write_field),
        "matrix .tfm": Reader(".tfm", transforms.read_matrix, write_matrix),
        "pairs to train": Reader(
            ".csv", lambda path: files.file_splits(FilesConfig(pairs=str(path))), text(pairs)
        ),
        "pairs of a batch": Reader(".csv", read_pairs, text("name,fixed,moving\na,a.nii,b.nii\n")),
        "cases.csv": Reader(".csv", tables.read_cases, text(dice)),
        "IXI results": Reader(
            ".csv",
            ixi_dice.read_results,
            text(ixi_dice.results_csv("seed", np.full((2, 46), 0.5), np.zeros(2))),
        ),
    }


def fuzz(name: str, corpus: Path, artefacts: Path, seconds: int) -> None:
    """Fuzzes a reader. Never returns: libFuzzer ends the process, with status 0 if it found nothing.

    The package must not have been imported before.
    """
    import atheris

    with atheris.instrument_imports(
        include=["adregnet_jax.data", "adregnet_jax.evaluation", "adregnet_jax.report", "adregnet_jax.cli"]
    ):
        reader = readers()[name]
    from adregnet_jax.errors import UserError

    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    path = folder / f"input{reader.suffix}"

    def one(content: bytes) -> None:
        path.write_bytes(gzip.compress(content, 1) if reader.suffix.endswith(".gz") else content)
        try:
            reader.read(path)
        except UserError as error:
            if "\n" in str(error).strip():
                raise AssertionError(f"not one line: {error}") from error

    options = {
        "max_total_time": seconds,
        "max_len": MOST_BYTES,
        "rss_limit_mb": MOST_MIB,
        "timeout": MOST_SECONDS_A_FILE,
        "artifact_prefix": f"{artefacts}/",
        "print_final_stats": 1,
    }
    arguments = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one)
    atheris.Fuzz()


def run(name: str, folder: Path, seconds: int) -> dict:
    corpus, artefacts = folder / "corpus", folder / "found"
    corpus.mkdir(parents=True)
    artefacts.mkdir()
    reader = readers()[name]
    seed = corpus / f"seed{reader.suffix}"
    reader.write(seed)
    if reader.suffix.endswith(".gz"):
        seed.write_bytes(gzip.decompress(seed.read_bytes()))
    command = [sys.executable, "-m", "tools.torture.fuzz", "--one", name, "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, "--keep", str(folder)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    fault = re.search(r"=== Uncaught Python exception: ===\n(.*)$", done.stderr + done.stdout, re.MULTILINE)
    other = re.search(r"ERROR: libFuzzer: (.*)", done.stderr)
    found = fault[1] if fault else other[1] if other else "" if done.returncode == 0 else done.stderr[-300:]
    return {
        "reader": name,
        "inputs": int(count[1]) if count else None,
        "corpus": len(list(corpus.iterdir())),
        "found": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="seconds for each reader")
    parser.add_argument("--readers", nargs="+", metavar="NAME", default=[], help="for instance 'image .nii'")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        fuzz(options.one, options.keep / "corpus", options.keep / "found", options.seconds)
    names = list(readers())
    if unknown := sorted(set(options.readers) - set(names)):
        parser.error(f"no such reader: {unknown[0]}; there are {', '.join(names)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.readers or names:
            folder = Path(options.keep or temporary, re.sub(r"\W+", "_", name))
            rows.append(run(name, folder, options.seconds))
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["found"] for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
