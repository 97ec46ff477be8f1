"""The player's cage: what is forbidden is refused, by each layer alone; what is needed works.

Everything is tried in a forked child. What a layer forbids is also tried in a child without it,
where it must succeed: else the test would show nothing.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("players need fork(), which Windows has not got", allow_module_level=True)

import resource

from rlhf_course.grading import landlock, sandbox, seccomp
from rlhf_course.grading.kernel import call

ROOT = Path(__file__).parents[1]
LINUX = sys.platform == "linux"
REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS)
DONE = "done"  # said by an action that has nothing else to say


# ------------------------------------------------------------------------ children, with or without


@dataclass(frozen=True)
class Seen:
    """What became of a child: what the cage and the action said, or the signal that ended it."""

    layers: tuple | list = ()
    said: object = None
    error: str = ""
    number: int = 0
    signal: int = 0


def child(action: Callable[[], object], cage: Callable[[], object] = lambda: None) -> Seen:
    """Fork; the child goes into the cage and acts."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:

        def tell(**what):
            os.write(writer, json.dumps(what).encode() + b"\n")

        try:
            os.setsid()
            for number in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            tell(layers=cage() or [])
            said = action()
            tell(said=DONE if said is None else said)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent asks for it
            tell(error=type(error).__name__, number=getattr(error, "errno", None) or 0)
        finally:
            os._exit(0)
    os.close(writer)
    end = time.monotonic() + 30
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    os.set_blocking(reader, False)
    with open(reader, "rb") as pipe:
        lines = (pipe.read() or b"").splitlines()
    parts = {key: value for line in lines for key, value in json.loads(line).items()}
    return Seen(**parts, signal=ended[1] & 0x7F)


def whole() -> Callable[[], list[str]]:
    """All layers, as a player gets them."""
    readable = sandbox.readable_paths([str(ROOT)])
    return lambda: sandbox.confine(sandbox.Limits(), readable)


def only_seccomp(writing=False):
    call("prctl", sandbox.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    seccomp.install(writing)


def only_landlock():
    readable = sandbox.readable_paths([])
    call("prctl", sandbox.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    landlock.restrict(readable)


def only_nobody():
    sandbox._become_nobody(["/"])


HAS_SECCOMP = LINUX and not child(lambda: None, only_seccomp).error
LANDLOCK = landlock.version() if LINUX and not child(lambda: None, only_landlock).error else 0
ROOT_USER = os.getuid() == 0 and not child(lambda: None, only_nobody).error

needs_linux = pytest.mark.skipif(not LINUX, reason="a layer of Linux only")
needs_seccomp = pytest.mark.skipif(not HAS_SECCOMP, reason="no seccomp filter to be had here")
needs_landlock = pytest.mark.skipif(not LANDLOCK, reason="no Landlock in this kernel")
needs_root = pytest.mark.skipif(not ROOT_USER, reason="only root can become nobody")


def refused(action: Callable[[], object], cage: Callable[[], object]) -> None:
    """Assert that the action is refused in the cage and not outside of it."""
    inside, outside = child(action, cage), child(action)
    if outside.error:
        pytest.skip(f"not possible here, cage or not: {outside.error} {outside.number}")
    assert inside.said is None, f"it said {inside.said!r}"
    assert inside.number in REFUSALS, inside


# ------------------------------------------------------------------------ what is tried


@pytest.fixture
def prey(tmp_path, monkeypatch):
    """A working directory of the parent's, open to every user, with a file to read or spoil."""
    monkeypatch.chdir(tmp_path)
    Path("secret").write_text("the solution", encoding="utf-8")
    Path("folder").mkdir()
    Path("folder/inside").touch()
    return tmp_path


def number(name: str) -> int:
    """A system call's number here."""
    machine = os.uname().machine
    for listed in (*seccomp.REFUSED.values(), seccomp.JUDGED):
        found = seccomp.numbers(listed, machine).get(name)
        if found is not None:
            return found
    raise OSError(errno.ENOSYS, f"no {name} on {machine}")


def raw(name: str, *arguments) -> Callable[[], int]:
    """A system call by its name, which must not fail for what it is given, only for being made."""

    def action():
        try:
            return call("syscall", number(name), *arguments)
        except OSError as error:
            if error.errno in REFUSALS:
                raise
            return -error.errno  # it was let through, and then found its arguments wrong

    return action


def own_fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def fork_by_clone():
    pid = call("syscall", number("clone"), signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def write(name: str, flags: int) -> Callable[[], None]:
    return lambda: os.close(os.open(name, flags, 0o600))


def parent_on_signal():
    """Let the kernel signal the parent when a pipe has news (here: the harmless "urgent")."""
    reader, _ = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, os.getppid())


def terminal_typing():
    reader, _ = os.pipe()
    try:
        fcntl.ioctl(reader, 0x5412, b"x")
    except OSError as error:
        if error.errno in REFUSALS:
            raise


def of_the_parent(action: Callable[[int], object]) -> Callable[[], object]:
    return lambda: action(os.getppid())


PROCESSES = {
    "fork": own_fork,
    "clone": fork_by_clone,
    "spawn": lambda: subprocess.run(["/bin/sh", "-c", "true"], check=True) and None,
    "exec": raw("execve", 0, 0, 0),
    "signal 0 to the parent": of_the_parent(lambda parent: os.kill(parent, 0)),
    "signal by thread": of_the_parent(lambda p: call("syscall", number("tgkill"), p, p, 0)),
    "signal to everybody": lambda: os.kill(-1, 0),
    "signal to the group": lambda: os.kill(0, 0),
    "signals by files": parent_on_signal,
    "limits of the parent": of_the_parent(lambda p: resource.prlimit(p, resource.RLIMIT_CORE)),
    "processors of the parent": of_the_parent(
        lambda p: os.sched_setaffinity(p, os.sched_getaffinity(p))
    ),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0)),
    "trace": raw("ptrace", 0x4206, 1 << 22, 0, 0),
    "memory of others": raw("process_vm_readv", 1 << 22, 0, 0, 0, 0, 0),
    "handle of the parent": of_the_parent(lambda p: raw("pidfd_open", p, 0)()),
    "typing into a terminal": terminal_typing,
}
NETWORK = {
    "socket": lambda: socket.socket().close(),
    "unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "socket pair": lambda: [s.close() for s in socket.socketpair()] and None,
    "connect": raw("connect", -1, 0, 0),
    "bind": raw("bind", -1, 0, 0),
    "io_uring": raw("io_uring_setup", 0, 0),
}
FILES = {
    "make a file": write("new", os.O_WRONLY | os.O_CREAT),
    "open to write": write("secret", os.O_WRONLY),
    "open to change": write("secret", os.O_RDWR),
    "empty": write("secret", os.O_RDONLY | os.O_TRUNC),
    "truncate": lambda: os.truncate("secret", 1),
    "unlink": lambda: os.unlink("secret"),
    "rename": lambda: os.rename("secret", "other"),
    "hard link": lambda: os.link("secret", "other"),
    "symbolic link": lambda: os.symlink("secret", "other"),
    "make a folder": lambda: os.mkdir("new"),
    "remove a folder": lambda: os.rmdir("folder") if os.unlink("folder/inside") else None,
    "make a fifo": lambda: os.mkfifo("fifo"),
}
PROPERTIES = {
    "chmod": lambda: os.chmod("secret", 0),
    "chmod of a folder": lambda: os.chmod(".", 0o700),
    "chown": lambda: os.chown("secret", os.getuid(), os.getgid()),
    "utime": lambda: os.utime("secret", (0, 0)),
    "attributes": lambda: os.setxattr("secret", "user.x", b"x"),
}
KERNEL = {
    "memory file": lambda: os.close(os.memfd_create("x")),
    "shared memory": raw("shmget", 0, 0, 0),
    "message queue": raw("msgget", 0, 0),
    "semaphore": raw("semget", 0, 0, 0),
    "posix queue": raw("mq_open", 0, 0, 0, 0),
    "keys": raw("keyctl", 0, -3, 0),
    "new namespaces": lambda: call("unshare", sandbox.CLONE_NEWUSER),
    "other namespaces": raw("setns", -1, 0),
    "chroot": lambda: os.chroot("/"),
    "mount": raw("mount", 0, 0, 0, 0, 0),
    "bpf": raw("bpf", 0, 0, 0),
    "performance counters": raw("perf_event_open", 0, 0, 0, 0, 0),
    "page faults": raw("userfaultfd", -1),
    "swap": raw("swapoff", 0),
    "reboot": raw("reboot", 0, 0, 0, 0),
    "another personality": raw("personality", 0xFFFFFFFF),
}
READING = {
    "read a file": lambda: Path("secret").read_text(encoding="utf-8"),
    "list a folder": lambda: os.listdir("."),
    "read the system's users": lambda: len(Path("/etc/passwd").read_bytes()),
    "read a process": lambda: len(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()),
    "read oneself": lambda: len(Path("/proc/self/environ").read_bytes()),
}
FORBIDDEN = PROCESSES | NETWORK | FILES | PROPERTIES | KERNEL


def each(actions):
    return pytest.mark.parametrize("action", list(actions.values()), ids=list(actions))


# ------------------------------------------------------------------------ the cage as a whole


@needs_seccomp
@each(FORBIDDEN)
def test_the_cage_refuses(action, prey):
    refused(action, whole())


@needs_landlock
@each(READING)
def test_the_cage_hides(action, prey):
    refused(action, whole())


LATE = ("colorsys", "json.tool", "wave", "tabnanny", "pyclbr", "sched", "filecmp", "netrc")
"""Modules of the standard library that hardly anything imports."""


def test_what_an_answer_needs_works_in_the_cage():
    new = [name for name in LATE if name not in sys.modules]

    def action():
        for name in new:
            import_module(name)
        answers = []
        threads = [threading.Thread(target=answers.append, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        with open(os.devnull, "rb") as nothing:
            assert nothing.read() == b""
        assert os.urandom(8) != os.urandom(8)
        assert len(bytearray(100 << 20)) == 100 << 20
        os.kill(os.getpid(), 0)
        return sorted(answers)

    assert len(new) >= 2
    assert child(action, whole()).said == [0, 1, 2, 3]


@needs_landlock
def test_dev_null_can_be_written():
    def action():
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            return nothing.write("quiet")

    assert child(action, whole()).said == 5


def test_confine_is_fast_and_names_its_layers():
    readable = sandbox.readable_paths([str(ROOT)])

    def action():
        start = time.process_time()  # other processes' share is not ours
        sandbox.confine(sandbox.Limits(), readable)
        return time.process_time() - start

    assert min(child(action).said for _ in range(5)) < 0.015
    layers = " | ".join(child(lambda: None, whole()).layers)
    assert "limits on" in layers and "CPU time" in layers and "open files" in layers
    assert ("seccomp" in layers) == HAS_SECCOMP
    assert (f"Landlock {LANDLOCK}" in layers) == bool(LANDLOCK)
    assert ("no new privileges" in layers) == LINUX
    assert ("user nobody" in layers) == ROOT_USER


def test_a_system_that_refuses_all_layers_is_no_error(monkeypatch):
    def never(*_):
        raise OSError(errno.ENOSYS, "not here")

    class Stubborn:
        def __getattr__(self, name):
            return never

    for module in (sandbox, landlock, seccomp):
        monkeypatch.setattr(module, "call", never)
    monkeypatch.setattr(sandbox, "resource", Stubborn())
    seen = child(lambda: None, lambda: sandbox.confine(sandbox.Limits(), []))
    assert seen == Seen(layers=[], said=DONE)


@needs_seccomp
def test_without_landlock_the_filter_keeps_files_from_being_written(prey, monkeypatch):
    def never(_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(landlock, "restrict", never)
    seen = child(write("secret", os.O_WRONLY), whole())
    assert seen.number == errno.EPERM and not any("Landlock" in name for name in seen.layers)


@needs_linux
def test_the_player_is_the_first_to_go_when_memory_runs_short():
    def action():
        return Path("/proc/self/oom_score_adj").read_text(encoding="utf-8").strip()

    assert child(action, sandbox._offer_to_the_oom_killer).said == "1000"


# ------------------------------------------------------------------------ limits


def limited(**settings):
    return lambda: [sandbox._set_limits(sandbox.Limits(**settings))]


def endless():
    if LINUX:  # whose hard limit does not ask
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass


def test_an_endless_loop_is_killed():
    start = time.monotonic()
    assert child(endless, limited(cpu_seconds=1)).signal in (signal.SIGKILL, signal.SIGXCPU)
    assert time.monotonic() - start < 20


@needs_linux  # macOS knows the limit, and does not hold it
def test_memory_is_limited_from_where_it_stands():
    def take(size):
        return lambda: len(bytearray(size))

    assert child(take(10 << 40), limited()).error == "MemoryError"
    assert child(take(300 << 20)).said == 300 << 20
    assert child(take(300 << 20), limited(memory=200 << 20)).error == "MemoryError"
    much = bytearray(400 << 20)  # mapped already when the limit is set, and so beside it
    assert child(take(100 << 20), limited(memory=200 << 20)).said == 100 << 20
    del much


def test_no_byte_reaches_a_file_that_is_open_already(tmp_path):
    with open(tmp_path / "file", "wb", buffering=0) as file:

        def action():
            return file.write(b"x" * 100)

        assert child(action).said == 100
        assert child(action, limited()).number == errno.EFBIG
    assert (tmp_path / "file").stat().st_size == 100


def test_open_files_are_limited():
    def action():
        return len([os.open(os.devnull, os.O_RDONLY) for _ in range(100)])

    assert child(action).said == 100
    assert child(action, limited(open_files=64)).number == errno.EMFILE


def many_threads():
    stop = threading.Event()
    threading.stack_size(64 << 10)
    started = 0
    try:
        for _ in range(3000):
            threading.Thread(target=stop.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    stop.set()
    return started


@needs_linux
def test_a_bomb_of_threads_is_limited():
    if os.getuid() == 0 and not ROOT_USER:
        pytest.skip("root's threads are not limited, and it cannot become nobody here")
    tasks = int(sandbox._read("/proc/loadavg").split()[3].split("/")[1])
    if tasks > 2500 or child(many_threads).said < 3000:
        pytest.skip("so many threads cannot be started here, cage or not")
    assert 60 <= child(many_threads, whole()).said < 2900


def test_limits_cannot_be_raised_again():
    def action():
        resource.setrlimit(resource.RLIMIT_NOFILE, (65, 65))

    seen = child(action, whole())
    assert seen.error in ("ValueError", "PermissionError", "OSError")


def test_a_stricter_limit_is_kept():
    def action():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        sandbox._set_limits(sandbox.Limits())
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    assert child(action).said == 40


# ------------------------------------------------------------------------ another user


@needs_root
def test_nobody_owns_nothing(prey):
    os.chmod("secret", 0o600)
    for action in (FILES["open to write"], PROPERTIES["chmod"], PROCESSES["limits of the parent"],
                   PROCESSES["signal 0 to the parent"], READING["read a file"],
                   lambda: os.setuid(0)):  # fmt: skip
        refused(action, only_nobody)

    def from_a_group():
        os.setgroups([4])
        only_nobody()

    seen = child(lambda: [*os.getresuid(), *os.getresgid(), *os.getgroups()], from_a_group)
    assert seen.said == [65534] * 6


@needs_root
def test_nobody_takes_the_right_to_read_along_where_python_is_private(prey):
    os.chmod("secret", 0o600)

    def private():
        return [sandbox._become_nobody([str(prey / "secret")])]

    seen = child(READING["read a file"], private)
    assert seen.layers == ["user nobody, who may read"] and seen.said == "the solution"
    refused(FILES["open to write"], private)
    refused(lambda: os.setuid(0), private)


@needs_root
def test_root_stays_where_nobody_could_not_read(prey):
    """Containers' root often lacks the right that would have to be taken along."""
    os.chmod("secret", 0o600)

    def poor():
        sandbox._set_capabilities(sandbox.CAP_SETUID | sandbox.CAP_SETGID)
        return [sandbox._lose_privileges([str(prey / "secret")])]

    seen = child(READING["read a file"], poor)
    assert seen.layers == ["no capabilities"] and seen.said == "the solution"
    assert child(os.getuid, poor).said == 0
    refused(lambda: os.chroot("/"), poor)
    refused(lambda: os.setuid(1), poor)


def test_open_to_all():
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755)
        file = place / "folder" / "file"
        file.parent.mkdir()
        file.touch()
        if not sandbox.open_to_all([str(place.parent)]):
            pytest.skip(f"{place.parent} is private")
        for mode, folder, expected in [(0o644, 0o755, True), (0o640, 0o755, False),
                                       (0o644, 0o754, False), (0o644, 0o711, True)]:  # fmt: skip
            file.chmod(mode)
            file.parent.chmod(folder)
            assert sandbox.open_to_all([str(file)]) is expected
        assert not sandbox.open_to_all([str(file.parent)])  # 711 cannot be listed
        assert not sandbox.open_to_all([str(place / "absent")])
    finally:
        (place / "folder" / "file").unlink()
        (place / "folder").rmdir()
        place.rmdir()


SYSTEM_PYTHON = "/usr/bin/python3"
ALONE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from rlhf_course.grading import sandbox
sys.path.pop(0)
layers = sandbox.confine(sandbox.Limits(), sandbox.readable_paths([sys.argv[1]]))
import colorsys, statistics
print(os.getuid(), statistics.mean([1, 2, 3]), *layers, sep="|")
try:
    import rlhf_course.errors
except (ImportError, OSError):
    print("absent")
"""


@needs_root
@pytest.mark.skipif(not os.path.exists(SYSTEM_PYTHON), reason=f"no {SYSTEM_PYTHON}")
def test_a_python_that_everybody_may_read_needs_no_right_to_read():
    done = subprocess.run(
        [SYSTEM_PYTHON, "-I", "-c", ALONE, str(ROOT)],
        capture_output=True, text=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    if "SyntaxError" in done.stderr:
        pytest.skip("the system's Python is too old")
    said = done.stdout.splitlines()
    assert said and said[0].startswith("65534|2|user nobody|"), done
    assert not LANDLOCK or said[1] == "absent"


@needs_linux
def test_no_capability_is_left():
    def action():
        return [
            line.split()[1]
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            if line.startswith(("CapEff", "CapPrm", "CapInh", "CapAmb"))
        ]

    for readable in (["/"], ["/absent"]):  # readable by everybody, and not
        seen = child(action, lambda r=readable: [sandbox._lose_privileges(r)])
        held = 4 if seen.layers == ["user nobody, who may read"] else 0
        assert seen.said and {int(value, 16) for value in seen.said} <= {0, held}, seen


# ------------------------------------------------------------------------ seccomp alone


@needs_seccomp
@each(FORBIDDEN)
def test_the_filter_refuses(action, prey):
    refused(action, only_seccomp)


@needs_seccomp
def test_the_filter_may_leave_writing_to_landlock(prey):
    assert child(FILES["open to write"], lambda: only_seccomp(writing=True)).said == DONE
    assert child(FILES["unlink"], lambda: only_seccomp(writing=True)).number == errno.EPERM


@needs_seccomp
def test_calls_of_tomorrow_and_of_x32_are_unknown():
    for unheard in (seccomp.LAST_KNOWN + 1, 600, 0x40000000 + 39):
        seen = child(lambda n=unheard: call("syscall", n, 0, 0, 0), only_seccomp)
        assert seen.number == errno.ENOSYS


@needs_seccomp
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86's 32-bit calls")
def test_a_32_bit_call_is_the_last():
    """int 0x80 with the number of getpid: 64-bit code can make the 32-bit calls."""
    import mmap

    def action():
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(bytes.fromhex("b814000000cd80c3"))
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()

    outside = child(action)
    assert child(action, only_seccomp).signal == signal.SIGSYS or outside.signal


def verdict(processor: str, number: int, *arguments: int, own=77, writing=True) -> int:
    """Run the filter's program as the kernel would."""
    arguments = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iIQ6Q", number, seccomp.PROCESSORS[processor][1], 0, *arguments)
    code, at, word = seccomp.program(processor, own, writing), 0, 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        if operation == seccomp.RETURN:
            return operand
        if operation == seccomp.LOAD:
            (word,) = struct.unpack_from("<I", data, operand)
            continue
        holds = {seccomp.EQUAL: word == operand, seccomp.GREATER: word > operand,
                 seccomp.ANY_BIT: word & operand}[operation]  # fmt: skip
        at += yes if holds else no


@pytest.mark.parametrize("processor", seccomp.PROCESSORS)
def test_the_program_of_both_processors(processor):
    judged = seccomp.numbers(seccomp.JUDGED, processor)
    refuse, unknown = seccomp.ERROR | errno.EPERM, seccomp.ERROR | errno.ENOSYS

    for listed in seccomp.REFUSED.values():
        for number in seccomp.numbers(listed, processor).values():
            assert verdict(processor, number) == refuse
    for name, arguments, expected in [
        ("clone", [0x3D0F00], seccomp.ALLOW),  # what pthread_create asks for
        ("clone", [signal.SIGCHLD], refuse),
        ("clone3", [1, 88], unknown),
        ("openat2", [1, 2, 3, 4], unknown),
        ("kill", [77, 9], seccomp.ALLOW),
        ("kill", [78, 9], refuse),
        ("kill", [(1 << 64) - 1, 9], refuse),
        ("kill", [0, 9], refuse),
        ("tgkill", [77, 79, 6], seccomp.ALLOW),
        ("prlimit64", [0], seccomp.ALLOW),
        ("prlimit64", [77], seccomp.ALLOW),
        ("prlimit64", [1], refuse),
        ("sched_setaffinity", [78], refuse),
        ("fcntl", [3, fcntl.F_GETFL], seccomp.ALLOW),
        ("fcntl", [3, 8, 1], refuse),
        ("ioctl", [3, 0x5401], seccomp.ALLOW),
        ("ioctl", [3, 0x8901], refuse),
        ("openat", [3, 4, os.O_RDONLY], seccomp.ALLOW),
        ("openat", [3, 4, os.O_RDWR], seccomp.ALLOW),
    ]:
        assert verdict(processor, judged[name], *arguments) == expected, (name, arguments)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
        assert verdict(processor, judged["openat"], 3, 4, flags, writing=False) == refuse
    assert verdict(processor, judged["openat"], 3, 4, 0, writing=False) == seccomp.ALLOW
    read_and_exit = {"x86_64": (0, 60), "aarch64": (63, 93)}[processor]
    for number in read_and_exit:
        assert verdict(processor, number) == seccomp.ALLOW
    assert len(seccomp.program(processor, 77, False)) < 4096  # the kernel takes no longer one


@pytest.mark.parametrize(
    ("processor", "headers"),
    [("x86_64", ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"]),
     ("aarch64", ["/usr/include/asm-generic/unistd.h"])],
)  # fmt: skip
def test_the_numbers_are_those_of_the_kernels_headers(processor, headers):
    header = next((h for h in headers if os.path.exists(h)), None)
    if header is None:
        pytest.skip("the kernel's headers are not installed")
    text = Path(header).read_text(encoding="utf-8")
    true = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    ours = {}
    for listed in (*seccomp.REFUSED.values(), seccomp.JUDGED):
        ours |= seccomp.numbers(listed, processor)
    wrong = {name: n for name, n in ours.items() if name in true and int(true[name]) != n}
    assert len(ours) > 100 and not wrong
    # Old headers lack the youngest calls only.
    assert all(n > 435 for name, n in ours.items() if name not in true)


# ------------------------------------------------------------------------ Landlock alone


@needs_landlock
@each(FILES | READING)
def test_landlock_refuses(action, prey):
    if LANDLOCK < 3 and action in (FILES["truncate"], FILES["empty"]):
        pytest.skip("this Landlock lets files be truncated")
    refused(action, only_landlock)


@needs_landlock
def test_landlock_lets_no_program_start():
    refused(PROCESSES["spawn"], only_landlock)


@needs_landlock
@pytest.mark.skipif(LANDLOCK < 4, reason="this Landlock knows no TCP")
def test_landlock_refuses_tcp():
    def bind():
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))

    refused(bind, only_landlock)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def connect():
            with socket.socket() as client:
                client.connect(server.getsockname())

        refused(connect, only_landlock)


@needs_landlock
@pytest.mark.skipif(LANDLOCK < 6, reason="this Landlock knows no signals")
def test_landlock_refuses_signals_and_abstract_sockets():
    refused(PROCESSES["signal 0 to the parent"], only_landlock)
    assert child(lambda: os.kill(os.getpid(), 0), only_landlock).said == DONE
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0rlhf-course-{os.getpid()}")
        server.listen()

        def connect():
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(server.getsockname())

        refused(connect, only_landlock)


@pytest.mark.parametrize("known", range(1, 8))
def test_every_version_of_landlock_is_asked_for_what_it_knows(known, monkeypatch, tmp_path):
    asked = []

    def kernel(_, number, *arguments):
        if number == landlock.CREATE_RULESET and arguments[2] == landlock.ASK_VERSION:
            return known
        if number == landlock.CREATE_RULESET:
            rules, size, _ = arguments
            asked.append((rules.files.bit_length(), rules.tcp, rules.scopes, size))
            return os.open(os.devnull, os.O_RDONLY)  # to be closed
        if number == landlock.ADD_RULE:
            asked.append(arguments[2].rights)
        return 0

    monkeypatch.setattr(landlock, "call", kernel)
    monkeypatch.setattr(os, "O_PATH", os.O_RDONLY, raising=False)
    (tmp_path / "file").touch()
    assert landlock.restrict([str(tmp_path), str(tmp_path / "file"), "/absent"]) == known
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(known, 16)
    tcp, scopes = 3 if known >= 4 else 0, 3 if known >= 6 else 0
    size = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16}.get(known, 24)
    assert asked[0] == (bits, tcp, scopes, size)
    truncate = landlock.TRUNCATE if known >= 3 else 0
    read, write, folder = landlock.READ_FILE, landlock.WRITE_FILE, landlock.READ_FOLDER
    assert asked[1:] == [read | folder, read, read | write | truncate]


# ------------------------------------------------------------------------ network


@needs_linux
@pytest.mark.parametrize("user", [None, 65534], ids=["this user", "nobody"])
def test_a_network_of_ones_own(user):
    if user is not None and os.getuid() != 0:
        pytest.skip("only root can become another user")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def isolate():
            if user is not None:
                os.setresuid(user, user, user)
            return [sandbox.isolate_network()]

        def connect():
            with socket.socket() as client:
                client.connect(server.getsockname())
            return os.getuid()

        assert child(connect).said == os.getuid()
        inside = child(connect, isolate)
        if inside.layers == [None]:
            assert inside.said is not None  # refused, and nothing has changed
            pytest.skip("no namespaces for this user here")
        assert inside.number == errno.ENETUNREACH
        assert child(os.getuid, isolate).said == (os.getuid() if user is None else user)
        seen = child(lambda: None, lambda: [*isolate(), sandbox._lose_privileges(["/"])])
        assert seen.said == DONE and seen.layers[1] in ("user nobody", "no capabilities")


def test_elsewhere_there_is_no_network_layer(monkeypatch):
    def never(*_):
        raise OSError("no unshare()")

    monkeypatch.setattr(sandbox, "call", never)
    assert sandbox.isolate_network() is None


# ------------------------------------------------------------------------ what may be read


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder of installed packages, with an editable installation of this course."""
    site = tmp_path / "site-packages"
    for name in ("good", "rlhf_course", "rlhf_course-0.1.0.dist-info", "__pycache__"):
        (site / name).mkdir(parents=True)
    for name in ("six.py", "course.pth", "__editable___rlhf_course_0_1_0_finder.py",
                 "rlhf-course.egg-link", "__pycache__/six.cpython-311.pyc",
                 "__pycache__/__editable___rlhf_course_0_1_0_finder.cpython-311.pyc"):  # fmt: skip
        (site / name).touch()
    (tmp_path / "course" / "solutions").mkdir(parents=True)
    (site / "link").symlink_to(tmp_path / "course" / "solutions")
    (site / "above").symlink_to(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    return site


def below(folder: Path, paths: list[str]) -> set[str]:
    start = os.path.realpath(folder) + "/"
    return {path.removeprefix(start) for path in paths if path.startswith(start)}


def test_packages_are_readable_but_for_this_course(installed):
    paths = sandbox.readable_paths([str(installed.parent / "course")])
    assert below(installed, paths) == {"good", "six.py", "__pycache__/six.cpython-311.pyc"}
    assert below(installed.parent, paths) == {"site-packages/" + p for p in below(installed, paths)}
    assert os.path.realpath(installed) not in paths


def test_an_environment_in_the_repository_is_readable(installed):
    paths = sandbox.readable_paths([str(installed.parent), str(installed / "good" / "answers")])
    assert {"good", "six.py"} - below(installed, paths) == {"good"}  # opened up, and empty
    assert "six.py" in below(installed, paths)


def test_python_is_readable_and_this_course_is_not():
    paths = sandbox.readable_paths([str(ROOT / "rlhf_course"), str(ROOT / "tests")])

    def readable(file):
        return any(sandbox._within(os.path.realpath(file), path) for path in paths)

    import numpy
    import torch

    assert all(readable(module.__file__) for module in (os, json, numpy, torch))
    assert readable("/dev/null") and readable("/dev/urandom")
    for file in (sandbox.__file__, __file__, ROOT / "solutions" / "03_mdp.ipynb", "/etc/passwd",
                 "/proc/self/environ", Path.home(), tempfile.gettempdir()):  # fmt: skip
        assert not readable(file), file
    assert not any("rlhf_course" in os.path.basename(path) for path in paths)


# ------------------------------------------------------------------------ torch, as in a player

PLAYER = """
import json, os, sys, threading, traceback
sys.path.insert(0, sys.argv[1])
from rlhf_course.grading import sandbox
sys.path.pop(0)
layers = [sandbox.isolate_network()]
import numpy, torch
readable = sandbox.readable_paths([sys.argv[1]])
late = [m for m in ("statistics", "colorsys", "numpy.polynomial", "jinja2", "wave")
        if m not in sys.modules]
reader, writer = os.pipe()
if os.fork() == 0:
    try:
        layers += sandbox.confine(sandbox.Limits(), readable)
        torch.set_num_threads(2)
        x = torch.ones(256, 256, requires_grad=True)
        torch.nn.functional.gelu(x @ x).sum().backward()
        layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
        layer(torch.randn(2, 5, 32)).sum().backward()
        numpy.linalg.svd(numpy.eye(50))
        grads = []
        def work():
            y = torch.ones(3, requires_grad=True)
            (y * 2).sum().backward()
            grads.append(float(y.grad.sum()))
        threads = [threading.Thread(target=work) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for name in late:
            __import__(name)
        words = ""
        try:
            socket = __import__("socket").socket()
        except OSError:
            words = traceback.format_exc()
        said = {"layers": layers, "grads": grads, "words": words, "grad": float(x.grad.sum())}
    except BaseException:
        said = {"failed": traceback.format_exc()}
    os.write(writer, json.dumps(said).encode())
    os._exit(0)
os.close(writer)
os.wait()
sys.stdout.buffer.write(os.read(reader, 1 << 16))
"""


@needs_linux
def test_torch_works_in_the_cage():
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAYER, str(ROOT)],
        capture_output=True, text=True, encoding="utf-8", timeout=120, env={},
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert "failed" not in said, said
    assert said["grads"] == [6.0] * 8 and said["grad"] > 0
    assert not HAS_SECCOMP or "PermissionError" in said["words"]
    assert "rror" not in done.stderr  # no library complains of what it may not read
    names = " | ".join(map(str, said["layers"]))
    assert ("seccomp" in names) == HAS_SECCOMP and ("Landlock" in names) == bool(LANDLOCK)
