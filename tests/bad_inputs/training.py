"""`train.py`: configs, data, working directories, checkpoints."""

from __future__ import annotations

import pickle

import numpy as np

from adregnet_jax.data.datasets import files
from tests.bad_inputs.case import (
    SHAPE,
    Case,
    Make,
    Shell,
    config,
    directory,
    loop,
    make_all,
    nothing,
    pairs_csv,
    ramp,
    raw,
    run_folder,
    scan,
    text,
    trained,
    with_value,
)

TRAIN = "train.py --config config.py --workdir run"
FILES = "--config.data.kind=files --config.data.files.pairs"
IXI = "--config.data.kind=ixi --config.data.ixi.root=."


def three_splits(**changes: Make) -> Make:
    """A pair of small scans in each split; `changes` replaces files, given by name without suffix."""
    names = [f"{split}_{role}" for split in files.SPLITS for role in ("fixed", "moving")]
    rows = [f"{split},{split}_fixed.nii,{split}_moving.nii" for split in files.SPLITS]
    makes = [changes.get(name) or scan(f"{name}.nii") for name in names]
    return make_all(config(), pairs_csv(*rows), *makes)


def ixi_pickles(train: bytes) -> Make:
    """TransMorph's folder with the given pickle as its only training scan."""
    image, labels = np.zeros((8, 8, 8), np.float32), np.zeros((8, 8, 8), np.int16)
    good = pickle.dumps((image, labels))
    others = [raw(name, good) for name in ("atlas.pkl", "Val/b.pkl", "Test/c.pkl")]
    return make_all(config(), raw("Train/a.pkl", train), *others)


class Evaluated:
    """An object that runs Python code when unpickled."""

    def __reduce__(self):
        return eval, ("open('was_run', 'w').close()",)


TRAINING = [
    Case("no_config", TRAIN, nothing, "--config config.py: there is no such file"),
    Case("no_workdir", "train.py --config config.py", config(), "--workdir is missing: for instance"),
    Case("option_without_value", "train.py --config", nothing, "--config"),
    Case("empty_config", TRAIN, config(""), r"has no function get_config\(\)"),
    Case("config_syntax", TRAIN, config("def get_config(:\n"), "--config config.py: SyntaxError: "),
    Case("config_latin1", TRAIN, raw("config.py", b"x = '\xfc'\n"), "--config config.py: "),
    Case("config_binary", TRAIN, raw("config.py", b"\0" * 99), "--config config.py: "),
    Case(
        "config_of_dict", TRAIN, config("def get_config(): return {}\n"), "must return a Config, not a dict"
    ),
    Case("config_value", TRAIN, config("get_config = 3\n"), "--config config.py: TypeError: "),
    Case(
        "config_raises",
        TRAIN,
        config("raise RuntimeError('one\\ntwo')\n"),
        "--config config.py: RuntimeError: one two",
    ),
    Case("config_exits", TRAIN, config("import sys\nsys.exit(7)\n"), "--config config.py: SystemExit"),
    Case(
        "config_recurses",
        TRAIN,
        config("def get_config(): return get_config()\n"),
        "--config config.py: Recursion",
    ),
    Case(
        "config_field",
        TRAIN,
        config(
            "from adregnet_jax.config import *\n"
            "def get_config(): return Config(model=ModelConfig(chanels=(4,)))\n"
        ),
        "did you mean channels",
    ),
    Case(
        "config_type",
        TRAIN,
        config(
            "from adregnet_jax.config import *\n"
            "def get_config(): return Config(model=ModelConfig(channels='w'))\n"
        ),
        "config.model.channels must be tuple",
    ),
    Case(
        "config_group",
        TRAIN,
        config("from adregnet_jax.config import *\ndef get_config(): return Config(model=None)\n"),
        "config.model must be .*ModelConfig, not None",
    ),
    Case("config_is_a_folder", TRAIN, directory("config.py"), "--config config.py: there is no such file"),
    Case(
        "override_field",
        f"{TRAIN} --config.optimiser.epoch=3",
        config(),
        "no field epoch; did you mean epochs",
    ),
    Case("override_type", f"{TRAIN} --config.optimiser.epochs=many", config(), "many"),
    Case("override_cut", f"{TRAIN} --config.model.channels='(4,'", config(), "channels"),
    Case(
        "override_zero",
        f"{TRAIN} --config.optimiser.epochs=0",
        config(),
        "optimiser.epochs is 0: expected 1 or more",
    ),
    Case(
        "override_kind", f"{TRAIN} --config.data.kind=nii", config(), "data.kind is 'nii': expected phantom"
    ),
    Case("override_channels", f"{TRAIN} --config.model.channels='(-4,)'", config(), "model.channels"),
    Case(
        "override_no_channels",
        f"{TRAIN} --config.model.channels='()'",
        config(),
        "model.(finest_level|channels)",
    ),
    Case("override_rate", f"{TRAIN} --config.optimiser.learning_rate=nan", config(), "learning_rate"),
    Case(
        "workdir_is_a_file",
        TRAIN,
        make_all(config(), text("run", "")),
        "--workdir run: can't be written .*check the name",
    ),
    Case(
        "workdir_is_a_loop",
        TRAIN,
        make_all(config(), loop("run")),
        "--workdir run: can't be written .*check the name",
    ),
    Case(
        "train_no_pairs",
        f"{TRAIN} {FILES}=pairs.csv",
        config(),
        "data.files.pairs is 'pairs.csv': expected a CSV",
    ),
    Case(
        "train_columns",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv("a,b", columns="fixed;moving")),
        "columns are fixed;moving; expected split, fixed, moving.* with commas between",
    ),
    Case(
        "train_split",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv("tests,a.nii,b.nii")),
        "line 2: split is 'tests'; use one of train, validation, test",
    ),
    Case(
        "train_endless_cell",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv(f"train,{'a' * 200_000},b")),
        "pairs.csv.*field",
    ),
    Case(
        "train_missing",
        f"{TRAIN} {FILES}=pairs.csv",
        make_all(config(), pairs_csv("train,a.nii,b.nii")),
        "line 2: fixed is a.nii, which doesn't exist",
    ),
    Case(
        "train_two_grids",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_moving=scan("train_moving.nii", ramp((5, 5, 5)))),
        r"train_fixed.nii is \(6, 7, 8\) and train_moving.nii \(5, 5, 5\).*expected one grid",
    ),
    Case(
        "train_nan",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_fixed=scan("train_fixed.nii", with_value(np.nan))),
        "train_fixed.nii: 1 of 336 voxels are NaN",
    ),
    Case(
        "train_cut",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_fixed=scan("train_fixed.nii", share=0.5)),
        "train_fixed.nii: damaged or cut off",
    ),
    Case(
        "train_constant",
        f"{TRAIN} {FILES}=pairs.csv",
        three_splits(train_fixed=scan("train_fixed.nii", np.ones(SHAPE))),
        "train_fixed.nii: ",
    ),
    Case(
        "train_few_files",
        f"{TRAIN} {FILES}=.",
        make_all(config(), directory("images")),
        "0 NIfTI files in images/",
    ),
    Case(
        "train_on_the_run_of_another_record",
        TRAIN,
        run_folder("not json"),
        "run/config.json: not the record of a run .*restore a copy",
        leaves=("run/lock",),
    ),
    Case(
        "train_on_a_list",
        TRAIN,
        run_folder('{"config": {"model": [1]}}'),
        "run/config.json: not the record of a run .*restore a copy",
        leaves=("run/lock",),
    ),
    Case(
        "train_on_another_model",
        TRAIN,
        trained(),
        r"run holds a run with model.channels=\[4\], this config has \[32,",
        leaves=("run/lock",),
    ),
    Case(
        "pickle_runs_the_shell",
        f"{TRAIN} {IXI}",
        ixi_pickles(pickle.dumps(Shell())),
        "'posix.system', which isn't part of an array: don't trust it, nothing was run",
    ),
    Case(
        "pickle_runs_python",
        f"{TRAIN} {IXI}",
        ixi_pickles(pickle.dumps((Evaluated(), 1), 0)),
        "'builtins.eval'|'__builtin__.eval'",
    ),
    Case("pickle_of_text", f"{TRAIN} {IXI}", ixi_pickles(b"hello"), "a.pkl: not a pickle, or cut off"),
    Case(
        "pickle_of_one", f"{TRAIN} {IXI}", ixi_pickles(pickle.dumps(3)), "a.pkl: doesn't hold a tuple of two"
    ),
    Case(
        "ixi_without_atlas",
        f"{TRAIN} {IXI}",
        make_all(config(), raw("Train/a.pkl", b"")),
        "has no scans in val",
    ),
    Case(
        "dirlab_without_folder",
        f"{TRAIN} --config.data.kind=dirlab",
        config(),
        "DIR-Lab folder '' doesn't exist",
    ),
    Case(
        "dirlab_empty",
        f"{TRAIN} --config.data.kind=dirlab --config.data.dirlab.root=.",
        config(),
        "DIR-Lab case 3 under '.' lacks case3_T00-ssm.img",
    ),
    Case(
        "processes_of_words",
        f"{TRAIN} --coordinator here --processes a --process b",
        config(),
        "expected HOST:PORT and two numbers",
    ),
]
