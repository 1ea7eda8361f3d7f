"""Synthetic pairs as a pure function of a random key, in JAX; the public function is in `synthesis.pairs`."""
