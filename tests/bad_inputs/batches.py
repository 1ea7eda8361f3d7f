"""`adregnet batch`: tables of pairs."""

from __future__ import annotations

from tests.bad_inputs.case import Case, directory, make_all, nothing, pair, pairs_csv, raw, scan, text

BATCH = "adregnet batch pairs.csv --output out"
BATCHES = [
    Case("no_pairs", BATCH, nothing, "pairs.csv: no such file"),
    Case("empty_pairs", BATCH, text("pairs.csv", ""), "columns are none; expected fixed, moving"),
    Case(
        "batch_columns",
        BATCH,
        pairs_csv("a,b", columns="fixd,moving"),
        "columns are fixd, moving; expected fixed",
    ),
    Case(
        "batch_without_rows", BATCH, pairs_csv(columns="fixed,moving"), "has no rows; expected one per pair"
    ),
    Case(
        "batch_cells", BATCH, pairs_csv("a.nii", columns="fixed,moving"), "line 2: expected as many cells as"
    ),
    Case(
        "batch_encoding",
        BATCH,
        raw("pairs.csv", b"fixed,moving\n\xfc.nii,b.nii\n"),
        "not a CSV file that can be",
    ),
    Case(
        "batch_endless_cell",
        BATCH,
        pairs_csv(f"{'a' * 200_000},b", columns="fixed,moving"),
        "pairs.csv.*field",
    ),
    Case("batch_endless_column", BATCH, text("pairs.csv", "a" * 200_000), "pairs.csv.*field"),
    Case("batch_folder", BATCH, directory("pairs.csv"), "not a CSV file that can be read"),
    Case(
        "batch_twice",
        BATCH,
        pairs_csv("a.nii,b.nii", "a.nii,b.nii", columns="fixed,moving"),
        "two pairs are called a_b: add a column name",
    ),
    Case(
        "batch_name_leads_out",
        BATCH,
        pairs_csv("a.nii,b.nii,../away", columns="fixed,moving,name"),
        "name is '../away'; expected one that a folder can have",
    ),
    Case(
        "batch_output_is_a_file",
        BATCH,
        make_all(pairs_csv("a.nii,b.nii", columns="fixed,moving"), text("out", "")),
        "--output out: can't be written .*check the name",
    ),
    Case(
        "batch_pair_is_bad",
        BATCH,
        make_all(
            pairs_csv("fixed.nii.gz,moving.nii.gz,one", columns="fixed,moving,name"), scan("fixed.nii.gz")
        ),
        "^1/1 one: failed: moving.nii.gz: no such file",
        1,
        ("out", "out/results.csv"),
    ),
    Case(
        "batch_path_with_nul",
        BATCH,
        pairs_csv("a\0.nii,b.nii,one", columns="fixed,moving,name"),
        "^1/1 one: failed: a.*can't be read .embedded null byte",
        1,
        ("out", "out/results.csv"),
    ),
    Case(
        "batch_long_name",
        BATCH,
        make_all(pairs_csv(f"fixed.nii.gz,moving.nii.gz,{'n' * 300}", columns="fixed,moving,name"), pair()),
        "^1/1 n+: failed: .*/n+: can't be written .File name too long",
        1,
        ("out", "out/results.csv"),
    ),
]
