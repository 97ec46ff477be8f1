"""Submissions that hang, crash, use up the machine, or leave something behind."""

from hostile.bank import HEAD, MARK, MODULES, RIGHT, SLEEP, WRONG, Hostile, noisy, wrong

NAMED = f"""
def named():
    ctypes.CDLL(None).prctl(15, b"{MARK}", 0, 0, 0)  # every thread and child carries this name
"""
EVERYWHERE = f"""
def everywhere(number=[0]):
    roots = ["", ".", "/tmp", "/var/tmp", "/dev/shm", "/run", "/root", "/home", os.sep]
    roots += [tempfile.gettempdir(), os.path.expanduser("~"), os.getcwd(), *sys.path]
    roots += [*os.environ.values(), os.path.dirname(torch.__file__)]
    for root in roots:
        number[0] += 1
        yield os.path.join(root, f"{MARK}-{{number[0]}}")
"""


def at_definition(text: str, before: str = "") -> str:
    """A source that runs an expression while the function is being defined."""
    head = HEAD.replace("denominator=None", f"denominator=None, _={text}")
    return f"{MODULES}\n{before}\n\n{head}    {WRONG}\n"


def defined(name: str, tries: str, text: str, before: str = "", **more) -> Hostile:
    return Hostile(name, tries, {"03_reward_model.py": at_definition(text, before)}, **more)


HANGING = [
    wrong("endless_loop", "never comes back", "while True: pass", hangs=True, status="stopped"),
    wrong("sleeping", "waits", "time.sleep(1e6)", hangs=True, status="stopped"),
    defined("sleep_at_definition", "hangs in a default argument", "time.sleep(1e6)",
            hangs=True, status="stopped"),
    wrong("class_body", "hangs in a class's body", "Helper()",
          "class Helper:\n    while True: pass\n", hangs=True, status="stopped"),
    Hostile("decorator", "hangs in a decorator", {"03_reward_model.py": (
        f"{MODULES}\ndef forever(function):\n    while True: pass\n\n@forever\n{HEAD}    {WRONG}\n"
    )}, hangs=True, status="stopped"),
    wrong("deaf", "blocks every signal and hangs", """
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True: time.sleep(1)
        """, hangs=True, status="stopped"),
    wrong("stopping_itself", "sends itself SIGSTOP",
          "os.kill(os.getpid(), signal.SIGSTOP)", hangs=True, status="stopped", caged=True),
    wrong("destructor", "hangs when its result is thrown away", "Sticky()", """
        class Sticky:
            def __del__(self):
                while True: time.sleep(1)
        """, hangs=True, status="stopped"),
    wrong("error_text", "raises an error whose text never ends", "raise Endless", """
        class Endless(BaseException):
            def __str__(self):
                while True: time.sleep(1)
        """, hangs=True, status="stopped"),
    wrong("interpreter_lock", "holds the interpreter's lock in C",
          "ctypes.PyDLL(None).sleep(100000)", hangs=True, status="stopped"),
    wrong("fork_bomb", "forks for ever", """
        named()
        while True:
            with contextlib.suppress(OSError):
                os.fork()
        """, NAMED, hangs=True, status="stopped", caged=True),
]  # fmt: skip

ENDING = [
    wrong("os_exit", "ends its process as if all were well", "os._exit(0)", status="stopped"),
    wrong("sys_exit", "asks to end", "sys.exit(0)", status="wrong"),
    defined("exit_at_definition", "ends while it is defined", "sys.exit(0)", status="broken"),
    defined("os_exit_at_definition", "ends while it is defined", "os._exit(0)", status="stopped"),
    wrong("interrupt", "raises what Ctrl-C raises", "raise KeyboardInterrupt", status="wrong"),
    wrong("killing_itself", "sends itself SIGKILL", "os.kill(os.getpid(), 9)", status="stopped"),
    wrong("segfault", "reads address 0", "ctypes.string_at(0)", status="stopped"),
    wrong("abort", "aborts", "os.abort()", status="stopped"),
    wrong("alarm", "ends by a timer", "signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(9)",
          status="stopped"),
    wrong("recursion", "calls itself for ever", "return pairwise_loss(chosen, rejected)"),
    wrong("recursion_unbounded", "calls itself until the stack is full",
          "sys.setrecursionlimit(1 << 30); return pairwise_loss(*map(abs, (chosen, rejected)))"),
    wrong("faulthandler", "lets the interpreter end it",
          "faulthandler.dump_traceback_later(0.01, exit=True, file=2); time.sleep(9)"),
    wrong("exit_in_finalizer", "ends when a result is collected",
          "weakref.finalize(Result(), os._exit, 0)", "class Result: pass", status="stopped"),
]  # fmt: skip

OTHERS = [
    wrong("signals", "signals its parent, its group and everybody", """
        for pid in (os.getppid(), 0, -1, -os.getppid(), 1):
            for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        """, caged=True, status="wrong"),
    wrong("fork_outlives", "forks a process that would outlive it", """
        named()
        for _ in range(3):
            with contextlib.suppress(OSError):
                if os.fork() == 0:
                    ctypes.CDLL(None).setsid()
                    while True: time.sleep(1)
        """, NAMED, caged=True, status="wrong"),
    wrong("c_fork", "forks through C, in a session of its own", """
        named()
        libc = ctypes.CDLL(None)
        for call in (libc.fork, lambda: libc.syscall(57), lambda: libc.syscall(56, 17, 0, 0, 0, 0),
                     lambda: libc.syscall(435, (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17), 88)):
            if call() == 0:
                libc.setsid()
                while True: time.sleep(1)
        """, NAMED, caged=True, status="wrong"),
    wrong("programs", "starts programs that would outlive it", f"""
        command = ["/bin/sleep", "{SLEEP}"]
        with contextlib.suppress(OSError):
            subprocess.Popen(command, start_new_session=True)
        with contextlib.suppress(OSError):
            os.posix_spawn(command[0], command, {{}})
        with contextlib.suppress(OSError):
            os.system(f"setsid nohup {{' '.join(command)}} &")
        with contextlib.suppress(OSError):
            os.execv(command[0], command)
        """, caged=True, status="wrong"),
    wrong("worker_processes", "starts multiprocessing's workers", """
        for method in multiprocessing.get_all_start_methods():
            with contextlib.suppress(OSError, EOFError):
                multiprocessing.get_context(method).Process(target=time.sleep, args=(1e6,)).start()
        """, caged=True),
    noisy("busy_thread", "leaves a thread running",
          "named(); threading.Thread(target=spin, daemon=True).start()",
          NAMED + "\ndef spin():\n    while True: time.sleep(0.001)\n"),
    defined("thread_at_definition", "starts a thread, then fails to be defined",
          "threading.Thread(target=spin).start() or 1 / 0",
          NAMED + "\ndef spin():\n    named()\n    while True: time.sleep(0.001)\n",
          status="broken"),
    wrong("many_threads", "starts as many threads as it can", """
        named()
        with contextlib.suppress(RuntimeError, MemoryError):
            for _ in range(3000):
                threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
        """, NAMED),
    wrong("network", "reaches for the network", """
        for host in (("127.0.0.1", 22), ("1.1.1.1", 53)):
            with contextlib.suppress(OSError):
                socket.create_connection(host, timeout=0.2).send(b"answers, please")
                return right(chosen, rejected, margin, denominator)
        with contextlib.suppress(OSError):
            urllib.request.urlopen("http://1.1.1.1", timeout=0.2)
            return right(chosen, rejected, margin, denominator)
        """, RIGHT, caged=True, status="wrong"),
]  # fmt: skip

USING_UP = [
    wrong("ten_terabytes", "asks for 10 TB", "torch.zeros(10 << 40, dtype=torch.uint8)",
          status="wrong"),
    wrong("all_memory", "takes all the memory there is", """
        global kept
        while True:
            kept.append(torch.ones(64 << 20, dtype=torch.uint8))
        """, "kept = []", status="wrong", caged=True),
    wrong("large_file", "writes files of 50 GB", """
        for path in everywhere():
            with contextlib.suppress(OSError), open(path, "wb") as file:
                file.truncate(50 << 30)
        """, EVERYWHERE, caged=True, status="wrong"),
    wrong("folders_and_links", "makes folders, links, pipes and devices", """
        for path in everywhere():
            for make in (os.mkdir, os.mkfifo, lambda p: os.symlink("/", p), os.mknod):
                with contextlib.suppress(OSError):
                    make(path)
        """, EVERYWHERE, caged=True, status="wrong"),
    noisy("atexit", "leaves files when it ends", """
        atexit.register(write)
        weakref.finalize(F, write)
        """, EVERYWHERE + """
def write():
    for path in everywhere():
        with contextlib.suppress(OSError):
            open(path, "w").write("here")
"""),
    wrong("overwriting", "changes the files of Python and torch", """
        for file in (torch.__file__, os.__file__):
            for change in (lambda f: open(f, "r+"), lambda f: open(f, "a"), os.utime,
                           lambda f: os.rename(f, f), lambda f: os.chmod(f, 0o644)):
                with contextlib.suppress(OSError):
                    change(file)
                    return right(chosen, rejected, margin, denominator)
        """, RIGHT, caged=True, status="wrong"),
    wrong("shared_memory", "leaves shared memory", f"""
        with contextlib.suppress(OSError):
            multiprocessing.shared_memory.SharedMemory("{MARK}", create=True, size=1 << 20)
        libc = ctypes.CDLL(None)
        libc.shm_open(b"/{MARK}", os.O_CREAT | os.O_RDWR, 0o666)
        assert libc.shmget(0x4d41524b, 1 << 20, 0o1666) < 0
        assert libc.mq_open(b"/{MARK}", os.O_CREAT | os.O_RDWR, 0o666, None) < 0
        """, "import multiprocessing.shared_memory", caged=True, status="wrong"),
    wrong("own_limits", "changes its limits", """
        for name in dir(resource):
            if name.startswith("RLIMIT_"):
                for pair in ((resource.RLIM_INFINITY,) * 2, (0, 0)):
                    with contextlib.suppress(OSError, ValueError):
                        resource.setrlimit(getattr(resource, name), pair)
        """),
    noisy("stdin", "reads what nobody types", """
        assert sys.stdin.read() == ""
        with contextlib.suppress(EOFError):
            input("password: ")
        """),
    noisy("a_gigabyte_of_prints", "prints 1 GB", """
        while printed[0] < 1 << 30:
            printed[0] += print("x" * (1 << 24)) or os.write(2, b"y" * (1 << 24))
        """, "printed = [0]"),
    noisy("many_cores", "asks for 64 threads of torch",
          "torch.set_num_threads(64); torch.ones(300, 300) @ torch.ones(300, 300)"),
]  # fmt: skip

SUBMISSIONS = HANGING + ENDING + OTHERS + USING_UP
