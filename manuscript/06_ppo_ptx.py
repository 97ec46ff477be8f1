# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 6: PPO-ptx, and the art of normalising
#
# **What you will be able to do.** Measure what PPO forgets, and keep it with InstructGPT's pretraining
# term; say what its famous γ = 27.8 multiplies, and why the number means nothing without a reduction;
# merge running moments exactly; normalise a critic's targets without changing a single value that it
# predicts; normalise advantages over several processes, and show on two real ones what happens to
# those who do not; and read an ablation with its spread instead of its best seed.
#
# You bring from chapter 5: `ppo_step`, which lets somebody else add to the policy's gradient before
# it is clipped. This chapter is that somebody else.

# %%
from rlhf_course.plots.course_map import course_map

lab.show(
    course_map(6),
    alt="Map of the course: everything up to PPO is built; chapter 6, PPO-ptx, is "
    "framed.",
)

# %% [markdown]
# ## 1. What PPO forgets
#
# The reward model sees answers. Nobody asks the policy to still know the *corpus*: that Oslo is
# where somebody lives, how a document goes on after a full stop. What no loss protects, gradients
# overwrite; the literature calls it **catastrophic forgetting**, InstructGPT the *alignment tax*.
#
# It is easy to measure: the perplexity of pretraining text, while PPO runs. The runs below differ in
# one number, the weight γ of the pretraining term. γ = 10⁻⁹ stands for "off": the term is computed, so
# that we see it, and weighs nothing. Three seeds each, from the same SFT model.

# %%
base = {
    "iterations": 24, "batch": 64, "minibatch": 32, "critic_warmup": 4, "lr": 5e-4,
    "known_share": 0.2, "ptx_rows": 8, "ptx_coef": 0.1, "reward_norm": "running",
    "value_norm": "popart", "kl_controller": "adaptive", "kl_coef": 0.1,
    "kl_target": 1.2, "kl_horizon": 200.0,
}  # fmt: skip
seeds = [0] if lab.quick else [0, 1, 2]


def ablate(switches, others=None):
    """Runs of all seeds for each switch; others run beside them."""
    jobs = {f"06 {name} {s}": {**base, **change, "seed": s}
            for name, change in switches.items() for s in seeds}  # fmt: skip
    done = lab.train_many({**jobs, **(others or {})})
    return {name: [done[f"06 {name} {s}"] for s in seeds] for name in switches}


runs = ablate({"everything on": {}, "no ptx": {"ptx_coef": 1e-9}})

# %%
from rlhf_course.evaluation import corpus_perplexity
from rlhf_course.plots import lessons_ppo_ptx as figures
from rlhf_course.stages.corpus import Corpus

sft, tokenizer = lab.model("sft")
pretrained, _ = lab.model("pretrain")
documents = lab.world("town").documents("validation")
windows = Corpus(documents, tokenizer, 48).every_row(16 if lab.quick else 192)
before = {"pretrained": corpus_perplexity(pretrained, windows),
          "after SFT": corpus_perplexity(sft, windows)}  # fmt: skip
print({name: round(value, 2) for name, value in before.items()})
lab.show(
    figures.forgetting(
        {name: [run.metrics for run in of] for name, of in runs.items()},
        *before.values(),
    ),
    alt="Perplexity of the corpus over PPO's iterations: with ptx it falls to the "
    "pretrained model's within a few rollouts, without it rises far above SFT's. "
    "The rewards rise about equally.",
)

# %% [markdown]
# *What to see: on the left, on a logarithmic axis, SFT alone had already forgotten a good part (dashed
# line); PPO without ptx goes on forgetting; with ptx the perplexity is back near the pretrained model's
# after about ten rollouts. On the right: single runs stumble, with ptx and without; where they end, the two groups
# cannot be told apart. (The learning rate is high on purpose, see section 7.)* What would refute the claim:
# seeds without ptx that stay near the dotted line, or rewards that are clearly lower with it.
#
# ## 2. The pretraining term, and what γ multiplies
#
# InstructGPT (Ouyang et al. 2022, Eq. 2) maximises
#
# $$\mathbb E_{x\sim D,\,y\sim\pi}\Big[r(x,y)-\beta\log\frac{\pi(y\mid x)}{\pi_{\text{SFT}}(y\mid x)}\Big]
# \;+\;\gamma\;\mathbb E_{x\sim D_{\text{pretrain}}}\big[\log\pi(x)\big],\qquad \gamma = 27.8 .$$
#
# Appendix C.4 says how: compute both gradients one after the other, multiply the second by γ, make
# one step. Easy to copy. But *what is* $\log\pi(x)$ of a document of $L$ tokens?
#
# $$\underbrace{\textstyle\sum_{t=1}^{L}\log\pi(x_t\mid x_{<t})}_{\texttt{seq\_sum}: \text{ the formula, literally}}
# \qquad\text{or}\qquad
# \underbrace{\textstyle\frac1L\sum_{t=1}^{L}\log\pi(x_t\mid x_{<t})}_{\texttt{token\_mean}: \text{ what every loss function computes}}$$
#
# The first is $L$ times the second, and its gradient is $L$ times longer. With GPT-3's context of 2048
# tokens, 27.8 on a token mean equals $27.8/2048 = 0.0136$ on a sequence sum; and 27.8 on a sequence sum
# equals 56 934 on a token mean. The paper says neither which of the two is meant, nor whether its PPO
# loss is a mean over tokens or a sum over answers, which moves the balance by another factor. DeepSpeed-Chat
# put 27.8 on a token mean and reports that training does not converge; OpenRLHF, while it had the term,
# used 0.05 on a token mean.
#
# **A worked example.** Two rows of text, three and five tokens, each token costing 2 nats:
#
# - `token_mean`: $(3\cdot2+5\cdot2)/8 = 2$ nats. A token is a token.
# - `seq_sum`: $(6 + 10)/2 = 8$ nats. A row is a row, a longer one weighs more; and the loss doubles when the
#   rows become twice as long, with the same γ.
#
# So name the reduction, and look at the two gradients' norms: **start where they are about equal.** (Adam
# divides by the gradient's own size, so it is only the *ratio* of the two that counts.)

# %% exercise ppo_ptx.ptx_loss
# hint: `token_mean(nll, mask, denominator)` is the first reduction, as it stands.
# hint: For "seq_sum": sum each row with `masked_sum(nll, mask, dim=1)`, then the mean over the rows that
# have any valid token: `token_mean(sums, mask.any(dim=1), denominator)`.

# %%
nll = torch.full((2, 5), 2.0)
lengths = torch.tensor([3, 5])
mask = torch.arange(5) < lengths[:, None]
for reduction in ("token_mean", "seq_sum"):
    print(f"{reduction:10} {ptx_loss(nll, mask, reduction).item():.1f} nats")

# %% [markdown]
# Now the measurement: the norm of your term's gradient on the policy, at γ = 1, for the SFT model (which has
# forgotten) and for a policy after PPO-ptx (which has not); and the norms of PPO's own gradient, from the
# log of that run.

# %%
from torch import nn


def ptx_norm(model, reduction):
    rows = windows[:16].to(next(model.parameters()).device)
    model.zero_grad()
    model.requires_grad_(True)
    hidden = model.hidden_states(rows)[:, :-1]
    logp = model.unembed(hidden).float().log_softmax(-1)
    nll = -logp.gather(-1, rows[:, 1:, None])[..., 0]
    ptx_loss(nll, torch.ones_like(nll, dtype=torch.bool), reduction).backward()
    return nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


# %%
run = runs["everything on"][0]
after, _ = run.model()
norms = {
    "γ · token mean, after SFT": ptx_norm(sft, "token_mean"),
    "γ · token mean, after PPO-ptx": ptx_norm(after, "token_mean"),
    "γ · sequence sum, after SFT": ptx_norm(sft, "seq_sum"),
}
lab.show(
    figures.gradient_balance(norms, run.curve("grad_norm_ppo")),
    alt="Log-log plot: the norm of the pretraining gradient grows in proportion to "
    "gamma; the line of the sequence sum lies 47 times above that of the token "
    "mean. A band shows PPO's own norm; 27.8 lies far to the right of the "
    "crossings.",
)

# %% [markdown]
# *What to see: straight lines, since the norm is proportional to γ. The dots say where the pretraining gradient is as
# long as PPO's. The sequence sum (rows of 47 predicted tokens) lies 47 times higher and crosses 47 times
# earlier. A γ of 27.8 on a token mean drowns PPO; on a sequence sum it does so 47 times over. And the
# balance moves during training: once the corpus is known again, the same γ pulls far less. That is why a constant γ works
# at all: the term is strong exactly where something has been forgotten.*
#
# ## 3. Rewards: moments that run
#
# A reward model's scale is an accident of its training. Whitened advantages do not care, but the balance
# of reward and β·KL does, and so does a clip of the score at ±5. So divide rewards by their standard
# deviation *so far*. Not by the batch's own: that changes from batch to batch, and in a small one it is noise.
# And without subtracting the mean: a constant shift disappears in the whitening anyway, and a reward keeps its sign.
#
# The moments of everything seen must be updated batch by batch, without keeping the numbers. The tempting way,
# $\operatorname{Var} = \mathbb E[x^2]-\mathbb E[x]^2$, subtracts two numbers that may agree in all their
# digits:

# %%
x = torch.tensor([10000.0, 10001.0, 10002.0])
print("E[x²] - E[x]² in float32:", (x.square().mean() - x.mean().square()).item())
print("true variance:            ", x.double().var(unbiased=False).item())

# %% [markdown]
# **Chan, Golub and LeVeque (1979)** merge two sets exactly. Let set A have $n_A$ numbers with mean $\mu_A$ and
# population variance $v_A$, set B likewise; let $s = n_B/(n_A+n_B)$ be B's share. A number drawn from the union
# comes from A with probability $1-s$ and from B with probability $s$. So
#
# $$\mu = (1-s)\,\mu_A + s\,\mu_B = \mu_A + s\,\delta,\qquad \delta = \mu_B-\mu_A .$$
#
# The law of total variance says: variance = mean of the variances + variance of the means. The means are
# $\mu_A$ and $\mu_B$, with probabilities $1-s$ and $s$, and a two-valued variable with distance $\delta$ has variance
# $s(1-s)\delta^2$:
#
# $$v = (1-s)\,v_A + s\,v_B + s(1-s)\,\delta^2 = v_A + s\,\big(v_B - v_A + (1-s)\,\delta^2\big).$$
#
# No large numbers are subtracted, and the order of the batches does not matter. The same two lines make a
# *forgetting* average when $s$ is a constant instead of $n_B/n$: `EMAMoments` overrides nothing but the share.

# %% exercise ppo_ptx.RunningMoments.update
# hint: `mean`, `variance` and `count` are the new batch's. `share = self._share(int(count))` counts the batch
# and gives s.
# hint: Keep `delta = mean - self.mean` before the mean is changed.
# hint: `self.mean += share * delta` and
# `self.var += share * (variance - self.var + (1 - share) * delta**2)`.

# %%
from rlhf_course.ppo_ptx import EMAMoments

generator = torch.Generator().manual_seed(0)
running, ema = RunningMoments(), EMAMoments(0.9)
means, tracked = [], {"running (yours)": [], "EMA, decay 0.9": []}
for step in range(80):
    spread, centre = (1.0, -1.0) if step < 40 else (2.0, 1.5)  # the policy has improved
    rewards = centre + spread * torch.randn(16, generator=generator)
    means.append(rewards.mean().item())
    for moments, seen in zip((running, ema), tracked.values(), strict=True):
        moments.update(rewards)
        seen.append((moments.mean, moments.std))
lab.show(
    figures.moments_over_time(means, tracked),
    alt="Means and deviations over 80 batches whose distribution changes half way: the "
    "running moments follow slowly, the EMA within some 20 batches.",
)

# %% [markdown]
# *What to see: until batch 40 both agree, the running one with less noise. Then rewards improve and spread. The
# running moments remember everything; their deviation even counts the improvement itself as spread. The EMA has
# forgotten the old world after some twenty batches, and stays noisier.*
#
# ## 4. Values: PopArt
#
# The critic has the same problem, and a worse one: its *targets* have the returns' scale. Normalise them,
# $\hat R = (R-\mu)/\sigma$, let the head $\hat V = w^\top h + b$ learn those, and read values as
# $V = \sigma\hat V+\mu$. But then every update of $\mu,\sigma$ changes what the critic says about *every* state,
# though it has learned nothing, and the next advantages are computed with those values.
#
# **PopArt** (van Hasselt et al. 2016: *preserving outputs precisely, while adaptively rescaling targets*) moves the
# head the other way. We want for every $h$
#
# $$\sigma'\,(w'^\top h+b') + \mu' \;=\; \sigma\,(w^\top h+b)+\mu .$$
#
# Compare what multiplies $h$, then the rest:
#
# $$w' = \frac{\sigma}{\sigma'}\,w,\qquad b' = \frac{\sigma b+\mu-\mu'}{\sigma'} .$$
#
# Exact for all states at once, since the head is linear. Three details. The mean and deviation *before* the update are
# needed after it: keep them. The bias' formula uses the *old* bias. And $\sigma$ must not be 0: as long as
# nothing varies, `std` is 1. (Adam's moments of the head belong to the old scale for a few steps; one lives with it.)

# %% exercise ppo_ptx.PopArt.update
# hint: First `mean, std = self.mean, self.std`, the old ones. Then
# `self.moments.update(targets[mask], group)`.
# hint: Now `self.std` and `self.mean` are the new ones. `self.head.weight.mul_(std / self.std)`.
# hint: `self.head.bias.fill_((std * bias + mean - self.mean) / self.std)` with `bias` read before.

# %%
states, returns = torch.randn(40, 8), 4 + 3 * torch.randn(20, 8)
every = torch.ones_like(returns, dtype=torch.bool)
after_update = {}
for title in ("moments alone", "PopArt (yours)"):
    torch.manual_seed(0)
    head = nn.Linear(8, 1)
    popart = PopArt(head)
    old = popart.denormalize(head(states)).flatten().tolist()
    if title == "moments alone":
        popart.moments.update(returns[every])
    else:
        popart.update(returns, every)
    after_update[title] = popart.denormalize(head(states)).flatten().tolist()
lab.show(
    figures.preserved_values(old, after_update),
    alt="Values before and after an update of the moments. With the moments alone all "
    "values are shifted and stretched; with PopArt every point lies on the diagonal.",
)

# %% [markdown]
# *What to see: each point is a state. On the left the critic has changed its mind about all of them without having
# learned anything; on the right every point stays on the diagonal.*
#
# ## 5. Whose mean? Normalising over all ranks
#
# Large batches are spread over processes, called ranks. Gradients are averaged over them, so it looks as if each could
# do everything else by itself. With *moments* that is wrong, and wrong in sign. Two ranks with four tokens each:
#
# | | raw advantages | own mean | global mean |
# |---|---|---|---|
# | rank 0 | 4, 3, 2, 1 | 2.5 | 0.5 |
# | rank 1 | 0, −1, −2, −3 | −1.5 | 0.5 |
#
# Globally, all of rank 0's tokens did better than average, all of rank 1's worse. With their own means, rank 0
# *punishes* 2 and 1, rank 1 *rewards* 0 and −1: half of the eight tokens are pushed the wrong way.

# %%
lab.show(
    figures.sign_flip({"rank 0": [4, 3, 2, 1], "rank 1": [0, -1, -2, -3]}),
    alt="Eight advantages on a line. The global mean separates the two ranks; each "
    "rank's own mean lies in the middle of its four, and four points change sign.",
)

# %% [markdown]
# *What to see: hollow points have one sign by the mean of all (black line) and the other by their own rank's (dashed).*
#
# Averaging the ranks' means is no remedy either: a rank with 10 valid tokens would count as much as one with 1000. What
# may be added up are **sums**: $\sum m x$ and $\sum m$, and, once the global mean is known, $\sum m\,(x-\mu)^2$.
# That is `masked_moments`, on which whitening, running moments and PopArt all stand. Three `all_reduce` calls of one
# float64 number each. Every rank has to make them, also one without a valid token, or the others wait for ever.

# %% exercise ppo_ptx.masked_moments
# hint: Move x to float64 with `in_float64(x)`, the mask to the same device. `masked_sum(values, mask)` adds up
# this rank's valid entries.
# hint: Write a small inner function: the masked sum, then `all_reduce(total, group=group)` when there is a
# group (it changes the tensor in place).
# hint: Count first, then the mean, then the mean of the squared distances to it. `count.clamp(min=1)` divides
# an empty batch without NaN.

# %% [markdown]
# ### Two real processes
#
# Now for real. The next cell lets the SFT policy answer questions, computes advantages with a critic that has had its
# warm-up, and starts **two processes** that talk through gloo. Each holds its half of a batch, whitens with *your*
# `masked_moments` (its source is sent along), once over both ranks and once for itself, and both add up the policy's
# gradient. The batch is dealt out in two ways: shuffled, or as data often lie on disk, by where they come
# from: known people to rank 0, strangers to rank 1.

# %%
import inspect

from rlhf_course.coursework import two_ranks

rollout, known, policy = two_ranks.raw_rollout(256)
measured = two_ranks.measure(
    policy, rollout, known, inspect.getsource(masked_moments),
    sizes=(2, 4, 8, 16, 32, 64), repeats=3,
)  # fmt: skip
lab.show(
    figures.ranks_disagree(measured),
    alt="Left: share of advantages that change sign under per-rank moments, falling "
    "with the answers per rank when shuffled, staying at some 15 % when sorted by "
    "source. Right: the gradient's cosine to the global one.",
)

# %%
for order in two_ranks.ORDERS:
    rows = [row for row in measured if row["order"] == order]
    print(order)
    for size in sorted({row["answers"] for row in rows}):
        flips = [row["flipped"] for row in rows if row["answers"] == size]
        cosines = [row["cosine"] for row in rows if row["answers"] == size]
        print(f"{size:5} answers a rank: {min(flips):4.0%} … "
              f"{max(flips):4.0%} flipped, cosine {min(cosines):.3f} … "
              f"{max(cosines):.3f}")  # fmt: skip

# %% [markdown]
# *What to see: faint points are single batches, lines their means. Shuffled, the damage is sampling noise: large with
# two answers a rank, as on a large model's GPU, and small with 64. Sorted, it does not go away with more
# answers, since the two ranks' means really differ: known people do better than the critic thinks, strangers worse, and
# per-rank whitening removes just that difference.* To be fair: the gradient's direction suffers less than the signs
# suggest, for the flipped tokens are those near the mean. But the error is systematic, it is invisible in every
# curve, and the remedy costs three numbers a batch.
#
# ## 6. PPO-ptx with your functions
#
# The run of section 1 once more, seed 0, with your `ptx_loss`, `RunningMoments`, `PopArt` and `masked_moments`.

# %%
from rlhf_course.plots import lessons_ppo

own = [ptx_loss, RunningMoments, PopArt, masked_moments]
yours = lab.train("ppo", name="06-yours", own=own, **base)
package = [run.metrics for run in runs["everything on"]]
keys = ["reward", "gold", "share_idk", "share_true", "kl", "explained_variance"]
pairs = zip(yours.curve("kl"), runs["everything on"][0].curve("kl"), strict=True)
gap = max(abs(a - b) for a, b in pairs)
print(f"KL, largest difference to the package's run: {gap:.2g}")
lab.show(
    lessons_ppo.bands(package, keys, yours=yours.metrics, target=base["kl_target"]),
    alt="Six curves of PPO-ptx with your functions, within the band of the package's "
    "three seeds.",
)

# %% [markdown]
# *What to see: your line is seed 0 once more, so it goes where the band goes. The printed number is 0 when both ran on
# equally many threads. The worker had one; with two, sums are rounded differently, a sampled token sooner or later comes
# out differently, and from there on it is another run of the same kind. The line jumps about more because the band is
# smoothed over three rollouts and the line is not.* "True answers" fall to nothing here too: the run is too short to tell
# known people from strangers (chapter 5), and "I do not know" pays for four in five questions.
#
# ## 7. What does each of it do? An ablation
#
# Five switches: reward norm, value norm, advantage norm, adaptive KL, ptx. Each is turned off alone, over three seeds:
# eighteen short runs, of which you have six already. The learning rate is deliberately higher than in chapter 5; all
# of these are guards, and on a quiet road no guard is needed.

# %%
switches = {
    "no reward norm": {"reward_norm": "none"},
    "no value norm": {"value_norm": "none"},
    "no advantage norm": {"whiten": False},
    "fixed KL price": {"kl_controller": "fixed"},
}
gammas = {"γ = 27.8 (token mean)": 27.8, "γ = 0.0003": 0.0003}  # for the gallery
wrong = {f"06 gamma {g}": {**base, "ptx_coef": g} for g in gammas.values()}
runs |= ablate(switches, wrong)


# %%
def judged(run):
    """What one run came to."""
    model, _ = run.model()
    kl, gold = run.curve("kl"), run.curve("gold")
    return {
        "gold": sum(gold[-5:]) / len(gold[-5:]),
        "kl": sum(kl[-5:]) / len(kl[-5:]),
        "peak": max(kl),
        "forgetting": corpus_perplexity(model, windows) / before["pretrained"],
    }


columns = {
    "gold": "gold, last 5", "kl": "KL, last 5, nats", "peak": "largest KL, nats",
    "forgetting": "perplexity / pretrained",
}  # fmt: skip
order = ["everything on", *switches, "no ptx"]
results = {name: [judged(run) for run in runs[name]] for name in order}

# %%
from IPython.display import Markdown, display

display(Markdown(figures.table(results, columns)))
lab.show(
    figures.ablation(results, columns),
    alt="Four panels with a row for each switch: gold, KL, largest KL and perplexity "
    "ratio; a point a seed, a bar at the mean; the shaded band is everything on.",
)

# %% [markdown]
# *How to read it: **mean** (lowest … highest of three seeds); below, a point a seed, and in blue the range of "everything
# on". A difference counts when the points lie outside that band, on the same side, for all seeds.*
#
# What the table can and cannot say:
#
# - **ptx** is beyond doubt: every seed without it ends several times above every seed with it.
# - **Advantage norm**: no clear effect. One would look for it in the largest KL, since without it the size of a step
#   follows the size of the advantages. In an earlier printing of this table, from other base models, two of three seeds
#   without it were thrown far out and came back; in this one it is runs *with* everything on that reach furthest. The
#   largest of thirty noisy values is a poor witness: chapter 5's tendency is neither confirmed nor refuted.
# - **Reward norm**: no clear effect *here*. This reward model's answers happen to have a spread of about 2 at first, so dividing by it
#   makes the KL twice as dear relative to the reward, and that is all. On a reward in other units the same switch
#   would decide everything: multiply the rewards by ten, and β has to be ten times larger. (The normalised run pays
#   for it at first: its critic comes from the reward model, in the *old* unit, and needs its warm-up.)
# - **Value norm**: no clear effect, for the same reason. PopArt pays when returns grow by orders of magnitude, as the
#   scores of games do.
# - **Fixed KL price**: as good or bad as the guess. 0.1 happens to suit this reward, as our runs show; the
#   controller's worth is that you need not guess. It also has its cost, the overshoot of chapter 5: in twenty-four
#   rollouts no run has come back to its target of 1.2.
#
# So of five guards one saved this run; the others were insurance on a quiet road. That is a result, and the usual one: what an
# ablation finds depends on the task. Three seeds and twenty-four rollouts bear out a factor of ten, not a tenth. Whoever wants to know whether value norm helps
# by 0.02 needs longer runs and many more seeds; `lab.train_many` makes them.
#
# ## What healthy looks like
#
# | what | healthy | if not |
# |---|---|---|
# | corpus perplexity | back at the pretrained model's within some ten rollouts | γ too small; see γ's reduction |
# | ‖γ g_ptx‖ / ‖g_ppo‖ | 0.05 to 2, larger at the start | above 10: no PPO left. Below 0.01: no ptx |
# | reward after normalisation | spread of about 1 | moments updated after use, or per rank |
# | value loss under PopArt | 0.05 to 1, whatever the reward's unit | head not rescaled |
# | explained variance | negative at first if the reward is normalised and the critic's start is not | warm-up too short |
#
# ### A gallery: γ taken from a paper
#
# Two runs with a γ that is wrong by a factor of a few hundred, each way; grey is "everything on".

# %%
wrong = lab.train_many(wrong)  # they were run with the ablation
shown = ("reward", "kl", "share_idk", "ptx_loss")
lab.show(
    lessons_ppo.gallery(
        package,
        {name: (wrong[f"06 gamma {g}"].metrics, shown) for name, g in gammas.items()},
    ),
    alt="With gamma 27.8 reward and share of admitted ignorance stay behind while the "
    "pretraining loss falls; with gamma 0.0003 the pretraining loss stays high.",
)

# %% [markdown]
# *What to see: 27.8 on a token mean: gradient clipping shortens the sum of both gradients, and what is left of PPO in it is
# little. The policy studies the corpus (below, faster than it need be), forgets at first how to answer (KL and reward), and
# never learns what the reward asks for. With 0.0003 the pretraining loss stays far above the healthy band, and it is
# the only curve that says so: one forgets in silence unless one measures.*
#
# ## Scale it up
#
# ```bash
# rlhf-course ppo --data Anthropic/hh-rlhf --too-long drop --profile colab-a100 --iterations 200 --batch 256 --lr 1e-6 --critic-lr 1e-5 --out runs/hh/ppo-ptx \
#     --ptx-coef 0.05 --ptx-data stanfordnlp/imdb --ptx-rows 16 --reward-norm running --value-norm popart
# rlhf-course ppo --data Anthropic/hh-rlhf --too-long drop --rows 20000 --lora 16 --gradient-checkpointing \
#     --profile colab-t4 --iterations 100 --batch 64 --lr 1e-5 --critic-lr 1e-4 --ptx-coef 0.05 --ptx-data corpus.jsonl --out runs/hh-t4/ppo-ptx
# ```
#
# Take as `--ptx-data` what you want to keep: text like the pretraining corpus, or the SFT data. Look at `grad_norm_ppo` and
# `grad_norm_ptx` in TensorBoard after ten rollouts, and move γ until they are within a factor of a few.
#
# | | expect | |
# |---|---|---|
# | this chapter, two CPU cores | 169 s | *measured* 2026-11-23, two quiet Xeon cores |
# | time of an update with ptx | 1.3 to 2 times that without, by the rows | *estimated*: $6N$ FLOP a token of text beside $12N$ a token of the answers |
# | Qwen2.5-0.5B, 200 rollouts of 256 answers of 128 tokens, A100 40 GB | 1 h 15 min, 27 GB | *estimated*: chapter 5's hour, and 16 rows in each of 8 updates; one more copy of the gradients, 4 bytes a parameter |
# | γ on a token mean | 0.02 to 0.5 | *estimated*: InstructGPT's 27.8 (Ouyang et al. 2022, appendix C.4) multiplies a loss with another reduction |
# | loss on held-out general text without ptx | up by 0.05 to 0.5 nats | *estimated* |
# | the same with ptx | most of that taken back | *estimated*: Ouyang et al. 2022, section 4.2, say so of the regressions on public tasks |
#
# [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## Check yourself
#
# <details><summary>1. You double the length of the pretraining rows, with <code>seq_sum</code> and the same γ. What
# happens to the balance?</summary>
#
# The pretraining gradient becomes about twice as long, so it pulls twice as hard. With a token mean it stays as it was, only
# less noisy.
#
# </details>
#
# <details><summary>2. Why may the reward's mean be left in, while the standard deviation is divided out?</summary>
#
# A constant added to the score of every answer is a baseline: the critic learns it, and whitening removes it. The
# scale decides the balance with the price of the KL, so it has to be fixed. (A clip of the score is where the mean would matter.)
#
# </details>
#
# <details><summary>3. Rank 0 has mean 1 over 10 tokens, rank 1 mean 3 over 30. What is the global mean?</summary>
#
# $(10\cdot1+30\cdot3)/40 = 2.5$, not 2.
#
# </details>
#
# <details><summary>4. PopArt leaves every value as it was. What has it changed, then?</summary>
#
# The loss: its targets have variance 1 again, so the gradients, the learning rate and the clip norm keep their meaning. And what
# the *next* steps of the head do: a step of the same size now moves V by σ' instead of σ.
#
# </details>
#
# <details><summary>5. In an ablation, "without X" is better than "everything on" in two of three seeds. Should you
# drop X?</summary>
#
# Two of three is what a coin does half of the time. Look at the size of the difference beside the spread of the seeds,
# and at what X guards against: a seat belt does not make journeys faster.
#
# </details>
#
# ## What public systems do differently
#
# - **PPO-ptx** is in no maintained library: [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF) removed it in April 2025,
#   [TRL](https://github.com/huggingface/trl) its PPO trainer in September 2026. [DeepSpeed-Chat](https://github.com/deepspeedai/DeepSpeedExamples)
#   has it as a second backward pass (27.8, token mean; the accumulation steps must be doubled), ColossalChat mixes
#   0.1 · PPO + 0.9 · ptx, [MOSS-RLHF](https://github.com/OpenLMLab/MOSS-RLHF) has a weight of 0 by default.
# - **Reward normalisation.** TRL 0.11, [trlX](https://github.com/CarperAI/trlx) and MOSS-RLHF divide by running moments without
#   subtracting the mean, as here; OpenRLHF and verl normalise within groups of answers to one prompt.
# - **Value normalisation.** None does it, running or PopArt; OpenRLHF can reuse the reward model's fixed mean and std in the
#   critic.
# - **Advantages over all ranks.** OpenRLHF and [verl](https://github.com/volcengine/verl) whiten on a single controller, so
#   globally; trlX reduces over ranks but without a mask, MOSS-RLHF with mask per minibatch; lm-human-preferences, TRL and
#   summarize_from_feedback_details per rank.
#
# ## Further reading
#
# - Ouyang et al. 2022, [InstructGPT](https://arxiv.org/abs/2203.02155): section 3.5 and appendices C.4 and E.6, on γ.
# - van Hasselt et al. 2016, [Learning values across many orders of magnitude](https://arxiv.org/abs/1602.07714): PopArt.
# - Chan, Golub, LeVeque 1979, *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*.
# - Askell et al. 2021, [A General Language Assistant as a Laboratory for Alignment](https://arxiv.org/abs/2112.00861): the
#   alignment tax.
# - Andrychowicz et al. 2021, [What Matters In On-Policy Reinforcement Learning?](https://arxiv.org/abs/2006.05990): ablations
#   done with 250 000 runs.
