"""The guard inside the interpreter: an audit hook that lets known events pass and refuses all others.

A table in Python's documentation lists the events. The hook cannot be taken off again, and keeps all it needs in its
closure; but a program can replace what the standard library's functions call in turn, so it only stands behind the
kernel's walls.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

ALLOWED = frozenset(
    "compile exec import marshal.loads marshal.load marshal.dumps pickle.find_class array.__new__ mmap.__new__ "
    "code.__new__ function.__new__ object.__getattr__ object.__setattr__ object.__delattr__ builtins.id builtins.input "
    "builtins.input/result sys._getframe sys._getframemodulename sys.excepthook sys.unraisablehook sys.addaudithook "
    "sys.set_asyncgen_hooks_firstiter sys.set_asyncgen_hooks_finalizer cpython._PySys_ClearAuditHooks "
    "_thread.start_new_thread _thread.start_joinable_thread os.listdir os.scandir os.chdir os.walk os.fwalk glob.glob "
    "glob.glob/2 tempfile.mkstemp tempfile.mkdtemp shutil.copyfile shutil.copymode shutil.copystat shutil.copytree "
    "shutil.move shutil.rmtree time.sleep signal.alarm signal.setitimer".split()
)
# Allowed inside the folder: events whose first arguments are paths, and how many descriptors of folders follow at the
# end (-1: none is given). A path is relative to the descriptor in its place, which must be of a folder inside, too.
CONFINED = {
    "os.link": (2, 2),
    "os.mkdir": (1, 1),
    "os.remove": (1, 1),
    "os.rename": (2, 2),
    "os.rmdir": (1, 1),
    "os.symlink": (2, 1),
    "os.truncate": (1, 0),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HIDDEN = ("ctypes", "_ctypes", "_xxsubinterpreters", "_interpreters", "_testcapi", "_testinternalcapi")
IMPORT = "import of {}"
# Refused events that a verdict may name. It names no others: an event's name can be any text that a program chose.
NAMED = frozenset(
    "open socket.__new__ socket.connect socket.getaddrinfo subprocess.Popen os.exec os.fork os.forkpty os.kill "
    "os.killpg os.posix_spawn os.spawn os.system os.putenv os.unsetenv os.chmod os.chown os.utime os.setxattr "
    "os.removexattr os.lockf resource.setrlimit resource.prlimit signal.pthread_kill gc.get_objects gc.get_referrers "
    "gc.get_referents sys.settrace sys.setprofile sys._current_frames pty.spawn fcntl.fcntl fcntl.ioctl fcntl.flock "
    "fcntl.lockf syslog.syslog urllib.Request".split()
) | {*CONFINED, *map(IMPORT.format, HIDDEN)}


def put_on(folder: str) -> Callable[[], str | None]:
    """Make this interpreter refuse all but known events from here on, and writing anywhere but in `folder`.

    Return a function that returns the last refused event since it was called before, or None.
    """
    real, text, prefix = os.path.realpath, os.fsdecode, os.path.realpath(folder) + os.sep
    allowed, confined, hidden, writing, no_folder, join = ALLOWED, dict(CONFINED), HIDDEN, WRITING, -1, os.path.join
    last: list[str] = []

    def inside(path: Any) -> bool:
        return isinstance(path, int) or (real(text(path)) + os.sep).startswith(prefix)

    def beneath(descriptor: int, path: Any) -> str:
        return text(path) if descriptor == no_folder else join(real(f"/proc/self/fd/{descriptor}"), text(path))

    def allows(event: str, args: tuple) -> bool:
        if event == "open":
            path, _, flags = args
            return not (flags or 0) & writing or inside(path)
        if event in confined:
            paths, folders = confined[event]
            given = args[len(args) - folders :]
            if all(value == no_folder for value in given):
                return all(inside(path) for path in args[:paths])
            return paths == folders and all(map(inside, map(beneath, given, args[:paths])))
        return event in allowed

    def hook(event: str, args: tuple) -> None:
        if event == "import":
            for part in args[0].split("."):  # any of them: a module is made from the last, whatever is before it
                if part in hidden:
                    last[:] = [f"import of {part}"]
                    raise PermissionError("the sandbox refuses this import")
        if not allows(event, args):
            last[:] = [event]
            raise PermissionError("the sandbox refuses this")

    sys.addaudithook(hook)
    return lambda: last.pop() if last else None
