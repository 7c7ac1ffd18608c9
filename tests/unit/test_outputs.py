"""Where output may be written: known before, whole or not at all, never in the place of a device, a pipe or a link."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mobile import outputs
from mobile.errors import Refused
from mobile.ledger import Ledger


def write(path: Path, data: bytes = b"new") -> None:
    with outputs.open_atomic(path) as file:
        file.write(data)


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path):
    outputs.check_file(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_is_broken_off_leaves_the_old_file(tmp_path):
    (tmp_path / "out").write_bytes(b"old")

    def half() -> None:
        with outputs.open_atomic(tmp_path / "out") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert (tmp_path / "out").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "out").chmod(0o640)
    write(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_through_a_link_the_file_behind_it_is_written_and_the_link_stays(tmp_path, there):
    (tmp_path / "folder").mkdir()
    if there:
        (tmp_path / "folder/real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("folder/real")
    outputs.check_file(tmp_path / "link")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder/real").read_bytes() == b"new"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def link_to_a_pipe(folder: Path) -> Path:
    (folder / "link").symlink_to(pipe(folder))
    return folder / "link"


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


PLACES = {
    "a device": lambda folder: Path(os.devnull),
    "a pipe": pipe,
    "a link to a pipe": link_to_a_pipe,
    "a link to itself": loop,
    "a folder": lambda folder: folder,
    "a folder that is missing": lambda folder: folder / "absent/out",
    "a file in the place of a folder": lambda folder: Path(__file__) / "out",
    "a folder that takes no files": lambda folder: Path("/proc/out"),
    "a name too long": lambda folder: folder / ("x" * 256),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_cannot_be_written_is_refused_before_and_again_and_nothing_is_changed(tmp_path, place):
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for attempt in (outputs.check_file, write):
        with pytest.raises(Refused, match="name a file in a folder that exists"):
            attempt(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_longest_name_can_be_written(tmp_path):
    write(tmp_path / ("x" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Refused, match="Permission denied"):
        outputs.check_file(tmp_path / "out")


@contextmanager
def small_files() -> Iterator[None]:
    """Inside, the system writes no file beyond 4 KiB, as a full disk would. pytest's own output may be one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_outgrows_its_disk_is_refused_and_the_old_one_stays(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    with small_files(), pytest.raises(Refused, match=r"cannot be written \(File too large\)"):
        write(tmp_path / "out", bytes(100_000))
    assert (tmp_path / "out").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_folder_that_can_be_made_is_not_made_and_one_that_cannot_is_refused(tmp_path):
    outputs.check_folder(tmp_path)
    outputs.check_folder(tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []
    for path in (Path(__file__), Path(os.devnull), Path("/proc/out"), tmp_path / ("x" * 256)):
        with pytest.raises(Refused, match="cannot be made"):
            outputs.check_folder(path)


def test_bytes_of_a_name_that_are_no_text_are_shown_escaped(tmp_path):
    with pytest.raises(Refused, match=r"\\udcff/out cannot be written"):
        outputs.check_file(tmp_path / "\udcff/out")


def test_a_ledger_is_not_exported_in_the_place_of_a_pipe(tmp_path):
    with pytest.raises(Refused, match="no regular file"):
        Ledger().export_perfetto(pipe(tmp_path))
    assert (tmp_path / "pipe").is_fifo()
