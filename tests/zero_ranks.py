"""Real ranks under DeepSpeed ZeRO, for test_zero.py.

    python -m tests.zero_ranks FOLDER WORLD...      starts WORLD ranks, runs its cases, ends them

The heavy imports are made once; the ranks are forks of that process. Each writes what it saw of a
case to FOLDER/WORLD-CASE-RANK.pt.
"""

import copy
import dataclasses
import functools
import gc
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_course import ppo_ptx, rollout
from rlhf_course.distributed.shares import _to_host
from rlhf_course.distributed.updates import update_critic, update_policy
from rlhf_course.distributed.zero import ZeroModel, ZeroSettings, join
from rlhf_course.errors import CheckpointError, TrainingError
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.mdp import action_mask
from rlhf_course.ppo_ptx import PTXSettings
from rlhf_course.reward_model import ScalarModel
from rlhf_course.rollout import PPOSettings, Rollout, action_logprobs
from tests.tiny_models import VOCABULARY, tiny

SECONDS = 400  # that the ranks of one world may take
LR, CRITIC_LR, BETAS, STEPS = 1e-3, 2e-3, (0.9, 0.95), 2
ROWS = {1: [7], 2: [4, 3], 4: [3, 1, 2, 1]}  # answers of each rank; their lengths differ widely
TEXTS = {1: [4], 2: [4, 0], 4: [1, 0, 2, 1]}  # corpus rows


@dataclass(frozen=True)
class Case:
    """One configuration; two updates of policy and critic."""

    kind: str = "gpt"
    stage: int = 3
    micro: int | None = None
    zero: dict = field(default_factory=dict)
    ppo: dict = field(default_factory=dict)
    ptx: dict = field(default_factory=dict)
    chunk: int = 4096
    load: str | None = None
    """State to begin from, instead of new models; one update then."""
    save: bool = False

    @property
    def settings(self) -> PPOSettings:
        return PPOSettings(micro_batch_size=self.micro, **self.ppo)


# Every stage and every kind of model with 1, 2 and 4 micro-batches (4 answers and 3).
SAME = {
    "gpt-1": Case("gpt", 1, None), "llama-1": Case("llama", 1, 2), "qwen2-1": Case("qwen2", 1, 1),
    "gpt-2": Case("gpt", 2, 2), "llama-2": Case("llama", 2, 1), "qwen2-2": Case("qwen2", 2, None),
    "gpt-3": Case("gpt", 3, 1, save=True), "llama-3": Case("llama", 3, None),
    "qwen2-3": Case("qwen2", 3, 2),
    "chunks": Case("gpt", 3, 2, chunk=5), "chunks-llama": Case("llama", 3, None, chunk=5),
    "recompute": Case("gpt", 3, 2, {"gradient_checkpointing": True}),
    "recompute-llama": Case("llama", 3, 2, {"gradient_checkpointing": True}),
    "host": Case("gpt", 3, 2, {"offload": "parameters"}),
    "host-2": Case("gpt", 2, 2, {"offload": "optimizer"}),
    "persistent": Case("llama", 3, 2, {"extra": {
        "zero_optimization": {"stage3_param_persistence_threshold": 100}}}),
    "terms": Case("gpt", 3, 1, {}, {"entropy_coef": 0.01, "kl_loss_coef": 0.3, "dual_clip": 3.0},
                  {"reduction": "seq_sum", "coef": 0.02}),
    "bandit": Case("gpt", 2, 1, {}, {"sequence_ratio": True, "value_clip": None}),
}  # fmt: skip
CUT = {"autotp": 2}
CASES = {
    2: SAME | {"resumed": Case("gpt", 2, 2, load="gpt")},
    4: {
        "gpt-3": Case("gpt", 3, 1), "llama-3": Case("llama", 3, None),
        "resumed": Case("gpt", 3, 2, load="gpt"),
        # The last ones: DeepSpeed keeps its groups, and then makes no model without AutoTP.
        "cut-1": Case("llama-cut", 1, 2, CUT), "cut-3": Case("llama-cut", 3, None, CUT, save=True),
    },
    1: {"resumed": Case("gpt", 3, 1, load="gpt"), "cut": Case("llama-cut", 3, 2, load="llama-cut")},
}  # fmt: skip


def models(kind: str) -> tuple[nn.Module, ScalarModel]:
    """The policy and the critic that a case begins with."""
    policy, other = tiny(kind.removesuffix("-cut")), tiny(kind.removesuffix("-cut"), 1)
    if kind.endswith("-cut"):  # a head of keys and values for each of the two that share a matrix
        policy, other = two_heads(policy), two_heads(other)
    return policy, ScalarModel.from_language_model(other)


def two_heads(model: HuggingFaceLM) -> HuggingFaceLM:
    """The same with the one head of keys and values twice, the second scaled."""
    config = copy.deepcopy(model.model.config)
    config.num_key_value_heads = 2
    weights = model.model.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = torch.cat([weight, 0.7 * weight])
    doubled = type(model.model)(config)
    doubled.load_state_dict(weights)
    return HuggingFaceLM(doubled)


def answers(policy: nn.Module, critic: ScalarModel, seed: int = 0) -> tuple[Rollout, Tensor]:
    """Made-up answers of 1 to 20 tokens whose ratios and values reach both sides of the clips, and
    corpus rows."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.tensor([3, 1, 7, 2, 5, 4, 6])
    lengths = torch.tensor([20, 17, 1, 9, 2, 13, 4])
    tokens = torch.randint(0, VOCABULARY, (7, 29), generator=generator)
    mask = action_mask(prompts, lengths, 29)
    noise = [torch.randn(mask.shape, generator=generator) * mask for _ in range(5)]
    with torch.no_grad():
        logprobs, _ = action_logprobs(policy, tokens, mask)
        values = torch.where(mask, critic.token_scores(tokens)[:, :-1], 0.0)
    held = Rollout(
        tokens, mask, logprobs + 0.2 * noise[0], noise[1], values + 0.3 * noise[2],
        values + noise[3], mask, logprobs + 0.3 * noise[4], (1 + 0.1 * noise[0]) * mask,
    )  # fmt: skip
    return held, torch.randint(0, VOCABULARY, (4, 24), generator=generator)


def share(rank: int, world: int, batch: Rollout, texts: Tensor) -> tuple[Rollout, Tensor | None]:
    """This rank's answers and corpus rows."""
    mine = torch.arange(7).split(ROWS[world])[rank]
    text = texts.split(TEXTS[world])[rank]
    return batch.select(mine), text if len(text) else None


# ----------------------------------------------------------------------------------- on each rank


def updates(rank: int, world: int, case: Case, folder: Path, seen: dict) -> None:
    """Two updates, or one from a loaded state."""
    policy, critic = models(case.kind)
    batch, texts = answers(policy, critic)
    settings = ZeroSettings(case.stage, **case.zero)
    policy, critic = (ZeroModel(m, settings, BETAS) for m in (policy, critic))
    part, mine = share(policy.group.rank(), policy.group.size(), batch, texts)
    for chunked in (rollout, ppo_ptx):
        chunked.rows_at_a_time = lambda vocabulary, most: case.chunk
    if case.load:
        state = load_file(folder / f"{case.load}.safetensors") if rank == 0 else None
        policy.load_state("policy", state)
        critic.load_state("critic", state)
    seen["stats"], seen["seconds"] = [], []
    for _ in range(1 if case.load else STEPS):
        began = time.perf_counter()
        ptx = PTXSettings(**{"coef": 0.3, **case.ptx})
        stats = update_policy(policy, part, mine, case.settings, ptx, LR, policy.group)
        stats |= update_critic(critic, part, case.settings, CRITIC_LR, critic.group)
        seen["stats"].append(stats)
        seen["seconds"].append(time.perf_counter() - began)
    seen["policy"], seen["critic"] = whole(policy), whole(critic)
    seen["bytes"] = policy.partition_bytes()
    if case.save:
        state = policy.state_tensors("policy") | critic.state_tensors("critic")
        assert bool(state) == (rank == 0)
        if state:
            save_file(state, folder / f"{case.kind}.safetensors")


def whole(model: ZeroModel) -> dict[str, Tensor]:
    """Every parameter, gathered."""
    return {name: gather().clone() for name, gather in model.parameters_whole()}


def gathering(rank: int, world: int, folder: Path, seen: dict) -> None:
    """`parameters_whole` beside DeepSpeed's own way, for a model with a tensor of one number."""
    import deepspeed

    for training in (False, True):
        critic = models("llama")[1]
        names = [name for name, _ in critic.named_parameters()]
        before = {name: p.detach().clone() for name, p in critic.named_parameters()}
        shared = ZeroModel(critic, ZeroSettings(3), BETAS if training else None)
        ours = whole(shared)
        seen[f"names-{training}"] = list(ours) == names
        for name, parameter in critic.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                theirs = parameter.detach().clone()
            same = torch.equal(ours[name], theirs) and torch.equal(theirs, before[name])
            seen[f"{training}-{name}"] = same and parameter.numel() == 0
        batch, _ = answers(tiny("llama"), models("llama")[1])
        scores = shared(ScalarModel.token_scores, batch.tokens)
        wanted = models("llama")[1].token_scores(batch.tokens)
        seen[f"scores-{training}"] = torch.allclose(scores, wanted, rtol=1e-6, atol=1e-6)
        seen[f"bytes-{training}"] = shared.partition_bytes()


def poison(model: nn.Module, rank: int) -> Tensor:
    """0, with a gradient that is NaN on one of the ranks."""
    loss = 0.0 * action_logprobs(model, torch.ones(1, 4).long(), torch.ones(1, 3).bool())[0].sum()
    return loss + torch.where(torch.tensor(rank == 1), loss.abs().sqrt(), loss)


def not_finite(rank: int, world: int, folder: Path, seen: dict) -> None:
    """A gradient that is NaN is refused, and the next update is good; so is a loss that is NaN."""
    for stage in (1, 2, 3):
        policy, critic = models("gpt")
        part, mine = share(rank, world, *answers(policy, critic))
        shared = ZeroModel(policy, ZeroSettings(stage), BETAS)
        before = whole(shared)
        shared.backward(shared(poison, rank), last=True)
        seen[f"gradient-{stage}"] = refusal(shared.step, LR)
        seen[f"kept-{stage}"] = same(whole(shared), before)
        update = functools.partial(
            update_policy, shared, settings=PPOSettings(), ptx=PTXSettings(0.3), lr=LR,
            group=shared.group, rows=mine,
        )  # fmt: skip
        seen[f"next-{stage}"] = [update(part=part), before := whole(shared)]
        bad = dataclasses.replace(part, advantages=part.advantages * (torch.nan if rank else 1))
        seen[f"loss-{stage}"] = refusal(update, part=bad)
        seen[f"still-{stage}"] = same(whole(shared), before)


def refusal(function, *args, **named) -> str:
    """What the TrainingError says."""
    try:
        function(*args, **named)
    except TrainingError as error:
        return str(error)
    return "nothing was raised"


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs)


def low_precision(rank: int, world: int, folder: Path, seen: dict) -> None:
    """One update in bf16, with fp32 masters; the state goes out and in again."""
    for kind, stage in (("gpt", 1), ("llama", 2), ("llama", 3)):
        policy, critic = models(kind)
        part, mine = share(rank, world, *answers(policy, critic))
        buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
        shared = ZeroModel(policy, ZeroSettings(stage, bf16=True), BETAS)
        settings = PPOSettings(micro_batch_size=2)
        stats = update_policy(shared, part, mine, settings, PTXSettings(0.3), LR, shared.group)
        state = shared.state_tensors("policy")
        shared.load_state("policy", state if rank == 0 else None)
        seen[f"{kind}-{stage}"] = {
            "stats": stats,
            "state": state,
            "again": same(shared.state_tensors("policy"), state),
            "dtypes": sorted({str(gather().dtype) for _, gather in shared.parameters_whole()}),
            "buffers": same(dict(policy.named_buffers()), buffers),
            "bytes": shared.partition_bytes(),
        }


def moved(rank: int, world: int, folder: Path, seen: dict) -> None:
    """The share is moved out of its memory and back, as `offload` does on a GPU; then other values
    are given to two parameters, as PopArt does."""
    policy, critic = models("gpt")
    part, mine = share(rank, world, *answers(policy, critic))
    shared = ZeroModel(policy, ZeroSettings(3), BETAS)

    def update():
        return update_policy(shared, part, mine, PPOSettings(), PTXSettings(0.3), LR, shared.group)

    seen["stats"] = [update()]
    held = [storage for some in shared._held() for storage in some.values()]
    shared._away = [(storage, _to_host(storage)) for storage in held]
    seen["left"] = sum(storage.nbytes() for storage in held)
    shared.offload()  # finds nothing on a GPU
    shared.reload()
    seen["stats"].append(update())
    seen["policy"] = whole(shared)
    for stage in (1, 2, 3):
        shared = ZeroModel(models("gpt")[1], ZeroSettings(stage), BETAS)
        given = {"head.weight": torch.arange(32.0)[None], "head.bias": torch.tensor([5.0])}
        shared(ScalarModel.token_scores, part.tokens)  # something may be gathered still
        shared.set_parameters(given)
        seen[f"given-{stage}"] = whole(shared)
        update_critic(shared, part, PPOSettings(), LR, shared.group)
        seen[f"trained-{stage}"] = whole(shared)


def refused(rank: int, world: int, folder: Path, seen: dict) -> None:
    """A state that is not this model's is refused on every rank."""
    shared = ZeroModel(models("gpt")[0], ZeroSettings(3), BETAS)
    state = load_file(folder / "gpt.safetensors")
    other = state | {"module/policy/final_norm.bias": torch.zeros(31)}
    lacks = {key: value for key, value in state.items() if key != "optimizer/policy/3/exp_avg"}
    for name, wrong in {"other": other, "lacks": lacks}.items():
        try:
            shared.load_state("policy", wrong if rank == 0 else None)
        except CheckpointError as error:
            seen[name] = str(error)


OTHERS = {
    2: {
        "gathering": gathering, "not-finite": not_finite, "low-precision": low_precision,
        "moved": moved, "refused": refused,
    }
}  # fmt: skip


def run_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """All cases of this world, one after the other."""
    join(rank, world, "127.0.0.1", port, timeout_s=120)
    for name, case in CASES[world].items():
        seen: dict = {}
        updates(rank, world, case, folder, seen)
        torch.save(seen, folder / f"{world}-{name}-{rank}.pt")
    for name, other in OTHERS.get(world, {}).items():
        seen = {}
        other(rank, world, folder, seen)
        torch.save(seen, folder / f"{world}-{name}-{rank}.pt")


def main(folder: Path, worlds: list[int]) -> int:
    import deepspeed  # noqa: F401  before the ranks are forked
    import torch._dynamo  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage for every model, and would look at all of these

    for world in worlds:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                status = 1
                signal.alarm(SECONDS)  # it ends even where nobody is left to end it
                try:
                    run_rank(rank, world, port, folder)
                    status = 0
                finally:
                    if status:
                        traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(status)  # an error ends the rank, and never comes back from the fork
            ranks.append(pid)
        ended = [os.waitpid(pid, 0)[1] for pid in ranks]
        if any(ended):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]]))
