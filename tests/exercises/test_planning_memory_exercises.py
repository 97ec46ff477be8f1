"""Chapter 9's exercise: what ZeRO's stages leave to each rank, in bytes."""

import torch

from rlhf_course.coursework.expect import call, equal, exercise, same


def by_hand(parameters, stage, ranks, training=True, parameter_bytes=2):
    """Number by number: who holds it, and in how many bytes."""
    padded = parameters + (-parameters) % ranks

    def held(each, shared_from):
        return each * (padded // ranks if stage >= shared_from else parameters)

    return {
        "parameters": held(parameter_bytes, 3),
        "gradients": held(parameter_bytes, 2) if training else 0,
        "optimizer": held(12, 1) if training else 0,
    }


def holds(subject, parameters, stage, ranks, what="other bytes", **more):
    """The answer's bytes are exactly those."""
    expected = by_hand(parameters, stage, ranks, **more)
    same(subject.zero_bytes, (parameters, stage, ranks), expected, more, what, 0, 0)


def numbers(rng, low, high, count=1):
    return torch.randint(low, high, (count,), generator=rng).tolist()


@exercise("planning.memory.zero_bytes", core=True)
def test_nothing_is_shared_out(subject):
    """stage 0: weights and gradients of 2 bytes, 12 for the optimizer, on every rank"""
    expected = {"parameters": 20, "gradients": 20, "optimizer": 120}
    for ranks in (1, 4):
        same(subject.zero_bytes, (10, 0, ranks), expected, what="other bytes", rtol=0, atol=0)


@exercise("planning.memory.zero_bytes", core=True)
def test_each_stage_shares_out_more(subject):
    """stages 1, 2, 3: first the optimizer's state, then gradients, then parameters"""
    for stage, parameters, gradients, optimizer in ((1, 16, 16, 24), (2, 16, 4, 24), (3, 4, 4, 24)):
        expected = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
        same(subject.zero_bytes, (8, stage, 4), expected, what="other bytes", rtol=0, atol=0)


@exercise("planning.memory.zero_bytes")
def test_shares_are_rounded_up(subject):
    """a share is rounded up to whole numbers, each of all its bytes"""
    for parameters, ranks in ((7, 2), (10, 4), (3, 8), (1_000_001, 3)):
        for stage in (1, 2, 3):
            holds(subject, parameters, stage, ranks)


@exercise("planning.memory.zero_bytes")
def test_bytes_are_integers(subject):
    """bytes are integers, also of the largest models"""
    args = (70_000_000_001, 3, 64)
    got = call(subject.zero_bytes, args)
    kinds = {name: type(value).__name__ for name, value in got.items()}
    inputs = {"parameters": args[0], "stage": args[1], "ranks": args[2]}
    equal(kinds, dict.fromkeys(("parameters", "gradients", "optimizer"), "int"),
          "other types", inputs)  # fmt: skip
    holds(subject, *args)


@exercise("planning.memory.zero_bytes")
def test_a_model_that_only_scores(subject):
    """a reference or reward model has weights alone, shared out in stage 3"""
    for stage in (0, 1, 2, 3):
        holds(subject, 8, stage, 4, training=False)


@exercise("planning.memory.zero_bytes")
def test_fp32_weights(subject):
    """with fp32 weights the gradients are fp32, and the optimizer is as it was"""
    for stage in (0, 1, 2, 3):
        holds(subject, 8, stage, 2, parameter_bytes=4)
        holds(subject, 8, stage, 2, parameter_bytes=4, training=False)


@exercise("planning.memory.zero_bytes")
def test_figures_of_the_paper(subject):
    """7.5 billion parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB, as in the paper's figure 1"""
    for stage, gigabytes in enumerate((120.0, 31.4, 16.6, 1.9)):
        args = (7_500_000_000, stage, 64)
        inputs = {"parameters": args[0], "stage": stage, "ranks": 64}
        total = round(sum(call(subject.zero_bytes, args).values()) / 1e9, 1)
        equal(total, gigabytes, "another sum, in GB", inputs)


@exercise("planning.memory.zero_bytes")
def test_any_model_on_any_ranks(subject, rng):
    """any model, on any number of ranks, in any stage"""
    for _ in range(12):
        (parameters,), (ranks,) = numbers(rng, 1, 10**6), numbers(rng, 1, 65)
        training, wide, stage = numbers(rng, 0, 2) + numbers(rng, 0, 2) + numbers(rng, 0, 4)
        holds(subject, parameters, stage, ranks, training=bool(training),
              parameter_bytes=4 if wide else 2)  # fmt: skip
