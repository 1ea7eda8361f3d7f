"""The DIR-Lab pipeline at a size that two CPU cores train: 4.2 mm voxels, cases 1-5, leave-one-case-out.

    python train.py --config configs/dirlab_cpu.py --workdir runs/dirlab_cpu_case3 \
        --config.data.dirlab.root=DIR-LAB-FOLDER --config.data.dirlab.test_case=3
    python eval.py  (the same arguments)
    python eval.py --instance  (the same arguments: refined on the test pair itself, by its images)

Hardware: two CPU cores, 200 steps in 3 to 7 minutes. Measured on breathing-CT cases in DIR-Lab's format (a
real CT that moves by the real landmarks of cases 1-5; the original images can't be redistributed), best
checkpoint by the validation case, TRE of cases 1 to 5, each left out once: before 3.78 4.27 6.77 9.51 7.15
(mean 6.29), network alone 3.34 3.14 2.65 3.42 3.25 (3.16), no folded voxel. Three pairs are few: the network
overfits after 50 to 200 steps. Registering a pair by its images alone at full resolution, without training,
comes to 0.92 mm (`benchmarks/peers.py`).
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    DirLabConfig,
    InstanceConfig,
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
        # Voxels of 4.2 mm are coarse enough to begin with.
        instance=InstanceConfig(factors=(2, 1), steps=(40, 60), strides=(2, 3), smoothness=0.3),
        run=RunConfig(patience_epochs=0, validate_every_epochs=25, checkpoint_every_steps=100),
    )
