"""The version of this package."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "mobile-moe"
UNKNOWN = "unknown"


def this_version() -> str:
    """Return the installed version; in a checkout that is not installed, the one its pyproject.toml names."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return _version_in(Path(__file__).parent.parent / "pyproject.toml")


def _version_in(pyproject: Path) -> str:
    """Return the version in a pyproject.toml, or "unknown" if it cannot be read or is another project's."""
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return str(project["version"]) if project["name"] == DISTRIBUTION else UNKNOWN
    except (OSError, ValueError, KeyError):
        return UNKNOWN
