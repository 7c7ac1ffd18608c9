"""Whatever breaks a load off leaves nothing behind, and a load changes nothing for those beside it."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import transformers
from conftest import tiny
from torch.nn.modules import module as torch_modules
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

import mobile
from mobile.checkpoints import loading, reading

T = TypeVar("T")

PACKAGE = Path(mobile.__file__).parent
FILES = {str(PACKAGE / "live_model/cleanup.py")} | {
    str(PACKAGE / f"checkpoints/{name}.py")
    for name in (
        "examine",
        "configuration",
        "generation",
        "headers",
        "loading",
        "reading",
        "direct",
        "source",
        "weights",
    )
}
STORE_FILES = {str(PACKAGE / f"store/{name}.py") for name in ("disk", "rows_file")}
SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of one layer in several files."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    where = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(config).save_pretrained(where, max_shard_size="5KB")
    return where


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(autouse=True)
def _a_lock_of_its_own(monkeypatch) -> None:
    """So that a test that fails leaves none to wait for."""
    monkeypatch.setattr(loading, "ONE_AT_A_TIME", threading.RLock())


@pytest.fixture(params=["direct", "converted"])
def way(request, monkeypatch) -> str:
    if request.param == "converted":
        monkeypatch.setattr(loading, "plan_readings", lambda *_: None)
    return request.param


def load(folder: Path, *, progress: bool = True, store: Path | None = None) -> PreTrainedModel:
    return mobile.load(folder, "lru", slots=4, device="cpu", progress=progress, store=store)


def whole(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> bool:
    ours = mobile.detach(model).state_dict()
    return ours.keys() == weights.keys() and all(torch.equal(weight, ours[key]) for key, weight in weights.items())


def shared(folder: Path) -> dict[str, object]:
    """Everything that a load could leave behind in this process."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    log = transformers.utils.logging
    return {
        "environment": os.environ.get(SWITCH),
        "verbosity": log.get_verbosity(),
        "bars": log.is_progress_bar_enabled(),
        "hooks": len(torch_modules._global_parameter_registration_hooks),
        "open files": [link for link in map(target, links) if str(folder) in link],
        "default device": (torch.get_default_device(), torch._C._len_torch_function_stack()),
        "default dtype": torch.get_default_dtype(),
        "modes": (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "lock": held_elsewhere(loading.ONE_AT_A_TIME),
    }


def in_a_thread(work: Callable[[], T]) -> T:
    """The result of the work, done on a thread of its own; an exception of a trace function can spoil a thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def held_elsewhere(lock: threading.RLock) -> bool:
    """Whether another thread would have to wait for it."""

    def attempt() -> bool:
        got = lock.acquire(blocking=False)
        if got:
            lock.release()
        return not got

    return in_a_thread(attempt)


def target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def threads_end(before: set[threading.Thread]) -> bool:
    """Whether no thread of a load is left, a moment later: threads that were told to stop need one."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if set(threading.enumerate()) <= before:
            return True
        time.sleep(0.01)
    return False


class Press:
    """A trace function that presses Ctrl-C before the n-th line that a load runs of its own code."""

    def __init__(self, at: int = 0, files: set[str] = FILES) -> None:
        self.at, self.files, self.where = at, files, ""
        self.lines: list[tuple[str, int]] = []

    def __call__(self, frame, event: str, _argument: object):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def load(self, folder: Path, store: Path | None = None) -> None:
        sys.settrace(self)
        try:
            load(folder, store=store)
        finally:
            sys.settrace(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_at_any_line_of_a_load_leaves_nothing_behind(folder, weights, way, monkeypatch, capfd):
    """The exception is kept meanwhile, as an interactive session does."""
    monkeypatch.setenv(SWITCH, "0") if way == "direct" else monkeypatch.delenv(SWITCH, raising=False)
    threads, before, counting = set(threading.enumerate()), shared(folder), Press()
    counting.load(folder)
    firsts = {line: at for at, line in reversed(list(enumerate(counting.lines, 1)))}
    lasts = {line: at for at, line in enumerate(counting.lines, 1)}
    assert len(firsts) > 200
    swallowed = 0

    def interrupted(at: int) -> None:
        nonlocal swallowed
        press, kept = Press(at), []
        try:
            press.load(folder)
        except KeyboardInterrupt as pressed:
            kept.append(pressed)
        swallowed += not kept
        assert shared(folder) == before, press.where
        assert at % 10 or whole(load(folder), weights), press.where

    for at in sorted({*firsts.values(), *lasts.values()}):
        in_a_thread(lambda at=at: interrupted(at))
    assert swallowed < 5  # one that falls into a finalizer goes no further
    assert whole(load(folder), weights)
    assert threads_end(threads)
    capfd.readouterr()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_at_any_line_of_a_load_into_a_file_leaves_no_half_of_one(folder, weights, tmp_path, capfd):
    rows = tmp_path / "rows"
    threads, before, counting = set(threading.enumerate()), shared(rows), Press(files=FILES | STORE_FILES)
    counting.load(folder, rows)
    lines = {line: at for at, line in reversed(list(enumerate(counting.lines, 1)))}
    chosen = [
        at for (file, _), at in sorted(lines.items(), key=lambda each: each[1]) if file in STORE_FILES or at % 5 == 0
    ]
    assert sum(file in STORE_FILES for file, _ in lines) > 80
    swallowed = 0

    def interrupted(at: int) -> None:
        nonlocal swallowed
        press, kept = Press(at, FILES | STORE_FILES), []
        for file in rows.iterdir():
            file.unlink()
        try:
            press.load(folder, rows)
        except KeyboardInterrupt as pressed:
            kept.append(pressed)
        swallowed += not kept
        kept.clear()
        gc.collect()
        assert shared(rows) == before, press.where
        assert all(file.suffix == ".safetensors" for file in rows.iterdir()), press.where
        assert whole(load(folder, store=rows), weights), press.where  # which may find the file that is there

    for at in chosen:
        in_a_thread(lambda at=at: interrupted(at))
    assert swallowed < 5
    assert threads_end(threads)
    capfd.readouterr()


def test_a_refusal_and_a_failure_in_the_middle_leave_nothing_behind(folder, weights, way, monkeypatch):
    before = shared(folder)
    for error in (RuntimeError("no"), mobile.Refused("no"), ZeroDivisionError()):
        with monkeypatch.context() as patch:

            def fail(*_: object, error: Exception = error) -> None:
                raise error

            patch.setattr(loading.HostStore, "weights", fail)
            with pytest.raises((mobile.Refused, ZeroDivisionError)):
                load(folder, progress=False)
        assert shared(folder) == before
    assert whole(load(folder, progress=False), weights)


def test_modes_that_pytorch_leaves_on_when_it_is_interrupted_are_put_back(folder, weights, monkeypatch):
    before = shared(folder)

    def leave_on(*_: object) -> None:
        torch.device("meta").__enter__()
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "plan_readings", leave_on)
        with pytest.raises(KeyboardInterrupt):
            load(folder, progress=False)
    assert shared(folder) == before
    assert whole(load(folder, progress=False), weights)


def test_an_interrupt_that_comes_out_as_another_error_is_an_interrupt(folder, monkeypatch):
    def fail(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("the stack is empty")

    monkeypatch.setattr(reading, "_keep_experts_out", fail)  # on the thread that Ctrl-C comes to
    with pytest.raises(KeyboardInterrupt):
        load(folder, progress=False)


# --- the caller's modes, and other threads ------------------------------------------------------------


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable] = {
    "with torch.device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("strategy", "gamma"), [("lru", None), ("mobile", 1.1)])
def test_the_callers_modes_change_nothing_about_what_is_loaded(tmp_path, mode, strategy, gamma, way):
    tiny("deepseek_v2").save_pretrained(tmp_path, max_shard_size="40KB")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    with mode():
        model = mobile.load(tmp_path, strategy, slots=8, gamma=gamma, device="cpu", progress=False)
    assert model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
    mobile.detach(model)
    for kind in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(stock, kind)())
        for name, weight in getattr(model, kind)():
            assert not weight.is_inference(), name
            assert (weight.dtype, weight.requires_grad) == (theirs[name].dtype, theirs[name].requires_grad), name
            assert torch.equal(weight, theirs[name]), name


def test_a_load_draws_no_random_numbers(folder, way):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load(folder, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_two_threads_may_load_at_once_in_dtypes_of_their_own(folder, weights, way):
    """Transformers builds a model under a default dtype that all threads share."""
    before, dtypes = shared(folder), (torch.float32, torch.bfloat16)

    def load_often(dtype: torch.dtype) -> list[PreTrainedModel]:
        return [mobile.load(folder, "lru", slots=4, device="cpu", progress=False, dtype=dtype) for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        loaded = dict(zip(dtypes, threads.map(load_often, dtypes), strict=True))
    for dtype, models in loaded.items():
        assert all(whole(model, {key: weight.to(dtype) for key, weight in weights.items()}) for model in models)
        assert {weight.dtype for model in models for weight in model.parameters()} == {dtype}
    assert shared(folder) == before


def test_a_model_that_another_thread_loads_with_transformers_meanwhile_keeps_its_experts(folder, weights, monkeypatch):
    monkeypatch.setattr(loading, "plan_readings", lambda *_: None)
    weights_of, others = loading.HostStore.weights, []

    def load_another(store: loading.HostStore, layer: int, name: str) -> torch.Tensor:
        if not others:
            others.append(in_a_thread(lambda: AutoModelForCausalLM.from_pretrained(folder)))
        return weights_of(store, layer, name)

    monkeypatch.setattr(loading.HostStore, "weights", load_another)
    model = load(folder, progress=False)
    [other] = others
    assert all(torch.equal(weight, weights[key]) for key, weight in other.state_dict().items())
    assert whole(model, weights)
