"""Files and folders appear complete or not at all, and what killed processes left is removed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adregnet_jax.atomic import REPLACED, new_file, new_folder, write_file
from adregnet_jax.errors import UserError

KILLED = """
import os, signal, sys
from pathlib import Path
from adregnet_jax import atomic
path = Path(sys.argv[1])
{block}
    (temporary / "file" if temporary.is_dir() else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
FILE = "with atomic.new_file(path, overwrite=True) as temporary:"
FOLDER = "with atomic.new_folder(path, own=('file',), overwrite=True) as temporary:"


def killed_while_writing(path, block=FILE):
    """A process that is killed while it writes `path`; returns the names it left."""
    before = set(path.parent.iterdir())
    program = KILLED.format(block=block)
    process = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    return set(path.parent.iterdir()) - before


def write_folder(path, content, **options):
    with new_folder(path, own=("file",), **options) as temporary:
        (temporary / "file").write_text(content)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_the_temporary_name_is_hidden_and_keeps_the_suffix(tmp_path):
    with new_file(tmp_path / "scan.nii.gz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".") and temporary.name.endswith(".nii.gz")
        temporary.touch()


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_file(path, "one: µ")
    write_file(path, b"two")
    assert contents(tmp_path) == {"a/b/file.txt": "two"}


def test_an_existing_file_is_kept_unless_it_may_be_overwritten(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"the table: exists already"), new_file(path, name="the table"):
        pass
    assert contents(tmp_path) == {"file.txt": "mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interruption_leaves_the_earlier_file_and_folder(tmp_path, error):
    write_file(tmp_path / "file.txt", "before")
    write_folder(tmp_path / "folder", "before")
    with pytest.raises(error), new_file(tmp_path / "file.txt", overwrite=True) as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(error), new_folder(tmp_path / "folder", own=["file"], overwrite=True) as temporary:
        (temporary / "file").write_text("half")
        raise error
    assert contents(tmp_path) == {"file.txt": "before", "folder/file": "before"}


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "eval" / "summary.json"
    write_file(path, "old")

    def full(self, content):
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"summary\.json: can't be written \(No space left on device\)"):
        write_file(path, "new")
    assert contents(tmp_path) == {"eval/summary.json": "old"}


def test_a_refusal_of_the_file_system_names_what_is_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^report: can't be written \(.*/file\): check the name"):
        write_file(tmp_path / "file" / "report.html", "", name="report")


def test_a_folder_that_cannot_take_its_name_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    write_folder(path, "before")
    rename = Path.rename

    def refused(self, target):
        if target == path and not self.name.endswith(REPLACED):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UserError, match="Input/output error"):
        write_folder(path, "after", overwrite=True)
    assert contents(tmp_path) == {"folder/file": "before"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "a[0].txt"
    for other in (tmp_path / "b.txt", path):
        left = killed_while_writing(other)
        assert len(left) == 1
    write_file(path, "whole")
    assert set(contents(tmp_path).values()) == {"half", "whole"}  # that of b.txt is not ours to remove
    assert len(killed_while_writing(tmp_path / "folder", FOLDER)) == 1
    write_folder(tmp_path / "folder", "whole")
    assert sorted(contents(tmp_path).values()) == ["half", "whole", "whole"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path, overwrite):
    path = tmp_path / "folder"
    write_folder(path, "before")
    (left,) = killed_while_writing(path, FOLDER)
    path.rename(left.with_name(left.name + REPLACED))  # as if it had been killed between the two renames
    with contextlib.nullcontext() if overwrite else pytest.raises(UserError, match="is not empty"):
        write_folder(path, "after", overwrite=overwrite)
    assert contents(tmp_path) == {"folder/file": "after" if overwrite else "before"}


def test_running_processes_and_other_hosts_keep_their_files(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    (left,) = killed_while_writing(path)
    running = left.with_name(f".{left.name.split('.')[1]}.{os.getppid()}.a.txt")
    running.write_text("in work")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
        write_file(path, "theirs")
        assert left.exists()
    write_file(path, "ours")
    assert contents(tmp_path) == {"a.txt": "ours", running.name: "in work"}
