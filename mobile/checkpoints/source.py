"""A checkpoint's place: a folder, or a repository of the hub whose files are fetched by name. Imports no torch.

Only the files that are asked for are fetched, so that a checkpoint is refused before its weights are downloaded.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm

from mobile.errors import Refused, one_line, shortened
from mobile.machine.host import nearest_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GB = 1e9


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder. Of a hub repository it is the snapshot of one `commit` in the cache.

    `sizes` is the repository's listing, bytes by file; None for a folder, and where the hub cannot be reached: then
    there is only what lies in `folder`.
    """

    name: str
    folder: Path
    commit: str | None = None
    sizes: Mapping[str, int] | None = None

    def has(self, file: str) -> bool:
        """Return whether the file is there, or can be fetched."""
        return self.holds(file) if self.sizes is None else file in self.sizes

    def holds(self, file: str) -> bool:
        """Return whether the file is in the folder, a regular one or a link to one."""
        try:
            return (self.folder / file).is_file()
        except (OSError, ValueError):  # a name that no file can have
            return False

    def files(self) -> list[str]:
        """Return the names of all files of the top level, sorted. Raise Refused for a folder that may not be read."""
        if self.sizes is not None:
            return sorted(name for name in self.sizes if "/" not in name)
        try:
            return sorted(os.listdir(self.folder))
        except OSError as error:
            raise Refused(f"{self.folder} cannot be read ({one_line(error)}); give yourself the right to.") from error

    def nbytes(self, files: Iterable[str]) -> int:
        """Return the bytes of these files, which are in the listing or in the folder."""
        sizes = self.sizes or {}
        return sum(sizes[file] if file in sizes else (self.folder / file).stat().st_size for file in files)

    def missing_nbytes(self, files: Iterable[str]) -> int:
        """Return the bytes of these files that are not in the cache yet."""
        return sum((self.sizes or {}).get(file, 0) for file in files if not self.holds(file))

    def fetch(self, files: Sequence[str], *, shown: bool = False) -> None:
        """Fetch those files that are not in the folder. `shown` shows bars on stderr. Raise Refused if one fails."""
        missing = [file for file in files if not self.holds(file)]
        if missing and self.sizes is None:
            raise Refused(self.missing_file(missing[0]))
        if missing:
            try:
                # The names go in as patterns, so what is special in a pattern is escaped.
                _download(self.name, self.commit, [glob.escape(file) for file in missing], shown)
            except Exception as error:  # any exception of the HTTP client, the hub or the disk
                raise Refused(f"Fetching {self.name} stopped: {_why(error, self.commit)}; run it again.") from error
            for file in missing:
                if not self.holds(file):
                    raise Refused(self.missing_file(file))

    def missing_file(self, file: str) -> str:
        """Return the refusal of a checkpoint that lacks this file."""
        file = shortened(file)
        if self.commit is None:
            return f"{self.folder} lacks {file}; copy it again."
        if self.sizes is None:
            return f"{self.name} is in the cache without {file}, and the hub cannot be reached; connect to it once."
        return f"{self.name} has no {file} on the hub, which makes it incomplete; take another revision, or a copy."


def locate(source: str | os.PathLike[str], revision: str | None, patterns: Sequence[str]) -> Source:
    """Return a local folder, or a repository at that revision, of which the files that match `patterns` are fetched.

    Raise Refused for a name that is neither, and for a repository that is neither reachable nor in the cache.
    """
    name = _name(source)
    folder = _folder(name)
    if folder is None:
        return _repository(name, revision, patterns)
    if revision is not None:
        raise Refused(f"{folder} is a folder, which has no revisions; leave revision out.")
    return Source(folder, Path(folder))


def _name(source: object) -> str:
    """Return the folder or hub id as text. Raise Refused if it is empty or no text."""
    try:
        name = os.fspath(source)  # type: ignore[call-overload]
    except TypeError:
        name = None
    if not isinstance(name, str) or not name.strip():
        raise Refused(f"{source!r} is no checkpoint; give its folder, or a hub id like owner/name.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"The path {name!a} is no valid UTF-8, which safetensors needs; rename it.") from error
    return name


def _folder(name: str) -> str | None:
    """Return the local folder of that name, or None for a hub id. Raise Refused for a name that is neither."""
    for path in (name, os.path.expanduser(name)):
        if os.path.isdir(path):
            return path
        if os.path.isfile(path):
            raise Refused(f"{name} is a file; give the folder of a checkpoint, with its config.json in it.")
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise Refused(f"There is no folder {name}; give a checkpoint folder or a hub id like owner/name.")
    return None


def _repository(name: str, revision: str | None, patterns: Sequence[str]) -> Source:
    """Return the snapshot of a repository, with files that match fetched, or what the cache has of it offline."""
    try:
        folder = Path(_download(name, revision, patterns, shown=False))
    except LocalEntryNotFoundError as error:  # no network, and not everything in the cache; what is there may do
        cached = _cached(name, "config.json", revision)
        if cached is None:
            raise Refused(f"Cannot load {name}: {_why(error, revision)}.") from error
        folder = cached.parent
    except Exception as error:  # any exception of the HTTP client, the hub or the disk
        raise Refused(f"Cannot load {name}: {_why(error, revision)}.") from error
    return Source(name, folder, folder.name, _listing(name, folder.name))


def _download(name: str, revision: str | None, patterns: Sequence[str], shown: bool) -> str:
    bars = tqdm if shown else _Silent
    return snapshot_download(name, revision=revision, allow_patterns=list(patterns), tqdm_class=bars)


class _Silent(tqdm):
    """The hub's progress bar, never shown."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a repository in the hub's cache, or None if it is not there."""
    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def cached_whole(name: str, revision: str | None) -> bool:
    """Return whether all weights of a repository are in the cache: its single file, or every file of its index."""
    if _cached(name, SINGLE, revision) is not None:
        return True
    index = _cached(name, INDEX, revision)
    try:
        files = set() if index is None else set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(files) and all(_cached(name, file, revision) is not None for file in files)


def _listing(name: str, commit: str) -> dict[str, int] | None:
    """Return the bytes of each file of a repository, or None without a network."""
    try:
        entries = list(HfApi().list_repo_tree(name, recursive=True, revision=commit))
    except Exception:  # any exception of the HTTP client: without a network there is only the cache
        return None
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _why(error: Exception, revision: str | None) -> str:
    """Return why a repository cannot be read, and what to do about it."""
    if isinstance(error, GatedRepoError):
        return "it is gated; accept its terms on its page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub shows no such model; check the name, or run `hf auth login` if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision}; leave revision out, or give a branch, a tag or a commit of it"
    if isinstance(error, HFValidationError):
        return "that is neither a folder here nor a hub id like owner/name (a revision goes into revision=)"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub cannot be reached and it is not in the cache; connect, or give a folder with a copy"
    return one_line(error)


def cache_folder() -> Path:
    """Return the folder of the hub's cache, or where there is none yet, its nearest parent that exists."""
    return nearest_folder(Path(constants.HF_HUB_CACHE))


def disk_shortage(nbytes: int, free_nbytes: int) -> str | None:
    """Return why the disk of the hub's cache, with `free_nbytes` free, cannot take `nbytes` more, or None if it can."""
    if nbytes <= free_nbytes:
        return None
    return (
        f"the weights take {_gb(nbytes)} and {_gb(free_nbytes)} are free under {constants.HF_HUB_CACHE}; free some, or "
        "set HF_HOME to a larger disk"
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:,.0f} GB" if nbytes >= 10 * GB else f"{nbytes / GB:.3g} GB"
