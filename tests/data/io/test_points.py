"""Reading and writing points, and refusing bad files."""

import json

import numpy as np
import pytest

from adregnet_jax.data.io.points import read_points, write_points
from adregnet_jax.errors import UserError

POINTS_MM = np.array([[1.5, -20.25, 300.125], [0.1, 1e-7, -3.0]])


def refusal(path, text):
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_points(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".csv", ".fcsv", ".mrk.json"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_points(path, POINTS_MM)
    np.testing.assert_array_equal(read_points(path), POINTS_MM)
    with pytest.raises(UserError, match="exists already"):
        write_points(path, POINTS_MM)


@pytest.mark.parametrize(
    ("system", "signs"), [("RAS", (1, 1, 1)), ("0", (1, 1, 1)), ("LPS", (-1, -1, 1)), ("1", (-1, -1, 1))]
)
def test_fcsv_of_slicer(tmp_path, system, signs):
    (tmp_path / "a.fcsv").write_text(
        f"# Markups fiducial file version = 4.11\n# CoordinateSystem = {system}\n"
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
        '1,10.5,20,-30,0,0,0,1,1,1,0,F-1,"a, b",vtkMRMLScalarVolumeNode1\n'
    )
    np.testing.assert_array_equal(read_points(tmp_path / "a.fcsv"), [np.multiply(signs, [10.5, 20, -30])])


def test_markups_in_lps_are_turned(tmp_path):
    markup = {"coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": [{"position": [1, 2, 3]}]}
    (tmp_path / "a.mrk.json").write_text(json.dumps({"markups": [markup]}))
    np.testing.assert_array_equal(read_points(tmp_path / "a.mrk.json"), [[-1, -2, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,z,t\n1,2,3,0\n", "columns are x, y, z, t; expected x, y, z in RAS mm"),
        ("1,2,3\n4,5,6\n", "columns are 1, 2, 3"),
        ("z,y,x\n1,2,3\n", "columns are z, y, x"),
        ("", "columns are none"),
        ("x,y,z\n", "has 0 points"),
        ("x,y,z\n1,2,3\n1,2\n", "line 3: expected three numbers x, y, z, got '1,2'"),
        ("x,y,z\n1,2,a\n", "line 2"),
        ("x,y,z\n1,2,nan\n", "finite numbers"),
    ],
)
def test_csv_files_that_are_not_points(tmp_path, text, message):
    assert message in refusal(tmp_path / "a.csv", text)


def test_files_of_slicer_that_are_not_points(tmp_path):
    assert "coordinates are 2" in refusal(tmp_path / "a.fcsv", "# CoordinateSystem = 2\n1,1,2,3\n")
    assert "coordinates are unknown" in refusal(tmp_path / "a.fcsv", "1,1,2,3\n")
    assert "line 2" in refusal(tmp_path / "a.fcsv", "# CoordinateSystem = RAS\n1,1,2\n")
    assert "markups" in refusal(tmp_path / "a.mrk.json", "{}")
    assert "markups" in refusal(tmp_path / "a.mrk.json", "not JSON")
    markup = {"coordinateSystem": "RAS", "coordinateUnits": "um", "controlPoints": [{"position": [1, 2, 3]}]}
    statuses: list[dict] = [{"positionStatus": "undefined"}, {"position": []}, {"position": None}]
    for placed in statuses:
        point = {"label": "F-1", "position": [0.0, 0.0, 0.0]} | placed
        unplaced = json.dumps({"markups": [markup | {"coordinateUnits": "mm", "controlPoints": [point]}]})
        assert "point 1 (F-1) isn't placed" in refusal(tmp_path / "a.mrk.json", unplaced)
    assert "units um" in refusal(tmp_path / "a.mrk.json", json.dumps({"markups": [markup]}))


@pytest.mark.usefixtures("unchecked_types")
def test_other_files(tmp_path):
    assert "expected one of .csv" in refusal(tmp_path / "a.txt", "x,y,z\n1,2,3\n")
    with pytest.raises(UserError, match="no such file"):
        read_points(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_points(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=r"must be \[n, 3\]"):
        write_points(tmp_path / "c.csv", np.zeros((3, 2)))


def test_text_quoted_from_a_file_stays_on_one_line(tmp_path):
    assert "got '1.0 2,3'" in refusal(tmp_path / "a.csv", 'x,y,z\n"1.0\n2",3\n')


def test_a_comment_of_slicer_without_a_name(tmp_path):
    (tmp_path / "a.fcsv").write_text("#  = 4.11\n# CoordinateSystem = RAS\n1,1,2,3\n")
    np.testing.assert_array_equal(read_points(tmp_path / "a.fcsv"), [[1, 2, 3]])
