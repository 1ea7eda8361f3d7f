"""Settings that can't be used are refused in one line, which names the field."""

import dataclasses

import pytest

from adregnet_jax.config import (
    AffineConfig,
    Config,
    DataConfig,
    DirLabConfig,
    InstanceConfig,
    IxiConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    PhantomConfig,
    RunConfig,
    SyntheticConfig,
    instance_preset,
    paper_model,
    pretrained_model,
)
from adregnet_jax.errors import UserError

NAN = float("nan")
THREE = {"cases": (1, 2, 3)}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (PhantomConfig, {"seed": -2}, "data.phantom.seed is -2: expected 0 or more"),
        (PhantomConfig, {"shape": (4, 9, 9)}, "expected at least 8 voxels along each axis"),
        (PhantomConfig, {"test_cases": -1}, "test_cases is -1: expected a number from 0 to 1000000"),
        (SyntheticConfig, {"seed": -1}, "data.synthetic.seed is -1: expected 0 or more"),
        (SyntheticConfig, {"curriculum_cases": -1}, "curriculum_cases is -1: expected 0 or more"),
        (
            SyntheticConfig,
            {"spacing_mm": (0.0, 1.0, 1.0)},
            "spacing_mm is (0.0, 1.0, 1.0): expected mm above 0",
        ),
        (SyntheticConfig, {"largest_motion_mm": NAN}, "largest_motion_mm is nan: expected mm above 0"),
        (SyntheticConfig, {"same_contrast": 2.0}, "same_contrast is 2.0: expected a share from 0 to 1"),
        (SyntheticConfig, {"shape": (8, 40, 40)}, "expected at least 16 voxels along each axis"),
        (SyntheticConfig, {"train_cases": 1_000_001}, "train_cases is 1000001: expected a number from 0 to"),
        (DirLabConfig, {"protocol": "papers"}, "protocol is 'papers': expected leave-one-out or paper"),
        (DirLabConfig, {"preprocessing": "n"}, "preprocessing is 'n': expected isotropic or native"),
        (DirLabConfig, {"cases": (1, 2)}, "data.dirlab.cases is (1, 2): expected three or more different"),
        (DirLabConfig, {"cases": (1, 1, 2)}, "expected three or more different numbers"),
        (DirLabConfig, {"cases": (1, 2, 12)}, "numbers from 1 to 10"),
        (DirLabConfig, THREE | {"test_case": 4}, "test_case is 4: expected one of data.dirlab.cases"),
        (DirLabConfig, THREE | {"validation_case": 1}, "expected 0, or one of (1, 2, 3) that isn't"),
        (DirLabConfig, THREE | {"validation_case": 4}, "validation_case is 4: expected 0, or one of"),
        (DirLabConfig, {"shape": (40, 32, 0)}, "shape is (40, 32, 0): expected sizes above 0"),
        (DirLabConfig, {"spacing_mm": 0.0}, "spacing_mm is 0.0: expected mm above 0"),
        (IxiConfig, {"mode": "both"}, "data.ixi.mode is 'both': expected atlas, pairs or t1t2"),
        (
            ModelConfig,
            {"convolution": "fast"},
            "model.convolution is 'fast': expected auto, folded, onednn or",
        ),
        (
            DataConfig,
            {"kind": "nii"},
            "data.kind is 'nii': expected phantom, synthetic, dirlab, files or ixi",
        ),
        (DataConfig, {"workers": 0}, "data.workers is 0: expected 1 or more"),
        (DataConfig, {"phantom": PhantomConfig(seed=-1)}, "data.phantom.seed is -1"),
        (ModelConfig, {"channels": ()}, "model.channels is (): expected a number above 0 for each level"),
        (
            ModelConfig,
            {"channels": (8, 16), "finest_level": 2},
            "finest_level is 2: expected one of 2 levels",
        ),
        (ModelConfig, {"channels": (8, 12), "heads": 8}, "expected a number that divides all model.channels"),
        (ModelConfig, {"architecture": "vm"}, "is 'vm': expected adregnet, voxelmorph-1 or voxelmorph-2"),
        (ModelConfig, {"dropout": 1.0}, "dropout is 1.0: expected a share from 0 to below 1"),
        (ModelConfig, {"dtype": "float16"}, "dtype is 'float16': expected float32, tf32 or bfloat16"),
        (ModelConfig, {"stem_stride": 0}, "stem_stride is 0: expected a power of two"),
        (ModelConfig, {"stem_stride": 3}, "stem_stride is 3: expected a power of two"),
        (ModelConfig, {"refinements": 0}, "model.refinements is 0: expected 1 or more"),
        (ModelConfig, {"ascent_steps": -1}, "ascent_steps is -1: expected 0 or more"),
        (ModelConfig, {"ascent_window": 4}, "ascent_window is 4: expected an odd number from 3"),
        (ModelConfig, {"neighbourhood_radius": 0}, "neighbourhood_radius is 0: expected 1 or more"),
        (ModelConfig, {"attention_block": 0}, "attention_block is 0: expected 1 or more"),
        (LossConfig, {"dice": 1.0}, "loss.dice_labels is (): expected labels for loss.dice"),
        (OptimiserConfig, {"steps_per_epoch": -1}, "steps_per_epoch is -1: expected 0 or more"),
        (OptimiserConfig, {"gradient_clip": -1.0}, "gradient_clip is -1.0: expected 0 or more"),
        (OptimiserConfig, {"gradient_clip": NAN}, "gradient_clip is nan: expected 0 or more"),
        (OptimiserConfig, {"halve_every_epochs": -1}, "halve_every_epochs is -1: expected 0 or more"),
        (OptimiserConfig, {"epochs": 0}, "optimiser.epochs is 0: expected 1 or more"),
        (OptimiserConfig, {"learning_rate": NAN}, "learning_rate is nan: expected a number above 0"),
        (OptimiserConfig, {"average_decay": 1.0}, "average_decay is 1.0: expected a number from 0"),
        (RunConfig, {"space_devices": 0}, "run.space_devices is 0: expected 1 or more"),
        (RunConfig, {"memory": "all"}, "run.memory is 'all': expected check, auto or off"),
        (InstanceConfig, {"steps": (1,)}, "instance.steps is (1,): expected one entry per level"),
        (InstanceConfig, {"factors": (), "steps": (), "strides": ()}, "expected one entry per level"),
        (InstanceConfig, {"strides": (0, 1)}, "strides is (0, 1): expected 1 or more for each level"),
        (InstanceConfig, {"factors": (0, 1)}, "factors is (0, 1): expected 1 or more for each level"),
        (InstanceConfig, {"steps": (-1, 1)}, "steps is (-1, 1): expected 0 or more for each level"),
        (InstanceConfig, {"similarity": "lncc"}, "similarity is 'lncc': expected ncc, mind, mi or ssd"),
        (InstanceConfig, {"ncc_window": 4}, "ncc_window is 4: expected an odd number from 3"),
        (InstanceConfig, {"learning_rate": 0.0}, "learning_rate is 0.0: expected a number above 0"),
        (InstanceConfig, {"symmetric": True}, "symmetric is True: expected False, or instance.diffeomorphic"),
        (InstanceConfig, {"search_range_mm": -1.0}, "search_range_mm is -1.0: expected a number from 0"),
        (InstanceConfig, {"smoothness": NAN}, "smoothness is nan: expected a number from 0"),
        (AffineConfig, {"kind": "bent"}, "affine.kind is 'bent': expected rigid, similarity or affine"),
        (AffineConfig, {"similarity": "ssd"}, "similarity is 'ssd': expected ncc or nmi"),
        (AffineConfig, {"steps": (1, 2)}, "affine.steps is (1, 2): expected one entry per level"),
        (AffineConfig, {"voxels": (), "steps": ()}, "voxels is (): expected one entry per level"),
        (AffineConfig, {"voxels": (3, 32, 64)}, "expected 4 or more for each level"),
        (AffineConfig, {"steps": (-1, 1, 1)}, "expected 0 or more for each level"),
        (AffineConfig, {"rotation_starts_deg": 180.0}, "expected degrees from 0 to below 180"),
        (AffineConfig, {"max_stretch": 0.5}, "max_stretch is 0.5: expected a factor from 1 to 4"),
        (AffineConfig, {"min_overlap": 0.0}, "min_overlap is 0.0: expected a share above 0"),
        (Config, {"loss": LossConfig(field=1.0), "data": DataConfig(exchange=True)}, "exclude each other"),
        (Config, {"run": RunConfig(log_every_steps=0)}, "run.log_every_steps is 0"),
    ],
)
def test_what_is_refused(section, changes, message):
    with pytest.raises(UserError) as raised:
        section(**changes).check()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_prefix_names_where_a_setting_came_from():
    with pytest.raises(UserError, match=r"^--set smoothness is -1"):
        InstanceConfig(smoothness=-1).check(prefix="--set ")


def test_defaults_and_presets_are_accepted():
    Config().check()
    AffineConfig().check()
    for kind in ("phantom", "synthetic", "dirlab", "files", "ixi"):
        DataConfig(kind=kind).check()
    DirLabConfig(preprocessing="native", shape=(256, 256, 0), spacing_mm=0.0).check()
    for model in (paper_model(), pretrained_model(), ModelConfig(architecture="voxelmorph-2")):
        model.check()
    for effort in ("fast", "default", "thorough"):
        for subjects in ("any", "same", "different"):
            config = instance_preset(effort, subjects)
            config.check()
            dataclasses.replace(config, diffeomorphic=True, symmetric=True).check()
