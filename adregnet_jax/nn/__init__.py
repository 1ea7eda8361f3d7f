"""Flax modules: one component of the paper a file, put together in `nn.adregnet`."""
