"""Inter-subject registration of hippocampus MR scans: 200 train, 20 validate, 40 test; images only.

    python train.py --config configs/hippocampus.py --workdir runs/hippocampus \
        --config.data.files.pairs=FOLDER
    python eval.py  (the same arguments)

FOLDER holds images/ and labels/ with one NIfTI file per subject under the same names: the scans of the
Medical Segmentation Decathlon's task 4, 1 mm, cropped. Labels 1 and 2 are the anterior and the posterior
part. The
test is 200 pairs: each test subject with five others.

Training starts from the bundled network, which was trained on synthetic anatomy only.

Hardware: one CPU core, 2.5 steps per second without other load, 53 minutes. Two more commands continue from
there, with weaker regularisation and more refinements, in another 125 and 13 minutes on one core:

    python train.py --config configs/hippocampus.py --workdir runs/hippocampus_2 \
        --config.data.files.pairs=FOLDER --config.init_from=runs/hippocampus --config.model.refinements=3 \
        --config.loss.smoothness=0.2 --config.loss.bending=0.5 --config.loss.jacobian=100 \
        --config.optimiser.learning_rate=1e-3 --config.optimiser.warmup_steps=200 \
        --config.optimiser.epochs=12
    python train.py --config configs/hippocampus.py --workdir runs/hippocampus_3 \
        --config.data.files.pairs=FOLDER --config.init_from=runs/hippocampus_2 \
        --config.model.refinements=3 --config.model.ascent_steps=8 \
        --config.loss.smoothness=0.5 --config.loss.bending=2 --config.loss.jacobian=300 \
        --config.optimiser.learning_rate=4e-4 --config.optimiser.warmup_steps=100 \
        --config.optimiser.epochs=1

Weakly supervised, with the labels of the training scans, from the second command's network, 5000 steps to its
best checkpoint, about an hour on a core without other load (88 minutes with it):

    python train.py --config configs/hippocampus.py --workdir runs/hippocampus_labels \
        --config.data.files.pairs=FOLDER --config.init_from=runs/hippocampus_2 --config.model.refinements=3 \
        --config.loss.smoothness=0.2 --config.loss.bending=0.5 --config.loss.jacobian=300 \
        --config.loss.dice=2 --config.loss.dice_labels="(1, 2)" \
        --config.optimiser.learning_rate=1e-3 --config.optimiser.warmup_steps=200 \
        --config.optimiser.halve_every_epochs=2 --config.optimiser.epochs=7 \
        --config.data.exchange=True --config.data.flip_axes="(0,)"

Measured, network alone, mean Dice of the 200 pairs, 0.574 before (labels warped by nearest neighbour; one-hot
in brackets), and share of the voxels that fold:

- images only, this config: 0.769 (0.776), 0.0016 %
- after the second command: 0.785 (0.793), 0.21 %
- after the third: 0.788 (0.796), 0.06 %; with two thousand steps more the validation loss rises
- by greedy, which learns nothing (benchmarks/hippocampus_peers.py): 0.786 (0.794), none
- VoxelMorph-2 from random parameters with the second command, --config.init_from= and
  --config.model.architecture=voxelmorph-2 in it: 0.749 (0.755), 0.19 %
- with labels, the fourth command: 0.856 (0.860), 0.21 %
- with labels in 3000 steps from weights that were shipped before the present ones, at smoothness 0.3, bending
  3, dice 1, the rate halved every 1000: 0.833 (0.839), 0.10 %

From random parameters, in 62 minutes (configs/hippocampus_scratch.py): 0.741 and 0.827.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    FilesConfig,
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
            kind="files",
            files=FilesConfig(
                validation_fraction=20 / 260, test_fraction=40 / 260, partners=10, test_partners=5
            ),
            intensity_jitter=0.05,
        ),
        model=pretrained_model(),
        loss=LossConfig(ncc_window=5, smoothness=1.0, bending=10.0, masked=False),
        optimiser=OptimiserConfig(
            learning_rate=5e-4,
            warmup_steps=50,
            halve_every_epochs=3,
            epochs=8,
            steps_per_epoch=1000,
            average_decay=0.998,
        ),
        instance=InstanceConfig(factors=(2, 1), steps=(40, 60), strides=(2, 3), smoothness=0.3),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps=200),
    )
