"""The panels show the right slice in the right orientation, with grid lines where the field maps them."""

import io

import numpy as np
import pytest
from matplotlib import image

from adregnet_jax.report import figures

SPACING_MM = np.array([2.0, 3.0, 4.0])
SHAPE = (12, 10, 8)


def pixels(figure):
    """The figure as it would be saved: a valid PNG, read back."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    assert png.getvalue().startswith(b"\x89PNG\r\n\x1a\n")
    png.seek(0)
    return image.imread(png, format="png")


def draw(affine=None, displacement=None, jacobian=None, scan=None):
    rng = np.random.default_rng(0)
    scan = rng.uniform(0.1, 1, SHAPE) if scan is None else scan
    shape = scan.shape
    return figures.registration_figure(
        scan,
        rng.uniform(0.1, 1, shape),
        scan,
        np.zeros((*shape, 3)) if displacement is None else displacement,
        np.ones(shape) if jacobian is None else jacobian,
        spacing_mm=SPACING_MM,
        affine=np.eye(4) if affine is None else affine,
        title="a case",
    )


def panel(figure, row, column):
    return figure.axes[row * len(figures.PANELS) + column]


def shown(ax, layer=0):
    """The image [across, up] that a panel holds."""
    return np.asarray(ax.images[layer].get_array()).T


def test_figure_is_a_png_with_something_in_it():
    assert pixels(draw())[..., :3].std() > 0.05


def test_central_slices_of_a_field_at_rest():
    scan = np.random.default_rng(1).uniform(0.1, 1, SHAPE)
    figure = draw(scan=scan)
    np.testing.assert_array_equal(shown(panel(figure, 0, 0)), scan[:, :, 4])
    np.testing.assert_array_equal(shown(panel(figure, 1, 0)), scan[:, 5, :])
    np.testing.assert_array_equal(shown(panel(figure, 2, 0)), scan[6, :, :])
    assert panel(figure, 0, 0).get_ylabel() == "axial\nk = 4"


def test_panels_have_one_scale_in_mm_and_the_right_of_the_patient_on_the_left():
    figure = draw()
    inches = figure.get_size_inches()
    scales = []
    for row, (across, up) in enumerate([(24, 30), (24, 32), (30, 32)]):  # mm
        ax = panel(figure, row, 0)
        ax.apply_aspect()
        box = ax.get_position()
        scales += [box.width * inches[0] / across, box.height * inches[1] / up]
        assert ax.get_xlim()[0] > ax.get_xlim()[1]
        assert ax.get_ylim()[0] < ax.get_ylim()[1]
    assert scales == pytest.approx([scales[0]] * 6)


def test_an_array_in_another_orientation_gives_the_same_panels():
    rng = np.random.default_rng(2)
    scan = rng.uniform(0.1, 1, SHAPE)
    displacement = rng.normal(size=(*SHAPE, 3))
    expected = draw(scan=scan, displacement=displacement)
    # The same scan stored with axes inferior, right, posterior: (x, y, z) -> (-z, x, -y).
    stored = scan.transpose(2, 0, 1)[::-1, :, ::-1]
    field = displacement.transpose(2, 0, 1, 3)[::-1, :, ::-1][..., [2, 0, 1]] * (-1, 1, -1)
    affine = np.array([[0, 2, 0, 0], [0, 0, -3, 0], [-4, 0, 0, 0], [0, 0, 0, 1.0]])
    figure = figures.registration_figure(
        stored, stored, stored, field, np.ones(stored.shape), spacing_mm=SPACING_MM[[2, 0, 1]], affine=affine
    )
    for row in range(3):
        np.testing.assert_array_equal(shown(panel(figure, row, 0)), shown(panel(expected, row, 0)))
        lines, expected_lines = (panel(f, row, 5).collections[0].get_segments() for f in (figure, expected))
        np.testing.assert_allclose(np.concatenate(lines), np.concatenate(expected_lines))


def test_scans_share_a_window_and_scales_are_centred():
    figure = draw()
    limits = [panel(figure, 0, column).images[0].get_clim() for column in range(7)]
    assert limits[0] == limits[1] == limits[2]
    assert limits[3] == limits[4]
    assert limits[3][0] == -limits[3][1]
    assert sum(limits[6]) == pytest.approx(2.0)


def test_folded_voxels_are_marked():
    jacobian = np.ones(SHAPE)
    jacobian[6, 5, 4] = 0.0
    jacobian[6, 5, 3] = -0.5
    figure = draw(jacobian=jacobian)
    marks = [panel(figure, row, 6).images[1].get_array().count() for row in range(3)]
    assert marks == [1, 2, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["folded (≤ 0)"]
    assert not draw().legends


def test_grid_of_a_field_at_rest_is_regular():
    lines = figures.grid_lines(np.zeros((9, 7, 2)), np.array([1.0, 2.0]), every_mm=4.0)
    along_0, along_1 = lines[:4], lines[4:]
    np.testing.assert_array_equal([line[:, 1] for line in along_0], np.repeat([[0, 4, 8, 12]], 9, axis=0).T)
    np.testing.assert_array_equal([line[:, 0] for line in along_1], np.repeat([[0, 4, 8]], 7, axis=0).T)
    np.testing.assert_array_equal(along_0[0][:, 0], np.arange(9))


def test_grid_moves_with_the_field():
    displacement_mm = np.zeros((5, 5, 2))
    displacement_mm[2, 3] = (0.5, -0.25)
    lines = figures.grid_lines(displacement_mm, np.ones(2), every_mm=1.0)
    np.testing.assert_array_equal(lines[3][2], (2.5, 2.75))  # along axis 0, through the column 3
    np.testing.assert_array_equal(lines[5 + 2][3], (2.5, 2.75))  # along axis 1, through the row 2


def test_central_point_is_the_largest_motion_in_the_body():
    scan = np.ones((20, 20, 20))
    scan[12:] = 0.0
    motion_mm = np.zeros((20, 20, 20, 3))
    motion_mm[8:11, 9:12, 6:9] = (0, 0, 3.0)
    motion_mm[13:16, 9:12, 6:9] = 9.0  # background
    motion_mm[:3] = 9.0  # border
    assert figures.central_point(scan, scan, motion_mm) == (9, 10, 7)


def test_identical_constant_scans_can_be_drawn():
    constant = np.full(SHAPE, 0.5)
    figure = figures.registration_figure(
        constant,
        constant,
        constant,
        np.zeros((*SHAPE, 3)),
        constant * 2,
        spacing_mm=SPACING_MM,
        affine=np.eye(4),
    )
    assert np.isfinite(pixels(figure)).all()


def test_training_curves_hold_the_logged_values():
    records = [
        {"step": 1, "train/loss": 3.0, "learning_rate": 0.1},
        {"step": 2, "train/loss": 2.0, "validation/loss": 2.5, "validation/tre_mm": 4.0},
    ]
    figure = figures.training_figure(records)
    loss, rate, tre = figure.axes
    assert rate.get_title() == "learning_rate" and len(rate.lines) == 1
    assert {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in loss.lines} == {
        "training": [[1, 3.0], [2, 2.0]],
        "validation": [[2, 2.5]],
    }
    assert tre.get_title() == "tre_mm"
    assert pixels(figure)[..., :3].std() > 0.05


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("levels", [0, 2])
def test_levels_figure_has_a_column_a_map(levels, dropout):
    scan = np.random.default_rng(0).random((14, 12, 10))
    entropy = [np.ones((4, 4, 4)), np.ones((8, 8, 8))][:levels]
    jacobian = [np.ones((4, 4, 4)), np.ones((8, 8, 8))]
    figure = figures.levels_figure(
        scan,
        scan,
        scan,
        entropy,
        jacobian,
        spacing_mm=np.array([1.0, 1.0, 2.0]),
        affine=np.diag([-1, 1, 2, 1]),
        dropout_sd_mm=3 * scan if dropout else None,
    )
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    uncertainties = [f"uncertainty {n + 1}" for n in range(levels)]
    units = [ax.get_xlabel() for ax in figure.axes]
    assert units.count("SD of the displacement, mm") == dropout
    if dropout:
        uncertainties.append("uncertainty, dropout")
        panel_of_the_map = figure.axes[3 + levels]  # axial; this file runs to the left
        np.testing.assert_array_equal(shown(panel_of_the_map), 3 * scan[::-1, :, 5])
    assert titles == ["fixed", "moving", "warped", *uncertainties, "Jacobian 1", "Jacobian 2"]


def test_enlarged_repeats_voxels_and_crops():
    level = np.arange(8.0).reshape(2, 2, 2)
    full = figures.enlarged(level, (8, 7, 2))
    assert full.shape == (8, 7, 2)
    np.testing.assert_array_equal(full[3:5, 3:5, 1], [[1, 3], [5, 7]])
