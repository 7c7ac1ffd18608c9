"""Output files: checked before a run, and written completely or not at all.

A file is written under a temporary name in the same folder and renamed when it is complete. Behind a symbolic link its
target is replaced, and the link stays. Anything but a regular file (a device, a pipe) is refused: renaming would delete
it, and half a result in a pipe cannot be taken back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO
from uuid import uuid4

from mobile.errors import Refused, one_line
from mobile.visible import on_one_line


def check_file(path: Path) -> None:
    """Raise Refused if `open_atomic` could not write there, which is tried: a file is made beside it and removed."""
    partial, file = _begin(path)
    file.close()
    partial.unlink()


def check_folder(path: Path) -> None:
    """Raise Refused if the folder cannot be made, or no file written into it. All that is made to try it is removed."""
    new_folders: list[Path] = []
    try:
        new_folders += (folder for folder in (path, *path.parents) if not folder.exists())
        path.mkdir(parents=True, exist_ok=True)
        check_file(path / f".{uuid4().hex}")
    except OSError as error:
        raise Refused(f"The folder {printable(path)} cannot be made ({one_line(error)}); name another one.") from error
    finally:
        with suppress(OSError):  # another process may have put something there
            for folder in new_folders:
                folder.rmdir()


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write into; it replaces `path` at the end, and is removed if anything was raised.

    Raise Refused if it cannot be written, or the disk is full.
    """
    partial, file = _begin(path)
    try:
        with _refusing(path):
            with file:
                yield file
            target = _target(path)
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _begin(path: Path) -> tuple[Path, BinaryIO]:
    """Return the name of an empty file in the target's folder, and that file, open. Raise Refused."""
    with _refusing(path):
        partial = _target(path).with_name(f".{uuid4().hex}.partial")
        return partial, partial.open("xb")


def _target(path: Path) -> Path:
    """Return the regular file behind `path`, or the one to be made there. Raise OSError for anything else."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    if S_ISDIR(mode):
        raise IsADirectoryError("it is a folder")
    if not S_ISREG(mode):
        raise OSError("it is no regular file")
    return target


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as Refused, naming `path`."""
    try:
        yield
    except OSError as error:
        sentence = f"{printable(path)} cannot be written ({one_line(error)}); name a file in a folder that exists."
        raise Refused(sentence) from error


def printable(path: Path) -> str:
    """Return the path as text to be printed on one line, with bytes that are no text escaped."""
    return on_one_line(str(path))
