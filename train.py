"""Trains AD-RegNet: python train.py --config configs/phantom.py --workdir runs/phantom

Running the same command again resumes an interrupted run. Any field of the config can be set on the command
line, for instance --config.optimiser.learning_rate=3e-4. docs/scaling.md explains how to train on several
devices and machines.
"""

import sys
from pathlib import Path

from adregnet_jax.config import Config
from adregnet_jax.launch.main import main


def run(config: Config, workdir: Path) -> None:
    from adregnet_jax.training.loop import train  # JAX is loaded once the config is good

    train(config, workdir)


if __name__ == "__main__":
    sys.exit(main(run, __doc__, several_processes=True))
