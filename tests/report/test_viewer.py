"""The interactive report: the contents of its page, and the page in a browser."""

import base64
import dataclasses
import gzip
import io
import json
import re
import time

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

from adregnet_jax.report import page as html
from adregnet_jax.report import tables
from adregnet_jax.report.viewer import ViewedPair, coarsening, pack
from tools.chromium import chromium, chromium_path, opened
from tools.vendor_niivue import SCRIPT, check

SHAPE = (24, 20, 16)
# Axes of the file: left, posterior, superior, of 2 x 2 x 3 mm.
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2, 0, 20], [0, 0, 3, -10], [0, 0, 0, 1]])
NAME = "</script><b>liver</b> & $more"
VERDICT = {
    "verdict": "check",
    "score": 0.5,
    "predicted_error_mm": 1.25,
    "predicted_error_90_mm": [0.3, 2.5],
    "reasons": ["the field <folds>"],
}
LANDMARKS_MM = np.array([[10.0, 4, 5], [-8, -6, 20], [0, 10, 14]])


def ramp(axis):
    """Intensities from 0 to 1 along an axis."""
    values = np.linspace(0, 1, SHAPE[axis], dtype=np.float32)
    return np.broadcast_to(np.moveaxis(values[:, None, None], 0, axis), SHAPE).copy()


def a_pair(**changes):
    displacement = np.zeros((*SHAPE, 3), np.float32)
    displacement[..., 0] = 2 * ramp(2)
    jacobian = 1 + 0.5 * ramp(1)
    jacobian[3, 4, 5] = -0.5
    labels = np.zeros(SHAPE, np.int32)
    labels[6:15, 6:15, 5:11] = 70000
    fixed = ramp(0)
    fixed[10:14, 8:12] = 0  # a hole with edges, in the middle
    values = {
        "name": "one",
        "affine": AFFINE,
        "fixed": fixed,
        "moving": 1 - ramp(0),
        "warped": ramp(1),
        "displacement": displacement,
        "jacobian": jacobian,
        "error_mm": 3 * ramp(0),
        "fixed_labels": labels,
        "moving_labels": np.roll(labels, 3, 0),
        "warped_labels": np.roll(labels, 1, 0),
        "label_names": {70000: NAME},
        "fixed_landmarks_mm": LANDMARKS_MM,
        "moving_landmarks_mm": LANDMARKS_MM + np.array([6.0, 0, 0]),
        "mapped_landmarks_mm": LANDMARKS_MM + np.array([5.0, 0, 0]),
        "fixed_window": (-1000.0, 530.0),
    }
    return ViewedPair(**values | changes)


def contents(packed, name):
    return gzip.decompress(base64.b64decode(packed.volumes[name]))


def volume(packed, name, *, dtype=np.uint8):
    """A map or labels [x, y, z]."""
    shape = next((m["shape"] for m in packed.record["maps"] if m["name"] == name), packed.record["shape"])
    return np.frombuffer(contents(packed, name), dtype).reshape(shape, order="F")


def scan(packed, name):
    return nib.Nifti1Image.from_bytes(contents(packed, name))


def test_scans_are_packed_in_patient_orientation():
    packed = pack(a_pair(), limit_bytes=1e6)
    fixed = scan(packed, "fixed")
    assert nib.aff2axcodes(fixed.affine) == ("R", "A", "S")
    np.testing.assert_allclose(fixed.affine, packed.record["affine"])
    expected = nib.as_closest_canonical(
        nib.Nifti1Image(np.rint(255 * a_pair().fixed).astype(np.uint8), AFFINE)
    )
    np.testing.assert_allclose(fixed.affine, expected.affine)
    np.testing.assert_array_equal(np.asarray(fixed.dataobj), np.asarray(expected.dataobj))
    # The voxel of the file is found again.
    np.testing.assert_allclose(packed.record["to_file"] @ np.array([0, 0, 0, 1]), [23, 19, 0, 1], atol=1e-9)


def test_labels_are_packed_by_rank_and_maps_by_value():
    packed = pack(a_pair(), limit_bytes=1e6)
    assert packed.record["labels"] == [{"label": 70000, "name": NAME}]
    labels = volume(packed, "warped_labels")
    np.testing.assert_array_equal(labels, a_pair().warped_labels[::-1, ::-1] > 0)
    found = {one["name"]: one for one in packed.record["maps"]}
    assert found.keys() == {"displacement", "jacobian", "error"}
    moved_mm = (volume(packed, "displacement") - 1.0) * found["displacement"]["step"]
    assert moved_mm.max() == pytest.approx(4 * (1 - 0.5 / 15), abs=0.02)  # the last two slices are averaged
    assert (volume(packed, "jacobian") == 0).sum() == 1  # the one fold is in no mean


def test_maps_leave_out_the_background_but_not_the_holes():
    scan = np.zeros((24, 24, 16), np.float32)
    scan[4:20, 4:20] = 0.5
    scan[10:14, 10:14] = 0  # such as air in a lung
    still = np.zeros((*scan.shape, 3), np.float32)
    pair = ViewedPair("", np.eye(4), scan, scan, scan, still, np.ones_like(scan), error_mm=3 * scan + 1)
    error = volume(pack(pair, limit_bytes=1e6), "error")
    assert (error[:2] == 0).all() and (error[:, :2] == 0).all()
    assert (error[2:10, 2:10] > 0).all()


def test_many_labels_take_two_bytes():
    labels = np.arange(np.prod(SHAPE)).reshape(SHAPE) // 24 - 10  # 320 of them, some negative
    packed = pack(a_pair(fixed_labels=labels), limit_bytes=1e6)
    assert packed.record["label_bytes"] == 2
    ranks = volume(packed, "fixed_labels", dtype=np.uint16)
    names = np.array([0, *(one["label"] for one in packed.record["labels"])])
    np.testing.assert_array_equal(names[ranks], labels[::-1, ::-1])


def test_landmarks_have_their_residual_in_voxels():
    packed = pack(a_pair(), limit_bytes=1e6)
    first = packed.record["landmarks"][0]
    grid = np.array(packed.record["affine"])
    np.testing.assert_allclose(nib.affines.apply_affine(grid, first["at"]), LANDMARKS_MM[0], atol=1e-2)
    assert first["residual"] == [0.5, 0, 0]  # 1 mm to the right
    assert (first["before_mm"], first["after_mm"]) == (6, 1)


def test_a_pair_is_made_coarser_until_it_fits():
    noise = np.random.default_rng(0).random((40, 40, 30), np.float32)
    still = np.zeros((*noise.shape, 3), np.float32)
    big = ViewedPair("", np.diag([1.0, 1, 2, 1]), noise, noise, noise, still, np.ones_like(noise))
    whole, small = (pack(big, limit_bytes=limit) for limit in (1e6, 40_000))
    assert small.size_bytes() <= 40_000 < whole.size_bytes()
    assert whole.record["shape"] == [40, 40, 30]
    assert "40 × 40 × 30 voxels" in whole.record["note"] and "averaged" in small.record["note"]
    assert np.prod(small.record["shape"]) > 40_000 / (3.5 * 4 / 3) / 2.5  # not much coarser than it must be
    whole_corner, small_corner = (
        nib.affines.apply_affine(scan(packed, "fixed").affine, -0.5 * np.ones(3)) for packed in (whole, small)
    )
    np.testing.assert_allclose(small_corner, whole_corner, atol=1e-5)


def test_coarsening_starts_with_the_thinnest_voxels():
    assert coarsening((100, 100, 20), (1, 1, 5), 1e6) == (1, 1, 1)
    assert coarsening((100, 100, 20), (1, 1, 5), 50_000) == (2, 2, 1)
    assert coarsening((8, 8, 8), (1, 1, 1), 0) == (8, 8, 8)


def test_the_page_escapes_what_it_is_given():
    page = html.page("<i>", "a & b", [], verdict=VERDICT, numbers=[("<n>", "&")], pairs=[a_pair(name="<u>")])
    body = page[: page.index('<script type="text/plain"')]
    for given in ("<i>", "<folds>", "<n>", "<u>", "<b>"):
        assert given not in body
    (described,) = re.findall(r'<script type="application/json" id="pairs">(.*?)</script>', page, re.DOTALL)
    assert json.loads(described)[0]["labels"][0]["name"] == NAME


def test_pairs_share_the_size_of_the_page(monkeypatch):
    monkeypatch.setattr(html, "LARGEST_BYTES", 3_000_000)
    monkeypatch.setattr(html, "FEWEST_BYTES", 10_000)
    noise = np.random.default_rng(0).random((60, 60, 60), np.float32)
    still = np.zeros((*noise.shape, 3), np.float32)
    big = ViewedPair("", np.eye(4), noise, noise, noise, still, np.ones_like(noise))
    assert 2_500_000 < len(html.page("", "", [], pairs=[big, big]).encode()) <= 3_000_000


def test_a_page_of_pictures_has_no_viewer():
    page = html.page("t", "p", [html.Section("s", "<p>x</p>")])
    assert "niivue" not in page and len(page) < 20_000


def test_niivue_is_the_build_that_its_checksum_names():
    check(SCRIPT.read_bytes())
    assert "BSD 2-Clause" in SCRIPT.with_name("LICENSE.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="Playwright is not installed")
    if chromium_path() is None:
        pytest.skip("no Chromium is installed")
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(browser, tmp_path_factory):
    """A page with two pairs, open for all tests of this module, each of which resets it."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    second = dataclasses.replace(a_pair(), name="two", fixed_landmarks_mm=None, fixed_labels=None)
    rows = tables.with_mean_and_sd([{"name": n, "dice": d} for n, d in (("b", 0.5), ("a", 0.9), ("c", None))])
    columns = (tables.Column("case", "{name}"), tables.Column("Dice", "{dice:.2f}"))
    section = html.Section("Cases", tables.to_html(rows, columns))
    path.write_text(
        html.page("Two pairs", "p", [section], verdict=VERDICT, pairs=[a_pair(), second]), encoding="utf-8"
    )
    with opened(browser, path) as page:
        yield page


@pytest.fixture
def page(report):
    """The page as it is opened, without the lines over its slices."""
    report.evaluate(
        "Object.assign(viewer.view, {at: [12, 10, 8], plane: 0, blend: 1, flicker: false,"
        " checkerboard: false, edges: '', map: '', planes: 'all', alone: null, zoom: 1, pan: [0, 0, 0],"
        " labels: '', landmarks: false, chosen: -1}), viewer.draw()"
    )
    return report


def until(true, *, seconds=10):
    """Waits until a condition holds, for changes that the page makes by itself."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# What NiiVue and the page drew, read at once: a screenshot takes longer.
DRAWN = """(name) => {
  const {slices, marks} = viewer.panels.find((panel) => panel.name === name);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [slices.width, slices.height];
  viewer.draw();
  for (const part of [slices, marks]) canvas.getContext("2d").drawImage(part, 0, 0);
  return canvas.toDataURL().split(",")[1];
}"""


def shown(page, panel, *, on_screen=False):
    """The colours [height, width, 3] of a panel, and the places of its planes."""
    if on_screen:
        png = page.locator(f"#panel-{panel} .canvases").screenshot()
    else:
        png = base64.b64decode(page.evaluate(DRAWN, panel))
    tiles = page.evaluate(f"viewer.tiles('{panel}').map((tile) => ({{...tile}}))")
    return np.asarray(Picture.open(io.BytesIO(png)).convert("RGB"), float), tiles


def at(tile, voxel):
    """The pixel (x, y) of a voxel of the page in a plane."""
    x, y = (tile[f"{a}0"] + tile[f"{a}1"] * voxel[tile[axis]] for a, axis in (("x", "h"), ("y", "v")))
    return int(x), int(y)


def grey(page, panel, plane, voxel):
    """The mean grey of the pixels around a voxel in a plane."""
    pixels, tiles = shown(page, panel)
    x, y = at(tiles[plane], voxel)
    return pixels[y - 1 : y + 2, x - 1 : x + 2].mean()


@pytest.mark.parametrize(
    ("panel", "values"), [("fixed", ramp(0)), ("moving", 1 - ramp(0)), ("compared", ramp(1))]
)
def test_the_panels_show_the_scans(page, panel, values):
    turned = 255 * values[::-1, ::-1]  # the page's axes: right, anterior, superior
    pixels, tiles = shown(page, panel, on_screen=True)
    assert [tile["normal"] for tile in tiles] == [2, 1, 0]
    differences = []
    for tile in tiles:
        for voxel in ((5, 4, 4), (18, 15, 4), (6, 14, 12), (20, 6, 12)):
            place = [12, 10, 8]
            for axis in (tile["h"], tile["v"]):
                place[axis] = voxel[axis]
            x, y = at(tile, place)
            differences.append(pixels[y, x].mean() - turned[tuple(place)])
    assert np.abs(differences).max() < 8  # of 255: linear interpolation at whole pixels


def test_a_click_moves_the_cross_hair_in_all_panels(page):
    _, tiles = shown(page, "moving")
    x, y = at(tiles[1], (4, 10, 12))
    page.locator("#panel-moving .marks").click(position={"x": x, "y": y})
    assert page.evaluate("viewer.view.at") == [4, 10, 12]
    page.evaluate("viewer.draw()")
    for place in page.evaluate("viewer.panels.map((panel) => [...panel.niivue.scene.crosshairPos])"):
        np.testing.assert_allclose(place, [4.5 / 24, 10.5 / 20, 12.5 / 16], atol=1e-6)
    # The other planes of the other panels go through the point, too: fixed is a ramp to the left.
    assert grey(page, "fixed", 2, (4, 5, 3)) == pytest.approx(255 * (1 - 4 / 23), abs=6)
    readout = page.locator("#readout").inner_text()
    assert "voxel of the file 19, 9, 12" in readout
    assert f"fixed {-1000 + 1530 * round(255 * 19 / 23) / 255:.0f}" in readout
    assert "warped 0.47" in readout  # without a window of its own


def test_wheel_and_keys_change_the_slice(page):
    _, tiles = shown(page, "fixed")
    x, y = at(tiles[0], (6, 6, 8))
    page.locator("#panel-fixed .marks").hover(position={"x": x, "y": y})
    page.mouse.wheel(0, -100)
    until(lambda: page.evaluate("viewer.view.at") == [12, 10, 9])
    page.locator("#panel-fixed .marks").focus()
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("viewer.view.at") == [12, 11, 8]


def test_the_slider_blends(page):
    voxel = (5, 15, 8)
    fixed, warped = 255 * (1 - 5 / 23), 255 * (1 - 15 / 19)
    for percent in (0, 40, 100):
        page.locator("#blend").fill(str(percent))
        page.evaluate("viewer.draw()")
        expected = fixed + percent / 100 * (warped - fixed)
        assert grey(page, "compared", 0, voxel) == pytest.approx(expected, abs=8)


def test_flicker_shows_one_and_then_the_other(page):
    page.locator("#flicker").check()
    title = page.locator("#panel-compared figcaption")
    until(lambda: title.inner_text() == "fixed")
    until(lambda: title.inner_text() == "warped")
    page.locator("#flicker").uncheck()
    until(lambda: title.inner_text() == "warped")


def test_the_checkerboard_has_squares_of_both_scans(page):
    page.locator("#checkerboard").check()
    page.evaluate("viewer.draw()")
    # Squares of a longest side of 48 mm over 8: 6 mm, which are 3 voxels in the axial plane.
    for voxel, values in (((4, 16, 8), "fixed"), ((4, 13, 8), "warped"), ((7, 16, 8), "warped")):
        expected = 255 * (1 - voxel[0] / 23 if values == "fixed" else 1 - voxel[1] / 19)
        assert grey(page, "compared", 0, voxel) == pytest.approx(expected, abs=12)


def coloured(page, panel):
    pixels, _ = shown(page, panel)
    return (np.ptp(pixels, axis=2) > 60).sum()


def test_a_map_is_laid_over_the_warped_scan_alone(page):
    lines = {panel: coloured(page, panel) for panel in ("fixed", "compared")}
    page.locator("#map").select_option("displacement")
    page.evaluate("viewer.draw()")
    assert coloured(page, "compared") > lines["compared"] + 10_000
    assert coloured(page, "fixed") == lines["fixed"]
    assert "displacement 0" in page.locator("#legend").inner_text()
    page.locator("#map").select_option("")
    page.evaluate("viewer.draw()")
    assert coloured(page, "compared") == lines["compared"]


def test_outlines_and_edges_are_laid_over_the_slices(page):
    counts = []
    for control, value in (("labels", ""), ("labels", "all"), ("labels", "1"), ("edges", "fixed")):
        page.locator(f"#{control}").select_option(value)
        page.evaluate("viewer.draw()")
        counts.append(coloured(page, "compared"))
    assert counts[1] > counts[0] + 300
    assert counts[2] == counts[1]  # the only label
    assert counts[3] > counts[2]


def test_a_landmark_is_a_click_away(page):
    page.locator("#landmark-list tbody tr").nth(1).click()
    page.evaluate("viewer.draw()")
    grid = np.array(pack(a_pair(), limit_bytes=1e6).record["affine"])
    found = nib.affines.apply_affine(grid, page.evaluate("viewer.view.at"))
    np.testing.assert_allclose(found, LANDMARKS_MM[1], atol=0.01)
    assert page.evaluate("viewer.view.landmarks")
    page.keyboard.press("n")
    assert page.locator('#landmark-list tr[aria-selected="true"] td').first.inner_text() in ("2", "3")


def test_a_right_drag_changes_the_contrast(page):
    voxel = (5, 15, 8)
    before = grey(page, "compared", 0, voxel)
    x, y = at(shown(page, "compared")[1][0], voxel)
    box = page.locator("#panel-compared .marks").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + y)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + x, box["y"] + y + 60)
    page.mouse.up(button="right")
    until(lambda: page.evaluate("viewer.view.window[0]") > 5)
    page.evaluate("viewer.draw()")
    low, high = page.evaluate("viewer.view.window")
    assert high - low == pytest.approx(255)
    assert grey(page, "compared", 0, voxel) == pytest.approx(before - low, abs=3)
    page.locator("#reset").click()
    until(lambda: page.evaluate("viewer.view.window") == [0, 255])


def test_a_browser_without_webgl_gets_a_message(browser, report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html.page("t", "p", [], verdict=VERDICT, pairs=[a_pair()]), encoding="utf-8")
    bare = browser.new_page()
    bare.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    bare.goto(path.as_uri())
    until(lambda: "It needs WebGL 2" in bare.locator("#viewer .failure").inner_text())
    assert "Check this registration" in bare.locator(".verdict").inner_text()
    bare.close()


def test_zoom_keeps_the_cross_hair_in_place(page):
    before = at(shown(page, "fixed")[1][0], (12, 10, 8))
    page.keyboard.press("+")
    page.evaluate("viewer.draw()")
    tile = shown(page, "fixed")[1][0]
    assert np.abs(np.subtract(at(tile, (12, 10, 8)), before)).max() <= 1
    page.keyboard.press("r")
    assert page.evaluate("viewer.view.zoom") == 1


def test_a_drag_with_shift_pans_all_panels(page):
    x, y = at(shown(page, "fixed")[1][0], (12, 10, 8))
    box = page.locator("#panel-fixed .marks").bounding_box()
    page.keyboard.down("Shift")
    page.mouse.move(box["x"] + x, box["y"] + y)
    page.mouse.down()
    page.mouse.move(box["x"] + x + 30, box["y"] + y - 20)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.evaluate("viewer.draw()")
    for panel in ("fixed", "compared"):
        found = at(shown(page, panel)[1][0], (12, 10, 8))
        assert np.abs(np.subtract(found, (x + 30, y - 20))).max() <= 1


def test_one_panel_and_one_plane_alone(page):
    page.keyboard.press("x")
    page.keyboard.press("2")
    page.evaluate("viewer.draw()")
    assert page.locator("#viewer figure:visible").count() == 1
    _, tiles = shown(page, "compared")
    assert [tile["normal"] for tile in tiles] == [1]
    page.keyboard.press("x")


def test_another_pair_is_loaded_with_the_same_view(page):
    page.locator("#edges").select_option("second")
    page.locator("#second").select_option("moving")
    until(lambda: page.evaluate("viewer.panels[2].scans.join()") == "fixed,moving")
    first = shown(page, "compared")[0]
    page.locator("#pair").select_option("1")
    until(lambda: page.locator("#landmark-list").is_hidden() and page.locator("#pair").is_enabled())
    page.locator("#pair").select_option("0")
    until(lambda: page.locator("#landmark-list").is_visible() and page.locator("#pair").is_enabled())
    page.evaluate("viewer.view.at = [12, 10, 8]; viewer.view.landmarks = false")
    np.testing.assert_array_equal(shown(page, "compared")[0], first)
    page.locator("#second").select_option("warped")
    until(lambda: page.evaluate("viewer.panels[2].scans.join()") == "fixed,warped")


def test_tables_are_sorted_by_their_headings(page):
    headings = page.locator("body > table th")
    names = page.locator("body > table tbody td:first-child")
    headings.nth(0).click()
    assert names.all_inner_texts() == ["a", "b", "c"]
    headings.nth(1).click()
    assert names.all_inner_texts() == ["b", "a", "c"]
    headings.nth(1).click()
    assert names.all_inner_texts()[-2:] == ["a", "b"] or names.all_inner_texts()[0] == "c"
    assert page.locator("body > table tfoot td:first-child").all_inner_texts() == ["mean", "SD"]
