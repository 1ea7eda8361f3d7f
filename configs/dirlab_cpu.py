"""The DIR-Lab pipeline at a size that two CPU cores train: 4.2 mm voxels, cases 1-5, leave-one-case-out.

    python train.py --config configs/dirlab_cpu.py --workdir runs/dirlab_cpu_case3 \
        --config.data.dirlab.root=DIR-LAB-FOLDER --config.data.dirlab.test_case=3
    python eval.py  (the same arguments)

Hardware: two CPU cores, 200 steps in 5 to 7 minutes. Measured on breathing-CT cases in DIR-Lab's format (a
real CT that moves by the real landmarks of cases 1-5; the original images can't be redistributed), network
alone, best checkpoint by the validation case: case 3 left out 6.77 -> 2.65 mm (step 150), case 5 left out
7.15 -> 3.25 mm (step 50, run stopped at step 150), no folded voxel. Three pairs are few: it overfits from
there on.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    DirLabConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="dirlab",
            dirlab=DirLabConfig(cases=(1, 2, 3, 4, 5), spacing_mm=4.2, shape=(64, 48, 56)),
            # Three pairs to train on, mirrored from left to right. The breath is not reversed as well
            # (`exchange`): fixed is always inhale, and the network may know.
            flip_axes=(0,),
            intensity_jitter=0.03,
        ),
        model=ModelConfig(channels=(8, 16, 32, 64), finest_level=1, global_attention_tokens=1024),
        loss=LossConfig(ncc_window=7),
        # An epoch is two steps of two pairs.
        optimiser=OptimiserConfig(
            learning_rate=2e-3, warmup_steps=50, halve_every_epochs=50, epochs=100, batch_size=2
        ),
        run=RunConfig(patience_epochs=0, validate_every_epochs=25, checkpoint_every_steps=100),
    )
