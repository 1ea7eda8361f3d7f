"""Fine-tuning of the bundled network on a folder of your own scans.

    python train.py --config configs/finetune.py --workdir runs/finetune --config.data.files.pairs=FOLDER
    adregnet register fixed.nii.gz moving.nii.gz --output out --weights runs/finetune

FOLDER holds images/ with one NIfTI file per subject, all with one spacing, and optionally labels/: see
`adregnet_jax.data.datasets.files`, also for a CSV of pairs. In training, scans keep their
voxels; `register` brings others to their spacing and axes. Trains on images only; --config.loss.dice=1
--config.loss.dice_labels="(1, 2)" adds labels.

The network handles motions of up to about 14 voxels: resample scans of 200 voxels and more to about 100 first
(`nibabel.processing.resample_to_output`, or any other resampler).

Hardware: anything; one CPU core takes about a second per step of 64^3 voxels. The same way was measured with
configs/hippocampus.py and configs/dirlab_cpu.py, this config itself not.
"""

from adregnet_jax.config import Config, DataConfig, FilesConfig, LossConfig, OptimiserConfig, pretrained_model


def get_config() -> Config:
    return Config(
        init_from="pretrained",
        data=DataConfig(kind="files", files=FilesConfig(), intensity_jitter=0.05),
        model=pretrained_model(),
        loss=LossConfig(ncc_window=5, smoothness=1.0, bending=10.0, masked=False),
        optimiser=OptimiserConfig(
            learning_rate=2e-4, warmup_steps=50, halve_every_epochs=2, epochs=6, average_decay=0.999
        ),
    )
