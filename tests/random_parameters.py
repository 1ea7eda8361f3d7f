import jax
import numpy as np


def random_parameters(module, *inputs, seed=0):
    """Parameters of the module for these inputs, none of them 0: without compiling its initialisation."""
    abstract = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        return np.asarray(rng.normal(size=leaf.shape) / fan_in**0.5, leaf.dtype)

    return jax.tree.map(draw, abstract)
