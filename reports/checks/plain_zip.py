"""Zip files that people pass around: files of plain names and sizes, packed alike from alike files, read with distrust.

Nothing of an archive is believed before it is checked: no name leads out of the folder, no entry is a link, encrypted,
twice there or larger than it says, and the list of entries is measured before it is read. Whatever is wrong is a
BadArchive of one sentence.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from suites.strict_json import MOST_NBYTES

MOST_FILES = 20_000
MOST_ARCHIVE_NBYTES = 512 * 2**20
MOST_LIST_NBYTES = 8 * 2**20  # of the list of entries
MOST_EXPANSION = 1032  # what deflate can make of one byte
MOST_ALL_NBYTES = 2 * 2**30
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can hold
MODE = stat.S_IFREG | 0o644
END, LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL")  # the last records of a zip file; the second of ZIP64


class BadArchive(ValueError):
    """An archive that cannot be read, or is not what `pack` writes; the message is one sentence without a name."""


def pack(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a zip file by name: the same bytes from the same files. It appears whole or not at all."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_DEFLATED, allowZip64=False, compresslevel=9) as archive:
            for name in sorted(files):
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.create_system, entry.external_attr = 3, MODE << 16  # of Unix, wherever it is packed
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, files[name])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def unpack(path: Path, folder: Path, names: re.Pattern[str]) -> None:
    """Write the files of an archive into an empty folder. Raise BadArchive; OSError where the archive cannot be read.

    Every name must match `names`, which must let none through that leads out of the folder.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadArchive("it is no regular file")
        with path.open("rb") as file:
            _measure(file)
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                _check(entries, names)
                for entry in entries:
                    target = folder / entry.filename
                    target.parent.mkdir(exist_ok=True)
                    with archive.open(entry) as packed, target.open("xb") as out:
                        _copy(packed, out, entry)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise BadArchive(f"it is no complete zip file ({error})") from error


def _measure(file: BinaryIO) -> None:
    """Raise BadArchive unless the end of the file announces a list of entries that may be read."""
    nbytes = file.seek(0, os.SEEK_END)
    if nbytes > MOST_ARCHIVE_NBYTES:
        raise BadArchive(f"it has {nbytes:,} bytes; more than {MOST_ARCHIVE_NBYTES:,} are not read")
    if nbytes < END.size:
        raise BadArchive("it is no zip file")
    file.seek(nbytes - END.size)
    mark, *_, entries, listed, start, comment = END.unpack(file.read(END.size))
    if mark != b"PK\x05\x06" or comment:
        raise BadArchive("it is no zip file, or has something behind its end")
    if nbytes >= END.size + LOCATOR.size:
        file.seek(nbytes - END.size - LOCATOR.size)
        if file.read(4) == b"PK\x06\x07":
            raise BadArchive("it is of the format ZIP64, which no submission needs")
    if entries > MOST_FILES or listed > MOST_LIST_NBYTES or start + listed + END.size != nbytes:
        raise BadArchive(f"its list of {entries:,} files is too long, or not where it says")
    file.seek(0)


def _check(entries: list[zipfile.ZipInfo], names: re.Pattern[str]) -> None:
    """Raise BadArchive for an entry that `pack` would not write, or sizes that cannot be."""
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename
        if not names.fullmatch(name) or entry.orig_filename != name:
            raise BadArchive(f"it holds a file {name[:60]!a}, which no submission has")
        if name.lower() in seen:
            raise BadArchive(f"it holds {name} twice")
        seen.add(name.lower())
        if entry.external_attr >> 16 != MODE or entry.flag_bits & 1:
            raise BadArchive(f"{name} is a link or encrypted, or no plain file")
        if entry.compress_type not in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
            raise BadArchive(f"{name} is packed in a way that is not read")
        if entry.file_size > min(MOST_NBYTES, MOST_EXPANSION * (entry.compress_size + 1)):
            raise BadArchive(f"{name} says that it has {entry.file_size:,} bytes, which is too much")
    if (total := sum(entry.file_size for entry in entries)) > MOST_ALL_NBYTES:
        raise BadArchive(f"its files say that they have {total:,} bytes; more than {MOST_ALL_NBYTES:,} are not read")


def _copy(packed: BinaryIO, out: BinaryIO, entry: zipfile.ZipInfo) -> None:
    """Copy one file; its checksum is tested at its end. Raise BadArchive where it is not as long as it says."""
    content = packed.read(entry.file_size + 1)
    if len(content) != entry.file_size:
        raise BadArchive(f"{entry.filename} has not the {entry.file_size:,} bytes that it says")
    out.write(content)
