"""Links by name: what each needs, and in what scope its times are."""

from __future__ import annotations

import pytest

from mobile.errors import Refused
from mobile.links.registry import LINKS, link_kind, needs_gpu, real_time_link, scope_of


def test_every_link_has_a_module_that_connects_it():
    for name, kind in LINKS.items():
        assert kind.name == name
        module = pytest.importorskip(kind.module)
        assert callable(module.connect)


def test_auto_is_the_real_link_on_a_gpu_and_computed_time_elsewhere():
    assert link_kind("auto", "cuda").name == "cuda"
    assert link_kind("auto", "cpu").name == "virtual"
    assert link_kind("paced", "cpu") is LINKS["paced"]
    with pytest.raises(Refused, match="did you mean paced\\? Choose auto, cuda, disk, virtual or paced"):
        link_kind("pace", "cpu")


def test_real_time_comes_from_the_devices_own_link():
    assert real_time_link("cuda") == "cuda"
    assert real_time_link("cpu") == "paced"
    assert [name for name in LINKS if needs_gpu(name)] == ["cuda"]
    assert not needs_gpu(None)


def test_scopes_say_whose_time_it_is():
    assert {name: scope_of(name) for name in (None, *LINKS)} == {
        None: "cpu+virtual",
        "virtual": "cpu+virtual",
        "paced": "cpu+paced",
        "disk": "cpu+disk",
        "cuda": "gpu+pcie",
    }
    assert scope_of("cuda", 25.0) == "gpu+throttled"
    assert scope_of("paced", 25.0) == "cpu+paced"
    assert scope_of("virtual", 25.0) == "cpu+virtual"
