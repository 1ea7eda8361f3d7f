"""Like configs/hippocampus.py, but from random parameters: measures the contribution of each part.

    python train.py --config configs/hippocampus_scratch.py --workdir runs/scratch \
        --config.data.files.pairs=FOLDER
    python -m adregnet_jax.evaluation.ablation --config configs/hippocampus_scratch.py \
        --workdir runs/table_v --config.data.files.pairs=FOLDER \
        --config.optimiser.epochs=3 --config.optimiser.steps_per_epoch=300

Hardware: one CPU core, 2.7 steps per second, 62 minutes under other load. Measured, network alone, mean
Dice of the 200 pairs, 0.574 before (labels warped by nearest neighbour): images only 0.741, 0.04 % of the
voxels folded; with labels 0.827, 0.13 %.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    FilesConfig,
    InstanceConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="files",
            files=FilesConfig(
                validation_fraction=20 / 260, test_fraction=40 / 260, partners=10, test_partners=5
            ),
            intensity_jitter=0.05,
        ),
        # Half resolution, and few channels there: see docs/decisions.md. Regions of 24 voxels, as the paper's
        # for brains.
        model=ModelConfig(channels=(8, 32, 64), stem_stride=2, global_attention_tokens=1024, region_size=24),
        loss=LossConfig(ncc_window=5, smoothness=0.3, bending=3.0, masked=False),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            warmup_steps=50,
            halve_every_epochs=1,
            epochs=5,
            batch_size=1,
            average_decay=0.999,
        ),
        instance=InstanceConfig(factors=(2, 1), steps=(40, 60), strides=(2, 3), smoothness=0.3),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps=200),
    )
