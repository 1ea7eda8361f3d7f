"""The examples in the docstrings run and give the results they show."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adregnet_jax

# Modules whose examples need something that a docstring can't hold.
EXCLUDED = {
    "adregnet_jax.evaluation.ixi_dice": "a file of results",
    "adregnet_jax.registration.export": "trained parameters and a file to write",
    "adregnet_jax.registration.files": "scans in files",
    "adregnet_jax.registration.instance": "two scans",
    "adregnet_jax.registration.network": "two scans and several devices",
    "adregnet_jax.weights.packed": "scans in files",
}
IMPORTED = {"jax": jax, "jnp": jnp, "np": np}


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [info.name for info in pkgutil.walk_packages(adregnet_jax.__path__, "adregnet_jax.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    found = [test for module in modules for test in finder.find(module, extraglobs=IMPORTED) if test.examples]
    return {test.name: test for test in found}


EXAMPLES = examples()
RUNNABLE = [name for name in EXAMPLES if not name.startswith(tuple(EXCLUDED))]


def test_every_excluded_module_has_examples():
    assert all(any(name.startswith(module) for name in EXAMPLES) for module in EXCLUDED)


@pytest.mark.parametrize("name", RUNNABLE)
def test_examples_give_the_results_they_show(name):
    assert doctest.DocTestRunner().run(EXAMPLES[name]).failed == 0
