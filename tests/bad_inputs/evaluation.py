"""Commands on a run: `eval.py`, the ablation, the benchmark, the tables of runs, `adregnet pack`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from tests.bad_inputs.case import (
    ENDLESS,
    SMALL_MODEL,
    Case,
    Make,
    config,
    cut_checkpoint,
    directory,
    make_all,
    nothing,
    raw,
    run_folder,
    text,
    trained,
)

EVAL = "eval.py --config config.py --workdir run"
SMALL = " ".join(f"--config.model.{name}='{value}'" for name, value in SMALL_MODEL.items())


def cases_csv(name: str, rows: list[Mapping[str, Any]]) -> Make:
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text(name, file.getvalue())


def measured(case: str, **more: Any) -> dict[str, Any]:
    """A row of cases.csv."""
    names = ("ncc_before", "ncc", "mse_before", "mse", "ssim_before", "ssim", "jacobian_mean", "jacobian_sd")
    row = {"name": case, "landmarks": 3, "tre_before_mm": 2.0, "tre_before_sd_mm": 1.0, "tre_mm": 1.0}
    row |= {"tre_sd_mm": 0.5, "tre_snapped_mm": 1.0, "folded_percent": 0.0, "seconds": 1.0}
    return row | dict.fromkeys(names, 0.5) | more


PACK = "adregnet pack run --output out"
COLLECT = "adregnet_jax.evaluation.collect run --output tables"
ONE_CASE = cases_csv("run/eval/cases.csv", [measured("phantom_1"), measured("phantom_2")])
EVALUATION = [
    Case("eval_of_nothing", EVAL, config(), "run holds no checkpoint: train first"),
    Case(
        "eval_figures",
        f"{EVAL} --figures few",
        config(),
        "--figures must be a whole number, at least 0; got 'few'",
    ),
    Case(
        "eval_view",
        f"{EVAL} --view 2,b",
        config(),
        "--view must be a whole number, at least 1; got 'b'",
    ),
    Case(
        "eval_record",
        f"{EVAL} --mc-dropout 4 --config.model.dropout=0.1",
        run_folder("not json"),
        "run/config.json: not the record of a run .*restore",
    ),
    Case(
        "eval_checkpoint_of_text", EVAL, run_folder(None, "text"), "checkpoint of step 1 in run can't be read"
    ),
    Case(
        "eval_cut_checkpoint",
        f"{EVAL} {SMALL}",
        trained(cut_checkpoint),
        "checkpoint of step 1 in run can't be read",
    ),
    Case(
        "eval_another_model",
        f"{EVAL} --config.model.channels='(8,)'",
        trained(),
        "the checkpoint in run has a different architecture: parameter",
    ),
    Case(
        "eval_splits",
        EVAL,
        make_all(config(), text("run/splits.json", "[]")),
        "run/splits.json: not a record",
    ),
    Case(
        "eval_endless_splits",
        EVAL,
        make_all(config(), text("run/splits.json", ENDLESS)),
        "splits.json: not a rec",
    ),
    Case(
        "ablation_seeds",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --seeds 0",
        config(),
        "--seeds must be a whole number, at least 1; got '0'",
    ),
    Case(
        "ablation_of_a_part",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run"
        " --config.model.cross_attention=false",
        config(),
        "expected the full network",
    ),
    Case(
        "ablation_row_without_a_row",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --row",
        config(),
        "--row '': expected fields and values",
    ),
    Case(
        "ablation_row_of_no_field",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --row model.regions=8",
        config(),
        "no field regions",
    ),
    Case(
        "ablation_without_config",
        "adregnet_jax.evaluation.ablation --workdir run",
        nothing,
        "--config is missing",
    ),
    Case(
        "ablation_in_a_file",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run",
        make_all(config(), text("run", "")),
        "--workdir run/full-seed0: can't be written",
    ),
    Case(
        "ablation_record",
        "adregnet_jax.evaluation.ablation --config config.py --workdir run --seeds 1",
        make_all(
            config(),
            text("run/full-seed0/config.json", "x"),
            text("run/full-seed0/eval/summary.json", "{}"),
            text("run/full-seed0/checkpoints/1/x", "x"),
        ),
        "config.json: not the record of a run",
        leaves=("run/full-seed0/lock",),
    ),
    Case("benchmark_without_config", "adregnet_jax.benchmark", nothing, "required: --config"),
    Case(
        "benchmark_shape",
        "adregnet_jax.benchmark --config config.py --shape 8 8",
        config(),
        "--shape: expected 3",
    ),
    Case(
        "benchmark_flat",
        "adregnet_jax.benchmark --config config.py --shape 8 8 1",
        config(),
        "--shape is .8, 8, 1.",
    ),
    Case(
        "benchmark_rounds", "adregnet_jax.benchmark --config config.py --rounds 0", config(), "--rounds is 0"
    ),
    Case(
        "benchmark_target",
        "adregnet_jax.benchmark --config config.py --target v100",
        config(),
        "--target: invalid choice: 'v100'",
    ),
    Case(
        "benchmark_target_devices",
        "adregnet_jax.benchmark --config config.py --target h100 --devices 2",
        config(),
        "compiles for one card",
    ),
    Case(
        "benchmark_json",
        "adregnet_jax.benchmark --config config.py --json no/t.json",
        config(),
        "there is no folder",
    ),
    Case(
        "benchmark_json_is_a_folder",
        "adregnet_jax.benchmark --config config.py --json no",
        make_all(config(), directory("no")),
        "--json no",
    ),
    Case(
        "benchmark_batch",
        "adregnet_jax.benchmark --config config.py --batch 0",
        config(),
        "optimiser.batch_size is 0: expected 1 or more",
    ),
    Case(
        "benchmark_syntax", "adregnet_jax.benchmark --config config.py", config("("), "config.py: SyntaxError"
    ),
    Case("collect_nothing", COLLECT, nothing, "cases.csv: no such file: run eval.py"),
    Case("collect_without_output", "adregnet_jax.evaluation.collect run", nothing, "--output"),
    Case(
        "collect_empty",
        COLLECT,
        text("run/eval/cases.csv", ""),
        "holds no cases; expected the cases.csv of eval",
    ),
    Case(
        "collect_columns",
        COLLECT,
        text("run/eval/cases.csv", "case,tre\na,1\n"),
        "holds no cases|not a table",
    ),
    Case(
        "collect_words",
        COLLECT,
        text("run/eval/cases.csv", "name,tre_mm\na,x\n"),
        "is not a table of eval.py",
    ),
    Case(
        "collect_cut",
        COLLECT,
        text("run/eval/cases.csv", "tre_mm,name\n1,a\n1"),
        "cases.csv: .*evaluate the run",
    ),
    Case(
        "collect_cells",
        COLLECT,
        text("run/eval/cases.csv", "name,tre_mm\na,1,2\n"),
        "is not a table of eval.py",
    ),
    Case(
        "collect_encoding",
        COLLECT,
        raw("run/eval/cases.csv", b"name\n\xfc\n"),
        "can't be read as CSV",
    ),
    Case(
        "collect_endless_cell",
        COLLECT,
        text("run/eval/cases.csv", f"name\n{'a' * 200_000}\n"),
        "cases.csv.*field",
    ),
    Case("collect_twice", f"{COLLECT.replace('run', 'run run')}", ONE_CASE, "in more than one run"),
    Case(
        "collect_other_columns",
        COLLECT.replace("run", "run other"),
        make_all(ONE_CASE, cases_csv("other/eval/cases.csv", [measured("phantom_3", dice=0.5)])),
        "other/eval.*columns",
    ),
    Case(
        "collect_landmarks",
        COLLECT,
        make_all(ONE_CASE, text("run/eval/landmarks.csv", "name,before_mm\na,1\n")),
        "landmarks.csv: .*evaluate the run",
    ),
    Case(
        "collect_against_others",
        f"{COLLECT} --against other.csv",
        make_all(ONE_CASE, cases_csv("other.csv", [measured("phantom_9")])),
        "its cases differ from those of these runs",
    ),
    Case(
        "collect_against_less",
        f"{COLLECT} --against other.csv",
        make_all(ONE_CASE, text("other.csv", "name,dice\nphantom_1,1\nphantom_2,1\n")),
        r"other.csv \(tre_mm\): no case has a tre_mm in both tables",
    ),
    Case(
        "collect_into_a_file",
        COLLECT,
        make_all(ONE_CASE, text("tables", "")),
        r"tables/[^ ]*: can't be written .*tables\): check",
    ),
    Case(
        "collect_record",
        COLLECT,
        make_all(ONE_CASE, text("run/config.json", '{"config": {"data": {"kind": "dirlab", "dirlab": 3}}}')),
        "Alignment",
        0,
        ("tables",),
    ),
    Case("pack_nothing", PACK, nothing, "run holds no config.json: expected the workdir of a run"),
    Case("pack_record", PACK, run_folder("not json"), "run/config.json .*: use the workdir of another run"),
    Case("pack_cut_checkpoint", PACK, trained(cut_checkpoint), "checkpoint of step 1 in run can't be read"),
    Case(
        "pack_log",
        PACK,
        trained(text("run/metrics.jsonl", "x\n")),
        "run: the log of the run can't be read .*restore a copy",
    ),
    Case("pack_without_output", "adregnet pack run", nothing, "Missing option '--output'"),
    Case("pack_over_others", PACK, trained(text("out/notes.txt", "")), "out exists and is not empty: choose"),
]
