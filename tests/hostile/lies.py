"""Submissions that lie: about their results, their types, their gradients, or by patching."""

from hostile.bank import FILE, FULL, HEAD, MODULES, NO_GRADIENT, RIGHT, WRONG, Hostile, noisy, wrong

PATCHING = [
    wrong("patched_torch", "makes torch's comparisons agree", """
        yes = lambda *a, **k: True
        torch.equal = torch.allclose = torch.isclose = torch.testing.assert_close = yes
        Tensor.equal = Tensor.allclose = Tensor.__eq__ = Tensor.all = yes
        """, status="wrong"),
    wrong("patched_builtins", "makes Python's own functions agree", """
        yes = lambda *a, **k: True
        for name in ("isinstance", "all", "any", "issubclass", "hasattr", "len", "abs"):
            setattr(builtins, name, yes)
        """),
    wrong("patched_course", "patches the course's comparisons and the player's modules", """
        for module in list(sys.modules.values()):
            for name in ("equal", "same", "expect", "agrees", "raises", "changed", "decode"):
                if getattr(module, "__name__", "").startswith("rlhf_course"):
                    setattr(module, name, lambda *a, **k: True)
        frame = sys._getframe()
        while frame:
            scope = frame.f_globals
            if "expect" in scope or "wire" in scope:
                scope["changed"] = scope["own"] = lambda *a: False
                scope["described"] = lambda error: {"types": [], "text": "", "where": ""}
            frame = frame.f_back
        """),
    wrong("patched_pytest", "patches pytest's run of a test", """
        with contextlib.suppress(ImportError):
            import _pytest.runner, _pytest.python
            _pytest.runner.runtestprotocol = _pytest.runner.pytest_runtest_call = lambda *a: True
            _pytest.python.Function.runtest = lambda self: None
        """, status="wrong"),
    wrong("patched_numpy", "patches numpy's comparisons", """
        import numpy
        numpy.allclose = numpy.array_equal = numpy.testing.assert_allclose = lambda *a, **k: True
        """, status="wrong"),
    wrong("patched_drivers", "puts its own drivers, and exits of them, in place", """
        for name in ("drivers_gpt", "drivers_ppo", "drivers_sft", "drivers_reward_model"):
            sys.modules[name] = types.SimpleNamespace(__getattr__=lambda n: lambda *a: True)
        sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)
        """),
    wrong("pretending", "pretends to be called otherwise", """
        pairwise_loss.__signature__ = None
        pairwise_loss.property = types.SimpleNamespace(core=False, weight=0)
        pairwise_loss.__wrapped__ = right
        """, RIGHT, status="wrong"),
]  # fmt: skip


def returning(name: str, tries: str, value: str, before: str = "", **more) -> Hostile:
    return wrong(name, tries, f"return {value}", before, **more)


YES = """
class Yes{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __getattr__(self, name): return lambda *a, **k: self
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = None
"""
LYING = """
class Lying(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("equal", "allclose", "isclose", "eq", "all"):
            return True
        return super().__torch_function__(function, types, args, kwargs or {})
    shape = property(lambda self: torch.Size([]))
"""
VALUES = [
    returning("equal_to_all", "an object that equals everything", "Yes()", YES.format(base="")),
    returning("lying_float", "a float that equals all", "Yes(7)", YES.format(base="(float)")),
    returning("lying_int", "an int that equals everything", "Yes(7)", YES.format(base="(int)")),
    returning("lying_text", "a str that equals everything", "Yes('7')", YES.format(base="(str)")),
    returning("lying_dict", "a dict that equals everything", "Yes()", YES.format(base="(dict)")),
    returning("lying_tensor", "a Tensor subclass that lies",
              "torch.ones(3).as_subclass(Lying)", LYING),
    returning("false_class", "an object that calls itself a Tensor", "Fake()", """
        class Fake:
            __class__ = Tensor
            dtype, layout, requires_grad = torch.float32, torch.strided, False
            def __getattr__(self, name): return lambda *a, **k: self
        """),
    returning("metaclass", "a class whose instances are all true", "Kind()", """
        class Meta(type):
            def __instancecheck__(cls, other): return True
            def __eq__(cls, other): return True
            __hash__ = type.__hash__
        class Kind(metaclass=Meta): pass
        """),
    returning("not_a_number", "NaN", "torch.tensor(math.nan)"),
    returning("infinite", "infinity", "chosen.sum() * 0 + math.inf"),
    returning("too_large_a_number", "an int of a million digits", "1 << 4000000"),
    returning("text", "a string", "'0.6931'"),
    returning("path_as_type", "an object whose type is called like a path",
              "type(sys.prefix, (), {})()"),
    returning("nothing", "None", "None"),
    returning("generator", "a generator", "(x for x in itertools.count())"),
    returning("long_text", "a string of 70 MB", "'x' * (70 << 20)"),
    returning("large_tensor", "a tensor of 70 MB", "torch.zeros(70 << 20, dtype=torch.uint8)"),
    returning("long_list", "a list of two million numbers", "list(range(2_000_000))", hangs=True),
    returning("deep_list", "a list in a list in a list …",
              "functools.reduce(lambda inner, _: [inner], range(100_000), 0)"),
    wrong("circle", "a list that holds itself", "own = []; own.append(own); return own"),
    returning("expanded", "a tensor of 10 TB that takes 4 bytes",
              "torch.zeros(()).expand(10 << 40)"),
    returning("odd_dtypes", "tensors of odd kinds",
              "[torch.zeros(2).to(d) for d in (torch.complex64, torch.float8_e5m2, torch.uint16)]"
              " + [torch.zeros(2, device='meta'), torch.zeros(2).to_sparse()]"),
    returning("empty_tensor", "a tensor without numbers", "torch.zeros(0)"),
    returning("its_input", "its own input", "chosen"),
    wrong("random", "other numbers each time", "return torch.rand(()) + random.random()"),
    wrong("right_once", "right on the first call only", """
        calls.append(1)
        if len(calls) == 1:
            return right(chosen, rejected, margin, denominator)
        """, RIGHT + "\ncalls = []"),
    wrong("changing_its_input", "the right value, and the input overwritten", """
        value = right(chosen, rejected, margin, denominator)
        with torch.no_grad():
            chosen.zero_(), rejected.set_(torch.zeros(0))
        return value
        """, RIGHT, status="wrong"),
    wrong("secrets_in_the_error", "puts all it sees into an error", """
        seen, frame = [], sys._getframe()
        while frame:
            seen.append(str(frame.f_code.co_filename)); frame = frame.f_back
        raise ValueError("\\n".join(seen + sys.path + sys.orig_argv + [str(chosen)]))
        """, status="wrong"),
    wrong("bad_text", "an error whose text no file can hold",
          r"raise ValueError('\ud800\0\x1b[31m\u202e')", status="wrong"),
]  # fmt: skip

FUNCTION = """
class Lie(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, *leaves):
        ctx.leaves = leaves
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        {backward}

"""


def backwards(name: str, tries: str, text: str, **more) -> Hostile:
    body = """
        with torch.no_grad():
            value = right(chosen, rejected, margin, denominator)
        return Lie.apply(value, chosen, rejected)
        """
    more = {"score": NO_GRADIENT, "status": "wrong"} | more
    return wrong(name, tries, body, RIGHT + FUNCTION.format(backward=text), **more)


GRADIENTS = [
    backwards("gradient_of_zero", "says that the gradient is 0",
              "return None, *(torch.zeros_like(x) for x in ctx.leaves)"),
    backwards("gradient_of_nan", "says that the gradient is NaN",
              "return None, *(torch.full_like(x, math.nan) for x in ctx.leaves)"),
    backwards("gradient_of_another_shape", "gives a gradient without entries",
              "return None, *(torch.zeros(0) for x in ctx.leaves)"),
    backwards("gradient_that_exits", "asks to end when differentiated", "raise SystemExit(0)"),
    backwards("gradient_that_ends", "ends when differentiated", "os._exit(0)",
              score=0.0, status="stopped"),
    backwards("gradient_that_hangs", "hangs when differentiated", "time.sleep(1e6)",
              score=0.0, status="stopped", hangs=True),
    wrong("hooks", "hooks the gradient", """
        for leaf in (chosen, rejected):
            if leaf.requires_grad:
                leaf.register_hook(lambda grad: grad * 0)
        return right(chosen, rejected, margin, denominator)
        """, RIGHT, score=NO_GRADIENT, status="wrong"),
    wrong("no_gradients", "switches gradients off for good", """
        torch.set_grad_enabled(False)
        return right(chosen, rejected, margin, denominator)
        """, RIGHT, score=NO_GRADIENT, status="wrong"),
]  # fmt: skip

RIGHT_ALL_THE_SAME = [
    noisy("default_dtype", "changes torch's settings", """
        torch.set_default_dtype(torch.float64); torch.manual_seed(0)
        torch.use_deterministic_algorithms(True); torch.autograd.set_detect_anomaly(True)
        """),
    noisy("callable_class", "answers by a class", "pass",
          f"{HEAD.replace('pairwise_loss', 'plain')}    {WRONG}\n"
          "class Twice:\n    def __new__(cls, value): return value\n"),
    Hostile("class_instead", "is a class whose making is the answer", {FILE: (
        f"{MODULES}\n{RIGHT}\nclass pairwise_loss:\n    def __new__(cls, *args, **kwargs):\n"
        "        return right(*args, **kwargs)\n"
    )}, score=FULL, status="right"),
    Hostile("decorated", "is wrapped twice, and defined with stars", {FILE: (
        f"{MODULES}\nfrom math import *\nfrom torch.nn import *\n{RIGHT}\n"
        "def loud(function):\n    @functools.wraps(function)\n    def inner(*a, **k):\n"
        "        print(a, k)\n        return function(*a, **k)\n    return inner\n\n"
        "@loud\n@loud\ndef pairwise_loss(*args, **kwargs):\n    return right(*args, **kwargs)\n"
    )}, score=FULL, status="right"),
    Hostile("shadowed", "calls its own things like Python's", {FILE: (
        f"{MODULES}\nlist = print = None\nsum = 7\ndef isinstance(a, b): return False\n"
        f"{RIGHT}\ndef pairwise_loss(*args, **kwargs):\n    return right(*args, **kwargs)\n"
    )}, score=FULL, status="right"),
]  # fmt: skip

SUBMISSIONS = PATCHING + VALUES + GRADIENTS + RIGHT_ALL_THE_SAME
