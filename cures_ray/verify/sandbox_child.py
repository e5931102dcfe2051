"""Runs hostile programs; started by ``programs.py`` as ``python -I -S sandbox_child.py FOLDER...``. The folders
hold numpy and sympy; beside these two, standard library only.

One JSON request a line in, one JSON reply a line out. For each run it forks; the fork takes its limits, then gives up
the system calls that it does not need, then executes the program. The parent only reads bytes and keeps the time.
It never holds expected outputs, so a program cannot find them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import tempfile
import time

PRELOADED = (  # what programs may import: nothing can be opened later
    "abc argparse array ast base64 binascii bisect builtins calendar cmath codecs collections collections.abc "
    "concurrent.futures concurrent.futures.thread contextlib contextvars copy copyreg csv dataclasses datetime "
    "decimal difflib enum fileinput fractions functools gc getopt graphlib hashlib heapq hmac html inspect io "
    "itertools json keyword linecache locale logging math numbers operator os os.path pathlib pickle pprint queue "
    "random re reprlib sched secrets select shlex signal stat statistics string struct sys tempfile textwrap "
    "threading time timeit token tokenize traceback types typing unicodedata unittest uuid warnings weakref zlib "
    "zoneinfo "
    "_strptime encodings.ascii encodings.latin_1 encodings.idna"
)
PACKAGES = {  # package -> what makes it load the parts that it would otherwise look for later
    "numpy": "import numpy as n, numpy.linalg, numpy.random, numpy.fft, numpy.polynomial, numpy.ma\n"
    "str(n.linalg.inv(n.eye(2))); n.random.default_rng(0).normal(); n.fft.fft([1.0, 2.0]); n.array(['a', 'b'])",
    "sympy": "import sympy as s\nx, k = s.symbols('x k')\n"
    "s.solve(x**2 - 2, x); s.solve([x - k, x + k - 2]); s.integrate(s.sin(x) * x, (x, 0, 1)); str(s.simplify(x / x))\n"
    "s.limit(s.sin(x) / x, x, 0); s.summation(k, (k, 1, x)); s.factorint(360); s.isprime(97); s.factor(x**2 - 1)\n"
    "s.series(s.exp(x), x, 0, 3); s.latex(x); s.sympify('x + 1/2'); s.Matrix([[1, 2], [3, 4]]).eigenvals()\n"
    "s.lambdify(x, x + 1)(1); s.nsolve(x**2 - 2, 1); s.Rational(1, 3).evalf(); s.divisors(12); s.diophantine(x - k)",
}
STARVED_SHARE = 0.25  # of the wall limit spent in the queue for a processor: a busy machine, no verdict
MAX_OUTPUT = 1 << 20  # bytes of one run
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
NOBODY = 65534

# x86-64 system calls that computing needs: memory, time, open descriptors, its own signals and exit. Not among them:
# open, stat, socket, clone, fork, execve, kill, ptrace, prctl, setrlimit, unlink, nanosleep, ...
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "getpid": 39, "exit": 60, "getcwd": 79, "gettimeofday": 96,
    "getrlimit": 97, "getrusage": 98, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "exit_group": 231, "set_robust_list": 273, "getrandom": 318, "rseq": 334,
}  # fmt: skip
NEWFSTATAT, AT_EMPTY_PATH = 262, 0x1000  # of an open descriptor, which has the second as its flag, not of a path

libc = ctypes.CDLL(None, use_errno=True)


def close_network() -> str:
    """Move into an empty network namespace. Returns how that went."""
    for flags, how in ((CLONE_NEWNET, "own namespace"), (CLONE_NEWUSER | CLONE_NEWNET, "own user namespace")):
        if libc.unshare(flags) == 0:
            return how
    return f"no own namespace ({os.strerror(ctypes.get_errno())})"


def install_seccomp() -> str:
    """Allow ``ALLOWED``, answer EPERM to every other system call; irrevocable. Returns "" or what went wrong."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"no system call table for {sys.platform} {platform.machine()}"
    load, equal, at_least, has_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    calls = sorted(ALLOWED.values())
    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (ret, 0, 0, kill), (load, 0, 0, 0)]
    program += [(equal, 0, 4, NEWFSTATAT), (load, 0, 0, 16 + 3 * 8), (has_bit, 0, 1, AT_EMPTY_PATH)]
    program += [(ret, 0, 0, allow), (ret, 0, 0, refuse)]
    program.append((at_least, len(calls), 0, 0x40000000))  # the x32 numbers
    program += [(equal, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    program += [(ret, 0, 0, refuse), (ret, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0):
        return os.strerror(ctypes.get_errno())
    return ""


def install_audit_hook() -> None:
    """The weaker stand-in for seccomp: Python's own reports, which C code and tricks can go round."""
    refused = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pty.", "signal.", "resource.", "fcntl.")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            inside = path == 0 or (isinstance(path, str) and path.startswith(os.path.dirname(os.__file__)))
            if not inside or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                raise PermissionError(f"the sandbox does not open {path!r}")
        elif event.startswith(refused) and event not in ("os.listdir", "os.scandir"):
            raise PermissionError(f"the sandbox does not allow {event}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("the sandbox does not look at files")

    for module in (os, sys.modules["posix"]):  # no audit event tells of these
        for name in ("stat", "lstat", "access", "statvfs", "readlink"):
            setattr(module, name, refuse)
    sys.addaudithook(hook)


def limit(cpu_s: float, memory_mb: int) -> None:
    """CPU seconds (SIGPROF, then SIGKILL), memory beyond what is loaded, processes, file size, descriptors, no core."""
    whole = int(cpu_s) + 1
    with open("/proc/self/statm") as statm:
        address_space = int(statm.read().split()[0]) * resource.getpagesize() + (memory_mb << 20)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        address_space = min(address_space, hard)
    for what, soft, hard in (
        (resource.RLIMIT_CPU, whole, whole + 1),
        (resource.RLIMIT_AS, address_space, address_space),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, 16, 16),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def run_program(request: dict, call_inputs: list | None, out: int) -> None:
    """In the fork: take the limits, run the program, write its results. Does not return."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setpgid(0, 0)
    os.environ.clear()
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.argv = ["program"]
    limit(request["cpu_s"], request["memory_mb"])
    if not request["seccomp"] or install_seccomp():
        if os.getuid() == 0:  # root is exempt from RLIMIT_NPROC
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user clears it
        install_audit_hook()
    status = 0
    try:
        space = {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit}
        if call_inputs is None:
            exec(compile(request["code"], "program", "exec"), space)
        else:
            call(request, call_inputs, space, out)
    except SystemExit:
        pass
    except BaseException as error:
        status = 1
        reason = {"error": f"{type(error).__name__}: {error}"[:300]}
        os.write(out, b"\n" + json.dumps(reason).encode() + b"\n")
    try:
        sys.stdout.flush()
    finally:
        os._exit(status)


def call(request: dict, inputs: list, space: dict, out: int) -> None:
    """Write one JSON line a call: the results of ``entry`` for each list of arguments."""
    code = request["code"]
    try:
        function = eval(compile(f"lambda {request['parameters']}: (\n{code}\n)", "program", "eval"), space)
        compile(code.strip(), "program", "eval")
    except SyntaxError:
        exec(compile(code, "program", "exec"), space)
        name = request["entry"]
        function = space.get(name) or getattr(space.get("Solution", object)(), name, None)
        if function is None:
            raise NameError(f"the program defines no {name!r}") from None
    for arguments in inputs:
        os.write(out, json.dumps({"value": function(*arguments)}).encode() + b"\n")


def run(request: dict, stdin: str, call_inputs: list | None, deadline: float) -> dict:
    """One fork, watched. Returns status, output, cpu_s and, for a run that was ended, why."""
    reader, writer = os.pipe()
    given = os.memfd_create("stdin")
    os.write(given, stdin.encode("utf-8", "replace"))
    os.lseek(given, 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(given, 0)
        os.dup2(writer if call_inputs is None else nothing, 1)
        os.dup2(nothing, 2)
        os.dup2(writer, 3)
        os.closerange(4, 64)
        run_program(request, call_inputs, 3)
    os.close(writer)
    os.close(given)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    chunks, size, why = [], 0, ""
    while not why:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            why = _late(pid, request["wall_s"])
        elif not (chunk := os.read(reader, 1 << 16)):
            break
        else:
            chunks.append(chunk)
            size += len(chunk)
            why = "output" if size > MAX_OUTPUT else ""
    os.close(reader)
    if not why:
        why = _wait(pid, deadline, request)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = _reaped.pop(pid) if pid in _reaped else os.wait4(pid, 0)
    if os.WIFSIGNALED(status) and not why:
        number = os.WTERMSIG(status)
        spent = number in (signal.SIGPROF, signal.SIGXCPU) or usage.ru_utime + usage.ru_stime >= request["cpu_s"]
        why = "cpu" if spent else signal.Signals(number).name
    text = b"".join(chunks)[:MAX_OUTPUT].decode("utf-8", "replace")
    return {"why": why, "output": text, "failed": status != 0, "cpu_s": usage.ru_utime + usage.ru_stime}


_reaped: dict = {}


def _wait(pid: int, deadline: float, request: dict) -> str:
    """After the output ended: until the process has ended. A program may close its output and go on."""
    pause = 0.0005
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            _reaped[pid] = (done, status, usage)
            return ""
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return _late(pid, request["wall_s"])


def _late(pid: int, wall_s: float) -> str:
    """Whose fault the wall deadline is: "starved" when the program wanted the processor and did not get it (or was
    stopped from outside), "waits" when it slept."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state = stat.read().rpartition(")")[2].split()[0]
        with open(f"/proc/{pid}/schedstat") as schedstat:
            queued_s = int(schedstat.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # no such files here: nothing is known
        return "starved"
    return "waits" if state == "S" and queued_s < STARVED_SHARE * wall_s else "starved"


def answer(request: dict) -> list[dict]:
    deadline = time.monotonic() + request["wall_s"]
    if request["entry"] is not None:
        return [run(request, "", request["inputs"], deadline)]
    runs: list[dict] = []
    for stdin in request["inputs"]:
        runs.append(run(request, stdin, None, deadline))
        request["cpu_s"] = max(0.01, request["cpu_s"] - runs[-1]["cpu_s"])
        if runs[-1]["failed"] or runs[-1]["why"]:
            break
    return runs


def main() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sys.setrecursionlimit(10_000)
    for name in PRELOADED.split():
        __import__(name)
    sys.path += sys.argv[1:]
    for package, use in PACKAGES.items():
        with contextlib.suppress(ImportError):
            __import__(package)
            exec(use, {})
    gc.freeze()  # what is loaded stays shared with the forks
    folder = tempfile.mkdtemp(prefix="cures-sandbox-")
    os.chdir(folder)
    os.rmdir(folder)  # the working folder of every program: empty, writable by nobody, gone with this process
    network = close_network()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    replies.write(json.dumps({"network": network}).encode() + b"\n")
    replies.flush()
    for line in requests:
        replies.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
