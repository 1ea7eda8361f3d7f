"""Table V: its rows and numbers, and resuming after an interruption; nothing is trained."""

import csv
import dataclasses
import json

import pytest

from adregnet_jax.atomic import write_file
from adregnet_jax.config import Config, ModelConfig
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import ablation
from adregnet_jax.evaluation import evaluate as evaluation
from adregnet_jax.report import tables
from adregnet_jax.training import loop


def differences(ours, theirs, path=""):
    """Paths and values of the fields in which two configs differ."""
    if not dataclasses.is_dataclass(ours):
        return {} if ours == theirs else {path: ours}
    found: dict[str, object] = {}
    for field in dataclasses.fields(ours):
        found |= differences(
            getattr(ours, field.name), getattr(theirs, field.name), f"{path}.{field.name}".lstrip(".")
        )
    return found


@pytest.fixture
def trained(monkeypatch):
    """Names of the folders that were trained, in order; the evaluation writes two cases of given numbers."""
    names = []

    def train(config, workdir):
        loop.prepare_workdir(config, workdir)
        names.append(workdir.name)

    def evaluate(config, workdir, *, figures):
        assert figures == 0
        worse = 0.0 if config.model.cross_attention else 1.0
        cases = [
            {
                "name": case,
                "tre_mm": tre_mm + worse + config.seed,
                "dice": None,  # there are no labels
                "ncc": 0.5,
                "mse": 0.01,
                "ssim": 0.75,
                "folded_percent": None if case == "b" else 0.25,
            }
            for case, tre_mm in (("a", 1.0), ("b", 2.0))
        ]
        write_file(workdir / "eval" / "cases.csv", tables.to_csv(cases))
        write_file(workdir / "eval" / "summary.json", "{}")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return names


def test_rows_differ_from_the_base_in_the_part_they_lack():
    base = Config(model=ModelConfig(channels=(4, 8)))
    found = {
        row: differences(ablation.row_config(base, changes), base)
        for row, changes in (ablation.ROWS | ablation.BASELINES).items()
    }
    cross, regional = {"model.cross_attention": False}, {"model.regional_attention": False}
    assert found == {
        "full": {},
        "without cross-attention": cross,
        "without regional attention": regional,
        "without multi-resolution synthesis": {"model.multi_resolution": False},
        "without both attentions": cross | regional,
        "voxelmorph-1": {"model.architecture": "voxelmorph-1"},
        "voxelmorph-2": {"model.architecture": "voxelmorph-2"},
    }
    assert base == Config(model=ModelConfig(channels=(4, 8)))


def test_the_table_holds_means_over_cases_then_mean_and_sd_over_seeds(trained, tmp_path, capsys):
    ablation.table_v(Config(), tmp_path, seeds=2)
    assert trained[:2] == ["full-seed0", "without-cross-attention-seed0"] and len(trained) == 10

    with (tmp_path / "table_v.csv").open(newline="") as file:
        full, without, *_ = csv.DictReader(file)
    assert (full["network"], full["seeds"], full["cases"]) == ("full", "2", "2")
    assert float(full["tre_mm"]) == 2.0  # (1 + 2) / 2 of seed 0, one more of seed 1
    assert float(full["tre_mm_sd"]) == pytest.approx(0.5**0.5)
    assert float(without["tre_mm"]) == 3.0
    assert (full["dice"], float(full["folded_percent"])) == ("", 0.25)

    lines = (tmp_path / "table_v.md").read_text().splitlines()
    assert lines[0] == "| network | TRE, mm | NCC | MSE | SSIM | folded, % |"
    assert lines[2] == (
        "| full | 2.00 (0.71) | 0.500 (0.000) | 0.0100 (0.0000) | 0.750 (0.000) | 0.250 (0.000) |"
    )
    assert len(lines) == 7
    printed = capsys.readouterr().out
    assert "over 2 seeds" in printed and "without both attentions" in printed


def test_one_seed_has_no_sd(trained, tmp_path):
    ablation.ablate(Config(), tmp_path, {"full": ()}, seeds=1)
    assert "| full | 1.50 | 0.500 | 0.0100 | 0.750 | 0.250 |" in (tmp_path / "ablation.md").read_text()


def test_finished_rows_are_read_and_the_others_trained(trained, tmp_path):
    ablation.table_v(Config(), tmp_path, seeds=1)
    (tmp_path / "without-both-attentions-seed0" / "eval" / "summary.json").unlink()
    trained.clear()
    ablation.table_v(Config(), tmp_path, seeds=2, baselines=True)
    assert [name for name in trained if name.endswith("seed0")] == [
        "without-both-attentions-seed0", "voxelmorph-1-seed0", "voxelmorph-2-seed0",
    ]  # fmt: skip
    assert len([name for name in trained if name.endswith("seed1")]) == 7


def test_a_row_of_another_config_is_not_finished_even_after_an_interruption(trained, tmp_path, monkeypatch):
    ablation.ablate(Config(), tmp_path, {"full": ()}, seeds=1)
    longer = Config()
    longer.optimiser.epochs += 1

    def interrupted(config, workdir):
        loop.prepare_workdir(config, workdir)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ablation.ablate(longer, tmp_path, {"full": ()}, seeds=1)
    trained.clear()
    for _ in range(2):
        ablation.ablate(longer, tmp_path, {"full": ()}, seeds=1)
    assert trained == ["full-seed0"]
    written = json.loads((tmp_path / "full-seed0" / "config.json").read_text())
    assert written["config"]["optimiser"]["epochs"] == longer.optimiser.epochs


def test_a_row_from_before_a_setting_is_finished_where_that_has_its_default(trained, tmp_path):
    ablation.ablate(Config(), tmp_path, {"full": ()}, seeds=1)
    path = tmp_path / "full-seed0" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["model"]["convolution"]
    record["config"]["run"]["onednn"] = False
    path.write_text(json.dumps(record))
    ablation.ablate(Config(), tmp_path, {"full": ()}, seeds=1)
    assert trained == ["full-seed0"]
    other = Config(model=ModelConfig(convolution="xla"))
    with pytest.raises(UserError, match=r"holds a run with another model\.convolution"):
        ablation.ablate(other, tmp_path, {"full": ()}, seeds=1)


def test_a_folder_of_another_run_is_refused(trained, tmp_path):
    ablation.ablate(Config(), tmp_path, {"full": ()}, seeds=1)
    other = Config()
    other.loss.smoothness, other.loss.dice_labels, other.run.memory = 2.0, (1,), "off"
    with pytest.raises(
        UserError, match=r"full-seed0 holds a run with another loss\.smoothness, loss\.dice_l"
    ):
        ablation.ablate(other, tmp_path, {"full": ()}, seeds=1)
    assert trained == ["full-seed0"]
    assert (tmp_path / "full-seed0" / "eval" / "summary.json").is_file()


def test_rows_that_were_evaluated_on_other_cases_make_no_table(trained, tmp_path):
    ablation.ablate(Config(), tmp_path, {"full": ()}, seeds=2)
    path = tmp_path / "full-seed1" / "eval" / "cases.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"full-seed1 was evaluated on other cases than .*full-seed0"):
        ablation.ablate(Config(), tmp_path, {"full": ()}, seeds=2)


@pytest.mark.parametrize("model", [{"cross_attention": False}, {"architecture": "voxelmorph-1"}])
def test_a_base_that_lacks_a_part_is_refused(model, trained, tmp_path):
    with pytest.raises(UserError, match="lacks a part that the rows remove"):
        ablation.table_v(Config(model=ModelConfig(**model)), tmp_path)
    assert not trained


@pytest.fixture
def default_config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from adregnet_jax.config import Config as get_config\n")
    return str(path)


def test_rows_of_ones_own_take_the_place_of_the_papers(default_config, trained, tmp_path):
    two = "model.region_size=8 model.channels=(4, 8)"
    arguments = ["--config", default_config, "--workdir", str(tmp_path), "--seeds", "1"]
    rows = ["--row", "model.cross_attention=False", "--row", f" {two} ", "--config.loss.ncc=2"]
    assert ablation.main([*arguments, *rows]) == 0
    assert trained == [
        "config-seed0",
        "model.cross_attention=False-seed0",
        "model.region_size=8-model.channels=(4,-8)-seed0",
    ]  # fmt: skip
    written = json.loads((tmp_path / trained[2] / "config.json").read_text())["config"]
    assert (written["model"]["region_size"], written["model"]["channels"]) == (8, [4, 8])
    assert written["loss"]["ncc"] == 2

    assert not (tmp_path / "table_v.md").exists()
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| config", "1.50"], ["| model.cross_attention=False", "2.50"], [f"| {two}", "1.50"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("model.regionsize=8", "no field regionsize; did you mean region_size?"),
        ("model.region_size=small", "small"),
        ("model.heads=7", "model.heads is 7: expected a number that divides"),
        ("", "--row '': expected fields and values"),
        ("model.dtype model.heads=2", "expected fields and values"),
        ("seed=5", "a row can't set the seed"),
        ("loss.ncc=2/1", "ncc"),
        ("init_from=" + "a" * 200, "too long for the name of a folder"),
        ("init_from=a-b", "would share the folder"),
        ("init_from=a/b", "two rows"),
    ],
)
def test_a_row_that_can_not_be_is_refused_before_anything_is_trained(
    row, message, default_config, trained, tmp_path, capsys
):
    arguments = [
        "--config",
        default_config,
        "--workdir",
        str(tmp_path),
        "--row",
        "init_from=a/b",
        "--row",
        row,
    ]
    assert ablation.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not trained


@pytest.mark.parametrize("seeds", [["--seeds", "0"], ["--seeds=-1"], ["--seeds", "many"], ["--seeds"]])
def test_a_number_of_seeds_that_can_not_be_is_one_line(seeds, default_config, trained, tmp_path, capsys):
    assert ablation.main(["--config", default_config, "--workdir", str(tmp_path), *seeds]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --seeds must be a whole number, at least 1") and error.count("\n") == 1
    assert not trained
