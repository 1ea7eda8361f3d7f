"""The records that a run keeps in its workdir.

`config.json`: its settings. `splits.json`: the subjects and pairs of each split. `starts.jsonl`: one line per
start, with the command, the code, the versions, the devices and a fingerprint of the data.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from adregnet_jax import provenance
from adregnet_jax.atomic import write_errors_as_user_errors, write_file
from adregnet_jax.data.splits import Splits
from adregnet_jax.errors import UserError
from adregnet_jax.weights.packed import PRETRAINED


def write_record(path: Path, record: Any) -> None:
    """Writes a JSON file of the workdir, complete or not at all; only one of several processes does.

    Raises:
        UserError: the workdir can't be written.
    """
    if not jax.process_index():
        write_file(path, json.dumps(record, indent=2) + "\n", name=f"--workdir {path.parent}")


def append_start(workdir: Path, step: int, data: dict[str, Any] | None) -> bool:
    """Adds a start after `step` to `starts.jsonl`; only one of several processes does.

    Args:
        workdir: folder of the run.
        step: the last step done; 0 for a new run.
        data: `data_fingerprint` of the data.

    Returns:
        Whether the data are known to differ from those of the previous start.

    Raises:
        UserError: the workdir can't be written.
    """
    if jax.process_index():
        return False
    path = workdir / "starts.jsonl"
    with write_errors_as_user_errors(f"--workdir {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        before = path.read_text().splitlines() if path.exists() else []
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **provenance.origin(), "data": data}) + "\n")
    try:
        return bool(before) and json.loads(before[-1]).get("data", data) != data
    except (ValueError, AttributeError):  # a line cut off by a kill
        return False


def write_splits(workdir: Path, kind: str, splits: Splits) -> None:
    """Writes `splits.json`: for each split its sorted subjects and its pairs, [fixed, moving].

    Raises:
        UserError: the workdir has checkpoints of a run with different splits, or can't be written.
    """
    if any((workdir / "checkpoints").glob("[0-9]*")):
        check_splits(workdir, kind, splits)
    parts = {
        split: {
            "subjects": sorted(pairs.subjects),
            "pairs": [[maker.fixed, maker.moving] for maker in pairs.makers],
        }
        for split, pairs in splits._asdict().items()
    }
    write_record(workdir / "splits.json", {"data": kind, **parts})


def describe_origin(init_from: str, tested: Collection[str]) -> str:
    """Describes where the initial parameters of a run come from, with a warning if test data leaked into
    them.

    Args:
        init_from: the setting `init_from` of the run.
        tested: subjects whose scans are the fixed scans of test pairs.

    Returns:
        "" for random parameters; else a sentence for each run in the chain of starting points.
    """
    if not init_from:
        return ""
    if init_from == PRETRAINED:
        return "Started from the bundled weights, which were trained on synthetic anatomy only."
    try:
        splits = json.loads((Path(init_from) / "splits.json").read_text())
        seen = {subject for split in ("train", "validation") for subject in splits[split]["subjects"]}
        before = json.loads((Path(init_from) / "config.json").read_text())["config"].get("init_from", "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return f"Started from {init_from}, whose training data are unknown."
    if leaked := sorted(seen & set(tested)):
        named = ", ".join(leaked[:4]) + (", ..." if len(leaked) > 4 else "")
        return f"WARNING: LEAKAGE, started from {init_from}, which was trained with test subjects: {named}."
    origin = f"Started from {init_from}, which was trained without the test subjects. "
    return origin + describe_origin(before, tested)


def check_splits(workdir: Path, kind: str, splits: Splits) -> None:
    """Refuses splits whose subjects differ from those that the run in `workdir` was trained with.

    Different pairs of the same subjects are accepted. So is everything if there is no `splits.json`, which
    older versions didn't write.

    Raises:
        UserError: a subject is in another split, or the record can't be read.
    """
    path = workdir / "splits.json"
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text())
        theirs = {split: set(record[split]["subjects"]) for split in Splits._fields}
        their_kind = record["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a record of splits ({type(error).__name__}): train again") from None
    advice = "use the config of that run, or another --workdir"
    if their_kind != kind:
        raise UserError(f"{workdir} was trained with {their_kind} data, this config has {kind}: {advice}")
    for split, pairs in splits._asdict().items():
        for subject in sorted(theirs[split] ^ pairs.subjects):
            before = _where(subject, theirs)
            now = _where(subject, {name: part.subjects for name, part in splits._asdict().items()})
            raise UserError(
                f"{workdir} was trained with another split: there {subject} is in {before}, in this config in"
                f" {now}: {advice}"
            )


def _where(subject: str, subjects: dict[str, set[str]]) -> str:
    return " and ".join(split for split, names in subjects.items() if subject in names) or "none"
