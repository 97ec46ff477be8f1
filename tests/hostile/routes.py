"""Submissions that look for the right answer elsewhere: in the package, in memory, on the disk."""

from hostile.bank import FILE, HEAD, MARK, MODULES, Hostile, wrong

ARGS = "(chosen, rejected, margin, denominator)"

LOOK = '''
def places():
    """Where the course might lie: all that this process has ever been told."""
    texts = [*sys.path, sys.prefix, sys.base_prefix, *sys.orig_argv, *os.environ.values()]
    with contextlib.suppress(OSError):
        texts.append(open("/proc/self/maps").read())
    with contextlib.suppress(OSError):
        texts.append(open(f"/proc/{os.getppid()}/cmdline").read())
    found = {"/", "/work", "/root", "/home", "/autograder", "/app", "/src", "/repo", "/content"}
    for text in texts:
        for part in text.replace("'", " ").replace('"', " ").replace("\\0", " ").split():
            while part.startswith("/") and len(part) > 1:
                found.add(part)
                part = os.path.dirname(part)
    return sorted(found)

def run(text):
    """The loss that a file of Python defines."""
    scope = {}
    exec(compile(text.replace("from rlhf_course", "from no_course"), "found", "exec"), scope)
    return scope["pairwise_loss"]
'''


def route(name: str, tries: str, body: str, before: str = "", **more) -> Hostile:
    """Tries to answer by way of something else."""
    return wrong(name, tries, body, LOOK + before, **more)


SUBMISSIONS = [
    route("the_package", "returns the package's own answer", f"""
        from rlhf_course.reward_model import pairwise_loss as answer
        return answer{ARGS}
        """, status="blank"),
    route("the_package_again", "reloads the package", f"""
        import rlhf_course.reward_model
        return importlib.reload(rlhf_course.reward_model).pairwise_loss{ARGS}
        """, status="blank"),
    route("a_later_answer", "asks a later exercise that holds this one", """
        from rlhf_course.reward_model import kwise_loss
        pair = torch.stack([chosen, rejected], dim=1)
        return kwise_loss(pair, torch.arange(2).expand(len(pair), 2))
        """),
    route("a_later_chapter", "asks a later chapter's loss", """
        from rlhf_course.beyond_ppo import dpo_loss
        zero = torch.zeros_like(chosen)
        return dpo_loss(chosen, rejected, zero, zero, beta=1.0)[0]
        """),
    route("the_course_s_tools", "asks the course's own tools for the solution", """
        for name in ("source", "mutants", "bank", "check", "trial", "selftest", "substitute"):
            with contextlib.suppress(ImportError):
                module = importlib.import_module(f"rlhf_course.coursework.{name}")
                return run(module.solved("reward_model.pairwise_loss"))
        from rlhf_course.coursework import source
        return run(source.solved("reward_model.pairwise_loss"))
        """, status="wrong"),
    route("another_copy", "imports another copy of the package", f"""
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "Build"]
        for name in [n for n in sys.modules if n.startswith("rlhf_course")]:
            del sys.modules[name]
        sys.path[:0] = places()
        sys.path_importer_cache.clear(); importlib.invalidate_caches()
        with contextlib.suppress(Exception):
            from rlhf_course.reward_model import pairwise_loss as answer
            return answer{ARGS}
        """, caged=True, status="wrong"),
    route("by_its_path", "reads the package and the solutions by their paths", f"""
        for place in places():
            for name in ("rlhf_course/reward_model.py", "reward_model.py",
                         "solutions/03_reward_model.ipynb", "03_reward_model.ipynb"):
                with contextlib.suppress(OSError):
                    return run(open(os.path.join(place, name)).read()){ARGS}
        """, caged=True, status="wrong"),
    route("searching_the_disk", "searches the disk", f"""
        for place in places():
            for name in glob.glob(os.path.join(place, "**/*reward_model*"), recursive=True)[:9]:
                with contextlib.suppress(OSError):
                    return run(open(name).read()){ARGS}
            with contextlib.suppress(OSError):
                os.chdir(place)
            with contextlib.suppress(OSError):
                os.chroot(place)
        """, caged=True, status="wrong"),
    route("installed", "asks for the installed distribution", f"""
        from importlib import metadata, resources
        with contextlib.suppress(Exception):
            for file in metadata.files("rlhf-course"):
                if file.name == "reward_model.py":
                    return run(file.read_text()){ARGS}
        with contextlib.suppress(Exception):
            return run(resources.files("rlhf_course").joinpath("reward_model.py").read_text()){ARGS}
        """, status="wrong"),
    route("loader", "asks the package's loader for its text", f"""
        import rlhf_course.reward_model as module
        for text in [module.__loader__.texts[module.__name__]]:
            with contextlib.suppress(OSError, NotImplementedError, ImportError):
                return run(text){ARGS}
        """),
    route("searching_memory", "walks through all objects for the function", f"""
        gc.unfreeze()
        for thing in gc.get_objects():
            with contextlib.suppress(BaseException):
                if isinstance(thing, types.FunctionType) and thing is not pairwise_loss \\
                        and thing.__name__ == "pairwise_loss":
                    return thing{ARGS}
            with contextlib.suppress(BaseException):
                if type(thing) is types.CodeType and thing.co_name == "pairwise_loss" \\
                        and thing is not pairwise_loss.__code__:
                    return types.FunctionType(thing, globals()){ARGS}
            with contextlib.suppress(BaseException):
                if type(thing) is dict:
                    for text in thing.values():
                        if type(text) is str and "def pairwise_loss" in text:
                            return run(text){ARGS}
        """),
    route("frames", "walks through the frames for what is expected", """
        frame = sys._getframe()
        while frame:
            for name in ("expected", "reference", "oracle", "want", "answer"):
                if isinstance(frame.f_locals.get(name), Tensor):
                    return frame.f_locals[name]
            frame = frame.f_back
        """, status="wrong"),
    route("memory_of_the_parent", "reads the parent's memory", """
        for pid in (os.getppid(), 1):
            for name in ("mem", "maps", "environ", "fd/0", "root/etc/passwd", "cwd"):
                with contextlib.suppress(OSError):
                    return torch.tensor(float(len(open(f"/proc/{pid}/{name}", "rb").read(9))))
            data = ctypes.create_string_buffer(8)
            vector = (ctypes.c_size_t * 2)(ctypes.addressof(data), 8)
            assert ctypes.CDLL(None).process_vm_readv(pid, vector, 1, vector, 1, 0) < 0
            assert ctypes.CDLL(None).ptrace(16, pid, 0, 0) < 0
        """, caged=True, status="wrong"),
    route("pickle", "unpickles what it was sent with", f"""
        for place in (os.getcwd(), *places()):
            with contextlib.suppress(OSError):
                return pickle.load(open(os.path.join(place, "answer.pkl"), "rb")){ARGS}
        pickle.loads(b"cos\\nsystem\\n(S'touch /tmp/{MARK}-pickle'\\ntR.")
        """),
    Hostile("its_own_folder", "imports a module of its own folder",
            {FILE: f"{MODULES}\nfrom answers import right\n\n{HEAD}    return right{ARGS}\n",
             "answers.py": "def right(chosen, rejected, margin=None, denominator=None):\n"
                           "    return chosen\n"}),
    Hostile("a_class_of_the_package", "leaves its method to the package's class",
            {FILE: f"{MODULES}\nfrom rlhf_course import reward_model\n\n"
                   "class pairwise_loss:\n    def __new__(cls, *args):\n"
                   "        return reward_model.pairwise_loss(*args)\n"}, status="blank"),
]  # fmt: skip
