"""The form of the public functions: arrays first, options by keyword, all annotated and documented."""

import importlib
import inspect
import pkgutil
import re

import pytest

import adregnet_jax
import adregnet_jax.losses
import adregnet_jax.ops

HOLD_ARRAYS = re.compile("Array|ndarray|DisplacementField|Image")
NAMES = {"instance_preset", "load_pretrained"}  # their optional arguments are names, not options


def is_function(value):
    return inspect.isfunction(inspect.unwrap(value))


def functions_of(module):
    return {
        f"{module.__name__}.{name}": function
        for name, function in vars(module).items()
        if is_function(function) and function.__module__ == module.__name__ and not name.startswith("_")
    }


def public_functions():
    exported = (getattr(adregnet_jax, name) for name in adregnet_jax.__all__)
    found = {f"{value.__module__}.{value.__name__}": value for value in exported if is_function(value)}
    for package in (adregnet_jax.ops, adregnet_jax.losses):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if not info.ispkg and not info.name.rpartition(".")[2].startswith("_"):
                found |= functions_of(importlib.import_module(info.name))
    return found


FUNCTIONS = public_functions()
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def parameters_of(name):
    return list(inspect.signature(FUNCTIONS[name]).parameters.values())


def holds_arrays(parameter):
    annotation = str(parameter.annotation)
    return bool(HOLD_ARRAYS.search(annotation)) and "Callable" not in annotation


def is_file(parameter):
    return "Path" in str(parameter.annotation)


def test_there_are_functions_to_look_at():
    expected = ("ops.sampling.warp", "losses.total.total_loss", "registration.instance.align")
    assert {f"adregnet_jax.{name}" for name in expected} < FUNCTIONS.keys()


@each_function
def test_arrays_come_first(name):
    positional = [p for p in parameters_of(name) if p.kind is not p.KEYWORD_ONLY]
    kinds = [holds_arrays(p) for p in positional if not is_file(p)]  # a file to write comes before them
    assert kinds == sorted(kinds, reverse=True)


@each_function
def test_arrays_have_types_and_shapes(name):
    signature = inspect.signature(FUNCTIONS[name])
    for annotation in (*(p.annotation for p in parameters_of(name)), signature.return_annotation):
        for array in re.finditer(r"(\w+\[)?\b(jax\.Array|Array|AnyArray|np\.ndarray)\b", str(annotation)):
            assert array[1], f"{array[0]} without a shape in {annotation}"


@each_function
def test_options_go_by_keyword(name):
    for parameter in parameters_of(name):
        if parameter.default is not parameter.empty and FUNCTIONS[name].__name__ not in NAMES:
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
