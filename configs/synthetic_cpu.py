"""Registration of scans that nobody showed it: trained on synthetic anatomy, on two CPU cores.

    python train.py --config configs/synthetic_cpu.py --workdir runs/synthetic

No data is read: `adregnet_jax.data.synthetic` makes new pairs for every step. The same command goes on where
an interrupted run stopped, so ten hours need not be ten hours at a stretch. The field is synthesised to half
the resolution of the grid (`stem_stride`).

Hardware: two CPU cores. Result: not yet trained.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SyntheticConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="synthetic",
            synthetic=SyntheticConfig(train_cases=40_000, curriculum_cases=4000),
            flip_axes=(0, 1, 2),
        ),
        model=ModelConfig(
            channels=(16, 32, 64, 64), stem_stride=2, global_attention_tokens=1024, region_size=16
        ),
        # Labels and field are known, so that image terms, of pairs of one contrast, only refine.
        loss=LossConfig(
            ncc_window=5, similarity=0.2, smoothness=0.1, dice=0.5, dice_labels=(1, 2, 3, 4), field=0.3
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            warmup_steps=100,
            halve_every_epochs=5,
            epochs=20,
            steps_per_epoch=1000,
            batch_size=2,
            average_decay=0.999,
        ),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps=200),
    )
