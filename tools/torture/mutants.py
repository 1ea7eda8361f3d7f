"""Mutation tests of the code that all figures depend on: a test must fail for each small fault.

    python -m tools.torture.mutants [--sample 300] [--jobs 2] [--seed 0] [--modules PREFIX ...] [--json FILE]
        [--again FILE]

Cosmic Ray (`pip install 'cosmic-ray>=8.4,<9'`, needed by nothing else) lists the mutants of
`adregnet_jax.ops`, the losses, the metrics and the readers: an operator or a number changed, a decorator, an
argument or a loop removed, and so on. A random sample of them, by --seed, is tried: each in a copy of the
tree, with the tests that belong to its module. A mutant is killed by a test that fails, or that takes three
times as long as usual. Survivors are tried again with the tests of the surrounding modules. Prints a table by
package, and the survivors as lines of the diff. --again takes the survivors from the JSON of an
earlier run with the same sample and the same modules, after tests were added.

Annotations and the texts of messages are left out, since no test should depend on them, and so are bitwise
operators in place of arithmetic, which raise for floating-point numbers, so that any test kills them.
"""

import argparse
import ast
import concurrent.futures
import functools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome

from adregnet_jax.benchmark.timing import report
from tools.torture.runs import ROOT

PACKAGE = "adregnet_jax"
READERS = (
    *(f"data/datasets/{name}" for name in ("dirlab", "files", "ixi", "ixi_t1t2")),
    *(f"data/io/{name}" for name in ("images", "nifti", "pickles", "points", "transforms")),
)
LOSSES = tuple(f"losses/{name}" for name in ("_masked", "similarity", "regularity", "supervision", "total"))
# Further tests of a module, in addition to those with its name.
MORE_TESTS = {
    "ops/arrays": ["tests/test_api.py"],
    "ops/cpu/folded_convolution": ["tests/ops/test_convolution.py"],
    "ops/cpu/onednn": ["tests/ops/test_convolution.py"],
    "ops/cpu/onednn_convolution": ["tests/ops/test_convolution.py"],
    "ops/mind": ["tests/losses/test_losses.py"],
    "ops/search": ["tests/registration/test_instance.py"],
    "ops/sampling": ["tests/test_laws.py"],
    "ops/grid": ["tests/ops/test_sampling.py"],
    "data/io/images": ["tests/registration/test_scans.py"],
    "data/io/transforms": ["tests/registration/test_field.py"],
    **{module: ["tests/losses/test_losses.py"] for module in LOSSES},
}
# Tests of the surrounding modules, by the beginning of a module's name.
WIDER_TESTS = {
    "ops/": ["tests/ops/test_slabs.py", "tests/test_laws.py", "tests/losses/test_losses.py"],
    "losses": ["tests/ops/test_slabs.py", "tests/test_laws.py", "tests/training/test_step.py"],
    "metrics": ["tests/evaluation"],
    "data/": ["tests/data"],
}
ON_BITS = ("RShift", "LShift", "BitOr", "BitAnd", "BitXor")
WIDER_SECONDS = 1800.0
GROUPS = {"ops": "ops/", "losses": "losses", "metrics": "metrics", "readers": "data/"}


def modules() -> dict[str, list[str]]:
    """Tests by module; modules are paths in the package without the suffix."""
    files = sorted((ROOT / PACKAGE / "ops").rglob("[!_]*.py"))
    names = [path.relative_to(ROOT / PACKAGE).with_suffix("").as_posix() for path in files]
    names += ["metrics", *LOSSES, *READERS]
    found = {}
    for name in names:
        own = Path("tests", name).with_name(f"test_{Path(name).name}.py")
        tests = [str(own)] if (ROOT / own).exists() else []
        found[name] = tests + MORE_TESTS.get(name, [])
        if not found[name]:
            raise SystemExit(f"{name} has no known tests: add them to MORE_TESTS")
    return found


def mutants(names: list[str], folder: Path) -> list[MutationSpec]:
    """All mutants of these modules, except those that the top of this file leaves out."""
    os.chdir(ROOT)
    paths = [Path(PACKAGE, f"{name}.py") for name in names]
    with use_db(folder / "mutants.sqlite", WorkDB.Mode.create) as database:
        init(paths, database, {})
        found = [item.mutations[0] for item in database.work_items]
    unnoticed = {path: _unnoticed(ast.parse(path.read_text())) for path in paths}
    return [
        one
        for one in found
        if not _within(one, unnoticed[Path(one.module_path)]) and not one.operator_name.endswith(ON_BITS)
    ]


def _unnoticed(tree: ast.Module) -> list[ast.expr]:
    """Annotations and the texts of messages."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.JoinedStr):
            found.append(node)
    return [node for node in found if node is not None]


def _within(mutant: MutationSpec, nodes: list[ast.expr]) -> bool:
    return any(
        (node.lineno, node.col_offset) <= mutant.start_pos
        and mutant.end_pos <= (node.end_lineno, node.end_col_offset)
        for node in nodes
    )


def _command(tests: list[str]) -> str:
    return f"{sys.executable} -m pytest -n 0 -x -q -p no:cacheprovider {' '.join(tests)}"


def _enter(copies: "multiprocessing.Queue[str]", cache: str) -> None:
    """Gives each process a copy of the tree; they share the compilation cache, as most code is unchanged."""
    os.chdir(copies.get())
    os.environ |= {
        "PYTHONPATH": str(Path.cwd()),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }


def _baseline(name: str, tests: list[str]) -> tuple[str, float]:
    for _ in range(2):  # the second finds the cache filled
        began = time.monotonic()
        outcome, output = run_tests(_command(tests), 1200)
        if outcome != TestOutcome.SURVIVED:
            raise SystemExit(f"the tests of {name} fail without a mutant: {output[-500:]}")
    return name, time.monotonic() - began


def _try(mutant: MutationSpec, tests: list[str], seconds: float, survived: bool) -> dict:
    """Tries a mutant; if it has `survived` the tests of its module before, only the wider tests."""
    result = None if survived else mutate_and_test([mutant], _command(tests), 3 * seconds + 30)
    if result is None or result.test_outcome == TestOutcome.SURVIVED:
        (wider,) = [more for prefix, more in WIDER_TESTS.items() if _module(mutant).startswith(prefix)]
        result = mutate_and_test([mutant], _command(tests + wider), WIDER_SECONDS)
    lines = (result.diff or "").splitlines()
    changed = [line for line in lines if line[:1] in "+-" and not line.startswith(("---", "+++"))]
    return {
        "module": str(Path(mutant.module_path).relative_to(PACKAGE).with_suffix("")),
        "line": mutant.start_pos[0],
        "operator": mutant.operator_name.removeprefix("core/"),
        "outcome": result.test_outcome.value if result.test_outcome else "not tried",
        "change": changed,
    }


def rows(tried: list[dict], listed: dict[str, int]) -> list[dict]:
    found = []
    for group, prefix in [*GROUPS.items(), ("all", "")]:
        here = [one for one in tried if one["module"].startswith(prefix)]
        killed = sum(one["outcome"] == "killed" for one in here)
        mutants_of = sum(count for name, count in listed.items() if name.startswith(prefix))
        share = round(100 * killed / len(here), 1) if here else None
        found.append(
            {"of": group, "mutants": mutants_of, "tried": len(here), "killed": killed, "killed %": share}
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", default=[""], metavar="PREFIX", help="e.g. ops/ losses")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only the survivors of an earlier run")
    options = parser.parse_args()
    tests = {name: of for name, of in modules().items() if name.startswith(tuple(options.modules))}
    with tempfile.TemporaryDirectory() as temporary:
        listed = mutants(list(tests), Path(temporary))
        sample = random.Random(options.seed).sample(listed, min(options.sample, len(listed)))
        counts = dict.fromkeys(tests, 0)
        for one in listed:
            counts[_module(one)] += 1
        context = multiprocessing.get_context("spawn")
        copies = context.Queue()
        ignore = shutil.ignore_patterns(".*", "__pycache__", "runs", "docs")
        for n in range(options.jobs):
            copies.put(shutil.copytree(ROOT, Path(temporary, f"copy{n}"), ignore=ignore).as_posix())
        enter = functools.partial(_enter, copies, str(Path(temporary, "cache")))
        with concurrent.futures.ProcessPoolExecutor(options.jobs, context, enter) as pool:
            earlier = json.loads(options.again.read_text())["tried"] if options.again else []
            asked = [n for n in range(len(sample)) if not earlier or earlier[n]["outcome"] != "killed"]
            names = [_module(sample[n]) for n in asked]
            seconds = dict.fromkeys(names, 0.0)
            if not earlier:
                used = list(seconds)
                seconds = dict(pool.map(_baseline, used, [tests[name] for name in used]))
            outcomes = pool.map(
                _try,
                [sample[n] for n in asked],
                [tests[name] for name in names],
                [seconds[name] for name in names],
                [bool(earlier)] * len(asked),
            )
            tried = dict(enumerate(earlier))
            for n, one in zip(asked, outcomes, strict=True):
                tried[n] = one
                if one["outcome"] != "killed":
                    where = f"{one['module']}:{one['line']} {one['operator']} {one['outcome']}"
                    print(where, *one["change"], sep="\n  ", flush=True)
                if options.json:
                    options.json.write_text(json.dumps({"tried": list(tried.values())}, indent=1) + "\n")
    print()
    report(rows(list(tried.values()), counts), None)
    return 0


def _module(mutant: MutationSpec) -> str:
    return str(Path(mutant.module_path).relative_to(PACKAGE).with_suffix(""))


if __name__ == "__main__":
    sys.exit(main())
