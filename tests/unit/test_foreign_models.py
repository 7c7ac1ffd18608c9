"""Models that are not ours are not called ours, and what they write does not run unasked."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from mobile.errors import Refused
from suites.identity import HERE, model_hash
from suites.plan import preflight
from suites.plan.preset import read_preset

SHIPPED = HERE / "models/olmoe-tiny"
SMOKE = (HERE / "presets/smoke.toml").read_text(encoding="utf-8")


def change(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    model_hash.cache_clear()


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Return a folder with a model of ours whose weights somebody changed, with a list of hashes to match."""
    folder = tmp_path / "foreign"
    shutil.copytree(SHIPPED, folder)
    change(folder / "model.safetensors")
    names = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


def preset(tmp_path: Path, *changes: tuple[str, str]) -> str:
    text = SMOKE
    for change in changes:
        assert change[0] in text
        text = text.replace(*change)
    (tmp_path / "mine.toml").write_text(text)
    return str(tmp_path / "mine.toml")


def test_a_foreign_model_does_not_pass_as_one_of_ours(foreign, tmp_path):
    with pytest.raises(Refused, match="holds no model that is shipped here"):
        read_preset("smoke", folders={"olmoe-tiny": foreign})
    with pytest.raises(Refused, match="holds no model that is shipped here"):
        read_preset(preset(tmp_path, ("models/olmoe-tiny", str(foreign))))


def test_code_that_a_foreign_model_writes_runs_on_request_only(foreign, tmp_path):
    named = read_preset(
        preset(
            tmp_path,
            ("models/olmoe-tiny", str(foreign)),
            ('"shipped-tiny"', '"real"'),
            ('["object_counting"]', '["python_functions"]'),
        )
    )
    with pytest.raises(Refused, match="pass --run-generated-code"):
        preflight.check(named, run_generated_code=False)


def test_other_weights_of_the_same_size_are_another_model(foreign, tmp_path):
    path = preset(tmp_path, ("models/olmoe-tiny", str(foreign)), ('"shipped-tiny"', '"real"'))
    before = read_preset(path).cells[0].id
    assert read_preset(path).cells[0].id == before
    change(foreign / "model.safetensors")
    assert read_preset(path).cells[0].id != before


def test_a_copy_of_a_shipped_model_is_ours_until_a_file_is_added(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(SHIPPED, copy)
    [model] = {cell.model for cell in read_preset("smoke", folders={"olmoe-tiny": copy}).scored}
    assert model.weights == "shipped-tiny"
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    model_hash.cache_clear()
    with pytest.raises(Refused, match=r"chat_template.jinja is not among the files"):
        read_preset("smoke", folders={"olmoe-tiny": copy})


def test_neither_a_model_of_the_hub_nor_one_of_ours_under_the_name_of_another_is_called_ours(tmp_path):
    hub = preset(tmp_path, ('path = "models/olmoe-tiny"', 'hub = "someone/foreign"\nrevision = "main"'))
    with pytest.raises(Refused, match=r"olmoe-tiny lies on the hub and is none that is shipped here"):
        read_preset(hub)
    other = HERE / "models/qwen2-moe-tiny"
    with pytest.raises(Refused, match=r"holds another of the models that are shipped here, and not olmoe-tiny"):
        read_preset("smoke", folders={"olmoe-tiny": other})
    with pytest.raises(Refused, match=r"and not olmoe-tiny"):
        read_preset(preset(tmp_path, ("models/olmoe-tiny", "models/qwen2-moe-tiny")))


def test_a_model_of_ours_is_not_called_real(tmp_path):
    named = read_preset(preset(tmp_path, ('"shipped-tiny"', '"real"')))
    assert {cell.model.weights for cell in named.scored} == {"shipped-tiny"}
