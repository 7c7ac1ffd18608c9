"""The sandbox: right functions pass, wrong and wicked ones do not, and nothing outside a program's folder changes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suites.scoring import sandbox_worker
from suites.scoring.sandbox import run_all, run_tests

TESTS = "assert f(1) == 2\nassert f(-3) == -2\n"
RIGHT = "def f(x):\n    return x + 1\n"

# Things that a program does instead of its work, and the word that the reason must have.
WRONG = {
    "answers wrongly": ("def f(x):\n    return x\n", "AssertionError at 'assert f(1) == 2'"),
    "answers one test wrongly": ("def f(x):\n    return 2\n", "assert f(-3) == -2"),
    "defines nothing": ("x = 1\n", "NameError"),
    "is no Python": ("def f(x)\n    return\n", "SyntaxError"),
    "has a null byte": ("\0", "program failed"),
    "has half a character": ("x = '\ud800'\n", "program failed"),
    "leaves before its tests": ("import sys\nsys.exit(0)\n", "SystemExit"),
    "leaves from the function": ("def f(x):\n    raise SystemExit(0)\n", "SystemExit"),
    "ends the process": ("import os\nos._exit(0)\n", "left before its tests"),
    "ends the process later": (
        "import os, threading\nthreading.Timer(0.01, os._exit, (0,)).start()\ndef f(x):\n    while True: pass\n",
        "left before its tests",
    ),
    "prints that it passed": ("import os\nprint('passed', flush=True)\nos._exit(0)\n", "left before its tests"),
    "writes to every pipe that it passed": (
        "import os\nfor i in range(40):\n    try: os.write(i, b'passed')\n    except OSError: pass\nos._exit(0)\n",
        "left before its tests",
    ),
    "closes every pipe and stays": ("import os\nos.closerange(0, 99)\nwhile True: pass\n", "time limit"),
    "calls itself for ever": ("def f(x):\n    return f(x)\n", "RecursionError"),
    "computes for ever": ("def f(x):\n    while True: pass\n", "time limit"),
    "computes for ever whatever is raised": (
        "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass\n",
        "time limit",
    ),
    "ignores the signal that its time is up": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef f(x):\n    while True: pass\n",
        "time limit",
    ),
    "sleeps for ever": ("import time\ndef f(x):\n    time.sleep(999)\n", "time limit"),
    "takes all memory": ("def f(x):\n    a = []\n    while True: a.append('x' * 10**7)\n", "MemoryError"),
    "takes all memory at once": ("def f(x):\n    return [0] * 10**10\n", "MemoryError"),
    "writes a big file": (
        "def f(x):\n    with open('big', 'wb') as big:\n        big.write(b'x' * 10**8)\n        big.flush()\n",
        "OSError",
    ),
    "forks": ("import os\ndef f(x):\n    while True: os.fork()\n", "refuses os.fork"),
    "forks through multiprocessing": (
        "import multiprocessing as m\ndef f(x):\n    p = m.get_context('fork').Process(target=print)\n    p.start()\n",
        "PermissionError",
    ),
    "starts a program": ("import subprocess\nsubprocess.run(['true'])\n", "refuses subprocess"),
    "starts a shell": ("import os\nos.system('true')\n", "refuses os.system"),
    "becomes a program": ("import os\nos.execv('/bin/true', ['true'])\n", "refuses os.exec"),
    "opens a socket": ("import socket\nsocket.socket()\n", "refuses socket"),
    "asks for a web page": ("import urllib.request as u\nu.urlopen('http://127.0.0.1:9')\n", "program failed"),
    "signals its parent": ("import os\nos.kill(os.getppid(), 9)\n", "refuses os.kill"),
    "reaches for C": ("import ctypes\n", "refuses to import ctypes"),
    "lifts its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n",
        "refuses resource.setrlimit",
    ),
    "crashes": ("import os\nos.abort()\n", "crashed"),
}


def test_a_right_function_passes():
    outcome = run_tests(RIGHT, TESTS)
    assert outcome.passed
    assert outcome.reason == "passed"


@pytest.fixture(scope="module")
def judged() -> dict:
    outcomes = run_all([(program, TESTS) for program, _ in WRONG.values()], seconds=1)
    return dict(zip(WRONG, outcomes, strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_a_program_does_not_pass_that(judged, name):
    assert not judged[name].passed
    assert WRONG[name][1] in judged[name].reason


RIGHT_IN_ITS_WAY = {
    "writes much": "def f(x):\n    for _ in range(1000): print('x' * 10**5)\n    return x + 1\n",
    "names things in other scripts": "def f(größe):\n    数 = größe\n    return 数 + 1  # 🙂\n",
    "writes, renames and deletes in its folder": (
        "import os, pathlib\ndef f(x):\n    os.makedirs('a/b', exist_ok=True)\n"
        "    pathlib.Path('a/b/c').write_text('1')\n"
        "    os.rename('a/b/c', 'd')\n    y = int(open('d').read())\n    os.remove('d')\n    return x + y\n"
    ),
    "reads a file of the system": "def f(x):\n    open('/etc/hosts').read()\n    return x + 1\n",
    "has a thread": (
        "import threading\ndef f(x):\n    r = []\n    t = threading.Thread(target=lambda: r.append(x + 1))\n"
        "    t.start()\n    t.join()\n    return r[0]\n"
    ),
    "catches everything": "def f(x):\n    try:\n        1 / 0\n    except BaseException:\n        return x + 1\n",
    "has no secrets around it": "import os\nassert not os.environ\nassert os.listdir() == []\n" + RIGHT,
    "has seeded chances": "import random\nassert random.random() == 0.8444218515250481\n" + RIGHT,
    "has seeded hashes": f"assert hash('a') == {{}}\n{RIGHT}",
}


def test_harmless_programs_pass_whatever_else_they_do():
    seeded = subprocess.run(
        [sys.executable, "-c", "print(hash('a'))"], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True
    )
    programs = [program.replace("{}", seeded.stdout.strip()) for program in RIGHT_IN_ITS_WAY.values()]
    outcomes = run_all([(program, TESTS) for program in programs])
    reasons = {name: outcome.reason for name, outcome in zip(RIGHT_IN_ITS_WAY, outcomes, strict=True)}
    assert reasons == dict.fromkeys(RIGHT_IN_ITS_WAY, "passed")


MISCHIEF = {
    "write": "open({path!r}, 'w').write('gone')",
    "append": "open({path!r}, 'a').write('gone')",
    "truncate": "import os; os.truncate({path!r}, 0)",
    "remove": "import os; os.remove({path!r})",
    "rename away": "import os; os.rename({path!r}, 'mine')",
    "rename over": "import os; open('mine', 'w').close(); os.rename('mine', {path!r})",
    "link": "import os; os.link({path!r}, 'mine'); open('mine', 'w').write('gone')",
    "symlink": "import os; os.symlink({path!r}, 'mine'); open('mine', 'w').write('gone')",
    "up and down": "open('../' * 20 + {path!r}, 'w').write('gone')",
    "by descriptor": "import os; d = os.open({folder!r}, 0); os.unlink({name!r}, dir_fd=d)",
    "make beside": "import os; os.mkdir({path!r} + '.beside')",
    "mode": "import os; os.chmod({path!r}, 0)",
    "sweep": "import shutil; shutil.rmtree({folder!r})",
}


@pytest.mark.parametrize("how", MISCHIEF)
def test_nothing_outside_the_folder_changes(how, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    mode = precious.stat().st_mode
    code = MISCHIEF[how].format(path=str(precious), folder=str(tmp_path), name="precious")
    assert not run_tests(code, "pass").passed
    assert precious.read_text() == "kept"
    assert precious.stat().st_mode == mode
    assert list(tmp_path.iterdir()) == [precious]


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_all([("open('left', 'w').write('x')", "pass"), ("import os\nos.mkdir('a', 0)", "pass")])
    assert list(tmp_path.iterdir()) == []


def test_two_hundred_programs_in_seconds():
    begun = time.monotonic()
    outcomes = run_all([(RIGHT.replace("1", str(1 + i % 2)), TESTS) for i in range(200)])
    assert [outcome.passed for outcome in outcomes] == [i % 2 == 0 for i in range(200)]
    assert time.monotonic() - begun < 20, "1.5 s were measured on two busy cores"


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=60), st.text(max_size=30))
def test_whatever_the_text_there_is_an_outcome(program, word):
    first, second = run_all([(program, f"assert {word!r} == 0"), (RIGHT, TESTS)])
    assert not first.passed
    assert second.passed, "no program disturbs the next"


def test_tests_that_do_not_compile_are_an_error_and_no_result():
    with pytest.raises(SyntaxError):
        run_tests(RIGHT, "assert f(1) ==")


# --- the kernel's walls, without the hook before them ----------------------------------------------------

BARE = """
import os, sys
sys.path.insert(0, {suites!r})
import sandbox_worker, socket, threading
sandbox_worker.kernel_walls().put_up({folder!r})
def refused(action):
    try:
        action()
    except OSError as error:
        return True
    return False
print(refused(socket.socket), refused(os.fork), refused(lambda: os.kill(os.getppid(), 0)),
      refused(lambda: os.execv("/bin/true", ["true"])), refused(lambda: open({outside!r}, "w")),
      refused(lambda: os.remove({outside!r})), refused(lambda: open({inside!r}, "w")))
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has these walls")
def test_the_kernel_refuses_what_the_hook_refuses(tmp_path):
    (tmp_path / "in").mkdir()
    outside = tmp_path / "precious"
    outside.write_text("kept")
    script = BARE.format(
        suites=str(Path(sandbox_worker.__file__).parent),
        folder=str(tmp_path / "in"),
        outside=str(outside),
        inside=str(tmp_path / "in" / "mine"),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    calls, files = _offered()
    expected = [calls] * 4 + [files] * 2 + [False]
    assert done.stdout.split() == [*map(str, expected), "thread"], done.stderr
    assert outside.read_text() == "kept" or not files


def _offered() -> tuple[bool, bool]:
    """Whether this kernel has seccomp filters for this machine, and Landlock."""
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    listed = Path("/sys/kernel/security/lsm")
    landlock = listed.is_file() and "landlock" in listed.read_text()
    if not listed.is_file():
        import ctypes

        landlock = ctypes.CDLL(None).syscall(sandbox_worker.LANDLOCK_CREATE, None, 0, 1) >= 1
    return actions.is_file() and os.uname().machine in sandbox_worker.CALLS, landlock
