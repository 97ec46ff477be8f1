# %% [markdown]
# # Chapter 9: PPO-ptx on Ray, vLLM and ZeRO-3
#
# One process holds four models, answers, and learns. With 7 billion parameters they no longer fit on any
# GPU, and answering takes longer and longer. This chapter takes the same pure functions apart and puts
# them on a cluster: **Ray** starts the processes, **DeepSpeed's ZeRO** shares the training out, **vLLM**
# answers. All three are the real ones, and they run here, on a CPU.
#
# **What you will be able to do**
#
# - say what share of a step generation takes, and why longer answers make it more;
# - say in bytes what ZeRO-1, 2 and 3 leave on each rank, and check it on two real ones;
# - place actor, critic, reference, reward and rollout engines on GPUs, apart or together;
# - share a batch out so that no rank is without work, and show what happens otherwise;
# - bring a sharded model's weights to an engine, so that it never answers with half of them;
# - run rollout and training beside each other, and say how stale the answers are;
# - plan a run of 7, 13 or 70 billion parameters before a single GPU is rented.
#
# **Where we are on the map.** Almost nothing in the method is new: the losses are those of chapters 5 and 6,
# called by other hands. One weight joins them, in section 5.

# %%
from rlhf_course.planning.doctor import distributed_missing
from rlhf_course.plots import lessons_distributed as draw
from rlhf_course.plots.course_map import course_map

missing = distributed_missing()
print(missing or "Ray, vLLM and DeepSpeed are installed: every cell below runs.")
lab.show(
    course_map(9),
    alt="The map of the course: chapters 1 to 8 are filled; chapter 9, Distributed, "
    "which follows PPO-ptx, is where we stand.",
)

# %% [markdown]
# *Where the engines are missing (on Windows, on macOS), the cells that need them say so in one line, and
# everything else works, all exercises included. `rlhf-course doctor` says what is there and how to get
# the rest.*
#
# ## 1. Why generation counts
#
# A step of PPO has three phases: generate answers, score them (policy, reference, critic and reward
# model read them once), update. The second and the third read a whole answer in **one** forward pass.
# The first needs **one forward pass for every token**, since a token is not known before the one before
# it is drawn. Measure it, with the functions of chapters 1, 4 and 5:

# %%
import time
from itertools import pairwise

from rlhf_course.ppo import ppo_step
from rlhf_course.rollout import PPOSettings, Rollout, action_logprobs, action_values
from rlhf_course.sampling import generate
from rlhf_course.training import make_optimizer

policy, tokenizer = lab.model("sft")
reward_model, _ = lab.model("reward_model")
critic = reward_model.as_critic()
device = next(policy.parameters()).device
# A learning rate of 0: the clock runs, the models stay.
optimizers = [make_optimizer(model, 0.0, (0.9, 0.95)) for model in (policy, critic)]
prompts = torch.randint(3, 300, (64, 8)).tolist()


# %%
def phases(length):
    """Seconds of each phase for 64 answers of this many tokens."""
    clock = [time.perf_counter()]
    said = generate(policy, prompts, length, eos_id=-1)  # an EOS that never comes
    clock.append(time.perf_counter())
    rows = [p + r for p, r in zip(prompts, said.responses, strict=True)]
    tokens = torch.tensor(rows, device=device)
    mask = (torch.arange(7 + length, device=device) >= 7).expand(64, -1)
    with torch.no_grad():
        old, _ = action_logprobs(policy, tokens, mask)
        action_logprobs(policy, tokens, mask)  # the reference is as large
        values = action_values(critic, tokens, mask)
        sizes = [torch.full((64,), n, device=device) for n in (8, length)]
        reward_model.rewards(tokens, *sizes)
    clock.append(time.perf_counter())
    rollout = Rollout(tokens, mask, old, values, values, values, mask)
    ppo_step(policy, critic, rollout, *optimizers, PPOSettings())
    clock.append(time.perf_counter())
    seconds = [b - a for a, b in pairwise(clock)]
    return dict(zip(("generation", "scoring", "update"), seconds, strict=True))


# %%
lengths = (8, 24, 56) if lab.quick else (8, 16, 24, 32, 40, 48, 56)
phases(8)  # the first time, memory has to be found
here = {n: min((phases(n) for _ in range(3)), key=lambda p: sum(p.values()))
        for n in lengths}  # fmt: skip
lab.show(
    draw.phases_over_length("64 answers on this machine", here, 1 / 11),
    alt="Stacked bars: seconds of generation, scoring and update grow with the length "
    "of the answers. Right: generation's share of the time against the length, far "
    "above a dashed line at 9 %.",
)

# %% [markdown]
# *What to see: every phase grows with the answers, and generation takes several times its share of the
# operations. That is one in eleven: a forward pass of one model over each token; scoring makes four, the
# update three times one (backward counts twice) for each of two models.* What would refute the claim: a
# share of 9 %.
#
# **Why, in numbers.** One token of one sequence needs $2N$ operations in a model of $N$ parameters (each
# weight is multiplied once and added once), and all $N$ weights have to come from memory, $2N$ bytes in
# bf16. Decoding $B$ sequences together needs $2NB$ operations for the same $2N$ bytes: $B$ operations a
# byte. An A100 can do $312\cdot10^{12}$ operations a second and read $2\cdot10^{12}$ bytes: **156 operations
# for each byte.** Until 156 sequences are decoded together, arithmetic waits for memory. Then the KV cache
# (chapter 1's key-value cache) joins, which every sequence reads for itself, so that no batch size helps. Scoring and training read a
# weight once for thousands of tokens, and compute at full speed.
#
# The planner of this package does this arithmetic for a whole step. Here for Llama 2 7B on eight A100,
# 512 answers to prompts of 512 tokens, one epoch:

# %%
from rlhf_course.planning.search import best_plan
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import LLAMA2

NAMES = {
    "rollout": "generation", "scoring": "scoring", "training": "update",
    "weight sync": "sync", "to the host and back": "moving",
}  # fmt: skip
planned = {}
for n in (128, 256, 512, 1024, 2048, 3584):
    config = PlanConfig(max_new_tokens=n, micro_batch=1, epochs=1)
    took = best_plan(config, LLAMA2["7b"]).speed.phases
    planned[n] = {NAMES[name]: seconds for name, seconds in took.items()}
lab.show(
    draw.phases_over_length("7B on 8 A100, estimated", planned, 1 / 11),
    alt="Estimated seconds of a step of a 7B model by phase, for answers of 128 to "
    "3584 tokens. Generation's share rises from a tenth to nearly a half.",
)

# %% [markdown]
# *What to see: the share grows with the length, from what the operations say to several times that. And
# this is what an engine reaches when everything goes well: all answers equally long, as many of them together
# as the cache can hold. Published runs report 80 % and more, since answers are **not** equally long (while
# the last one is written, all others wait), and since reasoning takes tens of thousands of tokens.*
#
# So generation deserves an engine of its own, which does nothing else: vLLM, section 5. And the training
# deserves its memory: section 2.
#
# ## 2. What fits: ZeRO
#
# A model that is trained in mixed precision with Adam needs 16 bytes for each parameter: 2 for the bf16
# weight, 2 for its gradient, and 12 for the optimizer, which keeps an fp32 copy of the weight and two
# moments. (In pure fp32 4 + 4 + 8 = 16 would do; DeepSpeed keeps its own copy of the weights even then, so
# that it is 20, and so in the exercise.) Plain data parallelism keeps all of it on every
# rank. **ZeRO** (Rajbhandari et al. 2020) keeps each number once:
#
# | stage | shared out over $N$ ranks | bytes a parameter and rank | traffic of an update, stage 0 = 1 |
# |---|---|---|---|
# | 0 | nothing | $2 + 2 + 12$ | 1 |
# | 1 | the optimizer's state | $2 + 2 + 12/N$ | 1 |
# | 2 | and the gradients | $2 + (2 + 12)/N$ | 1 |
# | 3 | and the parameters | $(2 + 2 + 12)/N$ | 1.5 |
#
# The traffic is that of an update with one micro-batch. Stages 1 and 2 add none: an all-reduce of gradients *is* a reduce-scatter (every rank gets the sum
# of its own share) and an all-gather (everyone gets everything). Between the two each rank updates its
# share; what is gathered then are weights instead of gradients. Stage 3's parameters have to be gathered
# wherever they are used, layer by layer, in the forward *and* in the backward pass, and are dropped at
# once: half as much traffic again. With several micro-batches stage 3 gathers for each, and stage 2 reduces
# the gradients after each. Reference and reward model are not
# trained: they have weights alone.
#
# **A worked example.** 7 billion parameters, 8 ranks, stage 2: $7\cdot10^9\cdot(2 + 14/8) = 26$ GB a rank.

# %% exercise planning.memory.zero_bytes
# hint: First the bytes of one number: weights and gradients have `parameter_bytes`, the optimizer
#   4 + 4 + 4 whatever those are. A model that only scores has the first alone.
# hint: Which of the three are shared out? From stage 1 on the optimizer, from 2 on the gradients, from 3
#   on the parameters: compare the stage with 1, 2 and 3.
# hint: A share of `n` numbers is `-(-n // ranks)`: rounded up, and always an integer. Round the numbers,
#   not their bytes.

# %%
GB = 1e9
for stage in range(4):
    held = zero_bytes(7_000_000_000, stage, 8)
    parts = ", ".join(f"{name} {size / GB:5.1f} GB" for name, size in held.items())
    print(f"stage {stage}: {sum(held.values()) / GB:5.1f} GB a GPU: {parts}")

# %% [markdown]
# *What to see: without ZeRO 7 billion parameters need 112 GB on every GPU, before the first activation.
# Stage 1 takes most of that away. But weights of 14 GB stay on every rank in stages 1 and 2, however many
# there are; only in stage 3 does everything go on falling.*
#
# Does DeepSpeed really hold that? The next cell starts **two ranks** (processes that talk through gloo, a
# few seconds each), puts our SFT model under stages 1, 2 and 3, makes two updates of two micro-batches, and
# adds up the memory that parameters, gradients, master weights and Adam's state take on rank 0.

# %%
from rlhf_course.distributed import lessons

small = lab.folder("sft") / "model"
if missing:
    print(missing)
else:
    told = lessons.on_ranks("partitions", small)[0]  # what rank 0 says
    held = {int(stage): row["bytes"] for stage, row in told.items()}
    count = sum(p.numel() for p in policy.parameters())
    formula = {stage: zero_bytes(count, stage, 2) for stage in range(4)}
    for stage, parts in held.items():
        ratio = sum(parts.values()) / sum(formula[stage].values())
        print(f"stage {stage}: {ratio:.3f} of what your formula says, "
              f"{1000 * told[str(stage)]['seconds']:.0f} ms an update")  # fmt: skip
    lab.show(
        draw.zero_partitions(held, formula),
        alt="Bytes of one of two ranks by stage. Formula and measurement agree; from "
        "stage 0 to 3 the sum falls from 16 to 8 bytes a parameter.",
    )

# %% [markdown]
# *What to see: pale the formula, dark what is there; the ratio is 1 up to padding and a few numbers of
# bookkeeping. Stage 3's update takes longest: it gathers each layer in the forward and again in the backward
# pass of every micro-batch, which stage 1 need not.*
#
# ## 3. The whole from its shards
#
# Under stage 3 no rank has a whole parameter. A parameter is laid out flat, filled up to a multiple of
# the number of ranks, and cut: rank $r$ holds piece $r$. For a layer of 3 × 3 on two ranks:
#
# $$\underbrace{w_1\,w_2\,w_3\,w_4\,w_5}_{\text{rank 0}}\;\big|\;
# \underbrace{w_6\,w_7\,w_8\,w_9\;\square}_{\text{rank 1}}$$
#
# To have the whole, all ranks exchange their pieces (an **all-gather**), drop the padding, and restore the
# shape. For the rollout engines we shall need just that, for one parameter after the other: all of them at
# once would be the whole model on each rank, which is what ZeRO was for.

# %% exercise distributed.weight_sync.gather_zero3_parameters
# hint: `all_gather(pieces, shard, group=group)` fills a list of tensors, one for each rank, which you have
#   to make before: of the shard's size and dtype.
# hint: `[torch.empty_like(shard)] * n` is n times the *same* tensor.
# hint: `torch.cat`, the first `math.prod(shape)` numbers, `.view(shape)`. Are there enough of them?

# %% [markdown]
# The check ran on made-up shards. Now on real ones: your function's source is sent to two ranks, which
# hold the SFT model under stage 3, and is compared with what DeepSpeed itself gathers.

# %%
import inspect

if missing:
    print(missing)
else:
    source = inspect.getsource(gather_zero3_parameters)
    rows = lessons.on_ranks("gather", small, source=source)
    for name in ("token_embedding.weight", "blocks.0.mlp.expand.bias"):
        (row,) = [row for row in rows[0] if row["name"] == name]
        print(f"{name} {row['shape']}: {row['shard']} numbers on each rank")
    right = sum(row["equal"] for rank in rows for row in rank)
    took = 1000 * sum(row["seconds"] for row in rows[0])
    every = f"{sum(map(len, rows))} parameters, {len(rows[0])} on each of two ranks"
    print(f"equal to DeepSpeed's: {right} of {every}; {took:.0f} ms for all")

# %% [markdown]
# ## 4. Ray: who sits where
#
# Ray runs Python on a cluster. An **actor** is an object that lives in a process of its own, somewhere;
# calling `actor.method.remote(x)` returns a *future* at once, and `ray.get(future)` waits. Our controller is
# an ordinary Python loop that holds no model: it calls, waits, and does the arithmetic of advantages.
#
# Five roles want GPUs: actor, critic, reference, reward, and the rollout engines. A large engine is itself cut
# over several GPUs: each holds a slice of every matrix (*tensor parallelism*), and its ranks exchange activations
# in every layer, so they must stand side by side on one *node*, which is a machine.
#
# - **Separate**: each has its own. Nothing moves, and everyone can work at the same time; but whoever
#   waits for another one's result has an idle GPU.
# - **Colocated** (a *hybrid engine*): all share the same GPUs and take turns. No GPU is idle; but what a role
#   does not need while another has its turn must leave the GPU, and come back.
#
# Ray is asked for all places at once, as **bundles** of a *placement group*. Either all are granted or
# none: this is *gang scheduling*. Without it, two runs on one cluster may each get half of their processes
# and wait for the other half for ever. Several processes share a GPU by asking for fractions of it; that is
# bookkeeping, nobody measures what they use.

# %% exercise distributed.placement.place
# hint: Count ranks first: an engine has `tensor_parallel` of them, the other roles one a rank. Then make a
#   list with what each bundle holds, and think of nodes and shares afterwards.
# hint: Separate: `{role: rank}` for every rank of every role, the engines' first. Colocated: bundle i
#   holds `{role: i}` for each role with more than i ranks, as many bundles as the largest role but
#   "rollout" has.
# hint: The ranks of engine e are bundles `e * tensor_parallel` up to `(e + 1) * tensor_parallel - 1` in
#   both cases: the nodes of the first and the last must be equal.

# %%
four = {"actor": 4, "critic": 4, "reference": 4, "reward": 4, "rollout": 2}
apart = {"actor": 4, "critic": 2, "reference": 1, "reward": 1, "rollout": 2}
layouts = {
    "Colocated on 4 GPUs: two engines of two ranks each": place(four, 8, True, 2),
    "Separate on 12 GPUs of two nodes": place(apart, 8, False, 2),
}
lab.show(
    draw.bundles(layouts),
    alt="Bundles as columns. Colocated: each of four GPUs holds a fifth of every role. "
    "Separate: each of twelve holds one rank, the engines' first; a dashed line "
    "between the eighth and the ninth is the border of the nodes.",
)

# %% [markdown]
# *What to see: colours are roles. Colocated, five ranks share a GPU; separate, each has one, in two nodes.
# An engine's ranks are side by side, since they talk in every layer.*
#
# **Each rank's part of a batch.** Answers have unequal lengths, and a rank that is done waits for the
# slowest. Worse: under ZeRO-3 every forward pass is a collective call, so a rank without any answer does
# not idle, it *hangs all others*. The obvious way to cut a list does just that. Five answers for four
# ranks, `ceil(5 / 4)` = 2 each: 2, 2, 1, **0**. Hence two demands, of which the first is the more important:
# no part may be empty (our function asks for more: the numbers of answers differ by at most one), and parts
# should hold about equally many tokens.

# %% exercise distributed.placement.balanced_chunks
# hint: Sort the indices by their lengths, the longest first. For each choose the part with the fewest
#   tokens so far, among those that have room.
# hint: `q, r = divmod(len(lengths), parts)`: a part with fewer than q items has room; one with q has room
#   as long as fewer than r parts have q + 1.
# hint: Ties: `min` takes the first of equals, and `sorted` keeps the order of equals. (With
#   `reverse=True`, too.) Sort the indices of each part at the end.

# %%
lengths = [50, 3, 9, 4, 31]
cut = [list(range(5))[i : i + 2] for i in range(0, 8, 2)]
for name, chunks in (("cut", cut), ("balanced", balanced_chunks(lengths, 4))):
    tokens = [sum(lengths[i] for i in chunk) for chunk in chunks]
    print(f"{name:9} {chunks}: {tokens} tokens, the slowest decides: {max(tokens)}")

# %% [markdown]
# And the hanging? Two real ranks: in the first trial each makes two forward passes (all that counts of
# them is that a layer is gathered); in the second, rank 1 has only one answer to score. So that you need not
# wait for ever, the call gives up after three seconds. (Its default is half an hour.)

# %%
if missing:
    print(missing)
else:
    limit = 1.0 if lab.quick else 3.0
    said = lessons.on_ranks("passes", trials=[[2, 2], [2, 1]], limit_s=limit)
    for trial, counts in enumerate(("2 and 2", "2 and 1")):
        for rank in (0, 1):
            row = said[rank][trial]
            words = row["error"].partition("] ")[2] or "done"
            print(f"{counts} passes, rank {rank}: {row['seconds']:.2f} s, {words}")

# %% [markdown]
# *What to see: in the second trial rank 1, which did too little, is content; rank 0, which did its work,
# fails. With GPUs it is a silent hang until NCCL's time-out (ten minutes in PyTorch, thirty in our workers),
# reported by the innocent.* The same
# rule holds for micro-batches: in our workers every rank makes as many as the one with the most, the
# surplus with weight 0.
#
# ## 5. vLLM: the engine that answers
#
# An engine has to decode as many sequences together as it can. Two ideas make that possible.
#
# **Paged KV cache** (Kwon et al. 2023). Our cache of chapter 1 reserves room for the longest possible
# answer. vLLM keeps keys and values in *blocks* of, say, 16 tokens, found through a table, as an operating
# system keeps memory in pages: a sequence takes the blocks that it needs, and wastes half of one on
# average. Equal beginnings can share blocks (the *prefix cache*).
#
# **Continuous batching** (Yu et al. 2022). A static batch ends when its longest answer does. But since
# each step of decoding is a forward pass of its own, the batch can change from step to step: whoever has
# finished leaves, and the next in the queue takes the slot.

# %%
generator = torch.Generator().manual_seed(0)
drawn = torch.empty(96).exponential_(1 / 14, generator=generator)
wanted = (4 + drawn).clamp(max=52).long().tolist()  # tokens: many short, some long
lab.show(
    draw.slots(wanted, 16),
    alt="Two Gantt charts of 96 answers in 16 slots. Static: six batches with much "
    "grey behind short answers. Continuous: the slots are filled until near the end, "
    "and it ends after little more than half of the steps.",
)

# %% [markdown]
# *What to see: a bar is an answer. Left, grey is computed for nothing. Right, a slot is filled again as soon as
# it is free, and grey are slots that stay empty at the end.*
#
# Now on the real engine, with sixteen slots. We start two of them in processes of their own, one that
# computes in fp32 and one in bf16, both with the SFT model's weights. (Importing vLLM takes about as long as the
# start that is printed. It is done once, by a process of which both engines are forks.)

# %%
from rlhf_course.distributed.engine_processes import start_engines

if missing:
    print(missing)
else:
    common = {"model_dir": small, "max_model_len": policy.context, "seed": 0,
              "max_num_seqs": 16, "gpu_memory_utilization": 0.2}  # fmt: skip
    engines = start_engines({"fp32": common, "bf16": common | {"dtype": "bfloat16"}})
    engine = engines["fp32"]
    for name, held in engines.items():
        print(f"{name}: started in {held.ask('info')['start_seconds']:.1f} s")

# %%
if missing:
    print(missing)
else:
    asked = torch.randint(3, 300, (len(wanted), 8), generator=generator).tolist()
    times = {"static, batches of 16": [], "continuous": []}
    for repeat in range(2 if lab.quick else 4):
        for name, size in zip(times, (16, None), strict=True):
            seconds = engine.ask("write", asked, wanted, size)
            times[name] += [seconds] if repeat else []  # the first time warms up
    lab.show(
        draw.engine_times(times, sum(wanted)),
        alt="Useful tokens a second of static and continuous batching, a dot for each "
        "of three repetitions; continuous batching writes more.",
    )
    slow, fast = (sum(t) / len(t) for t in times.values())
    print(f"continuous batching writes {slow / fast:.2f} times as much a second")

# %% [markdown]
# *What to see: fewer tokens are thrown away, so more useful ones are written. Where a step takes as long for
# three sequences as for sixteen, the factor is that of the steps in the figure before; here it nearly is. (Static
# batching here is what Hugging Face's `generate` does: an answer that has ended is computed on, and thrown
# away.)*
#
# ### Do engine and trainer mean the same?
#
# An engine draws tokens and says how likely each was. The trainer computes the same probabilities with
# other kernels, in another order of summation. PPO's ratio compares *new policy* with *old policy*: if
# the old one is the engine's word, the ratio is not 1 before anything has been learned.

# %%
from rlhf_course.huggingface import load_language_model
from rlhf_course.mdp import action_mask, importance_weights
from rlhf_course.padding import pad_rows
from rlhf_course.sft import encode_prompt

tasks = lab.world().prompts("ppo", 32 if lab.quick else 256, 0)
questions = [encode_prompt(tokenizer, task.text) for task in tasks]


def side_by_side(prompts, answers):
    """(tokens, mask) of prompts and answers, as a trainer scores them."""
    lengths = [torch.tensor([len(row) for row in rows]) for rows in (prompts, answers)]
    tokens = pad_rows([p + a for p, a in zip(prompts, answers, strict=True)])
    return tokens, action_mask(*lengths, tokens.shape[1])


# %%
trainer, gaps = load_language_model(small)[0], {}  # fp32, on the CPU
if missing:
    print(missing)
else:
    for name, held in engines.items():
        out = held.ask("generate", questions, 12, 1.0, tokenizer.eos_token_id, 0, 0)
        tokens, mask = side_by_side(questions, out["responses"])
        said = torch.tensor([x for row in out["logprobs"] for x in row])
        with torch.no_grad():
            own, _ = action_logprobs(trainer, tokens, mask)
        rollout = torch.zeros_like(own).masked_scatter(mask, said)
        gaps[name] = (own - rollout)[mask].tolist()
        weights, stats = importance_weights(own, rollout, mask, "tis")
        print(f"{name}: largest gap {max(map(abs, gaps[name])):.1e} nats a token, "
              f"{(own - rollout).sum(1).abs().max():.1e} an answer, KL "
              f"{stats['rollout_kl']:.1e}, weights {weights[mask].min():.3f} … "
              f"{weights[mask].max():.3f}")  # fmt: skip
    lab.show(draw.ratios(gaps), alt="Sorted gaps of trainer and engine: in fp32 below "
             "1e-5 nats, in bf16 some 1e-2, far below the clip range.")  # fmt: skip

# %% [markdown]
# *What to see: in fp32 the two agree up to rounding (1e-5 nats or less). In bf16, with 8 significant bits, they
# differ by some hundredths of a nat at the worst tokens.* A ratio of $e^{0.06}$ is far inside the clip range
# of ±20 %. But the engine's probability is the wrong one to divide by: the gap is not noise that averages out,
# since the token was drawn *because* the engine found it likely, and over an answer of a thousand tokens the
# gaps add up.
#
# Two remedies, and our controller uses both:
#
# 1. **Recompute**: the trainer scores the answers once more before the update, and these are the *old*
#    log-probabilities. The ratio is 1 up to rounding at first (our trainer stops with an error
#    otherwise).
# 2. **Correct**: then the answers come from another distribution than the old policy. *Truncated
#    importance sampling* (TIS; Yao et al. 2025) multiplies each token's loss by
#    $w = \min\big(\max(\pi_\text{trainer}/\pi_\text{engine},\, 0.5),\, 5\big)$, a constant. Without the cut one
#    token of a broken answer would decide the update. (Yao et al. cut above alone. This is `--importance tis`;
#    `icepop` gives tokens outside these bounds the weight 0, `seq_mask` drops whole answers whose geometric mean
#    of $w$ is outside.)
#
# ## 6. New weights for the engine
#
# After each update the engines need the new weights, within milliseconds, and **without ever answering
# with half of them**: some layers of this update and some of the last are no model at all, and nothing in
# the answers would say so. Four things belong to a sync.
#
# - **Names.** The engine knows Hugging Face's (`transformer.h.0.attn.c_attn.weight`), and some of its
#   matrices are stored transposed, or fused.
# - **Buckets.** A message for each of a thousand tensors costs more than the bytes: they travel together.
# - **A version.** From `begin` until `finish` the engine has no version and refuses. Afterwards every request
#   says which version it wants.
# - **The prefix cache** must be emptied: it holds keys and values that the *old* weights computed.
#
# A *channel* has three methods: `begin(version)`, `send(name, tensor)` for one whole parameter, `finish(version)`.
# Buckets and the prefix cache are its affair; yours is the order. Gathering is collective, sending is not: all
# ranks gather, one has the channel.

# %% exercise distributed.weight_sync.sync_weights
# hint: Which of the three calls happen on a rank whose channel is None? What must happen there all the
#   same?
# hint: Gather, send, and only then gather the next: its memory may be used again.
# hint: No `try`. An exception that leaves your function passes `finish` by, and that is what is wanted.

# %% [markdown]
# The engine holds the SFT model's weights, version 0. Send it those of the finished PPO-ptx policy, and
# ask the same questions before and after.

# %%
from rlhf_course.distributed.channels import StaleWeights, make_channel
from rlhf_course.gpt2_format import huggingface_tensor

trained = load_language_model(lab.folder("ppo") / "model")[0]
theirs = [huggingface_tensor(*named) for named in trained.named_parameters()]
parameters = [(name, lambda tensor=tensor: tensor) for name, tensor in theirs]
if missing:
    print(missing)
else:
    before = engine.ask("greedy", questions[:4], 10, 0)
    channel = make_channel("gloo", [engine.call])
    print(sync_weights(parameters, 1, channel), "tensors, first", parameters[0][0])
    after = engine.ask("greedy", questions[:4], 10, 1)
    for task, old, new in zip(tasks, before, after, strict=False):
        texts = [tokenizer.decode(ids).partition("<")[0] for ids in (old, new)]
        print(f"{task.text!r}\n    version 0: {texts[0]}\n    version 1: {texts[1]}")

# %% [markdown]
# **It refuses** what it does not hold; and when a sync breaks in the middle, it refuses everything until
# one has succeeded.

# %%
def broken():
    """Half of the parameters; then a rank is lost."""
    yield from parameters[: len(parameters) // 2]
    raise ConnectionError("rank 1 is gone")


def try_to(what, *args):
    """Call a function, and print what it refuses."""
    try:
        print("answered:", what(*args))
    except (StaleWeights, ConnectionError) as error:
        print(f"{type(error).__name__}: {error}")


# %%
if missing:
    print(missing)
else:
    try_to(engine.ask, "greedy", questions[:1], 4, 0)  # version 0 is gone
    try_to(sync_weights, broken(), 2, channel)
    try_to(engine.ask, "greedy", questions[:1], 4)  # any version
    sync_weights(parameters, 2, channel)
    try_to(engine.ask, "greedy", questions[:1], 4, 2)

# %% [markdown]
# **Is it really the new model?** A number says only what was meant. The proof: the engine's *greedy*
# answers, read by the trainer, must be its likeliest tokens one by one. This found a real bug while this
# course was made: vLLM packs matrices for the CPU when it loads them, and an output head tied to the
# embedding silently kept its old copy. No error, a new version number, wrong answers.

# %%
from rlhf_course.distributed.engine import verify_greedy

if missing:
    print(missing)
else:
    greedy = engine.ask("greedy", questions, 10, 2)
    tokens, mask = side_by_side(questions, greedy)
    with torch.no_grad():
        verify_greedy(trained(tokens), tokens, mask)  # raises where they differ
        print(f"{mask.sum()} greedy tokens, all are the trainer's")
        try_to(verify_greedy, trainer(tokens), tokens, mask)  # the model before PPO
    took = []
    for version in range(3, 13):
        began = time.perf_counter()
        sync_weights(parameters, version, channel)
        took.append(1000 * (time.perf_counter() - began))
    size = sum(tensor.numel() for _, tensor in theirs) * 4 / 1e6
    print(f"a sync of {size:.1f} MB: {min(took):.0f} … {max(took):.0f} ms")
    for held in engines.values():
        held.pipe.close()  # the engines end

# %% [markdown]
# On GPUs the same interface has two more channels: *NCCL* broadcast where engines and trainers have GPUs
# of their own, and *CUDA IPC* where they share one: NCCL refuses to talk to itself on the same GPU, so the
# trainer hands over the address of its memory, and the engine copies from there.
#
# ## 7. The loop: in step, or one step off
#
# **In step**: rollout, scoring, update, sync, one after the other. Answers are always of the newest
# weights; engines wait for the trainer and the trainer for the engines. Colocated on a GPU this is no
# loss, since only one of them fits at a time: the *hybrid engine*'s order is
#
# | when | engine | trainer |
# |---|---|---|
# | rollout | awake: weights and KV cache on the GPU | parameters and optimizer in the host's memory |
# | scoring, update | asleep: nothing on the GPU | back on the GPU |
# | sync | wakes for its **weights** alone | still there, to send them |
# | next rollout | wakes for the **KV cache** | leaves first |
#
# The KV cache comes last, since otherwise both would be there at once. (On a CPU nobody sleeps.)
#
# **One step off** (Noukhovitch et al. 2024): while the trainer learns from the answers of step $k$, the engines
# already write those of step $k+1$, with the weights that they have. Nobody waits; but the answers are one
# step old, by all updates of one rollout: *off-policy*. PPO can bear that, up to a point. With old
# log-probabilities that the trainer recomputes, its clip bounds the change of this step alone, and TIS corrects
# for the older weights; so **bound** the staleness. The controller is one function:

# %% exercise distributed.pipeline.pipeline_step
# hint: Before anything else: which rollouts should be running when training begins? Start those that are
#   not in `pending` yet.
# hint: Steps `step` up to `min(step + staleness, last)`, both included; `range` excludes its end.
# hint: `pending.pop(step)` takes the handle out. Then `finish`, `train`, and `sync(step + 1)`.

# %%
def told(what):
    """A function that says that it was called, and gives its argument back."""
    return lambda number, *_: print(f"{what} {number}", end=" → ") or number


for staleness in (0, 1):
    pending, parts = {}, [told(n) for n in ("start", "answers", "train", "weights")]
    for step in range(3):
        pipeline_step(step, 2, pending, *parts, staleness)
    print(f"end (staleness {staleness})")

# %% [markdown]
# *What to see: with staleness 1, step 1 is started with the weights of step 0; from then on there is always
# one rollout beside the training, and none after the last step.*
#
# Now the real thing: Ray, ZeRO-3, vLLM, and **your** `pipeline_step`, `place` and `balanced_chunks` in the
# controller. Two runs from the same SFT model: colocated and in step on two ranks; separate, with a process
# for each role, one step off. The seconds printed are those of the steps; starting the processes comes on top.
# Beside them the laptop's trainer, one process, with the same settings.

# %%
base = {
    "iterations": 20, "batch": 64, "minibatch": 32, "critic_warmup": 3, "lr": 5e-4,
    "known_share": 0.2, "ptx_rows": 8, "ptx_coef": 0.1, "reward_norm": "running",
    "kl_controller": "adaptive", "kl_coef": 0.1, "kl_target": 1.2, "kl_horizon": 200.0,
    "checkpoint_every": 100,
}  # fmt: skip
gpus = torch.cuda.device_count()
clusters = {
    "in step, colocated": {"actor_ranks": gpus or 2},
    "one step off, separate": {"actor_ranks": 1, "colocate": False, "staleness": 1,
                               "importance": "tis"},
}  # fmt: skip
if 0 < gpus < 5:
    print("Separate roles need a GPU each, five here: that run is left out.")
    del clusters["one step off, separate"]
if lab.quick:
    del clusters["in step, colocated"]

# %%
one = lab.train("ppo", name="09 one process", dtype="float32", **base)
runs = {"one process": one}
own = [pipeline_step, place, balanced_chunks]
if missing:
    print(missing)
else:
    for name, flags in clusters.items():
        runs[name] = lab.train("ppo_ray", name=f"09 {name}", own=own, **base, **flags)
        row = runs[name].metrics[-1]
        print(f"{name}: {runs[name].seconds:.0f} s, gold {row['gold']:.2f}, answers of "
              f"{row['staleness']} updates before")  # fmt: skip

# %%
if missing:
    print(missing)
else:
    ages = {name: flags.get("staleness", 0) for name, flags in clusters.items()}
    shown = range(1, 3) if lab.quick else range(8, 12)
    lab.show(
        draw.lanes({name: (runs[name].timing, ages[name]) for name in ages}, shown),
        alt="Two lanes for each run, engines and trainer. In step, a rollout, then "
        "scoring, update and sync, then the next rollout. One step off, the rollout "
        "of the next step lies beside scoring and update.",
    )
    for name in clusters:
        rows = runs[name].timing[2:]
        parts = ("rollout", "scoring", "update", "sync")
        means = [sum(row[f"{p}_seconds"] for row in rows) / len(rows) for p in parts]
        told = ", ".join(f"{p} {s:.2f}" for p, s in zip(parts, means, strict=True))
        print(f"{name}: seconds of waiting for the {told}")

# %% [markdown]
# *What to see: numbers are steps. In step, the lanes take turns. One step off, the engines' bar of the next
# step lies beside the trainer's work, and the trainer's wait for the rollout is gone.* That saves only the wait,
# a tenth of a second here: our model is tiny, vLLM is fast, and generation a small part. That the second run's
# step takes half as long has another reason: its actor is one rank, while in the first two ranks of ZeRO-3 talk
# through gloo (compare the updates), and actor and critic are updated at the same time. On GPUs of their own a
# step takes as long as the longer of the two lanes.

# %%
lab.show(
    draw.learning({name: run.metrics for name, run in runs.items()}, base["batch"]),
    alt="Gold over episodes of the three runs: it falls at first, then rises above "
    "its start. The age of the answers is 0 in step and 1 one step off. The KL of "
    "engine and trainer is 0 in step; one step off it has peaks.",
)
if not missing:
    for name in clusters:
        gap = max(runs[name].curve("rollout_logprob_gap"))
        print(f"{name}: largest gap of a log-probability {gap:.1e} nats")

# %% [markdown]
# *What to see: left, all three first get worse, while the reward model likes what the world does not, then
# better than they began; how deep the dip is and where a run ends differs by the luck of sampling (the engines
# draw other tokens than our `generate` does), and one seed proves nothing. Right: in step, engine and trainer
# are the same policy up to rounding, over the whole run; that is the proof that no sync went wrong. One step off
# they are one step's updates apart: about a tenth of a nat a token at the peak, and whole nats at single tokens,
# which without its cut TIS would weigh a thousandfold, or not at all.* What would refute it: a gap that grows in
# the run in step, or gold that lies lower one step off for several seeds.
#
# ## 8. From here to 70 billion
#
# The models' states alone, actor and critic trained, reference and reward scoring, all colocated. (The two that
# only score are shared out as by stage 3 wherever ZeRO is used at all, as `ppo-ray` does.)

# %%
counts = (1, 2, 4, 8, 16, 32, 64)


def state(parameters, stage, ranks):
    """GB of all four models on one GPU."""
    trained = zero_bytes(parameters, stage, ranks)
    scoring = zero_bytes(parameters, 3 if stage else 0, ranks, training=False)
    return 2 * (sum(trained.values()) + sum(scoring.values())) / GB


# %%
panels = {
    shape.name: {f"ZeRO-{stage}": [state(shape.parameters, stage, n) for n in counts]
                 for stage in (0, 1, 2, 3)}
    for shape in LLAMA2.values()
}  # fmt: skip
lab.show(
    draw.memory_per_gpu(panels, counts, 80.0),
    alt="GB a GPU over 1 to 64 GPUs for 7B, 13B and 70B, a line a stage. Stages 0 to 2 "
    "level off, stage 3 falls in proportion. A line marks 80 GB: with stage 3 7B is "
    "below it from 4 GPUs on, 70B only from 32 on.",
)

# %% [markdown]
# *What to see: on logarithmic axes stage 3 is a straight line, as it must be: twice the GPUs, half the bytes.
# The other stages level off at what every rank keeps whole of actor and critic. And this is the state alone; activations, logits,
# gathered layers, the engine's weights and its KV cache come on top.* The planner knows them all:

# %%
lean = {"gradient_checkpointing": True}
tight = lean | {"offload": "optimizer", "micro_batch": 1}
for model, gpus, settings in (
    ("7b", 1, {}), ("7b", 1, tight), ("7b", 8, {}), ("13b", 8, {}), ("13b", 8, lean),
    ("70b", 32, lean), ("70b", 64, lean),
):  # fmt: skip
    plan = best_plan(PlanConfig(model=model, gpus=gpus, **settings), LLAMA2[model])
    moment, need = max(plan.memory.moments.items(), key=lambda pair: pair[1])
    verdict = "does not fit" if plan.memory.over else f"{plan.seconds:.0f} s a step"
    how = "tight" if settings is tight else "lean" if settings else "plain"
    print(f"{model:4} {gpus:2} × A100 80 GB, {how:6} {verdict:14} most when {moment}: "
          f"{need / 2**30:.0f} GiB")  # fmt: skip

# %% [markdown]
# *What to see: "lean" computes activations twice instead of keeping them, "tight" has the optimizer in the
# host's memory too (some hundred GB of it), and takes one answer at a time. So 7 billion parameters fit a single
# GPU if need be, at ten times the seconds of eight. All estimated, on assumptions that the command prints; none of
# it was measured.* The same as a command:
#
# ```bash
# rlhf-course plan --model 7b --gpus 8                            # where everything goes, what fits
# rlhf-course plan --model 70b --gpus 64 --gradient-checkpointing
# rlhf-course plan --model runs/town-small-seed0/sft/model --gpus 1 --gpu-memory 40
# ```
#
# ## What healthy looks like
#
# | what | healthy | if not |
# |---|---|---|
# | `rollout_logprob_gap`, in step, fp32 | below 1e-4 over the whole run | growing: an engine with stale weights |
# | the same in bf16 | some hundredths at the worst tokens of this small model, more for large ones | a large mean, `rollout_kl`: another temperature, another tokenizer, a mask shifted by one |
# | `rollout_kl` one step off | near the KL of one step's updates: 5e-4 to 2e-2 nats a token in chapter 5; this short run at a high learning rate peaks near 0.1 | staying above: learning rate too high for stale answers |
# | `rollout_outside` (share of tokens that TIS cuts) | below 1 % | several: off-policy; fewer epochs, smaller steps, less staleness |
# | `staleness` | 0 in step, 1 one step off, never more | a queue without a bound |
# | log-ratio before the first update of a rollout | 0 up to rounding | old log-probs taken from the engine |
# | `generation_share` | grows with the answers | near 1: more engines; near 0: more trainers |
# | greedy answers after a sync | the trainer's, token by token | stop: everything learned since is worthless |
# | seconds between two steps, all ranks | alike | one rank slower: chunks out of balance; hanging: one without work |
#
# ## Scale it up
#
# On a CPU (this chapter): gloo, fp32, no sleeping. What changes with GPUs:
#
# | | 1 × A100 40 GB | 8 × A100 80 GB |
# |---|---|---|
# | placement | `--colocate --actor-ranks 1` | `--colocate --actor-ranks 8 --engines 4 --tensor-parallel 2`, or `--no-colocate --staleness 1` |
# | precision | bf16 beside fp32 master weights (`--dtype bfloat16`) | the same |
# | memory | `--offload optimizer --gradient-checkpointing --micro-batch 1` | `--zero-stage 3 --gradient-checkpointing` |
# | engine | `--gpu-memory-utilization 0.4`, sleeps while the trainer works | the same, or its own GPUs |
# | weights | CUDA IPC | IPC; NCCL when separate |
# | correction | `--importance tis` | the same |
# | fits, *estimated*: 16 bytes a parameter of policy and critic, shared over the GPUs, Adam's part on the host with `--offload` | 3 billion parameters | 7 billion; 13 with checkpointing |
# | one step of 512 answers, *estimated* by `rlhf-course plan` on assumptions that it prints | its last table | its last table |
# | *measured* | not in this course | not in this course |
#
# This chapter, from top to bottom on two quiet Xeon cores: 175 s, *measured* 2026-11-23.
# What else was measured, on CPUs: [docs/distributed.md](repository:docs/distributed.md). What becomes
# better with scale, *estimated*: Ouyang et al. 2022 (figure 1) find the 1.3 billion PPO-ptx model preferred to
# the 175 billion GPT-3; Huang et al. 2024 the win rate on TL;DR to rise from 1 to 6.9 billion parameters.
#
# ```bash
# rlhf-course plan --stage ppo --model qwen2.5-0.5b                     # one GPU, without a cluster
# rlhf-course plan --model 7b --gpus 8 --gpu-memory 80                  # a cluster, role by role
# rlhf-course ppo-ray --world town --size small                         # this machine, CPUs suffice
# rlhf-course ppo-ray --size gpt2 --actor-ranks 1 --importance tis      # one GPU, colocated
# rlhf-course ppo-ray --model Qwen/Qwen2.5-7B-Instruct --data Anthropic/hh-rlhf --reward-model RM \
#     --ray-address auto --actor-ranks 8 --engines 4 --tensor-parallel 2 --gradient-checkpointing
# ```
#
# Lost processes are noticed within seconds; the run clears the cluster and goes on from its last checkpoint
# by itself (`--restarts`). Nothing is repaired in place: a survivor may hold half of a gradient.
#
# ## Check yourself
#
# <details><summary>1. 30 billion parameters, 16 GPUs of 80 GB. Which ZeRO stages hold the actor's state?</summary>
#
# Stage 1: $30\cdot(4 + 12/16) = 143$ GB. Stage 2: $30\cdot(2 + 14/16) = 86$ GB. Stage 3: $30\cdot16/16 = 30$ GB. Only
# the third; and the critic wants as much again.
# </details>
#
# <details><summary>2. Why do stages 1 and 2 cost no more traffic than plain data parallelism, and stage 3
# does?</summary>
#
# (With one micro-batch.) An all-reduce is a reduce-scatter and an all-gather. ZeRO puts the update between the
# two. Stage 3 gathers the
# parameters a second time, for the backward pass, since it has dropped them after the forward pass: three
# transfers instead of two.
# </details>
#
# <details><summary>3. After a sync you forget to empty the prefix cache. What do you see?</summary>
#
# No error. Prompts whose beginnings were cached are continued with keys and values of the old weights: the
# engine's log-probabilities differ from the trainer's for those prompts, and greedy answers differ now and
# then. The gap in the log shows it, the reward does not.
# </details>
#
# <details><summary>4. Your rollouts take 30 s, scoring and training 60 s. What does one step off save, with
# GPUs of their own, and what if you colocate instead?</summary>
#
# In step and separate: 90 s, and one third of the time the trainer's GPUs are idle, two thirds the engine's. One
# step off: 60 s. Colocated, each phase has all GPUs: with perfect scaling between 30 and 60 s, 45 s if engines and
# trainer had equally many. Moving to the host and back is added, and phases do not scale perfectly; where that
# costs more than the 15 s gained, one step off wins.
# </details>
#
# <details><summary>5. Why are the old log-probabilities recomputed by the trainer, though the engine has sent them?
# </summary>
#
# The ratio must compare two numbers of the same arithmetic. With the engine's, it would differ from 1 before
# anything was learned, tokens with a large gap would be clipped at once, and the difference would be taken for
# progress. The
# engine's are needed all the same: for the importance weights.
# </details>
#
# ## What public systems do differently
#
# - **OpenRLHF** ([source](https://github.com/OpenRLHF/OpenRLHF)) has the same split of roles, Ray's fractional
#   GPUs, and one RPC for each parameter in a sync. Its workers cut a batch by `ceil`, so a batch that does not
#   divide may leave the last rank empty.
# - **verl** ([source](https://github.com/volcengine/verl)) is the hybrid engine: one process holds a rank of all
#   roles, and the controller calls whole groups. With Megatron it re-shards weights between training and inference
#   layouts without gathering them whole; with FSDP it gathers one parameter after the other, as we do.
# - **TRL** ([source](https://github.com/huggingface/trl)) has the engine as a server beside, or inside, the trainer's
#   processes, and a correction by importance sampling on by default.
# - **vLLM** ([source](https://github.com/vllm-project/vllm)) has a weight-transfer API of its own, with IPC and NCCL
#   but no CPU.
#
# ## Further reading
#
# - Rajbhandari et al. 2020, [ZeRO](https://arxiv.org/abs/1910.02054): sections 5 and 7, memory and traffic.
# - Kwon et al. 2023, [PagedAttention](https://arxiv.org/abs/2309.06180): vLLM; Yu et al. 2022, *Orca*: continuous
#   batching.
# - Moritz et al. 2018, [Ray](https://arxiv.org/abs/1712.05889).
# - Hu et al. 2024, [OpenRLHF](https://arxiv.org/abs/2405.11143); Sheng et al. 2024,
#   [HybridFlow](https://arxiv.org/abs/2409.19256), which is verl.
# - Noukhovitch et al. 2024, [Asynchronous RLHF](https://arxiv.org/abs/2410.18252): how stale is too stale.
# - Yao et al. 2025, *Your efficient RL framework secretly brings you off-policy RL training*: TIS, and how far engines
#   and trainers are apart.
