"""The folder of a program: how much lies in it while the program runs, and its removal, whatever was made there."""

from __future__ import annotations

import os
from contextlib import suppress

MOST_NBYTES, MOST_ENTRIES, DEEPEST = 2**25, 1000, 50
TOO_MUCH = (
    f"disk limit: more than {MOST_NBYTES >> 20} MiB or {MOST_ENTRIES} files were written, or folders more than "
    f"{DEEPEST} deep or not to be read"
)


def holds_too_much(folder: str) -> bool:
    """Return whether the folder passes a limit, or holds folders that cannot be looked into."""
    nbytes = entries = 0
    closed: list[OSError] = []
    for place, folders, files, descriptor in os.fwalk(folder, onerror=closed.append):
        entries += len(folders) + len(files)
        for name in files:
            with suppress(OSError):
                nbytes += os.lstat(name, dir_fd=descriptor).st_blocks * 512
        too_deep = place.count(os.sep) - folder.count(os.sep) > DEEPEST
        if too_deep or entries > MOST_ENTRIES or nbytes > MOST_NBYTES:
            return True
    return any(isinstance(error, PermissionError) for error in closed)


def remove(folder: str) -> None:
    """Delete a folder and all in it: modes, depth and names are no obstacle, and no link is followed.

    A folder in it is first moved up beside it, so that no path becomes too long.
    """
    waiting, number = [folder], 0
    while waiting:
        place = waiting.pop()
        os.chmod(place, 0o700)
        for entry in list(os.scandir(place)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif not _removed_empty(entry.path):
                os.chmod(entry.path, 0o700)  # moving a folder changes it, too
                number += 1
                waiting.append(f"{folder}-{number}")
                os.rename(entry.path, waiting[-1])
        os.rmdir(place)


def _removed_empty(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except OSError:
        return False
    return True
