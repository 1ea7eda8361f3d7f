"""What a killed process left beside a file or a folder, and what becomes of it."""

import os
import socket
import subprocess
import sys

import pytest

from adregnet_jax.atomic import REPLACED, tidy, unfinished
from adregnet_jax.data.io.images import new_file


@pytest.fixture
def dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def name_of(path, process):
    name = unfinished(path).name
    assert f".{os.getpid()}." in name
    return path.with_name(name.replace(f".{os.getpid()}.", f".{process}."))


def test_the_name_is_hidden_and_has_the_suffix(tmp_path):
    path = unfinished(tmp_path / "scan.nii.gz")
    assert path.parent == tmp_path
    assert path.name.startswith(".") and path.name.endswith(".nii.gz")


def test_what_a_dead_process_left_is_taken_away(tmp_path, dead):
    path = tmp_path / "a[0].nii"
    name_of(path, dead).write_text("half")
    name_of(path, dead).with_name(name_of(path, dead).name + REPLACED).write_text("before")
    folder = name_of(tmp_path / "a[0]", dead)
    folder.mkdir()
    kept = [path, name_of(tmp_path / "b.nii", dead), name_of(path, os.getpid()), folder]
    for other in kept[:3]:
        other.write_text("whole")
    tidy(path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    (folder / "file").write_text("half")
    tidy(tmp_path / "a[0]")
    assert not folder.exists()


def test_what_was_about_to_be_replaced_comes_back(tmp_path, dead):
    path = tmp_path / "result"
    left = name_of(path, dead)
    replaced = left.with_name(left.name + REPLACED)
    for folder in (left, replaced):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    tidy(path)
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "file").read_text() == replaced.name


def test_of_another_host_nothing_is_touched(tmp_path, dead, monkeypatch):
    path = tmp_path / "a.nii"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
        theirs = name_of(path, dead)
    theirs.write_text("half")
    tidy(path)
    assert theirs.exists()


def test_writing_a_file_tidies_up(tmp_path, dead):
    path = tmp_path / "a.txt"
    name_of(path, dead).write_text("half")
    with new_file(path) as temporary:
        temporary.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "whole")]
