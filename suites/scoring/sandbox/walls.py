"""The kernel's walls around a process: Landlock for files, seccomp for everything else. Linux only."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys
import sysconfig
from contextlib import suppress
from functools import cache

# Calls that may be made: name, number on x86_64, number on aarch64. They compute, and reach files, which Landlock
# confines; none changes a file's mode, owner or times, or another process, or a setting that outlives this one.
CALLS = """
read 0 63; write 1 64; open 2 -; openat 257 56; creat 85 -; close 3 57; close_range 436 436; stat 4 -; fstat 5 80
lstat 6 -; newfstatat 262 79; statx 332 291; statfs 137 43; fstatfs 138 44; access 21 -; faccessat 269 48
faccessat2 439 439; lseek 8 62; pread64 17 67; pwrite64 18 68; readv 19 65; writev 20 66; preadv 295 69
pwritev 296 70; ftruncate 77 46; fsync 74 82; fdatasync 75 83; fallocate 285 47; fadvise64 221 223
copy_file_range 326 285; sendfile 40 71; getdents64 217 61; getdents 78 -; getcwd 79 17; chdir 80 49; fchdir 81 50
rename 82 -; renameat 264 38; renameat2 316 276; mkdir 83 -; mkdirat 258 34; rmdir 84 -; link 86 -; linkat 265 37
unlink 87 -; unlinkat 263 35; symlink 88 -; symlinkat 266 36; readlink 89 -; readlinkat 267 78; umask 95 166
dup 32 23; dup2 33 -; dup3 292 24; pipe 22 -; pipe2 293 59; poll 7 -; ppoll 271 73; select 23 -; pselect6 270 72
epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22; eventfd2 290 19
mmap 9 222; munmap 11 215; mprotect 10 226; mremap 25 216; madvise 28 233; msync 26 227; mincore 27 232; brk 12 214
membarrier 324 283; rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigpending 127 136
rt_sigsuspend 130 133; rt_sigtimedwait 128 137; sigaltstack 131 132; setitimer 38 103; getitimer 36 102; alarm 37 -
pause 34 -; restart_syscall 219 128; nanosleep 35 101; clock_nanosleep 230 115; clock_gettime 228 113
clock_getres 229 114; gettimeofday 96 169; time 201 -; times 100 153; getrusage 98 165; sysinfo 99 179; uname 63 160
getrandom 318 278; getcpu 309 168; getpid 39 172; gettid 186 178; getppid 110 173; getpgrp 111 -; getpgid 121 155
getsid 124 156; getuid 102 174; geteuid 107 175; getgid 104 176; getegid 108 177; getgroups 115 158
getresuid 118 148; getresgid 120 150; sched_yield 24 124; sched_getaffinity 204 123; sched_getparam 143 121
sched_getscheduler 145 120; sched_get_priority_max 146 125; sched_get_priority_min 147 126; getpriority 140 141
futex 202 98; set_robust_list 273 99; get_robust_list 274 100; rseq 334 293; set_tid_address 218 96; exit 60 93
exit_group 231 94
"""
MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
# Calls of which some commands are allowed, by the second argument: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL and
# F_DUPFD_CLOEXEC, none that signals; FIONCLEX and FIOCLEX, with which Python lets no child inherit a descriptor.
COMMANDS = (
    ({"x86_64": 72, "aarch64": 25}, (0, 1, 2, 3, 4, 1030)),  # fcntl
    ({"x86_64": 16, "aarch64": 29}, (0x5450, 0x5451)),  # ioctl
)
CLONE_THREAD, NEWER, X32 = 0x10000, 424, 0x40000000  # the C library does without calls from 424 on if they are unknown
ENOSYS, EPERM = 38, 1
RET_ALLOW, RET_ERRNO, RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
READ_FILE, READ_FOLDER, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
CHANGES = WRITE_FILE | sum(1 << right for right in range(4, 13))  # write, remove, make
LATER = {2: 1 << 13, 3: 1 << 14}  # by version: refer (link across folders), truncate
SETTINGS = ("/etc/group", "/etc/hosts", "/etc/localtime", "/etc/passwd", "/usr/share/locale", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


@cache
def call_filter(machine: str) -> bytes | None:
    """Return a classic BPF program for seccomp (struct sock_filter[]), or None for a machine we have no numbers of.

    It allows the calls above, `clone` for threads and some commands of `fcntl` and `ioctl`, and lets no file be emptied
    that is not opened to be written. All else fails.
    """
    if machine not in MACHINES:
        return None
    column = 1 + MACHINES.index(machine)
    rows = [line.split() for line in CALLS.replace("\n", ";").split(";") if line.strip()]
    numbers = {row[0]: int(row[column]) for row in rows if row[column] != "-"}
    load, equal, at_least, any_bit, mask, ret = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # opcodes
    deny = (ret, 0, 0, RET_ERRNO | EPERM)
    number, argument = 0, [16 + 8 * index for index in range(6)]  # offsets in struct seccomp_data; low words
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (ret, 0, 0, RET_KILL), (load, 0, 0, number)]
    code += [(at_least, 0, 1, X32), deny]
    for name, at in (("open", 1), ("openat", 2)):
        if name in numbers:
            test = [
                (load, 0, 0, argument[at]),
                (mask, 0, 0, os.O_TRUNC | os.O_ACCMODE),
                (equal, 1, 0, os.O_TRUNC),
                (equal, 0, 1, os.O_TRUNC | os.O_ACCMODE),  # the fourth way to open, neither to read nor to write
            ]
            code += [(equal, 0, len(test) + 2, numbers.pop(name)), *test, deny, (ret, 0, 0, RET_ALLOW)]
    threads = [(load, 0, 0, argument[0]), (any_bit, 0, 1, CLONE_THREAD), (ret, 0, 0, RET_ALLOW), deny]
    code += [(equal, 0, len(threads), CLONE[machine]), *threads]
    for call, commands in COMMANDS:
        allow = [row for one in commands for row in ((equal, 0, 1, one), (ret, 0, 0, RET_ALLOW))]
        code += [(equal, 0, len(allow) + 2, call[machine]), (load, 0, 0, argument[1]), *allow, deny]
    for allowed in numbers.values():
        code += [(equal, 0, 1, allowed), (ret, 0, 0, RET_ALLOW)]
    code += [(at_least, 0, 1, NEWER), (ret, 0, 0, RET_ERRNO | ENOSYS), deny]
    return b"".join(struct.pack("<HBBI", *row) for row in code)


def missing() -> str | None:
    """Return which walls this system does not have, in words; None if it has them all."""
    if sys.platform != "linux":
        return "the kernel is not Linux's"
    if call_filter(platform.machine()) is None:
        return f"seccomp's call numbers of {platform.machine()} are not known here"
    if not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):
        return "the kernel has no seccomp filters"
    return None if _landlock_version() >= 1 else "the kernel has no Landlock (Linux 5.13), or it is switched off"


def _landlock_version() -> int:
    return ctypes.CDLL(None, use_errno=True).syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)


class Walls:
    """The walls around the children that write into one folder; made before a fork, put up after it."""

    def __init__(self, folder: str) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        code = call_filter(platform.machine()) or b""
        self._code = ctypes.create_string_buffer(code, len(code))
        version = _landlock_version()
        changes = CHANGES | sum(right for since, right in LATER.items() if version >= since)
        handled = (changes | READ_FILE | READ_FOLDER).to_bytes(8, "little")
        self.rules = self._call("syscall", LANDLOCK_CREATE, handled, ctypes.c_size_t(8), 0)
        self._allow(folder, changes | READ_FILE | READ_FOLDER)
        for path in DEVICES:
            self._allow(path, READ_FILE | WRITE_FILE)
        for path in readable():
            self._allow(path, READ_FILE | (READ_FOLDER if os.path.isdir(path) else 0))
        self._allow(sysconfig.get_path("stdlib"), READ_FOLDER)  # to look for modules

    def put_up(self) -> None:
        """Confine this process, for good, and end it when its parent ends. Raise OSError where the kernel refuses."""
        self._call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self._call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        self._call("syscall", LANDLOCK_RESTRICT, self.rules, 0)
        os.close(self.rules)
        length, place = len(self._code) // 8, ctypes.addressof(self._code)
        program = ctypes.create_string_buffer(length.to_bytes(8, "little") + place.to_bytes(8, "little"), 16)
        self._call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)

    def _allow(self, path: str, rights: int) -> None:
        """Allow the rights on the path and on everything under it, if it is there."""
        with suppress(FileNotFoundError, PermissionError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = rights.to_bytes(8, "little") + place.to_bytes(4, "little")
                self._call("syscall", LANDLOCK_ADD, self.rules, 1, rule, 0)
            finally:
                os.close(place)

    def _call(self, function: str, *arguments: object) -> int:
        result = getattr(self._libc, function)(*arguments)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"the kernel refuses a wall of the sandbox: {os.strerror(number)}")
        return result


@cache  # the server makes walls for every program
def readable() -> tuple[str, ...]:
    """Return what a program may read: the standard library, shared libraries, and settings of the system.

    Not among it are installed packages, which may hold the answers of the tasks.
    """
    packages = ("site-packages", "dist-packages")
    found = [path for path in _within(sysconfig.get_path("stdlib")) if os.path.basename(path) not in packages]
    homes = {sys.base_prefix, sys.base_exec_prefix, "/", "/usr", "/usr/local"}
    for place in (os.path.join(home, name) for home in sorted(homes) for name in ("lib", "lib64")):
        found += [path for path in _within(place) if not os.path.basename(path).startswith("python")]
    return (*SETTINGS, *found)


def _within(folder: str) -> list[str]:
    with suppress(OSError):
        return [entry.path for entry in os.scandir(folder)]
    return []
