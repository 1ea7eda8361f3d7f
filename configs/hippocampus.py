"""Inter-subject registration of hippocampus MR scans: 200 train, 20 validate, 40 test; images only.

    python train.py --config configs/hippocampus.py --workdir runs/hippocampus \
        --config.data.files.pairs=FOLDER
    python eval.py  (the same arguments)

FOLDER holds images/ and labels/ with one NIfTI a subject under the same names: the scans of the Medical
Segmentation Decathlon's task 4, 1 mm, cropped. Labels 1 and 2 are the anterior and the posterior part. The
test is 200 pairs: each test subject with five others.

Weakly supervised, with the labels of the training scans:
--config.loss.dice=1 --config.loss.dice_labels="(1, 2)"

The shipped network, which was trained on synthetic anatomy alone, is trained on.

Hardware: one CPU core, 2.5 steps a second alone on it, 27 minutes. Measured, network alone, mean Dice of the
200 pairs, 0.574 before (labels warped by nearest neighbour; one-hot in brackets):

- images only 0.769 (0.776), 0.0016 % of the voxels folded, after 8000 steps with the rate halved every 3000
  (--config.optimiser.epochs=8 --config.optimiser.halve_every_epochs=3). The validation loss is 0.653 after
  the fourth thousand and 0.647 after the eighth; the 4000 steps of this config were not run by themselves.
- images only, trained on from there at softer losses, each level refining three times: 0.785 (0.793), 0.21 %
  folded, after 12,000 further steps, 1.6 a second, in two hours and a quarter beside other work
  (--config.init_from=runs/hippocampus --config.model.refinements=3
  --config.loss.smoothness=0.2 --config.loss.bending=0.5 --config.loss.jacobian=100
  --config.optimiser.learning_rate=1e-3 --config.optimiser.warmup_steps=200
  --config.optimiser.epochs=12 --config.optimiser.halve_every_epochs=3).
- with labels, at smoothness 0.3, bending 3, stopped after 3000 steps, by the weights that were shipped before
  the present ones: 0.833 (0.839), 0.10 %.

From random parameters, in 62 minutes (configs/hippocampus_scratch.py): 0.741 and 0.827.
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
        init_from="pretrained",
        data=DataConfig(
            kind="files",
            files=FilesConfig(
                validation_fraction=20 / 260, test_fraction=40 / 260, partners=10, test_partners=5
            ),
            intensity_jitter=0.05,
        ),
        # That of configs/synthetic_cpu.py, whose parameters these are.
        model=ModelConfig(
            channels=(16, 32, 64),
            stem_stride=2,
            global_attention_tokens=0,
            region_size=16,
            cosine_logits=True,
            shared_projection=True,
            match_residual=True,
        ),
        loss=LossConfig(ncc_window=5, smoothness=1.0, bending=10.0, masked=False),
        optimiser=OptimiserConfig(
            learning_rate=5e-4,
            warmup_steps=50,
            halve_every_epochs=1,
            epochs=4,
            steps_per_epoch=1000,
            average_decay=0.998,
        ),
        instance=InstanceConfig(factors=(2, 1), steps=(40, 60), strides=(2, 3), smoothness=0.3),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps=200),
    )
