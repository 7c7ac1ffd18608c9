"""The registry of links: for each its name, the device it needs, whether its time is real, and its records' scope.

Everyone asks here instead of comparing names, so that a new link is a module with `connect` and an entry below. Needs
no torch: a link's module is imported when it is connected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from mobile.errors import Refused
from mobile.links.base import Link, LinkEnds
from mobile.suggest import offer


@dataclass(frozen=True)
class LinkKind:
    """A link that attach can make, with a `summary` of a few words for the help of `--link`.

    `module` has `connect(ends)`, which makes it. `device_type` is the kind of torch device on which the model must lie,
    None for any. `store` is where it copies from, "memory" or "disk". `scope` is that of records timed over it,
    `throttled_scope` of those over a link slowed down to a given rate, where that is another.
    """

    name: str
    summary: str
    module: str
    device_type: str | None
    real_time: bool
    scope: str
    throttled_scope: str | None = None
    store: str = "memory"

    @property
    def needs_gpu(self) -> bool:
        """Whether it copies to a GPU."""
        return self.device_type == "cuda"

    @property
    def usual_device(self) -> str:
        """The type of device that a model is put on for it."""
        return self.device_type or "cpu"

    def scope_at(self, link_gb_per_s: float | None) -> str:
        """Return the scope of records timed over it at that rate (decimal GB/s), None for the link's own."""
        return self.scope if link_gb_per_s is None else self.throttled_scope or self.scope

    def connect(self, ends: LinkEnds) -> Link:
        """Make the link. Raise Refused if it cannot be made as asked."""
        made: Link = import_module(self.module).connect(ends)
        return made


_CUDA = LinkKind(
    "cuda",
    "real copies to a GPU",
    "mobile.links.cuda",
    "cuda",
    real_time=True,
    scope="gpu+pcie",
    throttled_scope="gpu+throttled",
)
_VIRTUAL = LinkKind("virtual", "time is computed", "mobile.links.virtual", None, real_time=False, scope="cpu+virtual")
_DISK = LinkKind(
    "disk", "experts read from a file", "mobile.links.disk", "cpu", real_time=True, scope="cpu+disk", store="disk"
)
_PACED = LinkKind("paced", "sleeps, for tests", "mobile.links.paced", "cpu", real_time=True, scope="cpu+paced")

LINKS: Mapping[str, LinkKind] = MappingProxyType({kind.name: kind for kind in (_CUDA, _DISK, _VIRTUAL, _PACED)})
CHOICES = ("auto", *LINKS)


def link_kind(name: str, device_type: str) -> LinkKind:
    """Return the link of that name for a model on a device of that type; "auto" is cuda on a GPU, else virtual.

    Raise Refused for a name that is unknown.
    """
    if name == "auto":
        return _CUDA if device_type == _CUDA.device_type else _VIRTUAL
    if name not in LINKS:
        raise Refused(f"Link {name!r} is not available; {offer(name, CHOICES, f'choose {in_words(CHOICES)}')}.")
    return LINKS[name]


def described() -> str:
    """Return every choice of a link with its summary: "auto, cuda (real copies to a GPU), ..."."""
    return ", ".join(("auto", *(f"{kind.name} ({kind.summary})" for kind in LINKS.values())))


def in_words(names: Sequence[str]) -> str:
    """Return the names as a sentence has them: "cuda, virtual or paced"."""
    *others, last = names
    return f"{', '.join(others)} or {last}"


def real_time_link(device_type: str) -> str:
    """Return the name of the link that copies from memory to a device of that type in real time."""
    return _CUDA.name if device_type == _CUDA.device_type else _PACED.name


def needs_gpu(name: str | None) -> bool:
    """Return whether the link of that name copies to a GPU; False for None, a replay, which has no link."""
    return name is not None and LINKS[name].needs_gpu


def scope_of(name: str | None, link_gb_per_s: float | None = None) -> str:
    """Return the scope of records timed over that link at that rate; None is a replay, on the virtual clock."""
    return (_VIRTUAL if name is None else LINKS[name]).scope_at(link_gb_per_s)
