"""AD-RegNet in JAX."""
