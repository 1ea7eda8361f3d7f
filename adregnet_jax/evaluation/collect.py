"""Collects several evaluated runs, such as the folds of leave-one-case-out, in one set of tables.

    python -m adregnet_jax.evaluation.collect RUN [RUN ...] --output DIR [--against OTHER/eval/cases.csv]

Each RUN is a workdir evaluated by eval.py; --instance takes the results of `eval.py --instance`. DIR gets
Table I (TRE by case, with published results if the cases are DIR-Lab's), Table II (similarity and
deformation) and the signed-rank tests, each as text, CSV, Markdown and LaTeX, and report.html. --against
compares with another run on the same cases.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from adregnet_jax.atomic import write_file
from adregnet_jax.errors import OneLineParser, UserError
from adregnet_jax.evaluation import published
from adregnet_jax.evaluation.figures import landmark_figure
from adregnet_jax.evaluation.statistics import compare, holm
from adregnet_jax.report import page as html
from adregnet_jax.report import tables
from adregnet_jax.report.figures import png
from adregnet_jax.training.record import describe_origin

DIRLAB_NAME = re.compile(r"case(\d+)( \(.*\))?")
TABLE_II = (tables.Column("case", "{name}"), tables.Column("landmarks", "{landmarks:.0f}"),
            *tables.SIMILARITY[1:],
            tables.Column("folded, %", "{folded_percent:.3f}"))  # fmt: skip
STATISTICS = (
    tables.Column("ours against", "{name}"),
    tables.Column("cases", "{pairs}"),
    tables.Column("mean difference", "{mean_difference:+.3f}"),
    tables.Column("95 % interval", "{low:+.3f} to {high:+.3f}"),
    tables.Column("effect", "{effect:+.2f}"),
    tables.Column("p", "{p:.4f}"),
    tables.Column("p, corrected", "{p_corrected:.4f}"),
    tables.Column("note", "{note}"),
)

METHODS = {
    False: "Network alone",
    True: "Network, then instance optimisation on the images of each test pair",
}
SIMILARITY_CAPTION = (
    "Similarity and deformation: SSIM of one global window, SDlogJ of det + 3 as Learn2Reg, folded volume by"
    " tetrahedra"
)
STATISTICS_CAPTION = (
    "Two-sided Wilcoxon signed-rank tests over the cases, Holm's correction; difference: ours minus theirs; "
    "interval: bootstrap of the mean, BCa over the cases, over the subjects where pairs share them; effect: "
    "matched-pairs rank-biserial correlation"
)


def collect(
    runs: Sequence[Path], output: Path, against: Sequence[Path] = (), *, instance: bool = False
) -> list[tables.Table]:
    """Writes and returns the tables of all cases of the runs.

    Raises:
        UserError: a run that was not evaluated, a case in two runs, or a comparison on other cases.
    """
    folders = [run / ("eval_instance" if instance else "eval") for run in runs]
    rows = _joined([folder / "cases.csv" for folder in folders])
    distances = [row for folder in folders for row in _read_distances(folder / "landmarks.csv")]
    names = [row["name"] for row in rows]
    cases = [re.sub(r" \(trained on\)$", "", name) for name in names]
    if twice := sorted({name for name in cases if cases.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: in more than one run, but each case counts once: leave one out")
    kinds = {_recorded_data(run).get("kind") for run in runs}
    is_dirlab = kinds == {"dirlab"} and all(_dirlab_number(row) and row.get("landmarks") for row in rows)
    method = METHODS[instance]
    collected = {
        "table_1": tables.Table(
            f"{_caption(is_dirlab=is_dirlab)}. {method}", *_table_1(rows, is_dirlab=is_dirlab)
        ),
        "table_2": tables.Table(f"{SIMILARITY_CAPTION}. {method}", tables.with_mean_and_sd(rows), TABLE_II),
    }
    if comparisons := _comparisons(rows, against, is_dirlab=is_dirlab):
        collected["statistics"] = tables.Table(STATISTICS_CAPTION, comparisons, STATISTICS)

    sections = []
    for name, table in collected.items():
        _write_table(output / name, table)
        sections.append(html.Section(table.caption, tables.to_html(table.rows, table.columns)))
    if distances:
        distances.sort(key=_order)
        content = png(landmark_figure(distances))
        write_file(output / "landmark_distances.png", content)
        sections.append(html.Section("Landmark distances", html.picture(content, "whiskers: 5 to 95 %")))
    pictures = [path for folder in folders for path in sorted((folder / "figures").glob("[0-9]*.png"))]
    sections.append(
        html.Section("Cases", "\n".join(html.picture(path.read_bytes(), path.stem) for path in pictures))
    )
    page = html.page("Registration of all cases", _protocol(runs, instance), sections)
    write_file(output / "report.html", page)
    return list(collected.values())


def _write_table(path: Path, table: tables.Table) -> None:
    """Writes a table as text, Markdown, LaTeX and CSV; the path lacks the suffix."""
    for suffix, render in (
        ("txt", tables.to_text),
        ("md", tables.to_markdown),
        ("tex", tables.to_latex),
    ):
        caption = f"% {table.caption}\n" if suffix == "tex" else f"{table.caption}\n\n"
        write_file(path.with_suffix(f".{suffix}"), caption + render(table.rows, table.columns))
    write_file(path.with_suffix(".csv"), tables.to_csv(table.rows))


def _joined(paths: Sequence[Path]) -> list[tables.Row]:
    """The cases of several tables with the same columns, in the order of their names."""
    parts = [tables.read_cases(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if different := sorted(set(part[0]) ^ set(parts[0][0])):
            raise UserError(
                f"{path} and {paths[0]}: columns differ by {', '.join(different)}: evaluate all runs with the"
                " same options"
            )
    return sorted((row for part in parts for row in part), key=_order)


def _read_distances(path: Path) -> list[dict[str, str]]:
    """The lines of a `landmarks.csv`; empty without the file."""
    if not path.exists():
        return []
    rows = tables.read_csv(path)
    try:
        for row in rows:
            _order(row), float(row["before_mm"]), float(row["after_mm"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is not a table of eval.py ({type(error).__name__}: {error}): evaluate the run again"
        ) from None
    return rows


def _order(row: Mapping) -> tuple:
    """Sorts by the numbers in the names: case 10 comes after case 9."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", row["name"]))


def _dirlab_number(row: tables.Row) -> int | None:
    found = DIRLAB_NAME.fullmatch(row["name"])
    return int(found[1]) if found and 1 <= int(found[1]) <= 10 else None


def _published(rows: Sequence[tables.Row], method: str) -> list[float]:
    return [published.DIRLAB_TRE_MM[method][(_dirlab_number(row) or 0) - 1] for row in rows]


def _caption(*, is_dirlab: bool) -> str:
    if not is_dirlab:
        return "Alignment; Dice of labels warped by nearest neighbour"
    return (
        "TRE in mm, mean (SD over the landmarks), and published means on the original DIR-Lab images "
        f"(ORRN, published as a mean only: {published.ORRN_MEAN_MM} over the ten). "
        f"Snapped to voxels: {', '.join(sorted(published.SNAPPED))}; the others continuous or not stated. "
        f"Optimised on each test pair: {', '.join(sorted(published.OPTIMISED))}"
    )


def _table_1(
    rows: Sequence[tables.Row], *, is_dirlab: bool
) -> tuple[list[tables.Row], tuple[tables.Column, ...]]:
    columns: tuple[tables.Column, ...] = tables.ALIGNMENT
    if is_dirlab:
        values = {method: _published(rows, method) for method in published.DIRLAB_TRE_MM}
        rows = [row | {m: values[m][n] for m in values} for n, row in enumerate(rows)]
        columns += tuple(tables.Column(method, "{" + method + ":.2f}") for method in values)
    return tables.with_mean_and_sd(rows), columns


def _comparisons(rows: Sequence[tables.Row], against: Sequence[Path], *, is_dirlab: bool) -> list[tables.Row]:
    others: dict[str, tuple[Sequence[tables.Row], str, list[float | None]]] = {}
    if is_dirlab:
        for method in published.DIRLAB_TRE_MM:  # snapped distances are compared with snapped ones
            snapped = method in published.SNAPPED
            name = f"{method} (snapped)" if snapped else method
            others[name] = (rows, "tre_snapped_mm" if snapped else "tre_mm", list(_published(rows, method)))
    for path in against:
        theirs = {row["name"]: row for row in tables.read_cases(path)}
        if set(theirs) != {row["name"] for row in rows}:
            different = sorted(set(theirs) ^ {row["name"] for row in rows})
            raise UserError(
                f"{path}: its cases differ from those of these runs ({', '.join(different[:4])}, ...): "
                "a paired test needs the same ones"
            )
        measure = "tre_mm" if any(row.get("tre_mm") is not None for row in rows) else "dice"
        values = [theirs[row["name"]].get(measure) for row in rows]
        others[f"{path} ({measure})"] = (rows, measure, values)

    compared = {}
    for name, (ours, measure, values) in others.items():
        both = [
            (row, value)
            for row, value in zip(ours, values, strict=True)
            if row.get(measure) is not None and value is not None
        ]
        if not both:
            raise UserError(f"{name}: no case has a {measure} in both tables, so nothing can be compared")
        known = f"{name}, {len(both)} of {len(rows)} cases" if len(both) < len(rows) else name
        subjects = [(row["fixed"], row["moving"]) for row, _ in both] if "fixed" in rows[0] else None
        compared[known] = compare(
            [row[measure] for row, _ in both], [value for _, value in both], subjects=subjects
        )
    corrected = holm([comparison.p for comparison in compared.values()])
    return [
        {
            "name": name,
            "pairs": comparison.pairs,
            "mean_difference": comparison.mean_difference,
            "low": comparison.interval and comparison.interval[0],
            "high": comparison.interval and comparison.interval[1],
            "effect": comparison.effect,
            "p": comparison.p,
            "p_corrected": p_corrected,
            "note": comparison.note or None,
        }
        for (name, comparison), p_corrected in zip(compared.items(), corrected, strict=True)
    ]


def _protocol(runs: Sequence[Path], instance: bool) -> str:
    """The data that each run was trained and tested on, from its records, with a warning of any leakage."""
    lines = [f"{METHODS[instance]}; the best checkpoint of each run by its validation cases.", ""]
    for run in runs:
        try:
            lines.append(f"{run.name}: {_data(_recorded_data(run))}. {_origin(run)}".strip())
        except (KeyError, TypeError, AttributeError):
            lines.append(f"{run.name}: config.json can't be read, its protocol is unknown")
    return "\n".join(lines)


def _recorded_data(run: Path) -> Mapping:
    """The settings `data` of a run; {} where they can't be read."""
    config = _recorded_config(run)
    return config["data"] if isinstance(config.get("data"), dict) else {}


def _recorded_config(run: Path) -> Mapping:
    try:
        config = json.loads((run / "config.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _origin(run: Path) -> str:
    """The origin of a run's parameters, from its records."""
    try:
        pairs = json.loads((run / "splits.json").read_text())["test"]["pairs"]
        tested = {fixed for fixed, _ in pairs}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        tested = set()
    return describe_origin(_recorded_config(run).get("init_from", ""), tested)


def _data(data: Mapping) -> str:
    """The data that a run was trained and tested on, from its settings `data`."""
    if data["kind"] != "dirlab":
        return f"test split of {data['kind']} data"
    dirlab = data["dirlab"]
    protocol = f"leave-one-out, trained without case {dirlab['test_case']}"
    if dirlab.get("protocol") == "paper":
        protocol = f"WARNING: LEAKAGE, trained with the test case {dirlab['test_case']}"
    return f"{protocol}, cases {dirlab['cases']}, {dirlab['preprocessing']} preprocessing"


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="CSV")
    parser.add_argument("--instance", action="store_true")
    try:
        options = parser.parse_args(argv)
        for table in collect(options.runs, options.output, options.against, instance=options.instance):
            print(f"{table.caption}\n\n{tables.to_text(table.rows, table.columns)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {options.output}, with report.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
