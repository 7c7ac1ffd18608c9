"""The version: the installed one, or in a checkout that is not installed the one its pyproject.toml names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import mobile
from mobile.version import UNKNOWN, _version_in

ROOT = Path(__file__).parent.parent.parent
NAMED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_package_says_its_version():
    assert mobile.__version__ == NAMED
    assert "__version__" in mobile.__all__


def test_a_checkout_that_is_not_installed_says_the_version_that_it_names(tmp_path):
    shutil.copytree(ROOT / "mobile", tmp_path / "mobile", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace(f'version = "{NAMED}"', 'version = "7.8.9"', 1))
    code = (
        "import sys, importlib.metadata as m\n"
        "m.distribution = lambda name: (_ for _ in ()).throw(m.PackageNotFoundError(name))\n"
        "import mobile; print(mobile.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "7.8.9\n"


def test_a_pyproject_of_something_else_says_nothing_of_us(tmp_path):
    file = tmp_path / "pyproject.toml"
    for text in ('[project]\nname = "other"\nversion = "1"\n', "[tool]\n", "[project", "\xff"):
        file.write_text(text, encoding="latin-1")
        assert _version_in(file) == UNKNOWN
    assert _version_in(tmp_path / "absent.toml") == UNKNOWN
