"""Runs `adregnet_jax.benchmark.measure` as `python -m adregnet_jax.benchmark`."""

import sys

from adregnet_jax.benchmark.measure import main

sys.exit(main())
