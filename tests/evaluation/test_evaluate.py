"""Measurements and files of the evaluation, with a network that shifts by a known amount."""

import csv
import dataclasses
import functools
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from adregnet_jax.config import AffineConfig, Config, DataConfig, InstanceConfig, IxiConfig, ModelConfig
from adregnet_jax.data.pair import Pair, PairMaker
from adregnet_jax.data.splits import LazyPairs, Splits
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import baselines, inference
from adregnet_jax.evaluation import evaluate as evaluation
from adregnet_jax.evaluation.ixi_dice import read_results
from adregnet_jax.evaluation.uncertainty import landmark_rows
from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration.measure import label_scores, mean_dice, measure_pair
from adregnet_jax.registration.results import Registration
from adregnet_jax.report.tables import read_cases

SHAPE = (16, 14, 12)
SHIFT = (2.0, 0.0, 0.0)  # voxels, pull-back
SPACING_MM = np.array([1.5, 1.0, 2.0])


class Shift(nn.Module):
    """Stands for the network: one parameter, the displacement everywhere."""

    @nn.compact
    def __call__(self, fixed, moving):
        shift = self.param("shift", nn.initializers.zeros, (3,))
        return jnp.broadcast_to(shift, (*fixed.shape[:4], 3))


def register(params, fixed, moving, **_):
    displacement: Any = Shift().apply({"params": params}, fixed, moving)
    return Registration(displacement, warp(moving, displacement), (), ())


def shifted_pair(name="case", **changes):
    """A moving scan that is the fixed one shifted by two voxels along axis 0."""
    rng = np.random.default_rng(0)
    fixed = rng.uniform(0.1, 1, SHAPE).astype(np.float32)
    labels = np.zeros(SHAPE, np.int16)
    labels[3:8, 4:9, 3:9] = 1
    labels[8:11, 4:9, 3:9] = 7
    landmarks = rng.uniform(3, 9, (20, 3))
    pair = Pair(
        name,
        fixed,
        np.roll(fixed, 2, axis=0),
        SPACING_MM,
        fixed_landmarks=landmarks,
        moving_landmarks=landmarks + SHIFT,
        fixed_labels=labels,
        moving_labels=np.roll(labels, 2, axis=0),
    )
    return dataclasses.replace(pair, **changes)


def measured(pair, displacement, warped):
    dice = mean_dice(label_scores(pair, displacement))
    return measure_pair(pair, displacement, warped) | dice


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Evaluates pairs with the stand-in network; `shift` is its parameter."""

    def evaluate(pairs, shift=SHIFT, config=None, model=None, **options):
        kept = LazyPairs(
            [
                PairMaker(f"{pair.name}f", f"{pair.name}m", functools.partial(dataclasses.replace, pair))
                for pair in pairs
            ]
        )
        monkeypatch.setattr(evaluation, "make_model", lambda config: model or Shift())
        monkeypatch.setattr(inference, "register", register)
        monkeypatch.setattr(
            evaluation, "load_splits", lambda config: Splits(LazyPairs([]), LazyPairs([]), kept)
        )
        monkeypatch.setattr(
            evaluation,
            "restore_parameters",
            lambda workdir, abstract, which: ({"shift": jnp.array(shift)}, 5),
        )
        return evaluation.evaluate(config or Config(), tmp_path, **options)

    return evaluate


def test_a_field_at_rest_changes_nothing():
    pair = shifted_pair()
    row = measured(pair, np.zeros((*SHAPE, 3), np.float32), pair.moving)
    for name in ("tre{}_mm", "tre{}_sd_mm", "ncc{}", "mse{}", "ssim{}", "dice{}"):
        assert row[name.format("")] == row[name.format("_before")]
    assert row["tre_before_mm"] == pytest.approx(3.0)  # 2 voxels of 1.5 mm
    assert (row["jacobian_mean"], row["jacobian_sd"], row["jacobian_min"]) == (1.0, 0.0, 1.0)
    assert row["folded_percent"] == 0.0


def test_the_true_field_brings_everything_back():
    pair = shifted_pair()
    displacement = np.broadcast_to(np.asarray(SHIFT, np.float32), (*SHAPE, 3))
    row = measured(pair, displacement, np.roll(pair.moving, -2, axis=0))
    assert row["landmarks"] == 20
    assert row["tre_mm"] == pytest.approx(0.0, abs=1e-5)
    assert row["tre_snapped_mm"] < math.dist((0, 0, 0), SPACING_MM / 2)  # half a voxel along each axis
    assert row["dice_before"] < 0.7
    assert (row["dice"], row["ncc"], row["mse"]) == pytest.approx((1.0, 1.0, 0.0), abs=1e-5)


def test_without_landmarks_and_labels_cells_are_none():
    none = dict.fromkeys(("fixed_landmarks", "moving_landmarks", "fixed_labels", "moving_labels"))
    pair = shifted_pair(**none)
    row = measured(pair, np.zeros((*SHAPE, 3), np.float32), pair.moving)
    assert {name for name, value in row.items() if value is None} == {
        "landmarks", "tre_before_mm", "tre_before_sd_mm", "tre_mm", "tre_sd_mm", "tre_snapped_mm",
        "dice_before", "dice", "dice_onehot",
    }  # fmt: skip
    assert landmark_rows(pair, np.zeros((*SHAPE, 3), np.float32)) == []
    summary = evaluation.summary([row])
    assert summary["tre_mm"] is None
    assert summary["folded_percent"] == {"mean": 0.0, "sd": None}


def test_the_folder_holds_tables_summary_and_figures(run, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo'
    )
    pairs = [shifted_pair("case/1"), shifted_pair("case 2", fixed_landmarks=None), shifted_pair("3")]
    folder = run(pairs, figures=2)
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {
        "cases.csv", "landmarks.csv", "summary.json", "tables.md", "tables.tex", "report.html",
        "figures/01_case_1.png", "figures/01_case_1_levels.png", "figures/02_case_2.png",
        "figures/02_case_2_levels.png", "figures/jacobian.png", "figures/landmark_distances.png",
        "figures/training.png",
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    # Two overlays, two figures of levels, two summaries and the training: all of them in the page itself.
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 7
    assert "case/1" in page and "pull-back" in page
    distances = list(csv.DictReader((folder / "landmarks.csv").read_text().splitlines()))
    assert len(distances) == 40
    assert float(distances[0]["before_mm"]) == pytest.approx(3.0, abs=1e-5)
    assert float(distances[0]["after_mm"]) == pytest.approx(0.0, abs=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == [
        "cases", "tre_before_mm", "tre_mm", "tre_snapped_mm", "folded_percent", "dice_before", "dice",
        "origin",
    ]  # fmt: skip
    assert summary["origin"]["devices"]
    assert summary["cases"] == 3
    assert summary["tre_before_mm"] == pytest.approx({"mean": 3.0, "sd": 0.0}, abs=1e-6)
    assert summary["tre_mm"] == pytest.approx({"mean": 0.0, "sd": 0.0}, abs=1e-5)
    rows = read_cases(folder / "cases.csv")
    assert [(row["fixed"], row["moving"]) for row in rows][:2] == [
        ("case/1f", "case/1m"),
        ("case 2f", "case 2m"),
    ]
    for name in ("tables.md", "tables.tex"):
        assert "network alone, best checkpoint (step 5)" in (folder / name).read_text()
    printed = capsys.readouterr().out
    assert "figures of 2 of 3 cases" in printed
    assert "pull-back" in printed


def viewed_cases(folder):
    (described,) = re.findall(r'id="pairs">(.*?)</script>', (folder / "report.html").read_text())
    return json.loads(described)


def test_the_report_shows_every_slice_of_the_drawn_cases(run):
    first, second = viewed_cases(run([shifted_pair("a"), shifted_pair("b"), shifted_pair("c")], figures=2))
    assert (first["name"], second["name"]) == ("a", "b")
    assert first["shape"] == list(SHAPE) and first["spacing_mm"] == SPACING_MM.tolist()
    assert [one["name"] for one in first["maps"]] == ["displacement", "jacobian"]
    assert [one["label"] for one in first["labels"]] == [1, 7]
    for landmark in first["landmarks"]:
        assert landmark["before_mm"] == pytest.approx(3, abs=1e-3)
        assert landmark["after_mm"] == pytest.approx(0, abs=1e-3)


def test_other_cases_are_chosen_by_number(run):
    pairs = [shifted_pair("a"), shifted_pair("b"), shifted_pair("c")]
    folder = run(pairs, figures=0, view=[3])
    assert [case["name"] for case in viewed_cases(folder)] == ["c"]
    assert 'id="pairs"' not in (run(pairs, figures=1, view=[]) / "report.html").read_text()
    with pytest.raises(UserError, match=r"--view 4: there is no such case; expected 1 to 3"):
        run(pairs, view=[2, 4])


def test_the_affine_row_stands_between_before_and_after(run, monkeypatch, capsys):
    half = np.broadcast_to(np.array([1.0, 0.0, 0.0], np.float32), (*SHAPE, 3))  # of the two voxels
    monkeypatch.setattr(baselines, "affine_displacement", lambda *_, **__: half)
    folder = run([shifted_pair("a"), shifted_pair("b")], figures=0, affine=True)
    rows = read_cases(folder / "cases.csv")
    for row in rows:
        assert [row[f"tre{step}_mm"] for step in ("_before", "_affine", "")] == pytest.approx(
            [3.0, 1.5, 0.0], abs=1e-5
        )
        assert row["dice_before"] < row["dice_affine"] < row["dice"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tre_affine_mm"]["mean"] == pytest.approx(1.5)
    assert summary["dice_affine"]["mean"] == pytest.approx(rows[0]["dice_affine"])
    printed = capsys.readouterr().out
    assert "TRE affine, mm" in printed and "Dice affine" in printed and "NCC affine" in printed
    run([shifted_pair()], figures=0)
    assert "TRE affine" not in capsys.readouterr().out


def test_bad_settings_of_the_affine_alignment_are_one_clear_line(run):
    config = Config(affine=AffineConfig(kind="bent"))
    with pytest.raises(UserError, match=r"affine\.kind is 'bent': expected rigid, similarity or affine"):
        run([shifted_pair()], config=config, affine=True)


def test_a_field_that_is_not_finite_is_one_clear_line(run):
    with pytest.raises(UserError, match="displacement of case is not finite") as raised:
        run([shifted_pair()], shift=(math.nan, 0.0, 0.0))
    assert "\n" not in str(raised.value)


def test_bad_settings_of_the_instance_optimisation_are_one_clear_line(run):
    config = Config(instance=InstanceConfig(learning_rate=0.0))
    with pytest.raises(UserError, match=r"instance\.learning_rate is 0\.0: expected a number above 0"):
        run([shifted_pair()], config=config, instance=True)


def test_an_empty_test_split_is_one_clear_line(run):
    with pytest.raises(UserError, match="no pair to test on"):
        run([])


def test_ixi_is_scored_as_published(run, capsys):
    """Labels 1 and 7 are cut; 4 is not among those that are scored."""
    pair = shifted_pair()
    extra = pair.fixed_labels.copy()
    extra[0:3, 0:3, 0:3] = 4
    pairs = [dataclasses.replace(pair, fixed_labels=extra), pair]
    folder = run(pairs, shift=(1.0, 0.0, 0.0), config=Config(data=DataConfig(kind="ixi")), figures=0)
    dice, folded = read_results(folder / "ixi_dice.csv")
    rows = read_cases(folder / "cases.csv")
    assert dice.shape == (2, 46)
    np.testing.assert_array_equal(np.isnan(dice[1]), ~np.isin(np.arange(46), (1, 7)))
    assert dice[0, 4] == 0.0
    for row, scores in zip(rows, dice, strict=True):
        assert row["dice"] == pytest.approx(np.mean(scores[[1, 7]]))
        assert row["dice_before"] < row["dice"] < 1
    assert list(folded) == [0.0, 0.0]
    printed = capsys.readouterr().out
    assert "LL-Net-Large" in printed and "this run, one-hot trilinear" in printed
    before, _ = read_results(folder / "ixi_dice_before.csv")
    assert np.nanmean(before[1]) == pytest.approx(rows[1]["dice_before"])
    assert "this run, before" in printed and "this run, affine" not in printed
    assert (folder / "table_3.tex").exists()


def test_t1_to_t2_has_no_labels_to_score(run):
    pair = shifted_pair(fixed_labels=None, moving_labels=None)
    data = DataConfig(kind="ixi", ixi=IxiConfig(mode="t1t2"))
    folder = run([pair], config=Config(data=data), figures=0)
    assert (folder / "cases.csv").exists() and not (folder / "table_3.csv").exists()


def test_published_rows_are_shown_for_the_atlas_only(run):
    data = DataConfig(kind="ixi", ixi=IxiConfig(mode="pairs"))
    folder = run([shifted_pair()], config=Config(data=data), figures=0)
    assert not (folder / "table_3.csv").exists()


def test_the_origin_of_a_network_is_reported(run, tmp_path, capsys):
    ancestor = tmp_path / "ancestor"
    ancestor.mkdir()
    record = {split: {"subjects": ["x"]} for split in ("train", "validation")}
    (ancestor / "splits.json").write_text(json.dumps(record))
    (ancestor / "config.json").write_text(json.dumps({"config": {"init_from": "pretrained"}}))
    run([shifted_pair("a")], config=Config(init_from=str(ancestor)), figures=0)
    printed = capsys.readouterr().out
    assert "trained without the test subjects" in printed and "synthetic anatomy only" in printed

    record["train"]["subjects"].append("af")
    (ancestor / "splits.json").write_text(json.dumps(record))
    folder = run([shifted_pair("a")], config=Config(init_from=str(ancestor)), figures=0)
    assert "WARNING: LEAKAGE" in capsys.readouterr().out
    assert "with test subjects: af" in (folder / "tables.md").read_text()

    run([shifted_pair("a")], config=Config(init_from=str(tmp_path / "gone")), figures=0)
    assert "whose training data are unknown" in capsys.readouterr().out


class Scattered(nn.Module):
    """Stands for a network with dropout: a shift along the second axis that a key moves by up to a voxel."""

    @nn.compact
    def __call__(self, fixed, moving):
        self.param("shift", nn.initializers.zeros, (3,))
        x = jnp.arange(fixed.shape[1])[:, None, None, None] / fixed.shape[1]
        place = jnp.broadcast_to(x * jnp.array([0.0, 1.0, 0.0])[None, None, None], (*fixed.shape[:4], 3))
        field = place * jax.random.uniform(self.make_rng("dropout"))
        return Prediction(field, (field,), ())


def test_dropout_samples_go_to_landmarks_and_figures(run, capsys):
    points = np.random.default_rng(1).uniform(3, 9, (20, 3))
    pair = shifted_pair(moving_landmarks=points)  # errors that differ
    config = Config(seed=4, model=ModelConfig(dropout=0.2))
    folder = run([pair], config=config, mc_dropout=8, figures=1, model=Scattered())
    rows = list(csv.DictReader((folder / "landmarks.csv").read_text().splitlines()))
    found = np.array([float(row["dropout_sd_mm"]) for row in rows])
    # The SD grows along x, by the SD of the drawn numbers and a voxel of 1 mm along y.
    place = np.rint(pair.fixed_landmarks[:, 0]) / SHAPE[0]
    slope = found / place
    np.testing.assert_allclose(slope, slope[0], rtol=1e-4)
    assert 0.1 < slope[0] < 0.5  # 0.29 is that of numbers from 0 to 1
    assert (folder / "figures" / "calibration_of_the_dropout_uncertainty.png").exists()
    assert "rank correlation of SD by dropout, mm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rate", "samples", "message"),
    [(0.0, 5, "model.dropout is 0: train with"), (0.2, 1, "--mc-dropout is 1: an SD needs 2")],
)
def test_useless_dropout_samples_are_refused(run, rate, samples, message):
    with pytest.raises(UserError, match=message) as raised:
        run([shifted_pair()], config=Config(model=ModelConfig(dropout=rate)), mc_dropout=samples)
    assert "\n" not in str(raised.value)


def test_a_rate_that_the_network_was_not_trained_with_is_refused(run, tmp_path):
    record = {"config": {"model": dataclasses.asdict(ModelConfig())}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a run with model\.dropout=0\.0, this config has 0\.2"):
        run([shifted_pair()], config=Config(model=ModelConfig(dropout=0.2)), mc_dropout=4)
