"""The form of the functions of `ops` and `losses`: arrays first, options by keyword, all documented."""

import importlib
import inspect
import pkgutil

import pytest

import adregnet_jax
import adregnet_jax.losses
import adregnet_jax.ops


def functions_of(module):
    return {
        f"{module.__name__}.{name}": function
        for name, function in vars(module).items()
        if inspect.isfunction(inspect.unwrap(function))
        and function.__module__ == module.__name__
        and not name.startswith("_")
    }


def public_functions():
    found = {}
    for package in (adregnet_jax.ops, adregnet_jax.losses):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if not info.ispkg and not info.name.rpartition(".")[2].startswith("_"):
                found |= functions_of(importlib.import_module(info.name))
    return found


FUNCTIONS = public_functions()
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def parameters_of(name):
    return list(inspect.signature(FUNCTIONS[name]).parameters.values())


def is_array(parameter):
    return "Array" in str(parameter.annotation) and "Callable" not in str(parameter.annotation)


def test_there_are_functions_to_look_at():
    assert {"adregnet_jax.ops.sampling.warp", "adregnet_jax.losses.total.total_loss"} < FUNCTIONS.keys()


@each_function
def test_arrays_come_first(name):
    kinds = [is_array(p) for p in parameters_of(name) if p.kind is not p.KEYWORD_ONLY]
    assert kinds == sorted(kinds, reverse=True)


@each_function
def test_options_go_by_keyword(name):
    for parameter in parameters_of(name):
        if parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter


@each_function
def test_everything_is_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter


@each_function
def test_arguments_and_results_are_documented(name):
    document = inspect.getdoc(FUNCTIONS[name])
    assert document
    if not parameters_of(name):
        return
    arguments = document.partition("\nArgs:\n")[2]
    for parameter in parameters_of(name):
        assert f"\n  {parameter.name}: " in f"\n{arguments}", parameter
    if inspect.signature(FUNCTIONS[name]).return_annotation != "None":
        assert "\nReturns:\n" in document
