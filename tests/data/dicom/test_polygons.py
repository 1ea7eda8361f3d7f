"""Contours as shares of pixels and back, with holes and several pieces."""

import numpy as np
import pytest

from adregnet_jax.data.dicom.polygons import area, coverage, outlines, with_keyholes

SQUARE = np.array([[2.5, 3.5], [9.5, 3.5], [9.5, 8.5], [2.5, 8.5]])


def circle(radius, centre, count=400):
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1) * radius + centre


def test_edges_between_pixels_and_through_them():
    expected = np.zeros((14, 12))
    expected[3:10, 4:9] = 1
    np.testing.assert_allclose(coverage([SQUARE], shape=(14, 12)), expected, atol=1e-6)
    shifted = coverage([SQUARE + np.array([0.25, 0.5])], shape=(14, 12))
    np.testing.assert_allclose(shifted[:, 6], [0, 0, 0, 0.75, *[1] * 6, 0.25, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(shifted[6], [0, 0, 0, 0, 0.5, 1, 1, 1, 1, 0.5, 0, 0], atol=1e-6)


def test_what_lies_outside_of_the_image_is_cut_off():
    np.testing.assert_allclose(coverage([SQUARE - [6, 6]], shape=(5, 4))[:4, :3], 1)
    assert coverage([SQUARE + np.array([50, 0])], shape=(14, 12)).sum() == 0
    assert coverage([SQUARE - [50, 0]], shape=(14, 12)).sum() == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_the_area_of_a_ring_written_in_two_ways(reverse):
    outer, hole = circle(9, [12.3, 11.8]), circle(4, [13.1, 11.2])
    hole = hole[::-1] if reverse else hole
    expected = np.pi * (81 - 16)
    assert coverage([outer, hole], shape=(25, 24)).sum() == pytest.approx(expected, rel=1e-3)
    joined = with_keyholes(outer, [hole])
    assert coverage([joined], shape=(25, 24)).sum() == pytest.approx(expected, rel=1e-3)


def test_outlines_have_the_area_of_the_shares_they_surround():
    """Three pieces; one has three holes, two of them side by side, and one holds an island."""
    outer, far = circle(19, [22.3, 21.9]), circle(4, [52.4, 10.7])
    holes = [circle(3, [12.1, 22]), circle(2.5, [20.3, 22.2]), circle(6, [31.2, 21.7])]
    island = circle(2.6, [31.4, 21.6])
    shape = (60, 45)
    shares = coverage([outer, far, *holes, island], shape=shape)
    found = outlines(shares)
    assert len(found) == 3
    expected = np.pi * (19**2 + 4**2 + 2.6**2 - 3**2 - 2.5**2 - 6**2)
    assert coverage(found, shape=shape).sum() == pytest.approx(expected, rel=2e-3)
    again = coverage(found, shape=shape)
    assert np.abs(again - shares).max() < 0.35  # corners of a pixel grid, no slit
    border = (shares > 0) & (shares < 1)
    assert (
        np.mean(np.abs(again - shares)[border]) < 0.06
    )  # of a pixel: contours are straight between its edges


def test_keyholes_keep_the_area_for_readers_that_do_not_know_holes():
    outer, holes = circle(19, [22, 21]), [circle(3, [12, 22]), circle(2, [20, 22]), circle(6, [31, 21])]
    found = outlines(coverage([outer, *holes], shape=(60, 45)))
    (polygon,) = found
    assert area(polygon) == pytest.approx(np.pi * (361 - 9 - 4 - 36), rel=5e-3)


def test_a_piece_at_the_border_is_closed():
    shares = np.zeros((8, 7), np.float32)
    shares[:4] = 1
    (polygon,) = outlines(shares)
    assert area(polygon) == pytest.approx(4 * 7, rel=0.05)
    assert outlines(np.zeros((8, 7), np.float32)) == []
