# %% [markdown]
# # Chapter 8: Beyond PPO
#
# PPO keeps four networks in memory: policy, reference, reward model, critic. Since 2023 one after the
# other has been thrown out. This chapter derives the four best-known ways of doing so and races them,
# on the same world, with the same number of answers.
#
# **What you will be able to do**
#
# - derive DPO from the objective you already know, and say where the partition function went;
# - read DPO's gradient: which pairs still pull, and which way the chosen answer moves;
# - prove that a leave-one-out baseline is unbiased, and see what it saves;
# - say what GRPO's division by the standard deviation does to easy and hard prompts;
# - compare methods fairly: gold over KL, over answers, and over seconds.
#
# **Where we are on the map.** The reward model and the reference are those of chapters 2 and 3, the
# losses those of chapter 5. What changes is where the advantages come from, and in DPO everything.

# %%
import torch
from rlhf_course import lab
from rlhf_course.plots import lessons_beyond_ppo as draw
from rlhf_course.plots.course_map import course_map

lab.show(
    course_map(8),
    alt="The map of the course: everything up to chapter 7 is filled; beyond PPO, "
    "chapter 8, is the place where we stand.",
)

# %% [markdown]
# ## The best policy, in closed form
#
# All of them maximise what PPO maximises, for every prompt $x$:
#
# $$J(\pi) = \mathbb E_{y \sim \pi(\cdot \mid x)}\big[r(x, y)\big] - \beta\,
# \mathrm{KL}\big(\pi(\cdot \mid x) \,\|\, \pi_\text{ref}(\cdot \mid x)\big) .$$
#
# Write both terms as one expectation, and put the reward into the logarithm:
#
# $$J(\pi) = -\beta\, \mathbb E_{\pi}\Big[\log \frac{\pi(y \mid x)}{\pi_\text{ref}(y \mid x)} -
# \frac{r(x, y)}{\beta}\Big]
# = -\beta\, \mathbb E_{\pi}\Big[\log \frac{\pi(y \mid x)}{\pi_\text{ref}(y \mid x)\,
# e^{r(x, y) / \beta}}\Big] .$$
#
# The denominator is not a distribution, but it becomes one when it is divided by its sum over all
# answers, the **partition function** $Z(x) = \sum_y \pi_\text{ref}(y \mid x)\, e^{r(x, y)/\beta}$. Call
# the result
#
# $$\boxed{\;\pi^*(y \mid x) = \frac{1}{Z(x)}\, \pi_\text{ref}(y \mid x)\, e^{r(x, y) / \beta}\;}$$
#
# Then $J(\pi) = -\beta\, \mathrm{KL}(\pi \,\|\, \pi^*) + \beta \log Z(x)$. The second term does not
# depend on $\pi$, and a KL is at least 0 and equals 0 only for $\pi = \pi^*$. So $\pi^*$ **is the
# optimum**, and there is no other. No calculus was needed.
#
# It cannot be used directly: $Z(x)$ is a sum over more answers than there are atoms. PPO approaches it
# by sampling.

# %%
lab.show(
    draw.tilted(
        [0.5, 0.3, 0.15, 0.04, 0.01], [0.0, 0.5, -1.0, 1.0, 2.0], (1.0, 0.5, 0.2)
    ),
    alt="Five answers: probabilities under the reference and under the best policy for "
    "three prices of KL. The lower the price, the more mass on high rewards.",
)

# %% [markdown]
# *What to see: every answer's probability is multiplied by $e^{r/\beta}$ and all are scaled to sum to
# one. A cheap KL (small $\beta$) moves nearly everything to the best answer, even one the reference
# gave 1 %.*
#
# ## DPO: the policy is the reward model
#
# Rafailov et al. (2023) solved the boxed equation **for the reward**:
#
# $$r(x, y) = \beta \log \frac{\pi^*(y \mid x)}{\pi_\text{ref}(y \mid x)} + \beta \log Z(x) .$$
#
# Every policy is the optimum of *some* reward: this one. So instead of training a reward model and then
# a policy for it, train the policy so that *the reward it is optimal for* explains the comparisons.
# Under Bradley–Terry (chapter 3) only differences of rewards of the **same prompt** matter, and there
# the intractable $\beta \log Z(x)$ stands twice with opposite signs:
#
# $$\Pr[y_w \succ y_l \mid x] = \sigma\big(r(x, y_w) - r(x, y_l)\big)
# = \sigma\Big(\beta \log \frac{\pi(y_w \mid x)}{\pi_\text{ref}(y_w \mid x)} -
# \beta \log \frac{\pi(y_l \mid x)}{\pi_\text{ref}(y_l \mid x)}\Big) .$$
#
# The negative log-likelihood of the comparisons is the whole method:
#
# $$\mathcal L_\text{DPO} = -\frac1N \sum \log \sigma(\hat r_w - \hat r_l), \qquad
# \hat r = \beta \log \frac{\pi(y \mid x)}{\pi_\text{ref}(y \mid x)} ,$$
#
# the loss of chapter 3 with another reward. No sampling, no reward model, no critic. The log-probability
# of an answer is the **sum** over its tokens: a mean would be another distribution's.

# %% exercise beyond_ppo.dpo_loss
# hint: The reference is held constant: `.detach()` its log-probabilities. Then build the two
#   implicit rewards, and their difference.
# hint: `logsigmoid(margin)` does not overflow; `log(sigmoid(-200))` is minus infinity.
# hint: A tie counts half in the accuracy. Divide loss and statistics by the same denominator.

# %% [markdown]
# **What its gradient does.** With $\sigma'(z) = \sigma(z)\sigma(-z)$ and
# $\Delta = \log\frac{\pi(y_w)}{\pi_\text{ref}(y_w)} - \log\frac{\pi(y_l)}{\pi_\text{ref}(y_l)}$,
#
# $$-\nabla \mathcal L = \underbrace{\beta\, \sigma(-\beta \Delta)}_{\text{weight}}
# \big[\nabla \log \pi(y_w) - \nabla \log \pi(y_l)\big] .$$
#
# A pair that is in the right order by far has a weight near 0, one in the wrong order up to $\beta$.

# %%
lab.show(
    draw.dpo_weight((1.0, 0.3, 0.1)),
    alt="The weight of a pair against the difference of log-ratios for three beta: it "
    "falls from beta to zero, later for a smaller beta.",
)

# %% [markdown]
# *What to see: a pair stops pulling when $\beta \Delta$ is a few units, so at $\Delta$ of a few times
# $1/\beta$ nats. That is where $\beta$ acts: it is no penalty that is measured anywhere, but a point at
# which pairs fall silent.*
#
# Three things follow, and all three can be seen below.
#
# 1. Only the **difference** is trained. Both log-probabilities may fall, as long as the rejected one
#    falls faster; the mass goes to answers that nobody compared.
# 2. DPO never looks at what the policy *says now*. The comparisons are about SFT's answers. PPO's reward
#    model gets to see the policy's own, new answers.
# 3. If a pair has only one label and that is always the same, the likelihood is best at
#    $\Delta = \infty$. The KL then has no bound of its own, only early stopping.
#
# Train with *your* loss, with the usual $\beta = 0.1$ and with one that is much too small.

# %%
measured = {"eval_every": 10, "eval_prompts": 16 if lab.quick else 256}
betas, dpo = (0.1, 0.01), {}
for beta in betas:
    dpo[f"β = {beta:g}"] = lab.train(
        "dpo", name=f"beyond-dpo-own-{beta}", world="reviews", own=[dpo_loss],
        beta=beta, **measured,
    )  # fmt: skip


# %%
def in_nats(run, beta):
    """The run's metrics, with implicit rewards in nats: divided by beta."""
    pairs = (
        ("logratio_chosen", "reward_chosen"),
        ("logratio_rejected", "reward_rejected"),
    )
    return [row | {new: row[old] / beta for new, old in pairs} for row in run.metrics]


lab.show(
    draw.dpo_curves(
        {k: in_nats(r, b) for (k, r), b in zip(dpo.items(), betas, strict=True)}
    ),
    alt="Two DPO runs: log-ratios of chosen and rejected answers, KL and gold of the "
    "policy's own answers over the updates.",
)

# %% [markdown]
# *What to see. Left: chosen (solid) and rejected (dotted) part, as the loss wants, but nearly all of it by
# the **rejected** falling; the chosen ones stay about where they were, or fall too. Middle: with β = 0.1
# the KL of the policy's own answers settles, though nobody measures it: the pairs have fallen silent. With
# β = 0.01 they never do, and no controller holds it. Right: what that is worth.*
#
# ## Without a critic: REINFORCE and its baselines
#
# The policy gradient of chapter 4, for a whole answer as one action, is
# $\nabla J = \mathbb E_{y \sim \pi}[R(y)\, \nabla \log \pi(y)]$. Any number $b$ that does **not depend on
# $y$** may be subtracted from $R$:
#
# $$\mathbb E_{y \sim \pi}[b\, \nabla \log \pi(y)] = b \sum_y \pi(y) \frac{\nabla \pi(y)}{\pi(y)}
# = b\, \nabla \sum_y \pi(y) = b\, \nabla 1 = 0 .$$
#
# The mean stays, the variance does not: with a good $b$ the terms are small. PPO learns $b$ with a critic
# as large as the policy. But if $G$ answers to the *same* prompt are drawn anyway, their rewards say what
# to expect there.
#
# **Which mean?** The obvious one, $\bar R = \frac1G \sum_j R_j$, contains $R_i$ itself, so it *does*
# depend on $y_i$. Leave the answer out:
#
# $$A_i = R_i - \frac{1}{G - 1} \sum_{j \ne i} R_j .$$
#
# Given the prompt the answers are independent, so the baseline $b_{-i}$ is independent of $y_i$, and the
# proof above holds conditionally on the others:
# $\mathbb E[b_{-i} \nabla \log \pi(y_i)] = \mathbb E[b_{-i}]\, \mathbb E[\nabla \log \pi(y_i)] = 0$.
# **RLOO is unbiased.** And the plain mean? Since
# $\bar R = \frac1G R_i + \frac{G-1}{G} b_{-i}$,
#
# $$R_i - \bar R = \frac{G - 1}{G} \big( R_i - b_{-i} \big) .$$
#
# It is the same estimator, shrunk by $(G-1)/G$: a bias in length, not in direction. With $G = 2$ half
# the step is gone.

# %% exercise beyond_ppo.rloo_advantages
# hint: Sum of the row minus the answer's own reward, divided by G − 1.
# hint: `rewards.sum(dim=1, keepdim=True)` broadcasts over the answers.

# %% [markdown]
# What does a baseline save? Take a policy over ten answers (a softmax of ten numbers), with rewards
# around 3, and estimate its gradient 4000 times from 32 answers, in groups of $G$.

# %%
logits = torch.linspace(-1, 1, 10, dtype=torch.float64)
worth = 3 + torch.randn(10, generator=torch.Generator().manual_seed(0)).double()
pi = logits.softmax(0)
exact = pi * (worth - (pi * worth).sum())  # the true gradient: dJ / dlogits


def estimates(advantages, G, repeats=200 if lab.quick else 4000):
    """(repeats, 10): gradients from 32 answers in groups of G."""
    generator = torch.Generator().manual_seed(G)
    y = torch.multinomial(pi, repeats * 32, True, generator=generator)
    a = advantages(worth[y].view(-1, G)).view(repeats, 32, 1)
    score = torch.nn.functional.one_hot(y, 10).double() - pi  # gradient of log pi(y)
    return (a * score.view(repeats, 32, 10)).mean(1)


# %%
kinds = {"no baseline": lambda r: r, "mean of the group": lambda r: r - r.mean(1, True),
         "leave one out": rloo_advantages}  # fmt: skip
sizes, spread = (2, 4, 8, 16, 32), {name: [] for name in kinds}
for name, advantages in kinds.items():
    for G in sizes:
        found = estimates(advantages, G)
        spread[name].append(found.var(0).sum().item())
        if G == 2:
            length = (found.mean(0) @ exact / (exact @ exact)).item()
            print(f"{name:18} G = 2: {length:.2f} of the true gradient's length")
lab.show(draw.baselines(sizes, spread), alt="Variance of the gradient against the "
         "group size for three baselines: by far the largest without one.")  # fmt: skip

# %% [markdown]
# *What to see: without a baseline the common reward of 3, which says nothing, is nearly all of the
# variance. Leaving one out costs a little at $G = 2$ (its baseline is a single answer) and nothing from
# $G = 8$ on. The plain mean's variance at small $G$ is lower because its gradient is shorter: see the
# printed lengths.*
#
# ## GRPO: divided by the spread
#
# Shao et al. (2024) subtract the group's mean and divide by its standard deviation:
#
# $$A_i = \frac{R_i - \bar R}{\mathrm{std}(R_1, \dots, R_G) + \epsilon}, \qquad
# \text{KL in the loss, not in the reward.}$$
#
# Every prompt then speaks equally loudly, whatever its rewards' scale. That is the point, and the price.
# Let an answer be right with probability $p$ and rewards be 0 or 1. The typical $|R_i - \bar R|$ is
# $2p(1-p)$, the standard deviation $\sqrt{p(1-p)}$, so
#
# $$\mathbb E |A| \approx 2 \sqrt{p(1-p)} \quad\text{instead of}\quad 2p(1-p) .$$
#
# Prompts that are almost always right (or wrong) weigh $1/\sqrt{p(1-p)}$ times more than by the true
# gradient: a **difficulty bias** (Liu et al. 2025). A second bias is in GRPO's loss, not here: it averages
# each answer over its own length first, so a long wrong answer is punished less per token. We divide by
# the tokens of the whole step (chapter 5), which has none.
#
# And where a group is unanimous nothing is learned. Its advantage is 0/0; the ε makes it 0.

# %% exercise beyond_ppo.grpo_advantages
# hint: Mean and standard deviation over `dim=1`, with `keepdim=True`; the unbiased one, as the paper's
#   code has it.
# hint: Equal rewards in float32 may leave a spread of 1e-8 by rounding, more than eps. Compute in
#   float64 and return the dtype you were given.

# %%
shares = torch.linspace(0.01, 0.99, 25)
listened = {"RLOO": [], "GRPO": []}
for p in shares:
    generator = torch.Generator().manual_seed(1)
    right = (torch.rand(4000, 8, generator=generator) < p).float()
    listened["RLOO"].append(rloo_advantages(right).abs().mean().item())
    listened["GRPO"].append(grpo_advantages(right).abs().mean().item())
lab.show(draw.difficulty({name: (shares, size) for name, size in listened.items()}),
         alt="Mean absolute advantage against the chance of a right answer. GRPO's "
         "curve is flatter: easy and hard prompts weigh more.")  # fmt: skip

# %% [markdown]
# *What to see: both are silent at 0 % and 100 %. Between, GRPO listens to the hard and the easy prompts
# nearly as much as to those in the middle; RLOO, like the true gradient, cares about the middle, where
# there is most to gain.*
#
# ## REINFORCE++: the batch is the baseline
#
# Groups cost diversity of prompts: 128 answers are 32 prompts at $G = 4$. Hu et al. (2025) draw one answer
# a prompt, keep PPO's KL penalty at every token, and use no baseline but the batch. The return from
# token $t$ on is
#
# $$A_t = R - \beta \sum_{i \ge t} \mathrm{KL}_i ,$$
#
# whitened over all tokens of the batch: $(A - \mu)/\sqrt{\sigma^2 + \epsilon}$. What was paid before $t$
# cannot be changed any more, so it does not enter. Compare chapter 4: GAE with $\gamma = \lambda = 1$ and
# a critic that always says 0 gives the same number before whitening. The batch's mean is a baseline too,
# but the same for every prompt: it cannot know that this prompt is hard.

# %% exercise beyond_ppo.reinforce_plus_plus_advantages
# hint: `token_rewards(scores, kl, mask, kl_coef)` of chapter 4 places −β·KL everywhere and the score on
#   the last action.
# hint: "From t on" is a cumulative sum from the right: `flip`, `cumsum`, `flip`.
# hint: `whiten` of chapter 5 does the rest, over ranks too: hand `group` on.

# %% [markdown]
# ## Your functions in the trainer
#
# The same trainer as in chapter 5, with `advantages=` set and your function in it; eight iterations
# each.

# %%
no_critic = {"critic_lr": None, "critic_warmup": None}
group = {"rloo": rloo_advantages, "grpo": grpo_advantages,
         "reinforce_plus_plus": reinforce_plus_plus_advantages}  # fmt: skip
for name, function in group.items():
    run = lab.train("ppo", name=f"beyond-own-{name}", world="reviews", own=[function],
                    advantages=name, iterations=8, **no_critic)  # fmt: skip
    gold = run.curve("gold")
    print(f"{name:20} gold {gold[0]:.2f} → {gold[-1]:.2f}, {run.seconds:.1f} s")

# %% [markdown]
# ## The race
#
# Same world (the reviews), same SFT model, reward model and KL target, same number of answers (128 an
# iteration, 30 iterations, groups of four where groups are needed), same learning rate, three seeds.
# PPO's critic is warmed up first, as it must be. DPO draws no answers to learn from: it gets the
# comparisons on which the reward model was trained, two passes over the best against the worst of each
# prompt. (The learning rates were chosen by a few trials on validation prompts, PPO's for PPO and DPO's
# for DPO; the critic-free ones got PPO's.)

# %%
seeds = (0,) if lab.quick else (0, 1, 2)
methods = {
    "PPO": {},
    "RLOO": {"advantages": "rloo", **no_critic},
    "GRPO": {"advantages": "grpo", **no_critic},
    "REINFORCE++": {"advantages": "reinforce_plus_plus", **no_critic},
    "DPO": {"stage": "dpo", **measured},
}
unpriced = {
    f"{name} without KL": methods[name] | {"kl_coef": 0.0} for name in ("RLOO", "GRPO")
}
jobs = {
    (name, seed): {**settings, "seed": seed}
    for name, settings in methods.items()
    for seed in seeds
}
jobs |= {
    (name, 0): settings for name, settings in unpriced.items()
}  # to be broken: below

# %%
names = {key: f"beyond-{key[0]}-{key[1]}".replace(" ", "-") for key in jobs}
done = lab.train_many({names[key]: jobs[key] for key in jobs}, world="reviews")
runs = {name: [done[names[name, seed]] for seed in seeds] for name in methods}
lab.show(
    draw.race(
        {name: [(r.metrics, r.seconds) for r in rs] for name, rs in runs.items()}
    ),
    alt="Gold over the square root of KL, over the share of each run's budget and over "
    "seconds, for five methods with three seeds each.",
)

# %%
reviews = lab.world("reviews")
held = reviews.evaluation_prompts()["reviews"][: 16 if lab.quick else None]


def ending(run):
    """Gold on held-out prompts, KL at the end, seconds of training."""
    policy, tokenizer = run.model()
    said = lab.answers(policy, tokenizer, held)
    worth = [reviews.utility(p, *answer) for p, answer in zip(held, said, strict=True)]
    gold = sum(worth) / len(worth)
    return {"gold": gold, "kl": run.curve("kl")[-1], "seconds": run.seconds}


results = {name: [ending(run) for run in rs] for name, rs in runs.items()}
lab.show(draw.ends(results), alt="Gold on held-out prompts, final KL and seconds of "
         "training of the five methods, a dot for each seed.")  # fmt: skip

# %%
before = sum(
    run.seconds for run in (lab.Trained(lab.folder("reward_model", "reviews")),)
)
print(f"Not in these seconds: {before:.0f} s for the reward model, which DPO spares.")
for name, ends in results.items():
    gold = [end["gold"] for end in ends]
    print(f"{name:12} gold {min(gold):.2f} to {max(gold):.2f}")

# %% [markdown]
# *What to see. Left, what a **nat** buys: read upwards at equal KL. Middle, what an **answer** buys. Right,
# what a **second** buys. In the bars the dots are the seeds: a difference smaller than the spread of the
# dots is no difference.*
#
# **Does the critic pay?** Here it seems to, a little: after as many answers PPO's dots lie at the upper end
# or above those of the critic-free methods, at the same KL. But it takes longest, and at equal seconds the
# order is another one. What would refute it: dots that overlap widely. **GRPO** learns fastest at first and then does worst: with
# advantages of size one the coefficient of its KL term needs time to find the target, the policy
# overshoots it, and beyond lies over-optimisation. **DPO** is the surprise: the best gold, at the smallest
# KL, in the fewest seconds.
#
# **Why does DPO win here, and would it elsewhere?** The comparisons hold what the policy cannot say yet: one
# answer in twenty was put in by the world and is ideal. DPO raises *those very answers*; PPO gets a number
# from a reward model that is right in three pairs of four, and finds its holes. Where comparisons are only
# among the policy's own answers, or the policy moves far from them, this advantage goes.
#
# *What this race cannot say: how it ends for long answers (a chain of a thousand tokens of which one step
# was wrong), where a critic's credit for every token may be worth its price; or for a reward model good
# enough to be followed for a thousand iterations.*
#
# ## What healthy looks like
#
# | method | watch | healthy | unhealthy, and what it means |
# |---|---|---|---|
# | DPO | implicit accuracy, held out | rises to the reward model's (chapter 3) and stays | falls while the training loss falls: memorising pairs |
# | DPO | log-ratio of the chosen | near 0, or a few nats below | falls by tens of nats: mass flows to answers nobody compared; raise β, fewer updates |
# | DPO | KL of its own answers | grows and flattens | grows with every update: pairs never fall silent, β too small |
# | RLOO, GRPO | groups whose rewards are all equal | few | most: prompts too easy or too hard, no gradient |
# | GRPO | KL in the loss | near its target | many times it: the loss's KL is weighed against advantages of size 1, so its coefficient has another unit than PPO's β |
# | REINFORCE++ | variance of the advantages before whitening | falls as prompts are mastered | stays: what varies is the prompt, not the answer; use groups |
#
# **Gallery.** The run with $\beta = 0.01$ above is one really broken run; here is another. Without any
# price on the KL the critic-free methods are as free to over-optimise as PPO was in chapter 7.

# %%
from rlhf_course.plots.lessons_why_rlhf import healthy_and_broken

lab.show(
    healthy_and_broken(
        [run.metrics for run in runs["RLOO"]],
        {name: [done[names[name, 0]].metrics] for name in unpriced},
        ["kl", "reward", "gold"],
    ),
    alt="The band of RLOO's healthy runs for KL, proxy and gold, with RLOO and GRPO "
    "without a price on KL drawn over it.",
)

# %% [markdown]
# *What to see: the KL leaves the band, the proxy too (upwards), gold the other way. A method without a
# critic follows a wrong reward as faithfully as one with.*
#
# ## Scale it up
#
# The same flags for a 124 M model on a GPU. The comparisons and the reward model are those of
# `rlhf-course demo --size gpt2`:
#
# ```bash
# rlhf-course ppo --size gpt2 --advantages rloo --answers-per-prompt 4 --out runs/town-gpt2-seed0/rloo
# rlhf-course ppo --size gpt2 --advantages grpo --answers-per-prompt 8 --out runs/town-gpt2-seed0/grpo
# rlhf-course ppo --size gpt2 --advantages reinforce_plus_plus --out runs/town-gpt2-seed0/rpp
# rlhf-course dpo --size gpt2 --beta 0.1
# ```
#
# And on people's and models' comparisons, from a model that has been pretrained:
#
# ```bash
# rlhf-course dpo --data HuggingFaceH4/ultrafeedback_binarized --recipe ultrafeedback --too-long drop \
#     --model Qwen/Qwen2.5-0.5B-Instruct --gradient-checkpointing --beta 0.1 --lr 5e-7 --out runs/ultra/dpo
# rlhf-course ppo --data Anthropic/hh-rlhf --too-long drop --advantages rloo --profile colab-a100 --iterations 200 --batch 256 --lr 1e-6 --out runs/hh/rloo
# ```
#
# | | expect | |
# |---|---|---|
# | this chapter, two CPU cores | 144 s | *measured* 2026-11-23, two quiet Xeon cores |
# | without the critic, 124 M | 2 GB less, a third of an update's time less | *estimated*: 16 bytes a parameter, and PPO's update is $12N$ FLOP a token with it, $6N$ without; the reference's pass stays |
# | Qwen2.5-0.5B, `rloo`, 200 rollouts of 256 answers, A100 40 GB | 40 minutes, 17 GB | *estimated*: chapter 5's hour without the critic's half of the updates; 8 GB less |
# | DPO, 61,000 pairs of 2 × 350 tokens, A100 40 GB | 40 minutes, 16 GB | *estimated*: $43\cdot10^6$ tokens at 94 TFLOP/s, $10N$ FLOP each with the reference and checkpointing |
# | implicit accuracy held out | a little below that of a reward model of the same size | *estimated* |
# | DPO against PPO on TL;DR, preferred to the references | 61 % and 57 % | *estimated* for you, theirs: Rafailov et al. 2023, section 6.2, at temperature 0 |
#
# [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## Five questions
#
# <details><summary>1. Where did the partition function go, and for which other comparison model would it
# stay?</summary>
#
# It depends on the prompt alone, so it cancels in any difference of rewards of one prompt: Bradley–Terry
# and Plackett–Luce alike. It would stay where rewards are used one at a time: a "good / bad" label of a
# single answer (KTO has to estimate a reference point for it), or comparisons across prompts.
# </details>
#
# <details><summary>2. DPO's loss falls, and log π of the chosen answers falls as well. A bug?</summary>
#
# No. Only the difference is trained. If chosen and rejected share most of their tokens, lowering the
# rejected one lowers both. What was lost went to answers in neither column, which is worth a look.
# </details>
#
# <details><summary>3. Why may RLOO not use the answer's own reward in the baseline, and why does GRPO get
# away with it?</summary>
#
# With it the baseline depends on the action and the proof fails. For the plain mean the damage is a common
# factor (G−1)/G, which a learning rate absorbs. GRPO divides by the standard deviation afterwards, which
# contains the own reward too: *that* is a bias of direction, and it gets away with it because the sign of
# every advantage is still right.
# </details>
#
# <details><summary>4. G = 4 answers to 32 prompts, or one answer to 128 prompts?</summary>
#
# The first knows how hard each prompt is; the second sees four times as many prompts. Where prompts differ
# much in difficulty, the baseline within a prompt removes most of the variance. Where all prompts are
# alike, the batch's mean is as good and prompts are worth more.
# </details>
#
# <details><summary>5. Multiply all rewards by ten. Which of PPO (whitened advantages, β fixed), RLOO, GRPO,
# REINFORCE++ and DPO change?</summary>
#
# PPO and REINFORCE++ whiten, so the size of the step stays, but reward and β·KL change their proportions:
# the same as dividing β by ten. RLOO: the same, and ten times the advantages (here the clip and Adam absorb
# most of that). GRPO: nothing, the KL is in the loss and the advantages are standardised. DPO never sees a
# reward; a labeler with ten times the rewards is less noisy, which it does see.
# </details>
#
# ## What public systems do differently
#
# - **Standard deviation.** [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF)'s GRPO divides by the unbiased
#   standard deviation plus 1e−9, as we do; its `dr_grpo` subtracts the mean only; its RLOO is the same
#   G/(G−1) factor derived above.
# - **Where the KL goes.** OpenRLHF and [verl](https://github.com/volcengine/verl) offer both places, the
#   reward and the loss, with k1, k2 or k3; [open-instruct](https://github.com/allenai/open-instruct)'s GRPO
#   has it in the loss only. A KL in the loss needs an estimator whose *gradient* is right: k3 is not k1.
# - **Whitening.** OpenRLHF whitens over all ranks on one controller, for GAE and REINFORCE only and not per
#   minibatch; [trlx](https://github.com/CarperAI/trlx) all-reduces but over pads too; TRL whitened per rank.
# - **Averages of averages.** Until June 2026 OpenRLHF averaged the means of micro-batches, so a token in a
#   short answer weighed more (#1249, #1337). Ours divides by the tokens of the optimizer step.
# - **Who still has PPO.** [TRL](https://github.com/huggingface/trl) removed its `PPOTrainer` in September
#   2026 and has DPO, GRPO and RLOO; PPO-ptx, chapter 6, is in no maintained library any more.
#
# ## Further reading
#
# - Rafailov et al. 2023, *Direct preference optimization: your language model is secretly a reward model*.
# - Ahmadian et al. 2024, *Back to basics: revisiting REINFORCE style optimization for learning from human
#   feedback in LLMs* (RLOO); Kool, van Hoof, Welling 2019, *Buy 4 REINFORCE samples, get a baseline for
#   free!*
# - Shao et al. 2024, *DeepSeekMath* (GRPO, section 4.1); Liu et al. 2025, *Understanding R1-Zero-like
#   training* (its biases).
# - Hu et al. 2025, *REINFORCE++*; Williams 1992 (REINFORCE).
# - Xu et al. 2024, *Is DPO superior to PPO for LLM alignment?*; Tang et al. 2024, on why on-policy data
#   matters; Azar et al. 2024 (IPO: DPO's missing bound for deterministic labels).
