"""A calibration from end to end: this machine is timed, a profile is fitted and kept, commands and models use it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt, tiny

import mobile
from mobile.cli import main
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import PROFILES, profile, write_profile
from mobile.machine.fit_profile import fit, measurements_from
from mobile.machine.measure import measure, relinked, sizes
from mobile.machine.measure.copies import time_copies
from mobile.store import rows_file

SMALL = sizes.NARROW
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sizes, "ON_CPU", SMALL)


@pytest.fixture
def cli(capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return (main(argv), *capsys.readouterr())

    return run


def test_every_number_of_a_profile_is_measured_here():
    said: list[str] = []
    measured = measure(CPU, torch.float32, SMALL, say=said.append)
    card = fit(measured)
    assert said == ["copies over the link", "kernels", "decode steps"]
    assert [timing.nbytes for timing in measured.copies] == [3 * 256 * width * 4 for width in SMALL.widths]
    assert [depth.layers for depth in measured.depths] == [1, 2]
    assert measured.layer.moe_layers == 2
    assert measured.layer.top_k == 2
    assert 0 < measured.taken_nbytes < measured.memory_nbytes
    assert card.link_gb_per_s > 0.01
    assert all(depth.seconds > 0 for depth in measured.depths)
    assert torch.__version__ in card.sources[0]
    assert "UTC" in card.sources[0]


def test_a_paced_link_is_fitted_at_its_own_pace():
    """2 ms a megabyte and 1 ms a copy: far slower than this machine's memory, so that only the pace can show."""
    wide = replace(SMALL, widths=(256, 512, 1024))
    paced = time_copies(CPU, torch.float32, wide, pace=lambda nbytes: 10**6 + 2 * nbytes)
    assert all(timing.seconds >= 1e-3 + 2e-9 * timing.nbytes for timing in paced)
    free = time_copies(CPU, torch.float32, wide)
    assert sum(t.seconds for t in paced) > sum(t.seconds for t in free)


def test_relinking_times_nothing_but_copies():
    measured = measure(CPU, torch.float32, SMALL)
    other = relinked(measured, CPU, torch.float32, SMALL, pace=lambda nbytes: 10**6 + nbytes)
    assert replace(other, copies=measured.copies) == measured
    assert all(timing.seconds >= 1e-3 + 1e-9 * timing.nbytes for timing in other.copies)


@pytest.fixture
def small_disk(monkeypatch):
    monkeypatch.setattr(sizes, "ON_DISK", SMALL)


def test_with_a_folder_rows_are_read_from_a_file_there_and_nothing_is_left(tmp_path, monkeypatch):
    reads: list[tuple[str, int]] = []
    read = rows_file.RowsFile.read

    def counted(file, layer, expert, into):
        reads.append((str(file.path), len(into)))
        read(file, layer, expert, into)

    monkeypatch.setattr(rows_file.RowsFile, "read", counted)
    measured = measure(CPU, torch.float32, SMALL, folder=tmp_path / "absent" / "folder")
    rows = [3 * 256 * width * 4 for width in SMALL.widths]
    assert [timing.nbytes for timing in measured.copies] == rows
    assert {nbytes for _, nbytes in reads} == set(rows)
    assert {str(Path(path).parent) for path, _ in reads} == {str(tmp_path)}
    assert list(tmp_path.iterdir()) == []
    card = fit(measured)
    assert any("rows of a file, read " in source and "page cache" in source for source in card.sources)
    assert any(source.startswith("kernels and steps: beside rows that are read, ") for source in card.sources)
    assert measured.taken_nbytes == card.reserve_nbytes - 512 * 2**20
    assert 0 < measured.taken_nbytes < measured.memory_nbytes
    assert measurements_from(json.loads(json.dumps(asdict(measured)))) == measured


def test_experts_of_a_calibration_for_a_disk_are_as_large_as_the_real_families():
    rows = [3 * sizes.ON_DISK.hidden * width * 2 for width in sizes.ON_DISK.widths]
    assert {preset.expert_nbytes for preset in GEOMETRIES.values()} <= set(rows)
    assert sizes.ON_DISK.pool_nbytes > 4 * max(rows)


def test_the_doctor_calibrates_the_disk_and_virtual_time_is_computed_from_it(cli, small_disk, tmp_path):
    file, store = tmp_path / "disk.json", tmp_path / "store"
    store.mkdir()
    code, out, err = cli("doctor", "--calibrate", "--link", "disk", "--store", str(store), "--out", str(file))
    assert code == 0, err
    assert "link: rows of a file, read " in out
    assert "bfloat16" in out
    assert list(store.iterdir()) == []
    model = mobile.attach(tiny("olmoe"), "on-demand", slots=4, hardware=str(file))
    assert model.mobile.hardware == profile(str(file))


def test_the_doctor_calibrates_writes_and_plan_takes_the_file(cli, small, tmp_path):
    file = tmp_path / "here.json"
    code, out, err = cli("doctor", "--calibrate", "--device", "cpu", "--out", str(file))
    assert code == 0, err
    assert "measuring copies over the link" in err
    assert "GB/s" in out
    assert f"--hardware {file}" in out
    card = profile(str(file))
    code, out, _ = cli("plan", "olmoe-1b-7b", "--hardware", str(file), "--memory", "8GiB", "--json")
    plan = json.loads(out)
    assert (code, plan["hardware"], plan["reserve_nbytes"]) == (0, card.name, card.reserve_nbytes)
    bounds = {row["strategy"]: row["bounds"][0]["link_tokens_per_s"] for row in plan["strategies"]}
    assert bounds["on-demand"] == pytest.approx(card.link_gb_per_s * 1e9 / (16 * 8 * 12_582_912), rel=1e-6)


def test_a_calibration_prints_its_measurements_as_json(cli, small):
    code, out, _ = cli("doctor", "--calibrate", "--device", "cpu", "--json")
    told = json.loads(out)
    assert (code, told["file"]) == (0, None)
    assert len(told["measurements"]["copies"]) == len(SMALL.widths)
    assert told["profile"]["sources"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--calibrate", "--out", "here.txt"), "must end in .json"),
        (("--calibrate", "--out", "/no/such/folder/here.json"), "does not exist"),
        (("--out", "here.json"), "add --calibrate"),
        (("--device", "cpu"), "add --calibrate"),
        (("--link", "disk"), "add --calibrate"),
        (("--calibrate", "--link", "disk", "--store", "memory"), "Link disk reads experts from a disk"),
        (("--calibrate", "--link", "disk", "--store", "/proc/here"), "name a folder with room"),
        (("--calibrate", "--device", "gpu0"), "gpu0 is no device; give cpu, cuda or cuda:1"),
        (("--calibrate", "--device", "xpu"), "xpu is not among what can be timed here"),
        (("--calibrate", "--device", "cuda:97"), "CUDA device"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_anything_is_timed(cli, argv, says):
    code, out, err = cli("doctor", *argv)
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_not_calibrated(cli):
    code, _, err = cli("doctor", "--calibrate", "--device", "cuda")
    assert code == 2
    assert "no CUDA device" in err


def test_virtual_time_is_computed_for_the_file_and_what_was_measured_beyond_launches_counts(tmp_path):
    """Ten layers' worth of 1 ms and a step's 5 ms show up in the clock, to the nanosecond."""
    plain = replace(PROFILES["rtx4080-pcie4"], host_launch_seconds=0.0, host_copy_seconds=0.0, host_read_seconds=0.0)
    slower = replace(plain, name="slower", layer_seconds=1e-3, step_seconds=5e-3)
    times = []
    for card in (plain, slower):
        write_profile(card, tmp_path / "card.json")
        model = mobile.attach(tiny("olmoe"), "on-demand", slots=4, hardware=str(tmp_path / "card.json"))
        assert model.mobile.hardware == card
        greedy(model, prompt(), 5)
        times.append(model.mobile.ledger.counters.decode_ns)
    assert times[1] - times[0] == 4 * (3 * 1_000_000 + 5_000_000)
