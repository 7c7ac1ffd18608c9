"""Experts on disk: the stock model's answers, or one sentence, whatever befalls the file that they lie in."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import greedy, prompt, tiny
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import mobile
from mobile.checkpoints import loading
from mobile.store import rows_file

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "suites/models/olmoe-tiny"
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def stock():
    """The shipped model's next tokens, as Transformers writes them."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="eager").eval()
    return written(model)


def written(model) -> torch.Tensor:
    return model.generate(torch.arange(3, 19)[None], max_new_tokens=4, do_sample=False)


def load(folder: Path, **options: object):
    return mobile.load(
        MODEL, "lru", slots=64, link="disk", store=folder, dtype=torch.float32, progress=False, **options
    )


def rows_in(folder: Path) -> Path:
    [path] = folder.glob("*.safetensors")
    return path


# --- the file ---------------------------------------------------------------------------------------


def test_the_file_is_made_once_and_read_again(tmp_path, stock, monkeypatch):
    assert torch.equal(written(load(tmp_path)), stock)
    path, before = rows_in(tmp_path), rows_in(tmp_path).stat().st_mtime_ns
    monkeypatch.setattr(rows_file.RowsFile, "write", lambda *_: pytest.fail("the file was there"))
    model = load(tmp_path)
    assert torch.equal(written(model), stock)
    assert rows_in(tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert model.mobile.stats()["bytes_loaded"] % rows_file.PAGE == 0


def test_it_is_a_safetensors_file_of_page_aligned_rows(tmp_path):
    store = load(tmp_path).mobile.store
    data = rows_in(tmp_path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % rows_file.PAGE == 0
    assert store.layout.nbytes % rows_file.PAGE == 0
    with safe_open(rows_in(tmp_path), framework="pt") as file:
        assert file.metadata()["format"] == rows_file.FORMAT
        for layer in range(4):
            mine = store.views(layer)
            theirs = store.layout.views(file.get_tensor(f"layers.{layer}"))
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_it_is_the_same_file_where_transformers_converts_the_weights(tmp_path, stock, monkeypatch):
    load(tmp_path / "direct")
    monkeypatch.setattr(loading, "plan_readings", lambda *_: None)
    model = load(tmp_path / "converted")
    assert torch.equal(written(model), stock)
    names = [rows_in(tmp_path / way) for way in ("direct", "converted")]
    with safe_open(names[0], framework="pt") as first, safe_open(names[1], framework="pt") as second:
        assert all(torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in first.keys())  # noqa: SIM118


def test_other_weights_get_a_file_of_their_own(tmp_path, stock):
    copy = tmp_path / "model"
    shutil.copytree(MODEL, copy)
    store = tmp_path / "store"
    mobile.load(copy, "lru", slots=64, store=store, dtype=torch.float32, progress=False)
    first = rows_in(store)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(1.5)
    model.save_pretrained(copy)
    model.set_experts_implementation("eager")
    ours = mobile.load(copy, "lru", slots=64, store=store, dtype=torch.float32, progress=False)
    assert torch.equal(written(ours), written(model.eval()))
    assert len(list(store.glob("*.safetensors"))) == 2
    assert first.is_file()


def test_a_live_models_file_has_no_name_and_goes_with_it(tmp_path):
    model = tiny("olmoe")
    expected = greedy(model, prompt())[0]
    mobile.attach(model, "lru", slots=8, store=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(greedy(model, prompt())[0], expected)
    mobile.detach(model)
    assert torch.equal(greedy(model, prompt())[0], expected)


# --- harm -------------------------------------------------------------------------------------------

KILLED = """
import sys, torch, mobile
from mobile.store import rows_file
write = rows_file.RowsFile.write
def slow(self, layer, rows):
    write(self, layer, rows)
    print("written", flush=True)
    sys.stdin.readline()
rows_file.RowsFile.write = slow
mobile.load(sys.argv[1], "lru", slots=64, store=sys.argv[2], dtype=torch.float32, progress=False)
"""


def making(folder: Path) -> subprocess.Popen:
    """A process that stops in the middle of making the file, after its first layer."""
    command = [sys.executable, "-c", KILLED, str(MODEL), str(folder)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_process_killed_while_it_makes_the_file_leaves_none(tmp_path, stock):
    with making(tmp_path) as process:
        process.kill()
    assert list(tmp_path.glob("*.safetensors")) == []
    assert torch.equal(written(load(tmp_path)), stock)
    assert [path.name for path in tmp_path.iterdir()] == [rows_in(tmp_path).name]


def test_a_second_process_is_told_that_the_file_is_being_made(tmp_path, stock):
    with making(tmp_path) as process:
        with pytest.raises(mobile.Refused, match=r"Another process is making .*; wait for it, or name another folder"):
            load(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert torch.equal(written(load(tmp_path)), stock)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 4096),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"fields"', b'"Fields"', 1)),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"offset', b'"Offset', 1)),
        lambda path: path.open("ab").write(b"more"),
    ],
    ids=["one byte less", "the header alone", "empty", "no header", "another name", "another layout", "longer"],
)
def test_a_file_that_is_not_whole_is_made_again(tmp_path, stock, harm):
    load(tmp_path)
    harm(rows_in(tmp_path))
    assert torch.equal(written(load(tmp_path)), stock)
    assert torch.equal(written(load(tmp_path)), stock)


def test_a_flipped_bit_is_never_computed_with(tmp_path):
    """In the middle of every expert in turn, as far as the answer needs it: refused, or not read."""
    model = load(tmp_path)
    layer_nbytes, row = 64 * model.mobile.store.layout.nbytes, model.mobile.store.layout.nbytes
    path = rows_in(tmp_path)
    whole = path.read_bytes()
    data = bytearray(whole)
    header = len(data) - 4 * layer_nbytes
    for expert in range(4 * 64):
        data[header + expert * row + row // 3] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(mobile.Refused, match=r"is damaged in layer \d, expert \d+; delete it, and it is made again"):
        written(load(tmp_path))
    path.unlink()
    load(tmp_path)
    assert path.read_bytes()[header:] == whole[header:]


def test_a_file_that_disappears_is_still_read_and_one_cut_short_is_refused(tmp_path, stock):
    model = load(tmp_path)
    os.truncate(rows_in(tmp_path), 8192)
    with pytest.raises(mobile.Refused, match=r"ends before layer|is damaged in layer"):
        written(model)
    rows_in(tmp_path).unlink()
    model = load(tmp_path)
    shutil.rmtree(tmp_path)
    assert torch.equal(written(model), stock)


def test_a_read_error_reaches_the_caller_and_the_next_answer_is_whole(tmp_path, stock, monkeypatch):
    model, preadv = load(tmp_path), os.preadv

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(mobile.Refused, match=r"cannot be read \(Input/output error\); copy it to another disk"):
            written(model)
    assert os.preadv is preadv
    assert torch.equal(written(model), stock)


def test_reads_that_stop_short_go_on(tmp_path, stock, monkeypatch):
    model, preadv, calls = load(tmp_path), os.preadv, []

    def short(file: int, buffers: list, offset: int) -> int:
        calls.append(offset)
        return preadv(file, [buffers[0][: rows_file.PAGE]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert torch.equal(written(model), stock)
    assert len(calls) > model.mobile.stats()["loads"]


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(mobile.Refused, match=r"of 0\.0 GB cannot be made \(No space left on device\); name a folder"):
        load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_before_a_weight_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(loading, "_fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(mobile.Refused, match=r"The experts take 0\.0 GB on disk and 0\.0 GB are free under .*; name a"):
        load(tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys, torch, mobile
from mobile.store import rows_file
write = rows_file.RowsFile.write
def limited(self, layer, rows):
    if layer == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    write(self, layer, rows)
rows_file.RowsFile.write = limited
try:
    mobile.load(sys.argv[1], "lru", slots=64, store=sys.argv[2], dtype=torch.float32, progress=False)
except mobile.Refused as refused:
    print(refused)
"""


def test_a_disk_that_is_full_in_the_middle_leaves_no_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(MODEL), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "cannot be written (File too large); name a folder with room." in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mobile.Refused, match="cannot be made"):
        load(tmp_path / "file" / "folder")


@pytest.mark.skipif(not os.access(SHARED_MEMORY, os.W_OK), reason="no file system in memory")
def test_a_file_system_without_direct_reads_is_said_in_one_line_and_gives_the_same(stock):
    folder = SHARED_MEMORY / f"mobile-test-{os.getpid()}"
    try:
        direct = os.open(SHARED_MEMORY, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT)
    except OSError:
        direct = -1
    if direct >= 0:
        os.close(direct)
        pytest.skip("this one has them")
    try:
        with pytest.warns(UserWarning, match="takes no direct reads, so rows go through the page cache"):
            model = load(folder)
        assert not model.mobile.store.file.direct
        assert torch.equal(written(model), stock)
    finally:
        shutil.rmtree(folder)


# --- what is asked for ------------------------------------------------------------------------------


def test_a_store_says_which_link(tmp_path):
    model = mobile.attach(tiny("olmoe"), "lru", slots=8, store=tmp_path)
    assert model.mobile.plan.link == "disk"
    mobile.detach(model)
    assert mobile.attach(model, "lru", slots=8, store="memory").mobile.plan.link == "virtual"


@pytest.mark.parametrize(
    ("strategy", "options", "sentence"),
    [
        ("lru", {"link": "virtual", "store": "here", "slots": 8}, "Link virtual copies experts from memory"),
        ("lru", {"link": "disk", "store": "memory", "slots": 8}, "Link disk reads experts from a disk"),
        ("lru", {"link": "disk"}, "Experts on disk leave memory to be divided: give memory, like 8GiB, or slots"),
        ("cpu-hybrid", {"link": "disk", "slots": 8}, "computes experts where they lie, which a disk cannot"),
        ("lru", {"link": "disk", "slots": 8, "geometry": "olmoe-1b-7b"}, "virtual time only"),
        ("lru", {"link": "disk", "slots": 8, "link_gb_per_s": 1.0}, "A disk is as fast as it is; leave link_gb_per_s"),
    ],
)
def test_what_a_disk_cannot_do_is_refused(strategy, options, sentence):
    with pytest.raises(mobile.Refused, match=sentence):
        mobile.attach(tiny("olmoe"), strategy, **options)


BUDGET = """
import json, os, sys, torch, mobile
torch.set_num_threads(1)
def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
tiny = mobile.load(sys.argv[4], "lru", slots=64, progress=False)  # all that is imported is then there
tiny.generate(torch.arange(3, 40)[None], max_new_tokens=3, do_sample=False)
before = resident()
model = mobile.load(sys.argv[1], "lru", memory=int(sys.argv[3]), store=sys.argv[2], progress=False)
model.generate(torch.arange(3, 40)[None], max_new_tokens=30, do_sample=False)
print(json.dumps({
    "slots": model.mobile.slots, "experts": model.mobile.geometry.total_experts,
    "grown": resident() - before, "resident": resident(), "file": model.mobile.store.nbytes,
}))
"""


def test_the_memory_budget_is_kept(tmp_path):
    """By the process's resident memory, of a model of 0.4 GB of experts that gets 100 MiB beside the reserve."""
    from transformers import OlmoeConfig

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=4,
        pad_token_id=0,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(tmp_path / "model")
    reserve, share = 2**30, 100 * 2**20
    command = [sys.executable, "-c", BUDGET, str(tmp_path / "model"), str(tmp_path / "store"), str(reserve + share)]
    command.append(str(MODEL))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the first makes the file
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["file"] > 350 * 10**6
    assert told["slots"] < told["experts"] / 4
    assert told["grown"] < share + 50 * 2**20, told
    assert told["resident"] < reserve + share, told


def test_a_row_is_checked_at_its_first_read_and_again_once_the_file_has_changed(tmp_path, monkeypatch):
    model = load(tmp_path)
    store, checked, real = model.mobile.store, [], rows_file.checksum

    def checksum(row: memoryview) -> int:
        checked.append(len(row))
        return real(row)

    monkeypatch.setattr(rows_file, "checksum", checksum)
    store.file._checked.clear()
    for _ in range(3):
        model.mobile.fill((0, 1), 0)
    assert len(checked) == 1
    with rows_in(tmp_path).open("r+b") as file:
        place = store.file._offset(0, 1)
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(mobile.Refused, match="is damaged in layer 0, expert 1"):
        model.mobile.fill((0, 1), 0)
    model.mobile.fill((0, 2), 0)
    assert len(checked) == 3


def test_a_checksum_changes_with_every_bit_and_with_the_order_of_pages():
    generator = torch.Generator().manual_seed(0)
    row = bytearray(torch.randint(256, (4 * rows_file.PAGE,), dtype=torch.uint8, generator=generator).numpy().tobytes())
    whole = rows_file.checksum(memoryview(row))
    for bit in range(0, 8 * len(row), 97):
        row[bit // 8] ^= 1 << bit % 8
        assert rows_file.checksum(memoryview(row)) != whole
        row[bit // 8] ^= 1 << bit % 8
    assert rows_file.checksum(memoryview(row)) == whole
    page = rows_file.PAGE
    assert rows_file.checksum(memoryview(row[page : 2 * page] + row[:page] + row[2 * page :])) != whole


def test_slots_lie_in_large_pages_where_the_system_has_them():
    from mobile.store import layout
    from mobile.store.disk import LARGE_PAGE, page_aligned_rows

    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this system has none")
    rows = page_aligned_rows(3, layout.ExpertLayout((), LARGE_PAGE // 4, torch.float32))
    assert rows.data_ptr() % LARGE_PAGE == 0
    assert not rows.any()
    asked, here = False, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if rest and all(character in "0123456789abcdef" for character in first):
            here = int(first, 16) <= rows.data_ptr() < int(rest.split()[0], 16)
        asked |= here and line.startswith("VmFlags:") and "hg" in line.split()
    assert asked


def test_slots_that_no_memory_can_hold_are_refused(tmp_path, monkeypatch):
    take, first = mmap.mmap, [OSError(errno.ENOMEM, "Cannot allocate memory")]

    def none(*arguments: object, **options: object) -> mmap.mmap:
        if first:
            raise first.pop()
        return take(*arguments, **options)  # experts are given back

    monkeypatch.setattr(mmap, "mmap", none)
    model = tiny("olmoe")
    expected = greedy(model, prompt())[0]
    with pytest.raises(mobile.Refused, match="for 8 slots could not be taken on cpu; give fewer slots or less memory"):
        mobile.attach(model, "lru", slots=8, store=tmp_path)
    assert torch.equal(greedy(model, prompt())[0], expected)


# --- what lies where the file goes ------------------------------------------------------------------


def test_a_pipe_where_the_file_goes_is_no_wait(tmp_path, stock):
    load(tmp_path)
    path = rows_in(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert torch.equal(written(load(tmp_path)), stock)
    assert path.is_file()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_file_outside_is_written_through_a_link_in_the_folder(tmp_path, link):
    """The name of the file that is being made can be known beforehand, and a folder may be open to others."""
    folder, outside = tmp_path / "rows", tmp_path / "outside"
    load(folder)
    path = rows_in(folder)
    path.unlink()
    outside.write_text("precious")
    link(outside, path.with_name(f"{path.name}.partial"))
    with pytest.raises(mobile.Refused, match=r"cannot be made \(.*link.*\); name a folder"):
        load(folder)
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("store", ["\0", "\ud800", "x" * 300, 5, b"x", "/proc/x", __file__, f"{__file__}/x"])
def test_a_store_that_is_no_folder_is_one_sentence(store):
    with pytest.raises(mobile.Refused, match=r"is no folder|cannot be made|are free under"):
        load(store)
