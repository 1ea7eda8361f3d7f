"""`adregnet info` on points: CSV files and Slicer markups."""

from __future__ import annotations

import json

from tests.bad_inputs.case import ENDLESS, Case, directory, raw, text

MARKUPS = {"coordinateSystem": "RAS", "controlPoints": [{"position": [1, 2, 3]}]}
POINTS = [
    Case(
        "empty_points",
        "adregnet info p.csv",
        text("p.csv", ""),
        "columns are none; expected x, y, z in RAS mm",
    ),
    Case(
        "points_without_rows",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n"),
        "has 0 points; expected at least",
    ),
    Case(
        "points_of_ants",
        "adregnet info p.csv",
        text("p.csv", "x,y,z,t\n1,2,3,0\n"),
        "columns are x, y, z, t; exp",
    ),
    Case(
        "words_as_points",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n1,2,three\n"),
        "line 2: expected three num",
    ),
    Case(
        "two_coordinates",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n1,2\n"),
        "line 2: expected three numbers",
    ),
    Case(
        "nan_point",
        "adregnet info p.csv",
        text("p.csv", "x,y,z\n1,nan,3\n"),
        "expected at least one, of finite",
    ),
    Case(
        "endless_cell", "adregnet info p.csv", text("p.csv", f"x,y,z\n{'1' * 200_000},2,3\n"), "p.csv.*field"
    ),
    Case(
        "latin1_points",
        "adregnet info p.csv",
        raw("p.csv", b"x,y,z\n1,2,3 \xb5m\n"),
        "not a text file that can",
    ),
    Case(
        "utf16_points",
        "adregnet info p.csv",
        raw("p.csv", "x,y,z\n1,2,3\n".encode("utf-16")),
        "not a text file",
    ),
    Case(
        "points_with_bom",
        "adregnet info p.csv",
        raw("p.csv", b"\xef\xbb\xbfx,y,z\n1,2,3\n"),
        r"points +1\n",
        0,
    ),
    Case("points_of_windows", "adregnet info p.csv", raw("p.csv", b"x,y,z\r\n1,2,3\r\n"), r"points +1\n", 0),
    Case("folder_as_points", "adregnet info p.csv", directory("p.csv"), "not a text file that can be read"),
    Case(
        "fcsv_of_no_world",
        "adregnet info p.fcsv",
        text("p.fcsv", "1,2,3,4\n"),
        "coordinates are unknown; exp",
    ),
    Case(
        "empty_markups",
        "adregnet info p.mrk.json",
        text("p.mrk.json", ""),
        "not one list of markups of 3D Sli",
    ),
    Case(
        "endless_markups", "adregnet info p.mrk.json", text("p.mrk.json", ENDLESS), "not one list of markups"
    ),
    Case(
        "huge_coordinate",
        "adregnet info p.mrk.json",
        text("p.mrk.json", json.dumps({"markups": [MARKUPS]}).replace("[1,", f"[1{'0' * 400},")),
        "not one list of markups|finite numbers",
    ),
    Case(
        "two_coordinates_in_markups",
        "adregnet info p.mrk.json",
        text("p.mrk.json", json.dumps({"markups": [MARKUPS | {"controlPoints": [{"position": [1, 2]}]}]})),
        "expected points of three coordinates in mm",
    ),
]
