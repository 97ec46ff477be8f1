"""seccomp: a Linux process gives up system calls. A filter of ours stands before every one of them.

    seccomp.install(writing=False)

A filter is a program of "classic BPF": load a word of the call (its number, or an argument), jump
on it, return what shall happen. Ours refuses a list of calls and lets the others pass. A list of
what is allowed would be stricter, but Python, torch and the C library use hundreds of calls, other
ones on other machines, and a right solution must never fail for the filter.

The kernel's reference: https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from rlhf_course.grading.kernel import call

# What is refused, and why: the call and its numbers on x86_64 and aarch64 ("-": not there).
REFUSED = {
    "start a process or a program": """
        fork 57 -, vfork 58 -, execve 59 221, execveat 322 281""",
    "reach anybody: what is open already is all there is": """
        socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201,
        accept 43 202, accept4 288 242, io_uring_setup 425 425, io_uring_enter 426 426,
        io_uring_register 427 427""",
    "look into other processes, or write there": """
        ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272,
        process_madvise 440 440, process_mrelease 448 448, pidfd_open 434 434,
        pidfd_getfd 438 438, pidfd_send_signal 424 424, migrate_pages 256 238,
        move_pages 279 239""",
    "slow other processes down": """
        setpriority 141 140, ioprio_set 251 30, sync 162 81, syncfs 306 267""",
    "change the tree of files": """
        unlink 87 -, unlinkat 263 35, rmdir 84 -, mkdir 83 -, mkdirat 258 34, rename 82 -,
        renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -,
        symlinkat 266 36, mknod 133 -, mknodat 259 33, creat 85 -, truncate 76 45""",
    "change whose files are, who may use them, and since when": """
        chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -,
        fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
        setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14,
        lremovexattr 198 15, fremovexattr 199 16""",
    "keep bytes where no limit counts them, or where another process finds them": """
        memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195,
        msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, semget 64 190, semop 65 193,
        semtimedop 220 192, semctl 66 191, mq_open 240 180, mq_unlink 241 181,
        add_key 248 217, request_key 249 218, keyctl 250 219""",
    "see another file system or system than this": """
        mount 165 40, umount2 166 39, move_mount 429 429, open_tree 428 428, fsopen 430 430,
        fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
        unshare 272 97, setns 308 268, chroot 161 51, pivot_root 155 41,
        name_to_handle_at 303 264, open_by_handle_at 304 265""",
    "manage the machine, or reach rarely used corners of the kernel": """
        bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, fanotify_init 300 262,
        reboot 169 142, kexec_load 246 104, kexec_file_load 320 294, swapon 167 224,
        swapoff 168 225, init_module 175 105, finit_module 313 273, delete_module 176 106,
        settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266,
        acct 163 89, quotactl 179 60, quotactl_fd 443 443, sethostname 170 161,
        setdomainname 171 162, syslog 103 116, vhangup 153 58, personality 135 92,
        lookup_dcookie 212 18, iopl 172 -, ioperm 173 -, modify_ldt 154 -, uselib 134 -""",
}
# Refused or not by what is asked for; see `program`.
JUDGED = """
    clone 56 220, clone3 435 435, kill 62 129, tkill 200 130, tgkill 234 131,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, prlimit64 302 261,
    sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118,
    sched_setattr 314 274, fcntl 72 25, ioctl 16 29, open 2 -, openat 257 56, openat2 437 437"""
LAST_KNOWN = 451  # the last number that these lists were made with, on both

TO_ITSELF = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "prlimit64")
TO_ITSELF += ("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr")
CLONE_THREAD = 0x10000
# "Send a signal to that process when this file has news": of fcntl and of ioctl. The last two put
# words into a terminal, as if they had been typed.
SET_OWNER = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902, 0x5412, 0x541C)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Operations of classic BPF, the audit system's names of processors, and what a filter answers.
LOAD, EQUAL, GREATER, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, name
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
PR_SET_SECCOMP, MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]
"""Operation; how many instructions to skip if the test holds, and if not; operand."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(writing: bool) -> None:
    """Filter all later system calls of this thread and of the threads that it will start.

    writing: whether a file may be opened to be written, which a filter cannot tell by its name;
    True where another layer sees to that. Raises OSError where the kernel refuses or the processor
    is not known here; `no_new_privs` must have been set.
    """
    processor = os.uname().machine
    if processor not in PROCESSORS:
        raise OSError(f"no filter for {processor}")
    instructions = program(processor, os.getpid(), writing)
    packed = b"".join(struct.pack("=HBBI", *i) for i in instructions)
    call("prctl", PR_SET_SECCOMP, MODE_FILTER, _Program(len(instructions), packed), 0, 0)


def numbers(listed: str, processor: str) -> dict[str, int]:
    """A list as above -> {call: its number on this processor}, without those it has not got."""
    column = PROCESSORS[processor][0]
    rows = [entry.split() for entry in listed.split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def program(processor: str, own: int, writing: bool) -> list[Instruction]:
    """The filter of process number `own`."""
    code = [
        (LOAD, 0, 0, 4),  # the processor whose calls these are
        (EQUAL, 1, 0, PROCESSORS[processor][1]),
        (RETURN, 0, 0, KILL),  # 32-bit calls have other numbers
        (LOAD, 0, 0, 0),  # the call's number
        # Calls younger than the lists: as on a kernel that has not got them yet, and so are those
        # of x86's "x32", whose numbers are beyond all others.
        (GREATER, 0, 1, LAST_KNOWN),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
    ]
    for listed in REFUSED.values():
        for number in numbers(listed, processor).values():
            code += _when(number, _refuse())
    judged = _judged(own, writing)
    for name, number in numbers(JUDGED, processor).items():
        if name in judged:
            code += _when(number, judged[name])
    return [*code, (RETURN, 0, 0, ALLOW)]


def _judged(own: int, writing: bool) -> dict[str, list[Instruction]]:
    """What happens to the calls of which some are refused."""
    judged = {name: _only(0, EQUAL, own) for name in TO_ITSELF}
    for name in ("prlimit64", *(n for n in TO_ITSELF if n.startswith("sched_"))):
        judged[name] = _only(0, EQUAL, 0, own)  # 0 is a name of one's own, too
    judged["clone"] = _only(0, ANY_BIT, CLONE_THREAD)  # a thread, not a process
    # These hand over a structure, which a filter cannot read. The C library knows kernels without
    # them, and goes back to `clone` and `openat`.
    judged["clone3"] = judged["openat2"] = _refuse(errno.ENOSYS)
    judged |= {name: _all_but(1, EQUAL, *values) for name, values in SET_OWNER.items()}
    if not writing:
        judged |= {"open": _all_but(1, ANY_BIT, WRITING), "openat": _all_but(2, ANY_BIT, WRITING)}
    return judged


def _when(number: int, then: list[Instruction]) -> list[Instruction]:
    """Instructions that end in an answer, for one call; with any other, skip them."""
    return [(EQUAL, 0, len(then), number), *then]


def _refuse(error: int = errno.EPERM) -> list[Instruction]:
    return [(RETURN, 0, 0, ERROR | error)]


def _only(argument: int, test: int, *values: int) -> list[Instruction]:
    """Allowed where the argument passes the test with one of the values, and else refused."""
    return [*_tests(argument, test, values), *_refuse(), (RETURN, 0, 0, ALLOW)]


def _all_but(argument: int, test: int, *values: int) -> list[Instruction]:
    """Refused where the argument passes the test with one of the values, and else allowed."""
    return [*_tests(argument, test, values), (RETURN, 0, 0, ALLOW), *_refuse()]


def _tests(argument: int, test: int, values: tuple[int, ...]) -> list[Instruction]:
    """Go on with the next instruction but one if a test holds, and else with the next.

    The lower half of the argument counts: the kernel takes no more of those that are asked here.
    """
    last = len(values)
    tests = [(test, last - index, 0, value) for index, value in enumerate(values)]
    return [(LOAD, 0, 0, 16 + 8 * argument), *tests]
