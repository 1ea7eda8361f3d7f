"""Registration of scans that nobody showed it: trained on synthetic anatomy, on two CPU cores.

    python train.py --config configs/synthetic_cpu.py --workdir runs/synthetic
    adregnet pack runs/synthetic --output weights

No data is read: `adregnet_jax.data.datasets.synthetic` makes new pairs for every step. The same command
continues an interrupted run. The field is synthesised to half the resolution of the grid (`stem_stride`), at
three levels, each of which matches within one voxel: 14 voxels in all.

Anatomy that is never the same twice leaves nothing to learn but matching. With the settings of the other
configs, which learn one anatomy, nothing was learned here in 800 steps: so like features match from the start
(`cosine_logits`, `shared_projection`), and the matches are the field that the heads correct
(`match_residual`). The first cases have one contrast and small motions. Of pairs of two contrasts, the moving
scan is brought to the contrast of the fixed one, as `register` does.

Hardware: two CPU cores, 0.75 steps a second, so two hours for all of it; the generator keeps ahead
(`waiting_share` in metrics.jsonl: 0.001). How the shipped weights were trained, which differs a little, and
what they are worth: adregnet_jax/weights/MODEL_CARD.md.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    OptimiserConfig,
    RunConfig,
    SyntheticConfig,
    pretrained_model,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="synthetic",
            synthetic=SyntheticConfig(
                train_cases=40_000, curriculum_cases=4000, same_contrast=0.6, match_contrast=True
            ),
            flip_axes=(0, 1, 2),
        ),
        model=pretrained_model(),
        # Labels and field are known, so that image terms, of pairs of one contrast, only refine.
        loss=LossConfig(
            ncc_window=5, similarity=0.2, smoothness=0.1, dice=0.5, dice_labels=(1, 2, 3, 4), field=0.3
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            warmup_steps=100,
            halve_every_epochs=4,
            epochs=11,
            steps_per_epoch=500,
            batch_size=2,
            average_decay=0.999,
        ),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps=200),
    )
