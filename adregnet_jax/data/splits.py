"""Training, validation and test pairs of a `DataConfig`, made on first use and kept in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from adregnet_jax.config import CASES_PER_SPLIT, DataConfig, SyntheticConfig
from adregnet_jax.data.datasets import dirlab, files, ixi, phantom, synthetic
from adregnet_jax.data.pair import Pair, PairMaker

FIRST_CASE = {split: n * CASES_PER_SPLIT for n, split in enumerate(("train", "validation", "test"))}
CACHE_BYTES = 4 * 2**30  # per split
# Folders of scans are split and paired the same way in training and in evaluation.
FILES_SEED = 0


Makers = Sequence[PairMaker]


class LazyPairs(Sequence[Pair]):
    """Pairs that are read or generated on first access, and kept as long as they fit in `CACHE_BYTES`.

    Attributes:
      makers: one per pair.
      keep: whether pairs are kept; False for pairs that are hardly used twice.
    """

    def __init__(self, makers: Makers, *, keep: bool = True) -> None:
        self.makers = makers
        self.keep = keep
        self._kept: dict[int, Pair] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.makers)

    @property
    def subjects(self) -> set[str]:
        """Names of all subjects in the pairs, including moving atlases; reads nothing."""
        return {name for maker in self.makers for name in (maker.fixed, maker.moving)}

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]  # no slices
        if index in self._kept:
            return self._kept[index]
        pair = self.makers[index]()
        size = sum(value.nbytes for value in vars(pair).values() if isinstance(value, np.ndarray))
        if self.keep and self._kept_bytes + size <= CACHE_BYTES:
            self._kept[index] = pair
            self._kept_bytes += size
        return pair


class Splits(NamedTuple):
    train: LazyPairs
    validation: LazyPairs
    test: LazyPairs


def load_splits(config: DataConfig) -> Splits:
    """The three splits of `config`; no pair is in two of them.

    Raises:
        UserError: a setting can't be used, or the reader finds nothing to train on.
    """
    config.check()
    match config.kind:
        case "phantom":
            train, validation, test = _phantom(config)
        case "synthetic":
            train, validation, test = _synthetic(config.synthetic)
        case "dirlab":
            train, validation, test = _dirlab(config)
        case "files":
            train, validation, test = files.file_splits(config.files, FILES_SEED)
        case "ixi":
            train, validation, test = ixi.ixi_splits(config.ixi, FILES_SEED)
        case kind:
            raise ValueError(f"unknown kind {kind!r}")
    return Splits(LazyPairs(train, keep=config.kind != "synthetic"), LazyPairs(validation), LazyPairs(test))


def _phantom(config: DataConfig) -> list[Makers]:
    counts = {
        "train": config.phantom.train_cases,
        "validation": config.phantom.validation_cases,
        "test": config.phantom.test_cases,
    }
    return [
        [
            _maker(f"phantom_{case:04d}", functools.partial(phantom.phantom_pair, config.phantom, case))
            for case in range(first, first + counts[split])
        ]
        for split, first in FIRST_CASE.items()
    ]


def _synthetic(config: SyntheticConfig) -> list[Makers]:
    counts = (config.train_cases, config.validation_cases, config.test_cases)

    def maker(split: str, case: int) -> PairMaker:
        share = synthetic.curriculum_share(config, case) if split == "train" else 1.0
        make = functools.partial(synthetic.synthetic_pair, config, case, share=share)
        return _maker(f"synthetic_{case:07d}", make)

    return [
        [maker(split, case) for case in range(first, first + count)]
        for (split, first), count in zip(FIRST_CASE.items(), counts, strict=True)
    ]


def _dirlab(config: DataConfig) -> list[Makers]:
    train_cases, validation_case, test_case = dirlab.split_cases(config.dirlab)
    train, validation = (
        [_maker(f"case{case}", functools.partial(dirlab.dirlab_pair, config.dirlab, case)) for case in cases]
        for cases in (train_cases, [validation_case])
    )
    test = functools.partial(_test_pair, config, test_case, leaks=test_case in train_cases)
    return [train, validation, [_maker(f"case{test_case}", test)]]


def _maker(name: str, make: Callable[[], Pair]) -> PairMaker:
    """A maker for two scans of one subject."""
    return PairMaker(name, name, make)


def _test_pair(config: DataConfig, case: int, *, leaks: bool) -> Pair:
    """The test pair; where it was trained on, its name says so in every table."""
    pair = dirlab.dirlab_pair(config.dirlab, case)
    return dataclasses.replace(pair, name=f"{pair.name} (trained on)") if leaks else pair
