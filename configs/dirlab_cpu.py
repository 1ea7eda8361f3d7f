"""The DIR-Lab pipeline at a size that two CPU cores train: 3.2 mm voxels, cases 1-5, leave-one-case-out.

    python train.py --config configs/dirlab_cpu.py --workdir runs/dirlab_cpu_case3 \
        --config.data.dirlab.root=DIR-LAB-FOLDER --config.data.dirlab.test_case=3
    python eval.py  (the same arguments)
    python eval.py --instance  (the same arguments: refined on the test pair itself, by its images)

Training starts from the bundled network, which was trained on synthetic anatomy only, and uses the three
cases that are neither test nor validation case.

Hardware: a CPU core, 60 steps in about 3 minutes. Measured on breathing-CT cases in DIR-Lab's format (a real
CT that moves by the real landmarks of cases 1-5; the original images can't be redistributed), best checkpoint
by the validation case, TRE of cases 1 to 5, each left out once: before 3.78 4.27 6.77 9.51 7.15 (mean 6.29),
network alone 1.22 1.28 1.81 1.54 1.57 (1.48), no folded voxel; by the weights that were bundled before the
present ones. Registering a pair by its images alone at full resolution, without training, comes to 0.92 mm
(`benchmarks/peers.py`).
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    DirLabConfig,
    InstanceConfig,
    LossConfig,
    OptimiserConfig,
    RunConfig,
    pretrained_model,
)


def get_config() -> Config:
    return Config(
        init_from="pretrained",
        data=DataConfig(
            kind="dirlab",
            dirlab=DirLabConfig(cases=(1, 2, 3, 4, 5), spacing_mm=3.2, shape=(88, 64, 80)),
            # Three pairs to train on, mirrored from left to right. The breath is not reversed as well
            # (`exchange`): fixed is always inhale, and the network may know.
            flip_axes=(0,),
            intensity_jitter=0.03,
        ),
        model=pretrained_model(),
        loss=LossConfig(ncc_window=7),
        # An epoch is three steps.
        optimiser=OptimiserConfig(learning_rate=2e-4, warmup_steps=10, halve_every_epochs=10, epochs=20),
        # Voxels of 3.2 mm are coarse enough to begin with.
        instance=InstanceConfig(factors=(2, 1), steps=(20, 60), strides=(2, 3), smoothness=0.3),
        run=RunConfig(patience_epochs=0, validate_every_epochs=5, checkpoint_every_steps=30),
    )
