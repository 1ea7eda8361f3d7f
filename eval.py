"""Evaluates a trained network: python eval.py --config configs/phantom.py --workdir runs/phantom

Registers the test split with the best checkpoint, prints tables of the cases, and writes cases.csv,
summary.json, report.html and figures to the folder eval of the workdir. --figures N draws the first N cases,
or else 3. --instance refines each displacement on the test pair itself, by its images alone, and writes to
the folder eval_instance.
"""

import argparse
import sys
from pathlib import Path

from adregnet_jax.config import Config
from adregnet_jax.entry import main
from adregnet_jax.errors import UserError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--figures", type=int, default=3)
    parser.add_argument("--instance", action="store_true")
    own, shared = parser.parse_known_args()

    def run(config: Config, workdir: Path) -> None:
        if own.figures < 0:
            raise UserError(f"--figures must be 0 or more, it is {own.figures}")
        from adregnet_jax.evaluation.evaluate import evaluate  # JAX is loaded once the config is good

        evaluate(config, workdir, figures=own.figures, instance=own.instance)

    sys.exit(main(run, __doc__, shared))
