"""Wrong answers to chapter 9's memory plan, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant

ID = "planning.memory.zero_bytes"
SHARED = "stage >= since[name]"
SHARE = "share = -(-parameters // ranks)"


def mutant(name, says, *edits):
    return Mutant(ID, name, says, edits)


MUTANTS = [
    mutant(
        "no master copy",
        "You forget the fp32 master copy: Adam's steps are too small to be added to bf16 weights.",
        ("4 + 4 + 4", "4 + 4"),
    ),
    mutant(
        "one moment",
        "Adam keeps two moments of each number, the mean and the mean square.",
        ("4 + 4 + 4", "4"),
    ),
    mutant(
        "moments in bf16",
        "You give the optimizer's state the bytes of the weights. It is fp32 whatever those are.",
        ("4 + 4 + 4", "3 * parameter_bytes"),
    ),
    mutant(
        "master copy of bf16 only",
        "You leave out the master copy where the weights are fp32. DeepSpeed keeps one there too.",
        ("4 + 4 + 4", "4 + 4 + (4 if parameter_bytes == 2 else 0)"),
    ),
    mutant(
        "gradients in fp32",
        "You give the gradients 4 bytes. They have those of the weights.",
        ('"gradients": parameter_bytes, "opt', '"gradients": 4, "opt'),
    ),
    mutant(
        "no gradients",
        "The gradients are missing.",
        ('"gradients": parameter_bytes, "opt', '"gradients": 0, "opt'),
    ),
    mutant(
        "always two bytes",
        "You always count 2 bytes for a weight. `parameter_bytes` says how many there are.",
        ('{"parameters": parameter_bytes', '{"parameters": 2'),
        ('"gradients": parameter_bytes, "opt', '"gradients": 2, "opt'),
    ),
    mutant(
        "rounded down",
        "You round a share down. Then some numbers belong to nobody: shares are padded to one "
        "length.",
        (SHARE, "share = parameters // ranks"),
    ),
    mutant(
        "not rounded",
        "You divide with `/`, which gives fractions of a number. Round up.",
        (SHARE, "share = parameters / ranks"),
    ),
    mutant(
        "rounded as a float",
        "You divide as floats and round. A float has 53 bits and bytes are integers: use `//`.",
        (SHARE, "import math\n    share = float(math.ceil(parameters / ranks))"),
    ),
    mutant(
        "bytes are shared out",
        "You share out the bytes and round those. What is shared out are numbers, of several bytes "
        "each.",
        (
            "name: each * (share if stage >= since[name] else parameters) for",
            "name: -(-each * parameters // ranks) if stage >= since[name] else each * parameters"
            " for",
        ),
    ),
    mutant(
        "only what the stage adds",
        "You share out only what a stage adds. Stage 3 also shares out what 1 and 2 do.",
        (SHARED, "stage == since[name]"),
    ),
    mutant(
        "stage 3 or nothing",
        "You share out everything in stage 3 and nothing before it.",
        (SHARED, "stage == 3"),
    ),
    mutant(
        "one stage too late",
        "Everything is shared out one stage too late. Stage 1 shares out the optimizer's state.",
        (SHARED, "stage > since[name]"),
    ),
    mutant(
        "always shared out",
        "You share out everything in every stage. Stage 0 shares out nothing, 1 the optimizer's "
        "state alone.",
        (SHARED, "ranks"),
    ),
    mutant(
        "never shared out",
        "You share out nothing: these are the bytes of plain data parallelism.",
        (SHARED, "ranks < 1"),
    ),
    mutant(
        "gradients before the optimizer",
        "You share out the gradients first. The optimizer's state, the largest part, is first.",
        ('"optimizer": 1, "gradients": 2', '"optimizer": 2, "gradients": 1'),
    ),
    mutant(
        "parameters before gradients",
        "You share out the parameters in stage 2. That is stage 3, and in 2 it is the gradients.",
        ('"gradients": 2, "parameters": 3', '"gradients": 3, "parameters": 2'),
    ),
    mutant(
        "a scoring model is trained",
        "You do not look at `training`. A model that only scores has weights and nothing else.",
        ("if training:", "if True:"),
    ),
    mutant(
        "a scoring model has gradients",
        "A model that only scores has no gradients either.",
        ('"gradients": 0, "optimizer"', '"gradients": parameter_bytes, "optimizer"'),
    ),
    mutant(
        "a scoring model is whole",
        "You never share out a model that only scores. Stage 3 shares out its parameters, too.",
        (SHARED, "training and stage >= since[name]"),
    ),
    mutant(
        "all ranks together",
        "You count the bytes of all ranks. Those of one rank are asked for.",
        ("name: each * (", "name: ranks * each * ("),
    ),
]
