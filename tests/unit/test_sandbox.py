"""The sandbox: right functions pass, wrong and wicked ones do not, and nothing outside a program's folder changes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile.errors import Refused
from suites.scoring.sandbox import run, values, walls
from suites.scoring.sandbox.run import Outcome, Submission, run_all

TESTS = "assert f(1) == 2\nassert f(-3) == -2\n"
RIGHT = "def f(x):\n    return x + 1\n"


def run_tests(program: str, tests: str = TESTS, given: str = "") -> Outcome:
    return run_all([Submission(program, "f", tests, given)])[0]


def judge(programs: Iterable[str], **limits: int) -> list[Outcome]:
    return run_all([Submission(program, "f", TESTS) for program in programs], **limits)


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
        "no plain value",
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
    "reaches for C": ("import ctypes\n", "refuses import of ctypes"),
    "reaches for C by another name": (
        "import sys\nsys.audit('import', 'x._ctypes', None, None, None, None)\n",
        "refuses import of _ctypes",
    ),
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
    outcomes = judge((program for program, _ in WRONG.values()), seconds=1)
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
    "deletes a folder with all in it": (
        "import shutil, os, tempfile\ndef f(x):\n    os.makedirs('a/b')\n    open('a/b/c', 'w').close()\n"
        "    shutil.rmtree('a')\n    with tempfile.TemporaryDirectory() as folder:\n"
        "        open(folder + '/d', 'w').close()\n    return x + 1\n"
    ),
    "keeps things in temporary files": (
        "import tempfile\ndef f(x):\n    with tempfile.TemporaryFile('w+') as file:\n"
        "        print(x + 1, file=file)\n        file.seek(0)\n        return int(file.read())\n"
    ),
    "has a class with notes for its fields": (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n"
        "def f(x): return A(x + 1).x\n"
    ),
    "copies an object": (
        "import pickle\nclass A: pass\ndef f(x):\n    a = A()\n    a.x = x\n"
        "    return pickle.loads(pickle.dumps(a)).x + 1\n"
    ),
    "has seeded chances": "import random\nassert random.random() == 0.8444218515250481\n" + RIGHT,
    "has seeded hashes": f"assert hash('a') == {{}}\n{RIGHT}",
}


def test_harmless_programs_pass_whatever_else_they_do():
    seeded = subprocess.run(
        [sys.executable, "-c", "print(hash('a'))"], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True
    )
    programs = [program.replace("{}", seeded.stdout.strip()) for program in RIGHT_IN_ITS_WAY.values()]
    outcomes = judge(programs)
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
    judge(["open('left', 'w').write('x')", "import os\nos.mkdir('a', 0)"])
    assert list(tmp_path.iterdir()) == []


# The hook asks the standard library where a path leads, and a program can change that.
DECEIVED = "import os, posixpath\nhere = os.getcwd()\nposixpath._joinrealpath = lambda *a: (here, True)\n"
TOO_LONG = DECEIVED + "for _ in range(40): os.mkdir('a' * 250); os.chdir('a' * 250)\n"
LEAVING = {
    "a deep folder": "import os\nfor _ in range(3000): os.mkdir('a'); os.chdir('a')\n",
    "a path that is too long": TOO_LONG,
    "folders without rights": (
        "import os\nos.mkdir('c'); os.mkdir('c/d'); os.umask(0o777); os.mkdir('a', 0o777); os.mkdir('b', 0o300)\n"
        "open('c/d/e', 'w').close()\n"
    ),
    "names that are no text": "import os\nos.mkdir(b'\\xff\\n'); open(b'\\xff\\n/\\xfe *', 'w').close()\n",
    "links": "import os\nopen('a', 'w').close(); os.link('a', 'b'); os.symlink('a', os.getcwd() + '/c')\n",
}


def test_whatever_a_program_leaves_is_removed_and_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    try:
        outcomes = judge(code + RIGHT for code in [*LEAVING.values(), ""])
        left = list(tmp_path.iterdir())
    finally:  # pytest's own cleaning up cannot delete a folder so deep, in this run or a later one
        subprocess.run(["rm", "-rf", *tmp_path.glob("sandbox-*")], check=True)
    reasons = dict(zip(LEAVING, (outcome.reason for outcome in outcomes), strict=False))
    assert reasons.pop("a deep folder").startswith("disk limit: ")
    assert set(reasons.values()) == {"passed"}
    assert outcomes[-1].passed
    assert left == []


def test_what_is_hidden_deep_in_a_folder_is_counted():
    deep = TOO_LONG + "for i in range(40): open(str(i), 'wb').write(b'x' * 2**20)\n"
    assert judge([deep + RIGHT])[0].reason.startswith("disk limit: ")


def test_two_hundred_programs_in_seconds():
    begun = time.monotonic()
    outcomes = judge(RIGHT.replace("1", str(1 + i % 2)) for i in range(200))
    assert [outcome.passed for outcome in outcomes] == [i % 2 == 0 for i in range(200)]
    assert time.monotonic() - begun < 20, "1.5 s were measured on two busy cores"


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=60), st.text(max_size=30))
def test_whatever_the_text_there_is_an_outcome(program, word):
    first, second = run_all([Submission(program, "f", f"assert {word!r} == 0"), Submission(RIGHT, "f", TESTS)])
    assert not first.passed
    assert second.passed, "no program disturbs the next"


def test_tests_that_do_not_compile_are_an_error_and_no_result():
    with pytest.raises(SyntaxError):
        run_tests(RIGHT, "assert f(1) ==")


# --- verdicts cannot be forged --------------------------------------------------------------------------

EQUAL = (
    "class Equal:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
    "    def __lt__(self, other): return True\n    __gt__ = __le__ = __ge__ = __lt__\n"
    "    def __sub__(self, other): return self\n    __rsub__ = __sub__\n    def __abs__(self): return 0\n"
    "    def __bool__(self): return True\n    def __iter__(self): return iter(())\n    def __hash__(self): return 0\n"
)
FRAMES = "import sys\nframe = sys._getframe()\nwhile frame:\n{}\n    frame = frame.f_back\n"
FORGERIES = {
    "an object that equals everything": EQUAL + "def f(x): return Equal()\n",
    "a number that equals everything": EQUAL + "class N(int, Equal): __eq__ = Equal.__eq__\ndef f(x): return N(7)\n",
    "a text that equals everything": EQUAL + "class N(str, Equal): __eq__ = Equal.__eq__\ndef f(x): return N('7')\n",
    "a list that equals everything": EQUAL + "class N(list): __eq__ = Equal.__eq__\ndef f(x): return N()\n",
    "an object in a list": EQUAL + "def f(x): return [Equal()]\n",
    "a class": EQUAL + "f = Equal\n",
    "exec replaced": "import builtins\nbuiltins.exec = lambda *a: None\ndef f(x): return 7\n",
    "compile replaced": (
        "import builtins\nold = compile\nbuiltins.compile = lambda *a, **k: old('', 'x', 'exec')\ndef f(x): return 7\n"
    ),
    "__builtins__ emptied": "__builtins__.clear()\ndef f(x): return 7\n",
    "AssertionError replaced": "import builtins\nbuiltins.AssertionError = StopIteration\ndef f(x): return 7\n",
    "all and abs replaced": (
        "import builtins\nbuiltins.all = lambda x: True\nbuiltins.abs = lambda x: 0\ndef f(x): return 7\n"
    ),
    "equality of numbers patched through gc": "import gc\nint.__eq__ = 1\ndef f(x): return 7\n",
    "__main__ replaced": "import __main__\n__main__.__dict__.clear()\ndef f(x): return 7\n",
    "the server's functions replaced": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if 'sandbox' in name:\n"
        "        for key in list(vars(module)):\n"
        "            if callable(getattr(module, key)): setattr(module, key, lambda *a, **k: 'passed')\n"
        "def f(x): return 7\n"
    ),
    "encoding replaced": (
        "import sys\nm = sys.modules['suites.scoring.sandbox.program']\nm.encoded = lambda v: ['int', '0x2']\n"
        "def f(x): return 7\n"
    ),
    "expected answers in the frames": (
        "def f(x):\n    import sys\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "            if isinstance(value, str) and 'assert f' in value: return eval(value.split('== ')[1].split()[0])\n"
        "        frame = frame.f_back\n    return 7\n"
    ),
    "locals of the frames overwritten": FRAMES.format("    frame.f_globals['reason'] = 'passed'")
    + "def f(x): return 7\n",
    "the seal of the frames": FRAMES.format(
        "    for v in list(frame.f_locals.values()):\n        if isinstance(v, int) and 2 < v < 99:\n"
        "            import os\n            try: os.write(v, b'\\x00\\x00\\x00\\x08\"passed\"')\n"
        "            except OSError: pass"
    ),
    "the memory of the process": (
        "def f(x):\n    data = open('/proc/self/mem', 'rb').read(10)\n    return 2 if x == 1 else -2\n"
    ),
    "an answer for every call sent before": (
        "import os, json\nfor value in ('begun', {'value': None}, {'value': True}, 'passed') * 9:\n"
        "    body = json.dumps(value).encode()\n"
        "    for pipe in range(3, 32):\n"
        "        try: os.write(pipe, len(body).to_bytes(4, 'big') + body)\n        except OSError: pass\n"
        "def f(x): return 7\n"
    ),
    "an exception that ends loops": "def f(x): raise StopIteration\n",
    "an exception that ends generators": "def f(x): raise GeneratorExit\n",
    "an exception that reads as a pass": "class passed(Exception): pass\ndef f(x): raise passed('passed')\n",
    "a return of the verdict": "def f(x): return 'passed'\n",
    "the function replaced while it is called": "def f(x):\n    global f\n    f = lambda y: -2\n    return 7\n",
    "the tests' own name of the function": "def check(candidate): return None\ndef f(x): return 7\n",
    "a trace function": "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return 7\n",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)\n",
    "a signal handler": (
        "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.alarm(1)\n"
        "def f(x):\n    while True: pass\n"
    ),
    "a thread that answers": (
        "import threading, os\ndef say():\n    while True:\n        for pipe in range(3, 9):\n"
        '            try: os.write(pipe, b\'\\x00\\x00\\x00\\x10{"value": ["int"\')\n'
        "            except OSError: pass\n"
        "threading.Thread(target=say, daemon=True).start()\ndef f(x): return 7\n"
    ),
    "a result without end": "def f(x):\n    while True: yield x + 1\n",
    "a huge result": "def f(x): return 'x' * 2**24\n",
    "a deep result": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a\n",
    "a result that holds itself": "def f(x):\n    a = []\n    a.append(a)\n    return a\n",
}


@pytest.fixture(scope="module")
def forged() -> dict[str, list[Outcome]]:
    """Return the outcomes of each forgery, first under asserts, then under tests in HumanEval's style."""
    check = "def check(candidate):\n    assert all(candidate(x) == x + 1 for x in (1, -3))\n"
    check += "    assert abs(candidate(1) - 2) < 1e-6\n    assert list(map(candidate, [1])) == [2]\ncheck(f)\n"
    tried = [Submission(program, "f", tests) for program in FORGERIES.values() for tests in (TESTS, check)]
    outcomes = run_all(tried, seconds=1)
    return dict(zip(FORGERIES, zip(outcomes[::2], outcomes[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", FORGERIES)
def test_no_verdict_is_forged_by(forged, name):
    asserts, check = forged[name]
    assert not asserts.passed
    assert not check.passed
    assert "sandbox-" not in asserts.reason


def test_the_verdict_of_one_program_tells_the_next_nothing(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    thief = "import sys\nframe, seen = sys._getframe(), []\nwhile frame:\n"
    thief += "    seen += [*frame.f_locals.values(), *frame.f_globals.values()]\n    frame = frame.f_back\n"
    thief += "found = [text for text in seen if isinstance(text, str) and 'as' 'sert f' in text]\n"
    thief += "def f(x): return int(found[0].split('== ')[1].strip(chr(39)))\n"
    tests = "assert f(1) == 2"
    outcomes = run_all([Submission(program, "f", tests) for program in ("def f(x): return 7\n", thief)])
    assert outcomes[0].reason == "tests failed: AssertionError at 'assert f(1) == 2'"
    assert not outcomes[1].passed


DESCRIPTORS = """
import os, resource
from suites.scoring.sandbox.run import Submission, run_all
resource.setrlimit(resource.RLIMIT_NOFILE, (999, 999))
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(500)]
program = "import os\\ndef f(x): return [n for n in range(3, 999) if there(n)]\\n"
program += "def there(n):\\n    try: return bool(os.fstat(n))\\n    except OSError: return False\\n"
print(run_all([Submission(program, "f", "assert len(f(1)) == 2")])[0].reason)
"""


def test_a_program_holds_two_pipes_and_no_more_even_where_many_files_are_open():
    done = subprocess.run([sys.executable, "-c", DESCRIPTORS], capture_output=True, text=True, cwd=run.ROOT)
    assert done.stdout == "passed\n", done.stderr


def test_the_line_is_named_however_lines_end():
    tests = "x = 1\r\r\nassert f(1) == x\r\n"
    assert run_tests(RIGHT, tests).reason == "tests failed: AssertionError at 'assert f(1) == x'"


def test_a_program_that_names_things_like_builtins_is_judged_by_the_real_ones():
    program = "def abs(x): return 0\ndef all(x): return True\ndef len(x): return 3\ndef f(x): return x + {}\n"
    tests = "assert all([f(1) == 2, f(2) == 3])\nassert abs(f(1) - 2) < 1e-6\nassert len([f(1)]) == 1"
    assert run_tests(program.format(1), tests).passed
    assert not run_tests(program.format(2), tests).passed


def test_tests_see_the_names_that_are_given_and_none_of_the_program():
    given = "def twice(x):\n    return 2 * x\ndef f(x):\n    ...\n"
    assert run_tests("def f(x): return x // 2\n", "assert f(twice(21)) == 21", given).passed
    assert not run_tests("def twice(x): return 42\ndef f(x): return x\n", "assert f(twice(21)) == 21", given).passed
    assert "NameError" in run_tests("mine = 1\ndef f(x): return x\n", "assert f(mine) == 1").reason


NUMBERS = [None, True, 0, -1, 2**70, 0.1, float("inf"), 1j]
VALUES = [*NUMBERS, "ä\ud800", b"\xff", [1, [2]], (1,), {1, 2}, frozenset("a"), {"a": [1], 2: None, (1, 2): 0.0}]
VALUES += [range(2, 9, 3), [], (), {}, set()]


def test_plain_results_arrive_as_they_are():
    program = f"from math import inf\nvalues = {VALUES!r}\ndef f(i): return values[i]\n"
    tests = "\n".join(
        f"assert (type(f({i})).__name__, f({i})) == ({type(v).__name__!r}, {v!r})" for i, v in enumerate(VALUES)
    )
    assert run_tests(program, f"from math import inf\n{tests}").reason == "passed"


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["int", "dict"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.one_of(ODD, st.tuples(st.sampled_from([*values.COLLECTIONS, "int", "float", "range", "bytes"]), ODD)))
def test_whatever_a_process_sends_is_a_plain_value_or_refused(code):
    with suppress(ValueError):
        found = values.decoded(json.loads(json.dumps(code)))
        assert type(found).__module__ == "builtins"
        assert type(values.decoded(values.encoded(found))) is type(found)


def test_results_that_are_nearly_built_in_arrive_as_what_they_are_made_of():
    program = (
        "from collections import Counter\ndef f(x): return [Counter('aab'), map(str, [1, 2]), (i for i in [3])][x]\n"
    )
    tests = "assert f(0) == {'a': 2, 'b': 1}\nassert list(f(1)) == ['1', '2']\nassert tuple(f(2)) == (3,)"
    assert run_tests(program, tests).reason == "passed"


def test_views_of_a_dict_and_exact_numbers_arrive():
    program = "from decimal import Decimal\nfrom fractions import Fraction\nd = {2: 'b', 1: 'a'}\n"
    program += (
        "def f(x): return [d.keys(), d.values(), d.items(), Fraction(1, 2), Decimal('0.5'), bytearray(b'a')][x]\n"
    )
    tests = "assert f(0) == {1, 2} and list(f(0)) == [2, 1]\nassert list(f(1)) == ['b', 'a']\n"
    tests += "assert f(2) == {(1, 'a'), (2, 'b')}\nassert f(3) == f(4) == 0.5\nassert f(5) == b'a'"
    assert run_tests(program, tests).reason == "passed"


@pytest.mark.parametrize("code", [["Fraction", "0x1", "0x0"], ["Decimal", "x"], ["dict_items", [["list", []]]]])
def test_exact_numbers_and_views_that_cannot_be_are_refused(code):
    with pytest.raises(ValueError, match="no plain value"):
        values.decoded(code)


def test_an_exception_of_the_program_is_caught_by_tests_that_expect_it():
    tests = "try:\n    f(1)\nexcept ValueError:\n    caught = True\nassert caught"
    assert run_tests("import json\ndef f(x): return json.loads('{')\n", tests).passed
    assert not run_tests("def f(x): raise KeyError\n", tests).passed


# --- walls -------------------------------------------------------------------------------------------------

SECRET = "open({path!r}).read()"
LEAKS = {
    "in an exception": f"raise ValueError({SECRET})",
    "in an exception's name": f"raise type('E' + {SECRET}, (ValueError,), {{{{}}}})",
    "in a refused event": f"import sys\nsys.audit('os.system.' + {SECRET})",
    "in a result": f"def f(x): return {SECRET}",
}


@pytest.mark.parametrize("how", LEAKS)
def test_no_reason_carries_what_a_program_has_read(how, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    reason = run_tests(LEAKS[how].format(path=str(secret))).reason
    assert "hunter2" not in reason
    assert "PermissionError" in reason, "it could not be read to begin with"
    assert "Linux" not in run_tests("def f(x): raise ValueError(open('/proc/version').read())").reason


HOOK_OFF = (
    "import sys, os, types\n"
    "for module in [*sys.modules.values()]:\n"
    "    for name in ('REFUSED', 'CONFINED', 'HIDDEN', 'ALLOWED', 'NAMED'):\n"
    "        if hasattr(module, name): setattr(module, name, ())\n"
    "import __main__\n__main__.REFUSED = ()\nos.path.realpath = lambda p: os.getcwd()\n"
    "def tried(action):\n    try: action()\n    except OSError: pass\n    else: raise SystemExit\n"
)
INTRUSIONS = {
    "a mode by descriptor": "d = os.open({path!r}, os.O_RDONLY); os.fchmod(d, 0)",
    "an owner by descriptor": "d = os.open({path!r}, os.O_RDONLY); os.fchown(d, 1, 1)",
    "a mode by folder": "d = os.open({folder!r}, os.O_RDONLY); os.chmod({name!r}, 0, dir_fd=d)",
    "times": "os.utime({path!r}, (1, 1))",
    "times by folder": "d = os.open({folder!r}, os.O_RDONLY); os.utime({name!r}, (1, 1), dir_fd=d)",
    "an attribute": "os.setxattr({path!r}, 'user.x', b'1')",
    "priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "own priority": "os.nice(5)",
    "affinity": "os.sched_setaffinity(os.getppid(), [0])",
    "a signal": "os.kill(os.getppid(), 10)",
    "a group's signal": "os.killpg(0, 10)",
    "a signal by descriptor": "import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 10)",
    "an environment": "open('/proc/%d/environ' % os.getppid()).read()",
    "a scheduler": "os.sched_setscheduler(os.getppid(), os.SCHED_BATCH, os.sched_param(0))",
    "a host's name": "import socket; socket.sethostname('x')",
    "a hidden file": "os.memfd_create('x')",
    "a file emptied by reading": "os.open('/etc/hosts', os.O_RDONLY | os.O_TRUNC)",
}


@pytest.mark.skipif(walls.missing() is not None, reason="this system lacks a wall")
@pytest.mark.parametrize("what", INTRUSIONS)
def test_nothing_outside_changes_even_if_the_hook_is_deceived(what, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    before = precious.stat()
    code = INTRUSIONS[what].format(path=str(precious), folder=str(tmp_path), name="precious")
    outcome = run_tests(f"{HOOK_OFF}{code}\n")
    assert not outcome.passed
    assert outcome.reason.startswith(("program failed: PermissionError", "program failed: OSError")), outcome.reason
    after = precious.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (before.st_mode, before.st_uid, before.st_mtime)


BESIDE = {
    "make the next program's folder": "for i in range(1, 9): os.mkdir(f'../{i}')",
    "leave a note": "open('../note', 'w')",
    "remove its own": "os.rmdir(os.getcwd())",
    "rename its own": "os.rename(os.getcwd(), '../mine')",
}


@pytest.mark.skipif(walls.missing() is not None, reason="this system lacks a wall")
@pytest.mark.parametrize("what", BESIDE)
def test_a_program_changes_nothing_beside_its_folder_even_if_the_hook_is_deceived(what, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    outcomes = judge([DECEIVED + BESIDE[what] + "\n" + RIGHT, RIGHT, RIGHT])
    assert outcomes[0].reason.startswith(("program failed: PermissionError", "program failed: OSError"))
    assert [outcome.passed for outcome in outcomes] == [False, True, True]


def test_threads_are_limited():
    many = "import threading, time\nthreading.stack_size(2**15)\n"
    many += "for _ in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\ntime.sleep(9)\n"
    assert judge([many])[0].reason == "thread limit: more than 100 threads were started"


ORPHAN = """
import os, sys, time
sys.path.insert(0, {root!r})
from suites.scoring.sandbox import walls
around = walls.Walls({folder!r})
if os.fork() == 0:
    around.put_up()
    os.write(1, b"up")
    time.sleep(20)
    os.write(1, b"still there")
else:
    os.read(0, 1)
"""


@pytest.mark.skipif(walls.missing() is not None, reason="this system lacks a wall")
def test_a_process_within_walls_ends_with_its_parent(tmp_path):
    script = ORPHAN.format(root=str(run.ROOT), folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout.read(2) == b"up"
    parent.kill()
    assert parent.stdout.read() == b"", "this pipe ends with the last process that holds it"


FILLS = {
    "many files": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(b'x' * 2**20)\n",
    "many folders": "import os\ni = 0\nwhile True:\n    i += 1\n    os.mkdir(str(i))\n",
}


@pytest.mark.parametrize("how", FILLS)
def test_all_that_a_program_writes_together_is_limited(how):
    assert judge([FILLS[how]], seconds=20)[0].reason.startswith("disk limit: more than 32 MiB or 1000 files")


def test_a_server_that_is_killed_loses_no_other_verdict(monkeypatch):
    """As a system does that runs out of memory; a program cannot."""
    began: list[subprocess.Popen] = []
    start = subprocess.Popen

    def popen(*arguments, **options):
        began.append(start(*arguments, **options))
        return began[-1]

    judged_one = run._judge

    def judge_one(server, tests, one, *limits):
        if "doomed" in one.program:
            server.kill()
        return judged_one(server, tests, one, *limits)

    monkeypatch.setattr("subprocess.Popen", popen)
    monkeypatch.setattr(run, "_judge", judge_one)
    outcomes = judge([RIGHT, RIGHT + "# doomed\n", RIGHT, RIGHT, "def f(x): return x\n"])
    assert [outcome.passed for outcome in outcomes] == [True, False, True, True, False]
    assert outcomes[1].reason == "crashed: 2 times, the sandbox ended with the program"
    assert all(server.poll() is not None for server in began)


def test_without_walls_nothing_runs_unless_they_are_optional(monkeypatch):
    start = run.START.replace(
        "main()", "server = sys.modules[main.__module__]; server.walls.missing = lambda: 'none'; main()"
    )
    monkeypatch.setattr(run, "START", start)
    with pytest.raises(Refused, match=r"cannot be confined here: none\. .*--without-kernel-walls"):
        run_tests(RIGHT)
    monkeypatch.setattr(run, "walls_optional", ContextVar("walls_optional", default=True))
    assert run_tests(RIGHT).passed
    assert not run_tests("import os\nos.system('true')\n" + RIGHT).passed


BARE = """
import os, sys
sys.path.insert(0, {root!r})
import socket, threading
from suites.scoring.sandbox import walls
walls.Walls({folder!r}).put_up()
def refused(action):
    try:
        action()
    except OSError as error:
        return True
    return False
print(refused(socket.socket), refused(os.fork), refused(lambda: os.kill(os.getppid(), 0)),
      refused(lambda: os.execv("/bin/true", ["true"])), refused(lambda: open({outside!r}, "w")),
      refused(lambda: os.remove({outside!r})), refused(lambda: open({outside!r})),
      refused(lambda: open({inside!r}, "w")))
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
"""


@pytest.mark.skipif(walls.missing() is not None, reason="this system lacks a wall")
def test_the_kernel_refuses_what_the_hook_refuses(tmp_path):
    (tmp_path / "in").mkdir()
    outside = tmp_path / "precious"
    outside.write_text("kept")
    script = BARE.format(
        root=str(run.ROOT),
        folder=str(tmp_path / "in"),
        outside=str(outside),
        inside=str(tmp_path / "in" / "mine"),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [*["True"] * 7, "False", "thread"], done.stderr
    assert outside.read_text() == "kept"


@pytest.mark.parametrize("machine", walls.MACHINES)
def test_the_filter_of_calls_is_a_program_that_always_ends_in_a_verdict(machine):
    code = [struct.unpack("<HBBI", row) for row in batched(walls.call_filter(machine), 8)]
    jumps = [(at, at + 1 + max(row[1], row[2])) for at, row in enumerate(code) if row[0] & 7 == 5]
    assert all(target < len(code) for _, target in jumps)
    assert code[-1][0] == 0x06
    assert walls.call_filter("riscv64") is None


@pytest.mark.parametrize("machine", walls.MACHINES)
def test_a_file_is_emptied_by_those_who_may_write_it_only(machine):
    call, at = (257, 2) if machine == "x86_64" else (56, 2)
    ways = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_ACCMODE]
    given = [[0] * at + [way | emptied] for emptied in (0, os.O_TRUNC) for way in ways]
    assert [filtered(machine, call, arguments) for arguments in given] == [
        *[walls.RET_ALLOW] * 4,
        walls.RET_ERRNO | walls.EPERM,
        *[walls.RET_ALLOW] * 2,
        walls.RET_ERRNO | walls.EPERM,
    ]


def filtered(machine: str, call: int, arguments: list[int]) -> int:
    """Return what the filter says of a call: its program is run as the kernel would."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", call, walls.AUDIT_ARCH[machine], 0, *padded)
    value = at = 0
    while True:
        opcode, yes, no, operand = struct.unpack("<HBBI", batched(walls.call_filter(machine), 8)[at])
        at += 1
        if opcode == 0x06:
            return operand
        if opcode == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif opcode == 0x54:
            value &= operand
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[opcode]
            at += yes if holds else no


def batched(data: bytes, size: int) -> list[bytes]:
    return [data[first : first + size] for first in range(0, len(data), size)]
