"""Time, memory and FLOPs of the network, part by part: `python -m adregnet_jax.benchmark`."""
