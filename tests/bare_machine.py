"""A Python with torch, Transformers and pytest alone, whatever is installed beside them: as on a machine that is lent.

It is this one, which refuses every module that is not of Python itself, of this checkout, or of those three packages
and what they require. The project is not installed there either.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
QUICK = {"OMP_NUM_THREADS": "1"}
GIVEN = ("torch", "transformers", "pytest")
BARE = """
import importlib.machinery, importlib.metadata, sys
MODULES, PACKAGES, ROOT, INSTALLED = {modules!r}, {packages!r}, {root!r}, {installed!r}

def ours(spec):
    places = [spec.origin or "", *(spec.submodule_search_locations or ())]
    return any(place.startswith(ROOT) and not place.startswith(INSTALLED) for place in places)

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = super().find_spec(name, path, target)
        top = name.partition(".")[0]
        pythons = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        return found if pythons or top in MODULES or (found and ours(found)) else None

sys.meta_path[:] = [Bare if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
discover = importlib.metadata.Distribution.discover

def present(**sought):
    return (one for one in discover(**sought) if (one.name or "").lower().replace("_", "-") in PACKAGES)

importlib.metadata.Distribution.discover = present
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def given_packages() -> frozenset[str]:
    """The three packages, and what they require here without their extras."""
    found: set[str] = set()
    todo = list(GIVEN)
    while todo:
        name = normal(todo.pop())
        if name in found:
            continue
        try:
            wanted = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # a CUDA library, where this torch is for processors
            continue
        found.add(name)
        todo += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return frozenset(found)


@cache
def given_modules() -> frozenset[str]:
    """The names under which they are imported."""
    wanted = given_packages()
    return frozenset(top for top, owners in packages_distributions().items() if wanted & set(map(normal, owners)))


def bare(folder: Path) -> dict[str, str]:
    """An environment in which every Python is a bare one, by a `sitecustomize.py` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "modules": sorted(given_modules()),
        "packages": sorted(given_packages()),
        "root": str(ROOT) + os.sep,
        # the environment may lie within the checkout, as that of nox does
        "installed": tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")),
    }
    (folder / "sitecustomize.py").write_text(BARE.format(**told))
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def python(*words: str, environment: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a module of that environment to its end."""
    asked = [sys.executable, "-m", *words]
    return subprocess.run(asked, cwd=cwd, env={**environment, **QUICK}, capture_output=True, text=True)
