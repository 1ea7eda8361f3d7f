"""Files and folders that appear under their final name complete, or not at all.

Both are written under a hidden temporary name in the same folder and renamed at the end. The temporary name
holds the host and the process number, so that the next writer of the same path can remove what a killed
process left.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from adregnet_jax.errors import UserError

REPLACED = ".replaced"  # suffix of the earlier folder while the new one takes its name


def write_file(path: Path, content: str | bytes, *, name: str = "") -> None:
    """Writes a file, replacing an earlier one, and makes the folders it lies in.

    Args:
      path: final name.
      content: text is encoded as UTF-8.
      name: what error messages call the file; its path by default.

    Raises:
      UserError: the file can't be written.
    """
    with write_errors_as_user_errors(name or str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, name=name, overwrite=True) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(path: Path, *, name: str = "", overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary name for the block to write to, and renames that file to `path` at the end.

    Args:
      path: final name.
      name: what error messages call the file; its path by default.
      overwrite: replace an existing file.

    Raises:
      UserError: the file exists and `overwrite` is False, or it can't be written.
    """
    name = name or str(path)
    with _temporary(path, name) as temporary:
        if path.exists() and not overwrite:
            raise UserError(f"{name}: exists already; choose another name, or overwrite it")
        yield temporary
        temporary.replace(path)


@contextlib.contextmanager
def new_folder(
    path: Path, *, own: Collection[str], name: str = "", overwrite: bool = False
) -> Iterator[Path]:
    """Yields a temporary folder for the block to fill, and renames it to `path` at the end.

    A symbolic link is followed: the folder it leads to is replaced.

    Args:
      path: final name; an empty folder may exist there.
      own: names of files that may be overwritten. A folder that holds any other is never replaced.
      name: what error messages call the folder; its path by default.
      overwrite: replace a folder that isn't empty.

    Raises:
      UserError: the folder isn't empty and can't be replaced, or it can't be written.
    """
    name = name or str(path)
    path = Path(os.path.realpath(path))
    with _temporary(path, name) as temporary:
        _check_replaceable(path, own, name, overwrite=overwrite)
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rename(_replaced(temporary))
        temporary.rename(path)


@contextlib.contextmanager
def write_errors_as_user_errors(name: str) -> Iterator[None]:
    """Raises an `OSError` of the block as a `UserError`: `name` can't be written, the reason, and advice."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename and _prefix() not in str(error.filename):
            reason += f": {error.filename}"
        raise UserError(
            f"{name}: can't be written ({reason}): check the name, the folder and the disk"
        ) from error


@contextlib.contextmanager
def _temporary(path: Path, name: str) -> Iterator[Path]:
    """Yields a temporary name for `path`; afterwards removes what the block left under it."""
    with write_errors_as_user_errors(name):
        _remove_leftovers(path)
        temporary = path.parent / f"{_prefix()}{path.name}"  # libraries recognise formats by the suffix
        try:
            yield temporary
        finally:
            replaced = _replaced(temporary)
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            for left in (temporary, replaced):
                _remove(left)


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files and folders for `path` whose process was killed.

    A folder that was about to be replaced gets its name back if nothing else has it. Processes that still run
    keep their files, and so do those of other hosts, which can't be asked.
    """
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f".{glob.escape(_host())}.*.{glob.escape(path.name)}*"):
            found = re.fullmatch(r"\.(\d+)\.(.*)", left.name.removeprefix(f".{_host()}"), re.DOTALL)
            if not found or found[2].removesuffix(REPLACED) != path.name or _runs(int(found[1])):
                continue
            if found[2].endswith(REPLACED) and found[2] != path.name and not path.exists():
                left.rename(path)
            else:
                _remove(left)


def _remove(path: Path) -> None:
    """Removes a file or a folder, or as much of it as can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _check_replaceable(path: Path, own: Collection[str], name: str, *, overwrite: bool) -> None:
    if path.is_symlink():  # a resolved path is one only where links lead back to themselves
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{name} is a file; expected a folder, or a name that doesn't exist yet")
    if path.is_mount():
        raise UserError(f"{name} is a mount point, which can't be replaced: use a folder inside it")
    others = sorted({entry.name for entry in path.iterdir()} - set(own))
    if others and overwrite:
        raise UserError(f"{name} holds {others[0]}, which isn't ours to overwrite: choose another folder")
    if not overwrite and any(path.iterdir()):
        raise UserError(f"{name} exists and is not empty: choose another folder, or overwrite it")


def _replaced(temporary: Path) -> Path:
    return temporary.with_name(temporary.name + REPLACED)


def _prefix() -> str:
    return f".{_host()}.{os.getpid()}."


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # belongs to another user, or can't be a process number
        return True
    return True
