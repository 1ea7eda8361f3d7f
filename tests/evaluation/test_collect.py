"""Tables over several runs, from evaluations that were written by hand."""

import json

import numpy as np
import pytest

from adregnet_jax.errors import UserError
from adregnet_jax.evaluation.collect import collect, main
from adregnet_jax.evaluation.published import DIRLAB_TRE_MM
from adregnet_jax.evaluation.statistics import compare
from adregnet_jax.report import tables
from adregnet_jax.report.tables import read_cases


def evaluated(folder, name, tre_mm, *, landmarks=300, dice=None):
    """A workdir as eval.py leaves it, with one case."""
    row = dict.fromkeys(
        ["name", "landmarks", "tre_before_mm", "tre_before_sd_mm", "tre_mm", "tre_sd_mm", "tre_snapped_mm",
         "dice_before", "dice", "dice_onehot", "folded_percent", "seconds", "ncc_before", "ncc", "mse_before",
         "mse", "ssim_before", "ssim", "jacobian_mean", "jacobian_sd", "jacobian_min", "sd_log_jacobian",
         "folded_volume_percent"], 0.5)  # fmt: skip
    row |= {"name": name, "tre_mm": tre_mm, "landmarks": landmarks, "dice": dice}
    evaluation = folder / "eval"
    evaluation.mkdir(parents=True)
    (evaluation / "cases.csv").write_text(tables.to_csv([row]))
    if landmarks:
        distances = [{"name": name, "landmark": n, "before_mm": 5.0, "after_mm": tre_mm} for n in range(4)]
        (evaluation / "landmarks.csv").write_text(tables.to_csv(distances))
    data = {"kind": "dirlab", "dirlab": {"test_case": 1, "cases": [1, 2], "preprocessing": "isotropic"}}
    (folder / "config.json").write_text(json.dumps({"config": {"data": data}}))
    return folder


@pytest.fixture
def folds(tmp_path):
    values = np.round(np.random.default_rng(0).uniform(0.5, 3, 10), 2).tolist()
    runs = [evaluated(tmp_path / f"fold{n}", f"case{n}", value) for n, value in enumerate(values, 1)]
    return runs, values


def test_folds_become_one_table_in_the_order_of_the_cases(folds, tmp_path):
    runs, values = folds
    table_1, table_2, _ = collect(runs[::-1], tmp_path / "out")
    assert [row["name"] for row in table_1.rows] == [f"case{n}" for n in range(1, 11)] + ["mean", "SD"]
    assert table_1.rows[-2]["tre_mm"] == pytest.approx(np.mean(values))
    assert [row["Jiang"] for row in table_1.rows[:10]] == list(DIRLAB_TRE_MM["Jiang"])
    assert "Jiang" in [column.heading for column in table_1.columns]
    assert table_2.rows[0]["ncc"] == 0.5
    written = {path.name for path in (tmp_path / "out").iterdir()}
    stems = ("table_1", "table_2", "statistics")
    assert written == {f"{stem}.{suffix}" for stem in stems for suffix in ("txt", "csv", "md", "tex")} | {
        "landmark_distances.png",
        "report.html",
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "trained without case 1" in page and "AD-RegNet (paper)" in page


def test_the_tests_are_those_of_the_columns_corrected_for_their_number(folds, tmp_path):
    runs, values = folds
    statistics = collect(runs, tmp_path / "out")[2].rows
    jiang = next(row for row in statistics if row["name"] == "Jiang")
    assert jiang["p"] == compare(values, DIRLAB_TRE_MM["Jiang"]).p
    assert all(row["p_corrected"] >= row["p"] for row in statistics)
    assert max(row["p_corrected"] / row["p"] for row in statistics) == pytest.approx(len(DIRLAB_TRE_MM))


def test_a_run_that_was_trained_on_its_test_case_is_never_called_leave_one_out(folds, tmp_path):
    (run, *_), _ = folds
    record = json.loads((run / "config.json").read_text())
    record["config"]["data"]["dirlab"]["protocol"] = "paper"
    (run / "config.json").write_text(json.dumps(record))
    collect([run], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "WARNING: LEAKAGE, trained with the test case 1" in page
    assert "leave-one-out" not in page


def test_published_columns_are_of_dirlab_alone_and_snapped_goes_with_snapped(folds, tmp_path):
    runs, values = folds
    statistics = {row["name"]: row for row in collect(runs, tmp_path / "out")[2].rows}
    assert statistics["pTVreg (snapped)"]["mean_difference"] == pytest.approx(
        0.5 - np.mean(DIRLAB_TRE_MM["pTVreg"])
    )
    assert statistics["IDIR"]["mean_difference"] == pytest.approx(
        np.mean(values) - np.mean(DIRLAB_TRE_MM["IDIR"])
    )
    assert "Network alone" in (tmp_path / "out" / "table_1.md").read_text()

    for run in runs:
        (run / "config.json").write_text(json.dumps({"config": {"data": {"kind": "files"}}}))
    assert len(collect(runs, tmp_path / "out")) == 2
    others = [evaluated(tmp_path / f"other{n}", f"mycase{n}", 1.0) for n in range(1, 8)]
    assert len(collect(others, tmp_path / "out")) == 2


def test_cases_that_either_side_lacks_are_left_out_and_reported(tmp_path):
    ours = [evaluated(tmp_path / f"a{n}", f"x{n}", 1.0 + n if n else None, landmarks=None) for n in range(8)]
    other = tmp_path / "other.csv"
    other.write_text(tables.to_csv([{"name": f"x{n}", "tre_mm": None if n == 1 else 1.0} for n in range(8)]))
    (row,) = collect(ours, tmp_path / "out", [other])[2].rows
    assert row["pairs"] == 6 and row["name"].endswith("(tre_mm), 6 of 8 cases")
    assert row["mean_difference"] == pytest.approx(np.mean(range(2, 8)))


def test_few_folds_have_no_p_and_the_table_says_why(folds, tmp_path):
    statistics = collect(folds[0][:3], tmp_path / "out")[2]
    assert {row["p"] for row in statistics.rows} == {None}
    assert "n/a: 3 pairs differ" in tables.to_text(statistics.rows, statistics.columns)


def test_other_data_is_compared_with_another_run_by_case(tmp_path):
    ours = [evaluated(tmp_path / f"a{n}", f"x{n}", None, landmarks=None, dice=0.8 + n / 50) for n in range(7)]
    theirs = [{"name": f"x{n}", "tre_mm": None, "dice": 0.7 + n / 100} for n in reversed(range(7))]
    other = tmp_path / "other.csv"
    other.write_text(tables.to_csv(theirs))
    table_1, _, statistics = collect(ours, tmp_path / "out", [other])
    assert "Jiang" not in [column.heading for column in table_1.columns]
    (row,) = statistics.rows
    assert row["mean_difference"] == pytest.approx(0.13)
    assert row["effect"] == 1
    assert row["p"] == pytest.approx(2 / 2**7)
    other.write_text(tables.to_csv(theirs[1:]))
    with pytest.raises(UserError, match=r"cases differ from those of these runs \(x6"):
        collect(ours, tmp_path / "out", [other])


def test_what_is_missing_or_there_twice_is_one_line(folds, tmp_path, capsys):
    (run, *_), _ = folds
    assert main([str(run), str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert "run eval.py with this workdir first" in capsys.readouterr().err
    (tmp_path / "leaking").mkdir()
    leaking = evaluated(tmp_path / "leaking" / "run", "case1 (trained on)", 1.0)
    assert main([str(run), str(leaking), "--output", str(tmp_path / "out")]) == 2
    assert "case1: in more than one run" in capsys.readouterr().err
    assert main([str(run), str(run), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: case1: in more than one run, but each case counts once: leave one out\n"
    )
    assert not (tmp_path / "out").exists()
    (run / "eval" / "cases.csv").write_text("name,tre_mm\ncase1,much\n")
    with pytest.raises(UserError, match="is not a table of eval"):
        read_cases(run / "eval" / "cases.csv")
    assert main([str(folds[0][1]), "--output", str(tmp_path / "out")]) == 0
    assert "case2" in capsys.readouterr().out
