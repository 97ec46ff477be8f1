"""Our contestants: what the stages do in a step, without the run folder around it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peers.cases import EOS, PAD, PPO_BATCHES, Case

Turn = Callable[..., None]
NEVER = -1
"""An EOS that is never drawn."""


def _device(case: Case):
    """As the stages choose it."""
    from rlhf_course.stages.settings import SFTConfig
    from rlhf_course.stages.setup import device_of

    return device_of(SFTConfig(device="cpu", dtype=case.dtype))


def sft(case: Case, turn: Turn) -> None:
    """Updates of SFT on the same dialogues as everybody."""
    from rlhf_course.gpt import GPT
    from rlhf_course.stages import sft as stage
    from rlhf_course.training import make_optimizer

    device = _device(case)
    model = device.place(GPT.from_pretrained(case.model())).train()
    optimizer = make_optimizer(model, 1e-5)
    rows = [stage.as_example(p, a) for p, a in case.dialogues(case.rows * case.updates)]
    turn()
    while True:
        for start in range(0, len(rows), case.rows):
            examples = rows[start : start + case.rows]
            batch = stage.as_batch(examples, model.context, PAD, case.packing)
            optimizer.zero_grad(set_to_none=True)
            loss = stage.backward(model, batch, None, device.device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            loss.item()
            optimizer.step()
        turn(tokens=sum(len(ids) for ids, _ in rows))


def reward_model(case: Case, turn: Turn) -> None:
    """Updates of the reward model."""
    from rlhf_course.reward_model import ScalarModel
    from rlhf_course.stages import reward_model as stage
    from rlhf_course.stages.settings import RewardModelConfig
    from rlhf_course.training import make_optimizer

    device = _device(case)
    model = device.place(ScalarModel.from_pretrained(case.model("reward"))).train()
    optimizer = make_optimizer(model, 1e-5)
    config = RewardModelConfig(batch=case.rows, loss="pairwise")
    pairs = [stage.Ranked(p, [a, b]) for p, a, b in case.pairs(case.rows * case.updates)]
    turn()
    while True:
        for start in range(0, len(pairs), case.rows):
            optimizer.zero_grad(set_to_none=True)
            loss = stage.backward(config, model, pairs[start : start + case.rows])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            loss.item()
            optimizer.step()
        turn(pairs=len(pairs))


def rollout(case: Case, turn: Turn) -> None:
    """Answers of given lengths to the prompts."""
    from rlhf_course.decoding import decode
    from rlhf_course.device import casts_kept
    from rlhf_course.gpt import GPT

    device = _device(case)
    model = device.place(GPT.from_pretrained(case.model())).eval()
    prompts = [prompt for prompt, _ in case.dialogues(case.rows)]
    lengths = [answer for _, answer in case.lengths(case.rows)]
    turn()
    while True:
        with torch.no_grad(), casts_kept(model):
            said = decode(model, prompts, lengths, NEVER)
        turn(tokens=sum(map(len, said.responses)))


def ppo(case: Case, turn: Turn) -> None:
    """Iterations of PPO: answers, scores, advantages, updates."""
    import memory

    from rlhf_course.gpt import GPT

    shape, rows = case.shape, case.rows
    given = [prompt for prompt, _ in case.dialogues(rows * PPO_BATCHES)]

    def prompts(step: int) -> list[list[int]]:
        start = step % PPO_BATCHES * rows
        return given[start : start + rows]

    same = memory.Case(
        "ppo", "gpt", shape.layers, shape.width, shape.vocabulary, case.prompt, case.longest,
        rows=case.minibatch, micro_batch=None, generated=rows,
        epochs=case.epochs, dtype=case.dtype,
    )  # fmt: skip
    policy = GPT.from_pretrained(case.model("policy" if case.even else "ending"))
    eos = NEVER if case.even else EOS
    trainer = memory.ppo(same, _device(case), policy, prompts, eos)
    turn()
    step = 0
    while True:
        trainer.iterate(step)
        step += 1
        turn(episodes=rows)
