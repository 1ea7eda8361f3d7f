"""The documents: commands parse, files and names exist, the README's own steps run."""

import ast
import functools
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import adregnet_jax
from adregnet_jax.launch.config_file import load_config, override

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "adregnet_jax" / "weights" / "MODEL_CARD.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    (?! *[-*|]).*\n?)+", re.MULTILINE)
PROGRAMS = ("python", "adregnet", "make")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMAND_LINE = PROJECT["scripts"]["adregnet"].split(":")


def blocks(document, language):
    """Fenced blocks of a language, and for the shell also blocks that are indented by four spaces."""
    text = document.read_text(encoding="utf-8")
    found = [body for name, body in FENCE.findall(text) if name == language]
    if language == "sh":
        found += INDENTED.findall(FENCE.sub("", text))
    return found


def commands(document):
    """Shell commands of a document as lists of words, continued lines joined, comments removed."""
    for block in blocks(document, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words and Path(words[0]).name in PROGRAMS:
                    yield [Path(words[0]).name, *words[1:]]


def named(document):
    return str(document.relative_to(ROOT))


COMMANDS = [
    pytest.param(words, id=f"{named(document)}: {shlex.join(words)}")
    for document in DOCUMENTS
    for words in commands(document)
]


def check_config(words):
    """The config file exists and has the fields that the command sets."""
    options = dict(itertools.pairwise(words))
    fields = [word for word in words if word.startswith("--config.")]
    if "--config" in options:
        override(load_config(ROOT / options["--config"]), fields)
    else:
        assert not fields


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_name_existing_programs_files_and_options(words):
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "adregnet":
        group = typer.main.get_group(importlib.import_module(COMMAND_LINE[0]).app)
        group.commands[rest[0]].make_context(rest[0], rest[1:])
    elif rest[0] == "-m":
        assert importlib.util.find_spec(rest[1])
        check_config(rest)
    else:
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        check_config(rest)
        if rest[0].startswith("benchmarks/"):
            for option in (word for word in rest if word.startswith("--") and "." not in word):
                assert option in source, option


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_files_and_fields_in_the_text_exist(document):
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:benchmarks|configs|examples|tests|tools)/\w+(?:/\w+)*\.\w+", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"\badregnet_jax(?:/\w+)+\.(?:py|md)", text):
        assert (ROOT / module).is_file(), module
    for module in re.findall(r"-m (adregnet_jax[\w.]*|tools[\w.]*)", text):
        assert importlib.util.find_spec(module.rstrip(".")), module
    for field in re.findall(r"--config\.([a-z_.]+[a-z_])=", text):
        functools.reduce(getattr, field.split("."), adregnet_jax.Config())


@pytest.mark.parametrize("document", [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=named)
def test_links_to_files_exist(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_python_blocks_import_names_that_exist(document):
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("adregnet_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), alias.name


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: adregnet_jax\.(\w+)$", page, re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted(adregnet_jax.__all__)


def run(words, folder):
    # Registering takes minutes without the optimisations that the other tests switch off.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    result = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.program
def test_the_first_steps_of_the_readme_run(tmp_path):
    """Its `adregnet` commands and then its Python code, in the folder that they leave behind.

    Registering takes `--effort fast` in addition, as in the Python code: the usual effort, with which the
    benchmarks are tested, takes most of a minute.
    """
    steps = [words for words in commands(README) if words[0] == "adregnet"]
    assert steps[0][1] == "sample"
    module, function = COMMAND_LINE
    for words in steps:
        if words[1] == "register":
            assert "--effort" not in words
            words += ["--effort", "fast"]
        run([sys.executable, "-c", f"from {module} import {function}; {function}()", *words[1:]], tmp_path)
    for block in blocks(README, "python"):
        assert run([sys.executable, "-c", block], tmp_path)


@pytest.mark.program
def test_the_code_of_the_jax_tutorial_runs(tmp_path):
    code = "\n".join(blocks(ROOT / "docs" / "tutorials" / "jax.md", "python"))
    assert run([sys.executable, "-c", code], tmp_path)


def test_the_readme_fits_on_a_page_or_two():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 110
