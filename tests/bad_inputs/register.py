"""`adregnet register`, `export`, `warmup` and `sample`: scans, masks, labels, landmarks, weights, options."""

from __future__ import annotations

import numpy as np

from tests.bad_inputs.case import (
    AFFINE,
    ENDLESS,
    Case,
    config,
    cut_checkpoint,
    loop,
    make_all,
    noise,
    nothing,
    pair,
    ramp,
    run_folder,
    scan,
    text,
    trained,
    with_value,
)

PAIR = "adregnet register fixed.nii.gz moving.nii.gz --output out"
REGISTER = [
    Case(
        "pair_with_nan",
        PAIR,
        pair(moving=scan("moving.nii.gz", with_value(np.nan))),
        "moving.nii.gz: 1 of 336",
    ),
    Case(
        "cut_pair",
        PAIR,
        pair(moving=scan("moving.nii.gz", noise(), share=0.5)),
        "moving.nii.gz: damaged or cut off",
    ),
    Case("no_moving", PAIR, scan("fixed.nii.gz"), "moving.nii.gz: no such file"),
    Case(
        "pair_of_4d",
        PAIR,
        pair(scan("fixed.nii.gz", ramp((4, 4, 4, 2)))),
        "fixed.nii.gz: shape is .*save one",
    ),
    Case(
        "scan_of_few_slices",
        f"{PAIR} --method network --no-affine",
        pair(*(scan(f"{name}.nii.gz", noise((120, 120, 2))) for name in ("fixed", "moving"))),
        "fixed.nii.gz: .* voxels on the grid of pretrained .* which takes 8 or more.*--method instance",
    ),
    Case(
        "worlds_apart",
        PAIR,
        pair(moving=scan("moving.nii.gz", affine=AFFINE + np.outer([9e5, 0, 0, 0], [0, 0, 0, 1]))),
        "overlap.*--apart",
    ),
    Case(
        "output_holds_files", PAIR, make_all(pair(), text("out/mine", "")), "exists and is not empty: choose"
    ),
    Case(
        "output_of_others",
        f"{PAIR} --overwrite",
        make_all(pair(), text("out/mine", "")),
        "out holds mine, which isn't ours to overwrite",
    ),
    Case(
        "sample_on_files", "adregnet sample out", text("out/mine", ""), "out exists and is not empty: choose"
    ),
    Case(
        "masks_for_nothing",
        f"{PAIR} --method network --no-affine --fixed-mask fixed.nii.gz",
        pair(),
        "masks have no effect with --method network and --no-affine: drop them, or use --method both",
    ),
    Case("output_is_a_file", PAIR, make_all(pair(), text("out", "")), "out is a file; expected a folder"),
    Case(
        "output_below_a_file",
        f"{PAIR}/deep",
        make_all(pair(), text("out", "")),
        "out/deep: can't be written .Not a directory",
    ),
    Case("output_is_a_link_to_itself", PAIR, make_all(pair(), loop("out")), "out.*(loop|symbolic)"),
    Case(
        "one_of_two_labels",
        f"{PAIR} --fixed-labels fixed.nii.gz",
        pair(),
        "belong together: give both or none",
    ),
    Case(
        "labels_on_another_grid",
        f"{PAIR} --fixed-labels labels.nii --moving-labels labels.nii",
        make_all(pair(), scan("labels.nii", ramp((5, 5, 5)))),
        r"labels are \(5, 5, 5\) voxels, their scan fixed.nii.gz is \(6, 7, 8\).*expected one grid",
    ),
    Case(
        "numbers_of_landmarks",
        f"{PAIR} --fixed-landmarks a.csv --moving-landmarks b.csv",
        make_all(pair(), text("a.csv", "x,y,z\n-2,2,3\n"), text("b.csv", "x,y,z\n-2,2,3\n-2,2,3\n")),
        "a.csv has 1 landmarks, b.csv 2: expected pairs",
    ),
    Case(
        "landmarks_in_lps",
        f"{PAIR} --fixed-landmarks a.csv --moving-landmarks a.csv",
        make_all(pair(), text("a.csv", "x,y,z\n2,-2,3\n")),
        "1 of 1 landmarks lie outside of fixed.nii.gz.*expected RAS mm",
    ),
    Case(
        "weights_of_nothing",
        f"{PAIR} --weights run",
        pair(),
        "run holds no config.json: expected",
    ),
    Case(
        "packed_weights_of_another_version",
        f"{PAIR} --weights w",
        make_all(
            pair(),
            text("w/weights.json", '{"format": 2, "sha256": "", "adregnet_jax": "9.1"}'),
            text("w/weights.npz", ""),
        ),
        "w: weights of format 2, .* reads format 1: install the version that wrote them, 9.1",
    ),
    Case(
        "packed_weights_of_another_checksum",
        f"{PAIR} --weights w",
        make_all(
            pair(), text("w/weights.json", '{"format": 1, "sha256": "00"}'), text("w/weights.npz", "PK")
        ),
        "w: the weights or their record were changed or damaged: .*copy the folder again",
    ),
    Case(
        "packed_weights_without_arrays",
        f"{PAIR} --weights w",
        make_all(pair(), text("w/weights.json", '{"format": 1, "sha256": "00"}')),
        "weights.npz: can't be read .*expected a folder with weights.json and weights.npz",
    ),
    Case(
        "weights_of_text",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder("not json")),
        "run/config.json describes no model that this version knows",
    ),
    Case(
        "weights_of_endless_json",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder(ENDLESS)),
        "run/config.json describes no model that this version knows",
    ),
    Case(
        "weights_of_wrong_types",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder('{"config": {"model": {"channels": "wide"}}}')),
        "run/config.json describes no model",
    ),
    Case(
        "weights_of_negative_channels",
        f"{PAIR} --weights run",
        make_all(pair(), run_folder('{"config": {"model": {"channels": [-4]}}}')),
        "run/config.json describes no model",
    ),
    Case(
        "weights_without_checkpoint",
        f"{PAIR} --weights run",
        make_all(pair(), config(), text("run/config.json", '{"config": {"model": {}}}')),
        "run holds no checkpoint: train first",
    ),
    Case(
        "weights_cut",
        f"{PAIR} --weights run",
        make_all(pair(), trained(cut_checkpoint)),
        "the checkpoint of step 1 in run can't be read .*restore a copy",
    ),
    Case(
        "weights_of_another_model",
        f"{PAIR} --weights run",
        make_all(pair(), trained(channels=(8,))),
        "the checkpoint in run has a different architecture: parameter .* is",
    ),
    Case(
        "no_such_device", f"{PAIR} --device tpu:7", pair(), "--device tpu:7: there is no such device; JAX has"
    ),
    Case("device_of_no_number", f"{PAIR} --device cpu:x", pair(), "--device cpu:x: there is no such device"),
    Case("unknown_setting", f"{PAIR} --set smothness=1", pair(), "did you mean smoothness"),
    Case("setting_without_value", f"{PAIR} --set smoothness", pair(), "expected NAME=VALUE"),
    Case("setting_of_wrong_type", f"{PAIR} --set factors=wide", pair(), "--set factors must be tuple"),
    Case("setting_cut_off", f"{PAIR} --set 'steps=(80,'", pair(), "--set|steps"),
    Case(
        "setting_of_nan",
        f"{PAIR} --set learning_rate=nan",
        pair(),
        "--set learning_rate is nan: expected a number above 0",
    ),
    Case("unknown_effort", f"{PAIR} --effort extreme", pair(), "'extreme' is not one of"),
    Case(
        "export_flat",
        "adregnet export -o p.bin --shape 8 8 0 --spacing 1 1 1",
        nothing,
        "expected 2 voxels or more",
    ),
    Case(
        "export_spacing",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 nan 1",
        nothing,
        "expected 2 voxels or",
    ),
    Case(
        "export_words",
        "adregnet export -o p.bin --shape a b c --spacing 1 1 1",
        nothing,
        "Invalid value for '--shape': .*valid integer",
    ),
    Case(
        "export_for_nothing",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 1 1 --platforms abacus",
        nothing,
        "'abacus' is none of cpu, cuda",
    ),
    Case(
        "export_over_a_file",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 1 1",
        text("p.bin", ""),
        "p.bin: exists already",
    ),
    Case(
        "export_of_no_run",
        "adregnet export -o p.bin --shape 8 8 8 --spacing 1 1 1 --weights run --method network",
        nothing,
        "run holds no config.json",
    ),
    Case("warmup_flat", "adregnet warmup --shape 8 8 0", nothing, r"--shape \(8, 8, 0\) .*8 voxels or more"),
    Case(
        "warmup_spacing",
        "adregnet warmup --shape 8 8 8 --spacing 1 inf 1",
        nothing,
        "--spacing .*expected .* above 0",
    ),
    Case("warmup_words", "adregnet warmup --shape a b c", nothing, "Invalid value for '--shape'"),
    Case("warmup_nowhere", "adregnet warmup", nothing, "Missing option '--shape'"),
    Case("sample_nowhere", "adregnet sample", nothing, "Missing argument 'FOLDER'"),
    Case("sample_seed", "adregnet sample out --seed -1", nothing, "'--seed': "),
    Case(
        "sample_over_others", "adregnet sample out", text("out/notes.txt", ""), "out exists and is not empty"
    ),
]
