"""Evaluates a trained network: python eval.py --config configs/phantom.py --workdir runs/phantom

Registers the test split with the best checkpoint, prints a table of the cases, and writes cases.csv,
summary.json, report.html and figures to the folder eval in the workdir. --figures N draws the first N cases
(default: 3), and the report shows every slice of up to six of them; --view 2,7 chooses the cases to look
into, --view none leaves them out. --instance refines each displacement on the test pair itself, using its two
images alone, and writes to the folder eval_instance. --mc-dropout N adds a second measure of uncertainty, the
SD of the displacement over N networks drawn by dropout; it requires a network trained with model.dropout
above 0.
--affine adds columns for affine alignment alone (config.affine), next to those before and after registration.
"""

import argparse
import sys
from pathlib import Path

from adregnet_jax.config import Config
from adregnet_jax.errors import UserError
from adregnet_jax.launch.main import main


def whole_number(option: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{option} must be a whole number, at least {least}; got {text!r}")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--figures", nargs="?", default="3", const="")
    parser.add_argument("--instance", action="store_true")
    parser.add_argument("--mc-dropout", nargs="?", const="")
    parser.add_argument("--affine", action="store_true")
    parser.add_argument("--view", nargs="?", const="")
    own, shared = parser.parse_known_args()

    def run(config: Config, workdir: Path) -> None:
        figures = whole_number("--figures", own.figures, 0)
        samples = 0 if own.mc_dropout is None else whole_number("--mc-dropout", own.mc_dropout, 2)
        view = None
        if own.view is not None:
            chosen = [] if own.view == "none" else own.view.split(",")
            view = [whole_number("--view", number, 1) for number in chosen]
        from adregnet_jax.evaluation.evaluate import evaluate  # JAX is loaded once the config is good

        options = {"figures": figures, "instance": own.instance, "mc_dropout": samples, "affine": own.affine}
        evaluate(config, workdir, view=view, **options)

    sys.exit(main(run, __doc__, shared))
