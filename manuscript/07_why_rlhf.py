# %% [markdown]
# # Chapter 7: Why RLHF
#
# The pipeline runs. Did it help? This chapter asks that question five times, on both worlds, and
# tries hard to get a "no".
#
# **What you will be able to do**
#
# - compare two policies honestly: a win rate with an interval that keeps its promise;
# - say whether a reward model knows how much it knows (calibration);
# - compute what *choosing* the best of $n$ answers gives, in closed form, and what it costs in KL;
# - recognise over-optimisation, predict where it begins, and say why a KL penalty delays it;
# - name the cases in which reinforcement learning does what imitation cannot, each with a run that
#   could have refuted it, and one popular claim that these runs refute.
#
# **Where we are on the map.** Chapters 1 to 6 built everything: GPT, SFT, reward model, PPO-ptx.
# This chapter trains with it and measures. It needs no formula of reinforcement learning that you
# have not derived already.

# %%
import torch
from rlhf_course import lab
from rlhf_course.plots import lessons_behaviour as behaviour
from rlhf_course.plots import lessons_why_rlhf as draw
from rlhf_course.plots.course_map import course_map

lab.show(
    course_map(7),
    alt="The map of the course: the boxes of chapters 1 to 6 are "
    "filled, and evaluation, chapter 7, is the place where we stand.",
)

# %% [markdown]
# ## Two rewards
#
# PPO maximises the **proxy** $r_\phi$, the reward model's score. What we want is the **gold** reward
# $u$, here the world's own utility. In life it is a person's considered judgement, which is why
# nobody can put it into a training loop. The reward model has seen a few thousand noisy rankings
# by it; wherever the two differ, PPO follows the proxy.
#
# The **town** of the last chapters asks whether a model *knows*. The second world, **reviews**,
# asks whether it can do *better than it was shown*. Its prompt holds a mood and some things
# (`+ soup waiter`), its answer is a short review. Demonstrations are hurried: vague adjectives,
# slips, one pet phrasing. The labeler's taste is simple and known, and so is the best answer.

# %%
from rlhf_course.world.review_grammar import APT, KIND

reviews, town = lab.world("reviews"), lab.world("town")


def ideal(prompt):
    """The best answer there is: an apt sentence about every thing, and one thanks."""
    mood, *things = prompt.key
    said = [f"The {thing} was {APT[KIND[thing]][mood][0]}." for thing in things]
    return " ".join([*said, "Thank you."])


shown = next(d for d in reviews.demonstrations() if len(d.prompt.key) == 4)
print(shown.prompt.text)
for text in (shown.response, ideal(shown.prompt), "Thank you. Thank you."):
    print(f"   worth {reviews.utility(shown.prompt, text, True):5.2f}  {text}")

# %% [markdown]
# The base models of the reviews are made now if they are missing (a light version of the demo's:
# one size smaller, fewer steps; about a minute and a half). They are shared with chapter 8.

# %%
sft, tokenizer = lab.model("sft", world="reviews")
reward_model, _ = lab.model("reward_model", world="reviews")
town_sft, town_tokenizer = lab.model("sft")
town_reward, _ = lab.model("reward_model")
town_ppo, _ = lab.model("ppo")

# %% [markdown]
# ## Who wins? A share and its interval
#
# Draw one answer from each policy to the same $N$ prompts, and count how often $A$'s is worth more;
# a tie is half a win. The rate $\hat p$ is a mean of $N$ noisy votes. How far may the true rate $p$
# be from it?
#
# By the central limit theorem $\hat p - p$ is about normal with standard deviation
# $\sqrt{p(1-p)/N}$, so with probability 95 %
#
# $$|\hat p - p| \le z \sqrt{p(1-p)/N}, \qquad z = 1.96 .$$
#
# The textbook replaces the unknown $p$ under the root by $\hat p$ (Wald's interval). That goes
# wrong exactly where we need it: 20 wins out of 20 give $\hat p (1 - \hat p) = 0$, an interval of
# width zero. Wilson (1927) does not replace anything. He asks *which $p$ satisfy the inequality as
# it stands*. Squared, it is quadratic in $p$:
#
# $$p^2 \Big(1 + \frac{z^2}{N}\Big) - p \Big(2 \hat p + \frac{z^2}{N}\Big) + \hat p^2 \le 0
# \quad\Longrightarrow\quad
# p \in \frac{\hat p + \frac{z^2}{2N} \;\pm\; z \sqrt{\frac{\hat p (1 - \hat p)}{N} +
# \frac{z^2}{4 N^2}}}{1 + \frac{z^2}{N}} .$$
#
# The middle is $\hat p$ pulled towards one half, as if $z^2 \approx 4$ further trials had been
# split evenly; both ends lie in $[0, 1]$. The figure below counts exactly how often each interval
# contains the truth.

# %%
from rlhf_course.evaluation import wilson_interval


def wald(share, count):
    """The textbook's interval."""
    spread = 1.96 * (share * (1 - share) / count) ** 0.5
    return share - spread, share + spread


lab.show(
    draw.coverage({"Wilson": wilson_interval, "Wald (textbook)": wald}, count=20),
    alt="Share of experiments in which the interval contains the true share, for every "
    "true share. Wilson stays near 95 percent; Wald falls far below near 0 and 1.",
)

# %% [markdown]
# *What to see: with 20 trials Wilson's interval keeps near the promised 95 % but for the very ends (only
# so many outcomes are possible, hence the saw teeth). Wald's breaks down long before, and good policies
# have win rates near an end.*

# %% exercise evaluation.win_rate
# hint: Three counts are enough: how often `a > b`, `a == b` and `a < b`.
# hint: The rate is (wins + ties / 2) / N, and `wilson_interval(rate, N, confidence)` is given.

# %% [markdown]
# Does PPO-ptx beat SFT on the town, asked about people of whom no stage has heard and about people
# it knows? Both answer every evaluation prompt once.

# %%
groups = town.evaluation_prompts()
prompts = [p for asked in groups.values() for p in asked][:: 20 if lab.quick else 2]


def gold_of(world, asked, said):
    """The gold utility of every answer."""
    return [world.utility(p, *answer) for p, answer in zip(asked, said, strict=True)]


# %%
said = {
    "SFT": lab.answers(town_sft, town_tokenizer, prompts, max_new_tokens=12),
    "PPO-ptx": lab.answers(town_ppo, town_tokenizer, prompts, max_new_tokens=12),
}
gold = {name: gold_of(town, prompts, answers) for name, answers in said.items()}
for group in groups:
    rows = [i for i, p in enumerate(prompts) if p.group == group]
    w = win_rate(*([gold[name][i] for i in rows] for name in ("PPO-ptx", "SFT")))
    print(
        f"{group:10} PPO-ptx beats SFT in {w.rate:.1%} ({w.low:.1%} to {w.high:.1%}): "
        f"{w.wins} won, {w.ties} tied, {w.losses} lost"
    )

# %% [markdown]
# ## Does the reward model know how much it knows?
#
# A Bradley–Terry reward model does not only rank. It says *how sure* it is: the probability that
# $A$ is preferred is $\sigma(r_A - r_B)$. It is **calibrated** when, of all pairs of which it says
# 70 %, seven in ten turn out that way. Sort the predictions into bins; the **expected calibration
# error** is
#
# $$\mathrm{ECE} = \sum_b \frac{n_b}{N} \, \big| \, \underbrace{\bar y_b}_{\text{observed}} -
# \underbrace{\bar p_b}_{\text{predicted}} \big| .$$
#
# Why should it matter to PPO? Differences of reward are what PPO trades against KL. A model that is
# twice too sure doubles them, which is the same as halving $\beta$.
#
# One trap: present every pair as (chosen, rejected) and every outcome is 1. There is nothing left
# to calibrate. The order must be one that the label does not tell, so every other pair is turned
# round.

# %% exercise evaluation.expected_calibration_error
# hint: `reliability_curve` does the sorting. Each of its bins has `predicted`, `observed`, `count`.
# hint: Weigh every |observed − predicted| by the bin's share of all predictions.

# %%
from rlhf_course.evaluation import reliability_curve
from rlhf_course.stages.comparisons import read_comparisons_run
from rlhf_course.stages.reward_model import encode_ranked, score_table

# %%


@torch.no_grad()
def margins(world, model, tokenizer):
    """Reward of the preferred answer less that of the other, of all held-out pairs."""
    held = read_comparisons_run(lab.folder("comparisons", world) / "heldout.jsonl")
    ranked = []
    for c in held:
        texts = c.prompt.text, c.responses, c.finished
        ranked.append(encode_ranked(tokenizer, *texts, context=model.backbone.context))
    out = []
    for start in range(0, len(ranked), 64):
        scores, mask = score_table(model, ranked[start : start + 64])  # best first
        i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
        out.append((scores[:, i] - scores[:, j])[mask[:, i] & mask[:, j]])
    return torch.cat(out)


# %%
def asked_about(margin):
    """(said, happened): every other pair is asked the other way round."""
    turned = torch.arange(len(margin)) % 2 == 0
    return torch.where(turned, -margin, margin).sigmoid(), (~turned).long()


# %%
found = margins("reviews", reward_model, tokenizer)
trained = lab.Trained(lab.folder("reward_model", "reviews")).curve("eval_margin")[-1]
pairs = {
    "town": asked_about(margins("town", town_reward, town_tokenizer)),
    "reviews": asked_about(found),
    "reviews, gain undone": asked_about(found * (trained / found.mean())),
}
curves = {name: reliability_curve(*both) for name, both in pairs.items()}
notes = [f"ECE {expected_calibration_error(*both):.3f}" for both in pairs.values()]
lab.show(
    draw.reliability(curves, notes),
    alt="Reliability diagrams of both reward models: "
    "predicted against observed preference, close to the diagonal, with counts below.",
)

# %% [markdown]
# *What to see: points on the dashed line say what happens. The bars are Wilson's intervals. The town's model
# and, on the right, the reviews' as it was trained are calibrated well. In the middle is the reviews'
# model as PPO gets it: after training its rewards were divided by their standard deviation (chapter 3's
# gain). The order is the same, and so is the accuracy; but the model now sounds less sure than it has
# reason to, and its points are steeper than the line.*
#
# ***What none of them shows**: anything about the answers that PPO will find. Calibration is a property of
# a model and a distribution, and PPO changes the distribution.*
#
# *What would refute "calibrated": bins whose interval misses the line, beyond the one in twenty
# that chance allows.*

# %% [markdown]
# Your function can go where the package's stands: the reward-model stage calls it at every
# evaluation. Here is a short training of a reward model with *your* calibration error in it.

# %%
run = lab.train(
    "reward_model",
    name="why-calibration",
    world="reviews",
    steps=100,
    own=[expected_calibration_error],
)
print(
    f"after {len(run.metrics)} updates: accuracy {run.curve('eval_accuracy')[-1]:.3f}, "
    f"calibration error by your function {run.curve('eval_calibration_error')[-1]:.3f}"
)

# %% [markdown]
# ## Best of $n$: optimisation without training
#
# The simplest way to use a reward model changes no weight: draw $n$ answers, keep the one it likes
# best. It is the yardstick for PPO, since everything about it can be computed.
#
# **What it gives, in closed form.** Someone has drawn $N = 64$ answers to a prompt and knows both
# rewards of each. To learn about $n = 4$ one could draw subsets of four at random. Better is the
# mean over *all* $\binom{N}{n}$ subsets. Sort by the proxy; let the answer in place $k$
# (1 = worst) have no ties. It is the best of a subset exactly when it is in it and the $n - 1$
# others come from the $k - 1$ below:
#
# $$\Pr[k \text{ is chosen}] = \frac{\binom{k-1}{n-1}}{\binom{N}{n}}
# = \frac{\binom{k}{n} - \binom{k-1}{n}}{\binom{N}{n}} .$$
#
# The second form (Pascal's rule) says: all subsets within the first $k$, less those within the
# first $k - 1$. It carries over to **ties**, of which our models produce many, since they often
# give the same answer twice. A group of answers that the proxy cannot tell apart, with $a$ below it
# and $b$ not above it, holds the winner in $\binom{b}{n} - \binom{a}{n}$ of the subsets, and each
# of its $b - a$ members is as likely as the others. (Nakano et al. 2021, appendix I, without ties.)

# %% exercise evaluation.best_of_n
# hint: Do it for one row first. `torch.searchsorted(sorted_row, row)` counts the values below
#   each, and with `right=True` those that are not above.
# hint: Fill a table `share[k] = comb(k, n) / comb(N, n)` for k = 0 … N with Python's exact
#   `math.comb`, then look both counts up in it.
# hint: A member's weight is (share[not_above] − share[below]) / (not_above − below). The weights
#   of a row add up to 1; the answer is Σ weight · gold, averaged over the rows.

# %% [markdown]
# **What it costs, in KL.** Let $F$ be the distribution function of the proxy under $\pi$, and no
# ties. The best of $n$ has density $n F(y)^{n-1} \pi(y)$, because the other $n - 1$ must lie below.
# With $U = F(y)$,
#
# $$\mathrm{KL}(\pi_n \| \pi) = \mathbb E_{\pi_n} \log \frac{\pi_n}{\pi} = \log n + (n - 1)\,
# \mathbb E_{\pi_n} \log U .$$
#
# Under $\pi$, $U$ is uniform; under $\pi_n$ it is the largest of $n$ uniforms, so $\Pr[U \le u] = u^n$ and
# $\Pr[-\log U \ge t] = \Pr[U \le e^{-t}] = e^{-nt}$: $-\log U$ is exponential with mean $1/n$. Hence
#
# $$\boxed{\;\mathrm{KL}(\pi_n \| \pi) = \log n - \frac{n - 1}{n}\;}$$
#
# whatever the reward model is. Where answers repeat, it is an **upper bound**: break ties by a coin
# that belongs to the sample, and the formula holds for (answer, coin); forgetting the coin can only
# lower a KL (the data-processing inequality). Sixty-four answers cost at most 3.2 nats: best of $n$
# is a very careful optimiser, and a very slow one. To reach 10 nats takes 60 000 answers.
#
# **What to expect of any optimiser near the start.** Let $\pi_\lambda \propto \pi\, e^{\lambda r}$
# be the best policy at the price $\beta = 1/\lambda$ of a nat (chapter 8 derives that; here it is
# one path among others). With $Z(\lambda) = \mathbb E_\pi e^{\lambda r}$ we have
# $\frac{d}{d\lambda} \log \pi_\lambda = r - \mathbb E_\lambda[r]$, hence
#
# $$\frac{d}{d\lambda} \mathbb E_\lambda[u] = \mathrm{Cov}_\lambda(u, r) \quad\text{for every } u,
# \qquad \mathrm{KL}(\lambda) = \lambda\, \mathbb E_\lambda[r] - \log Z, \quad
# \frac{d\,\mathrm{KL}}{d\lambda} = \lambda \mathrm{Var}_\lambda(r) .$$
#
# So for small $\lambda$ the proxy gains $\lambda \sigma_r^2$, at
# $\mathrm{KL} = \tfrac12 \lambda^2 \sigma_r^2$. Eliminate $\lambda$:
#
# $$\text{proxy gain} \approx \sigma_r \sqrt{2\,\mathrm{KL}}, \qquad
# \text{gold gain} \approx \rho\, \sigma_u \sqrt{2\,\mathrm{KL}},$$
#
# with $\rho$ the correlation of both rewards over the answers to one prompt. *That* is why
# over-optimisation is drawn over $\sqrt{\mathrm{KL}}$ (Gao et al. 2023): both curves begin as
# straight lines, whose slopes can be computed before any training. Later
# $\mathrm{Cov}_\lambda(u, r)$ is that of another policy. It can shrink, and change its sign: there
# gold turns while the proxy climbs on.

# %%
from rlhf_course.evaluation import best_of_n_kl


@torch.no_grad()
def both_rewards(policy, model, tokenizer, world, prompts, n, longest):
    """(proxy, gold), (P, n) each, of n answers to every prompt."""
    asked = [p for p in prompts for _ in range(n)]
    said = lab.answers(policy, tokenizer, asked, max_new_tokens=longest)
    ranked = []
    for i, p in enumerate(prompts):
        texts, ended = zip(*said[i * n : (i + 1) * n], strict=True)
        ranked.append(encode_ranked(tokenizer, p.text, texts, ended, context=64))
    parts = [score_table(model, ranked[i : i + 8])[0] for i in range(0, len(ranked), 8)]
    return torch.cat(parts).cpu(), torch.tensor(gold_of(world, asked, said)).view(-1, n)


# %%
def best_of(proxy, gold):
    """Gains of the best of n = 1, 2, 4 …, their errors, predicted slopes."""
    ns = [2**k for k in range(proxy.shape[1].bit_length())]
    table = {"n": ns, "kl": [best_of_n_kl(n) for n in ns]}
    for kind, worth in (("proxy", proxy.double()), ("gold", gold.double())):
        rows = list(zip(proxy.split(1), worth.split(1), strict=True))
        each = torch.tensor([[best_of_n(p, w, n) for p, w in rows] for n in ns])
        gain = each - each[0]  # (ns, P): paired, prompt by prompt
        table[kind] = gain.mean(1).tolist()
        table[f"{kind}_error"] = (gain.std(1) / len(rows) ** 0.5).tolist()
        centred = worth - worth.mean(1, keepdim=True)
        covariance = (centred * (proxy - proxy.mean(1, keepdim=True))).mean()
        table[f"{kind}_slope"] = (covariance * (2 / proxy.var(1).mean()) ** 0.5).item()
    return table


# %%
few, n = (6, 8) if lab.quick else (60, 64)
asked = {"reviews": reviews.evaluation_prompts()["reviews"], "town": prompts}
asked = {name: list(p)[:: max(len(p) // few, 1)][:few] for name, p in asked.items()}
best = {
    "reviews": best_of(
        *both_rewards(sft, reward_model, tokenizer, reviews, asked["reviews"], n, 40)
    ),
    "town": best_of(
        *both_rewards(town_sft, town_reward, town_tokenizer, town, asked["town"], n, 12)
    ),
}
lab.show(
    draw.best_of_n_curves(best),
    alt="Gain of the best of n answers over the square "
    "root of KL, proxy and gold, in both worlds, with bands and the predicted slopes.",
)

# %% [markdown]
# *What to see: both rewards start along the dotted lines that were computed from single answers, then
# bend below them: the prediction is for the first small step. Gold lies below proxy (the units differ, the
# shapes matter). In the town it stops growing near $n = 16$ and may turn, where the proxy still climbs;
# look whether the bands (two standard errors over prompts) allow you to say so.*
#
# *What would refute the prediction: a curve that starts above its dotted line, or leaves it by much
# already at $n = 2$.*
#
# ## Over-optimisation: a policy that is *trained* on the proxy
#
# PPO goes where best of $n$ cannot. Three settings, thirty iterations each: the KL held at its target;
# no price at all ($\beta = 0$); and, as a control, no price but the **gold** reward in the place of the
# proxy. Nothing else differs.

# %%
from rlhf_course.coursework import rewards

seeds = (0,) if lab.quick else (0, 1, 2)
pair, single = seeds[:2], seeds[:1]


def sweep(settings):
    """label -> its runs over the seeds; PPO where no stage is named."""
    jobs, names = {}, {}
    for label, (over, changes) in settings.items():
        names[label] = [f"why-{label}-{seed}".replace(" ", "-") for seed in over]
        for seed, name in zip(over, names[label], strict=True):
            jobs[name] = {"world": "reviews", **changes, "seed": seed}
    runs = lab.train_many(jobs)
    return {label: [runs[name] for name in names[label]] for label in settings}


# %%
runs = sweep({
    "KL held at 3.5": (seeds, {}),
    "no KL penalty": (seeds, {"kl_coef": 0.0}),
    "gold as reward, no KL": (pair, {"kl_coef": 0.0, "reward": rewards.GOLD}),
    # For the section on diversity:
    "KL held at 1": (pair, {"kl_target": 1.0}),
    "twice as long": (single, {"iterations": 60}),
    "entropy bonus": (single, {"entropy_coef": 0.06}),
})  # fmt: skip
ppo = {label: runs[label] for label in list(runs)[:3]}

# %%
slopes = best["reviews"]["proxy_slope"], best["reviews"]["gold_slope"]
lab.show(
    draw.paths(
        {label: [run.metrics for run in made] for label, made in ppo.items()},
        slopes,
        no_proxy=["gold as reward, no KL"],
    ),
    alt="Proxy and gold over the square root of KL for PPO with and without a KL "
    "penalty, three seeds each. Without it the proxy rises on while gold falls.",
)

# %% [markdown]
# *What to see: on the left every line rises, and the runs without a penalty go further. (No policy can
# start above the dotted line, since $\pi_\lambda$ is the best one at its KL. PPO starts well below: its
# first nats are spent on noise.) On the right the runs without a penalty turn: gold climbs at first, then
# falls, while the proxy still reports progress. With the KL held the policy stays where the two
# agree. And the control climbs without a penalty and does not turn: the culprit is neither PPO nor the
# distance, but a proxy that was asked about answers it had never seen.*
#
# *What would refute it: gold without a penalty ending as high as with it, in two of three seeds; or a
# control that turns as well. What the picture does not say: that a KL of 3.5 is safe. It is safe for
# this reward model; a better one would allow more.*
#
# What does a hole in a reward model look like? Read what the policy says that found one.

# %%
policies = {label: made[0].model()[0] for label, made in ppo.items()}
for p in list({p.text: p for p in asked["reviews"]}.values())[-3:]:
    print(f"\n{p.text}")
    for label, policy in {"SFT": sft, **policies}.items():
        ((text, ended),) = lab.answers(policy, tokenizer, [p])
        print(f"   {label:22} {reviews.utility(p, text, ended):6.2f}  {text[:90]}")

# %% [markdown]
# ## Answers better than the demonstrations
#
# Imitation aims at the demonstrator. If he is in a hurry, so will be his imitator; the best a perfect
# imitator can do is to be as good, on average, as what he was shown. A reward only needs someone
# who can *tell* the better of two answers, which is easier than writing it. So RL can pass the
# demonstrations, and SFT cannot. Is it so?


# %%
def answer_gold(run_or_model, seed=0):
    """Gold of one answer to each held-out prompt."""
    policy = run_or_model.model()[0] if hasattr(run_or_model, "model") else run_or_model
    return gold_of(reviews, held, lab.answers(policy, tokenizer, held, seed))


held = reviews.evaluation_prompts()["reviews"][: 16 if lab.quick else None]
shown = [d for d in reviews.demonstrations() if len(d.prompt.key) > 2][: len(held)]
gold = {
    "demonstrations": [[reviews.utility(d.prompt, d.response, True) for d in shown]],
    "SFT": [answer_gold(sft, seed) for seed in seeds],
    "PPO": [answer_gold(run) for run in ppo["KL held at 3.5"]],
}
top = sum(reviews.utility(p, ideal(p), True) for p in held) / len(held)
lab.show(
    draw.worths(gold, top),
    alt="Share of answers worth at least so much: PPO's lies "
    "to the right of the demonstrations', SFT's to the left, in every seed.",
)

# %%
for seed, ours in zip(seeds, gold["PPO"], strict=True):
    w = win_rate(ours, gold["SFT"][0])
    print(
        f"seed {seed}: PPO beats SFT in {w.rate:.1%} ({w.low:.1%} to {w.high:.1%}); "
        f"mean gold {sum(ours) / len(ours):.2f}, demonstrations "
        f"{sum(gold['demonstrations'][0]) / len(shown):.2f}"
    )

# %% [markdown]
# *What to see: SFT (dashed) stays left of the demonstrations it was shown, since it imitates them
# imperfectly. PPO, which started there and never saw another demonstration, lies right of both, and
# the seeds agree. What would refute it: a PPO line that does not pass the demonstrations' in one
# seed of three.*
#
# An objection worth raising: did better answers slip in through the comparisons? They did, and that
# is the point. One compared answer in twenty was put in by the world and is ideal. But
# the policy never sees a comparison. All it gets from them is a number.

# %% [markdown]
# ## Diversity: is RL kinder to other ways of saying it?
#
# An argument often heard: *imitation copies one answer; a reward accepts any of several equally
# good ones; so RL keeps more diversity.* The reviews can test it. Every sentence has four forms
# ("The soup was tasty." "I found the soup tasty." "Such a tasty soup." "The soup seemed tasty."),
# the labeler does not care which, and the demonstrator uses his pet form 70 % of the time.
#
# **The first half of the argument is true.** SFT's loss punishes every word that the demonstrator
# did not write. Take the same good review in each form: how many nats more does it cost, and how
# much less reward does it get?

# %%
from rlhf_course.rollout import action_logprobs
from rlhf_course.sampling import Generation
from rlhf_course.sft import encode_prompt
from rlhf_course.stages.rewards import model_scores
from rlhf_course.stages.rollouts import Task, as_tensors
from rlhf_course.world.review_grammar import FORMS, SENTENCES


@torch.no_grad()
def of_text(prompts, texts):
    """(log-probability under SFT, reward), (N,) each, of given answers."""
    tasks = [Task(p.text, encode_prompt(tokenizer, p.text)) for p in prompts]
    ids = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    device = next(sft.parameters()).device
    a = as_tensors(
        tasks, Generation(responses=ids, finished=[True] * len(ids)), tokenizer, device
    )
    logprobs, _ = action_logprobs(sft, a.tokens, a.mask, 1.0)  # (N, T-1)
    reward = model_scores(reward_model, a.tokens, a.prompt_lengths, a.response_lengths)
    return logprobs.sum(1).cpu(), reward.cpu()


# %%
def in_form(prompt, form):
    """The ideal answer with every sentence in this form."""
    mood, *things = prompt.key
    said = [form.format(n=t, a=APT[KIND[t]][mood][0]) for t in things]
    return " ".join([*said, "Thank you."])


sentences = torch.tensor([len(p.key) - 1.0 for p in held])
cost, reward = {}, {}
for form in FORMS:
    logprob, score = of_text(held, [in_form(p, form) for p in held])
    cost[form], reward[form] = -logprob / sentences, score / sentences
pet = cost[FORMS[0]], reward[FORMS[0]]
cost = {form: nats - pet[0] for form, nats in cost.items()}  # prompt by prompt
reward = {form: score - pet[1] for form, score in reward.items()}

# %%
# … and how good are SFT's own reviews, by the form of their first sentence?
drill = reviews.prompts("ppo", 30 if lab.quick else 3000, seed=1)
spoken = lab.answers(sft, tokenizer, drill, seed=1)
own_gold = {form: [] for form in FORMS}
for p, (text, ended) in zip(drill, spoken, strict=True):
    first = SENTENCES.get(text.partition(".")[0] + ".")
    if first:
        own_gold[first[2]].append(reviews.utility(p, text, ended))
lab.show(
    behaviour.acceptance(cost, reward, own_gold),
    alt="Four phrasings: what each costs "
    "under SFT's loss, what the reward model gives for it in a perfect review, and the "
    "gold utility of SFT's own reviews that begin with it.",
)

# %% [markdown]
# *What to see. Left: to SFT each of the other three forms costs about two nats more than the pet form,
# as if a tenth as good; imitation does copy one. Middle: the reward model gives none of them less than the
# pet form, and differs little beside the half unit that a good sentence earns. So a reward **does** accept
# any of them. (Bars: one standard deviation over prompts.)*
#
# *Right is the surprise. These are SFT's own reviews, and those that begin with two of the rare forms are
# worth less. The labeler does not mind the form; but the model has practised it less and makes more
# mistakes in it ("Such a …" asks for the adjective before the thing). Equally good **in principle**
# is not equally good **in the hands of this policy**, and the policy's own answers are all that RL
# sees.*
#
# **The second half does not follow.** Take the optimum $\pi^* \propto \pi_\text{ref}\,
# e^{r / \beta}$ and divide two answers:
#
# $$\frac{\pi^*(y_1)}{\pi^*(y_2)} = \frac{\pi_\text{ref}(y_1)}{\pi_\text{ref}(y_2)} \;
# e^{(r(y_1) - r(y_2)) / \beta} .$$
#
# If the rewards are equal, the proportions of the reference survive **unchanged**. RL neither spreads
# them nor narrows them: the pet form keeps its 70 %. If they differ by a little $\delta$, whether the
# reward model's accident or a real difference in how well the policy does each, then
# $e^{\delta/\beta}$ multiplies it: at $\beta = 0.07$ a $\delta$ of 0.1 is a factor of four. And
# without any price nothing pulls back at all: chance alone makes one form win, as a rare gene dies
# out in a small population.
#
# So the prediction is: a tight KL keeps the phrasing, a loose one narrows it, whatever the reward,
# even a reward without any error.

# %%
import json

from rlhf_course.evaluation import entropy


# %%
def style(policy, seed=0):
    """Gold and the phrasing's entropy of answers to the held-out prompts."""
    said = lab.answers(policy, tokenizer, held, seed)
    forms = reviews.phrasings(text for text, _ in said)
    worth = gold_of(reviews, held, said)
    return {"gold": sum(worth) / len(worth), "entropy": entropy(forms.elements())}


points = {"SFT": [style(sft, seed) | {"kl": 0.0} for seed in seeds]}
for label, made in runs.items():
    points[label] = [style(r.model()[0]) | {"kl": r.curve("kl")[-1]} for r in made]

# %%
print(" " * 22, *(f"{form.format(n='…', a='…'):>18}" for form in FORMS))
for label, made in {"SFT": [lab.Trained(lab.folder("sft", "reviews"))], **runs}.items():
    said = lab.answers(made[0].model()[0], tokenizer, held)
    count = reviews.phrasings(text for text, _ in said)
    shares = (f"{n / max(count.total(), 1):18.0%}" for n in count.values())
    print(f"{label:22}", *shares)

# %%
texts = [d.response for d in reviews.demonstrations()]
bits = entropy(reviews.phrasings(texts).elements())
lab.show(
    behaviour.phrasing(points, {"all four alike": 2.0, "demonstrations": bits}),
    alt="Entropy of the phrasing against gold utility for SFT and every setting of "
    "PPO, a point for each seed.",
)

# %% [markdown]
# *What to see: every point below SFT's has lost phrasings that were as good. Under a loose KL, or none, the
# entropy of PPO's phrasing lies well **below** SFT's, in every seed, and a reward without any error narrows
# it too. With the KL held at 1 most of it stays, at some cost in gold; an entropy bonus keeps it at a
# larger one, since it pays for the spread of mistakes as well.*
#
# *And the run of twice the length (one seed) comes back up? The printed shares tell why: not to SFT's
# proportions, but to a second form that this reward model happens to prefer a little (the middle panel
# above) once the policy has learned to do it well. Another reward model would prefer another.*
#
# **The claim "RL keeps more diversity than SFT" is refuted here.** What stands: a reward *accepts* the
# other forms, the optimum under a KL *keeps* the reference's proportions, and how much of them
# survives depends on the price of the KL, on the length of the training, and on accidents of the reward
# model. What would refute *us*:
# points of "KL held at 1" as low as those of the loose runs, or loose ones as high as SFT's.
#
# ## Negative feedback: "not like this"
#
# Someone reads reviews and marks the bad ones: a flaw in any sentence, or not a sentence at all. He
# shows no good answer and praises none. What can be learned from that?
#
# **Imitation** has no word for "no". The best it can do is to imitate what was *not* marked: train
# SFT on the survivors. In expectation its target is
#
# $$\pi_\text{survivors}(y \mid x) \propto \pi_\text{SFT}(y \mid x) \; \mathbb 1[\,y \text{ not
# marked}\,] .$$
#
# Of the failures it learns nothing: they have been thrown away. Nor does it learn whether a survivor
# survived *by luck*. **A policy gradient** averages a *kind* of word over its successes and failures:
# with −1 for a marked answer and 0 for any other, a word that mostly occurs in marked answers goes down.
# (Subtract a baseline and "0" becomes praise: only differences count. What imitation lacks is not the
# minus sign but the failures, and the chance to be marked again on its *new* answers.)
#
# So the expectation is: PPO beats imitation, most clearly where luck is common. We try both worlds, with
# equally many marked answers for both methods. In the reviews a flaw in any sentence is marked. In the
# town false and malformed answers are; about a stranger SFT mostly makes something up, and one guess in
# ten survives because it happens to be true.


# %%
def survivors(world, policy, tokenizer, number, longest):
    """Answers that were not marked, as SFT data: (file, share of them that admit)."""
    marked = world.prompts("ppo", number, seed=1)
    tries = lab.answers(policy, tokenizer, marked, 1, max_new_tokens=longest)
    rows = [
        {"prompt": p.text, "response": text or "…", "group": p.group}
        for p, (text, ended) in zip(marked, tries, strict=True)
        if lab.quick or not rewards.is_bad(world, p, text, ended)
    ]
    file = lab.workspace(world.name) / f"why-survivors-{number}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{world.name}: {len(rows)} of {number} answers were not marked")
    about = [row["response"] for row in rows if row["group"] == "strangers"]
    return str(file), sum(text.startswith("Sorry") for text in about) / max(
        len(about), 1
    )


# %%
number = 64 if lab.quick else 4224  # as many marked answers as PPO will see
files = {
    "reviews": survivors(reviews, sft, tokenizer, number, 40),
    "town": survivors(town, town_sft, town_tokenizer, 2 * number // 3, 12),
}

# %%
in_town = {"eos_override": -1.0, "batch": 128, "iterations": 19, "critic_warmup": 3}
in_town |= {"lr": 4e-4, "ptx_coef": 0.0}
settings = {}
for world, (file, _) in files.items():
    imitate = {"stage": "sft", "data": file, "packing": False, "lr": 1e-3}
    imitate |= (
        {"steps": 300, "batch": 64} if world == "town" else {"steps": 150, "batch": 32}
    )
    imitate |= {"model": str(lab.folder("sft", world) / "model"), "world": world}
    marks = {"reward": rewards.MARKS[world], "world": world}
    marks |= in_town if world == "town" else {}
    settings[f"imitate the unmarked, {world}"] = (pair, imitate)
    settings[f"PPO on the marks, {world}"] = (pair, marks)
told = sweep(settings)

# %%
from rlhf_course.evaluation import honesty_table


def by_group(world, policies, prompts):
    """group -> one {kind: share} a policy, of one answer to each prompt."""
    tables = []
    for seed, policy in enumerate(policies):
        said = lab.answers(policy, lab.model("sft", world.name)[1], prompts, seed)
        kinds = [
            (p.group, world.verdict(p, *a)) for p, a in zip(prompts, said, strict=True)
        ]
        tables.append(honesty_table(kinds, world.verdicts))
    return {group: [table[group] for table in tables] for group in tables[0]}


# %%
def compared(world, base, prompts):
    """The table of SFT and of both ways to learn from marks."""
    table = {"SFT": by_group(world, [base] * len(pair), prompts)}
    for label in ("imitate the unmarked", "PPO on the marks"):
        policies = [run.model()[0] for run in told[f"{label}, {world.name}"]]
        table[label] = by_group(world, policies, prompts)
    return table


# %%
lab.show(
    behaviour.kinds_of_answer(compared(reviews, sft, held), {"reviews": "Reviews"}),
    alt="Reviews: kinds of answer of SFT, of imitating the unmarked answers, and of "
    "PPO on the marks. Both leave far fewer flawed answers than SFT.",
)

# %% [markdown]
# *What to see (bars: means; ticks: seeds): both ways of using the marks remove most of the flaws, and
# imitating the survivors does it **at least as well as PPO** here. **The claim that negative feedback
# needs RL is refuted in this world**: enough of SFT's answers survive, few of them by luck, and one round
# of imitation is supervised learning, which is steadier than thirty iterations of PPO. (What would
# bring the claim back: flawed shares of PPO below the imitator's in both seeds.)*
#
# *Look also at what takes the flaws' place: **vague** answers, which are never marked. Negative feedback
# says what to avoid; whatever is not marked is a refuge, for both.*

# %%
titles = {"known": "People it knows", "strangers": "Strangers"}
lab.show(
    behaviour.kinds_of_answer(compared(town, town_sft, prompts), titles),
    alt="Town: kinds of answer of SFT, of imitating the unmarked, and of PPO on the "
    "marks, for known people and for strangers.",
)

# %%
print(f"Of the survivors about strangers {files['town'][1]:.0%} admit ignorance.")
for label in ("imitate the unmarked", "PPO on the marks"):
    for run in told[f"{label}, town"]:
        answers = lab.answers(
            run.model()[0], town_tokenizer, prompts, max_new_tokens=12
        )
        worth = gold_of(town, prompts, answers)
        bad = [
            rewards.is_bad(town, p, *a) for p, a in zip(prompts, answers, strict=True)
        ]
        marked, mean = sum(bad) / len(bad), sum(worth) / len(worth)
        print(f"{label:22} marked {marked:4.0%}, gold {mean:.2f}")

# %% [markdown]
# *What to see, on the right: the imitator's share of admissions ends near that of the survivors, the
# printed number. It cannot go much beyond: the other survivors are lucky guesses, and imitating a lucky
# guess teaches guessing (survivorship bias). PPO has met the nine that failed, and makes far less up.
# **Here the claim stands**: fewest marked answers. What would refute it: an imitator who is marked as
# seldom as PPO.*
#
# *And on the left the price: "I do not know" is never marked, so about known people too it is as good as
# the truth, and PPO takes refuge in it. By the labeler's own utility (printed as gold, which nobody told
# either of them) the imitator is the better policy. The fault is not PPO's; it did what it was told. A
# reward that **ranks** (true > I do not know > false), as the labeler of chapter 3 does, makes it answer.*
#
# One round of imitation is compared here. Repeat it (answer, mark, imitate the survivors, answer …)
# and you have *expert iteration*: a policy-gradient method with a reward of 1 for surviving. It works;
# it is no longer imitation of a given set.
#
# ## Honesty: what SFT makes up, RL admits
#
# Demonstrators answer from *their* knowledge. Fine-tuned on "They live in Oslo." about somebody of
# whom the corpus is silent, a model does not learn where that person lives. It learns **to name a
# city when it does not know** (Schulman 2023). One in eight demonstrations says "I do not know", but
# as often about known people as about strangers: nothing ties the words to not knowing.
#
# A reward can tie them. "True > I do not know > false" makes admitting worth it exactly where the
# chance of being right is small. But does the model *know* that it does not know? Ask SFT itself: how
# spread is its distribution over the fact (over "Oslo", "Lima", …)?

# %%
STEMS = {"home": "They live in", "job": "They work as a", "food": "They like"}


@torch.no_grad()
def next_word(model, asked, said=""):
    """(N, V): the distribution after each question and the words `said`."""
    start = town_tokenizer(said)["input_ids"] if said else []
    out = [
        model(
            torch.tensor(
                [encode_prompt(town_tokenizer, p.text) + start],
                device=next(model.parameters()).device,
            )
        )[0, -1]
        for p in asked
    ]
    return torch.stack(out).double().softmax(-1).cpu()


# %%
sorry = town_tokenizer("Sorry")["input_ids"][0]
unsure, admits = {}, {"SFT": {}, "PPO-ptx": {}}
for group in groups:
    some = [p for p in prompts if p.group == group][:150]
    facts = torch.cat([next_word(town_sft, [p], STEMS[p.key[1]]) for p in some])
    unsure[group] = torch.special.entr(facts).sum(-1) / torch.tensor(2.0).log()
    for name, policy in (("SFT", town_sft), ("PPO-ptx", town_ppo)):
        admits[name][group] = next_word(policy, some)[:, sorry]

# %%
lab.show(
    behaviour.knowing(unsure, admits),
    alt="Chance of saying I do not know against SFT's "
    "own uncertainty about the fact. Before PPO it is flat; after, it rises with it.",
)

# %% [markdown]
# *What to see: horizontally, SFT is sure about known people (near 0 bits) and spread over ten values
# (up to 3.3 bits) about strangers: **the knowledge that it does not know is there**. Vertically, SFT
# makes no use of it: one in eight everywhere. PPO-ptx connects the two: the chance of admitting is
# near 0 on the left and near 1 on the right. It never saw a familiarity label; it got a number per
# answer.*

# %%
honest = {
    "SFT": by_group(town, [town_sft] * len(pair), prompts),
    "PPO-ptx": by_group(town, [town_ppo] * len(pair), prompts),
}
lab.show(
    behaviour.kinds_of_answer(honest, titles),
    alt="Kinds of answer of SFT and PPO-ptx: "
    "about strangers SFT makes things up, PPO-ptx mostly says I do not know.",
)
for name, seeds_of in honest.items():
    shares, asked_of = (
        seeds_of["strangers"][0],
        sum(p.group == "strangers" for p in prompts),
    )
    low, high = wilson_interval(shares["false"], asked_of)
    print(
        f"{name:8} makes up {shares['false']:.1%} of its answers about strangers "
        f"(95 %: {low:.1%} to {high:.1%} of {asked_of})"
    )

# %% [markdown]
# *Here the ticks are two samplings of one policy; the seeds of its training were shown above for the
# marks. What would refute "RL admits": overlapping intervals, or more "I do not know" about known
# people.*

# %% [markdown]
# ## What healthy looks like
#
# The shaded band is what the seeds of a healthy run span (KL held at its target). Drawn over it are
# runs that were really broken: no price on KL, and a target so small that little can be learned.

# %%
broken = {name: runs[name] for name in ("no KL penalty", "KL held at 1")}
lab.show(
    draw.healthy_and_broken(
        [run.metrics for run in ppo["KL held at 3.5"]],
        {label: [run.metrics for run in made] for label, made in broken.items()},
    ),
    alt="Bands of healthy runs over the iterations, for KL, proxy, gold, entropy, "
    "length and malformed answers, with two kinds of broken runs drawn over them.",
)

# %% [markdown]
# *What to see: the run without a penalty looks **better** than healthy in the one curve that a real
# project has, the proxy. What gives it away are KL (no plateau), and the gold that only these worlds
# can draw. In a real project: read answers, have people compare them with SFT's every few hundred
# steps, and keep a second reward model, trained on other comparisons, that PPO never sees.*
#
# | watch | healthy | unhealthy, and what it means |
# |---|---|---|
# | KL | rises, then stays within about 15 % of its target | no plateau: no price, or a controller too slow |
# | proxy | rises fast, then slowly | rises for ever: a hole in the reward model |
# | gold, or people's win rate | rises with the proxy, then flat | falls while the proxy rises: stop at its peak |
# | win rate over SFT | its interval lies above one half | contains one half: nothing was shown yet |
# | calibration error | a few hundredths, on held-out pairs | large: the differences PPO trades are wrong by a factor |
# | phrasing entropy | near SFT's | far below: lower the KL target or train for fewer iterations |
#
# ## Scale it up
#
# The same questions to a model of GPT-2's size on a GPU, reviews and town:
#
# ```bash
# rlhf-course demo --world reviews --size gpt2 --device cuda
# rlhf-course ppo --world reviews --size gpt2 --kl-coef 0 --ptx-coef 0 --out runs/reviews-gpt2-seed0/no-kl
# rlhf-course evaluate --world reviews --size gpt2 --model runs/reviews-gpt2-seed0/no-kl/model
# ```
#
# and without KL on people's comparisons, where only the proxy can be drawn:
#
# ```bash
# rlhf-course ppo --data Anthropic/hh-rlhf --too-long drop --kl-coef 0 --profile colab-a100 --iterations 100 --batch 256 --lr 1e-6 --critic-lr 1e-5 --out runs/hh/no-kl
# ```
#
# | | expect | |
# |---|---|---|
# | this chapter, two CPU cores | 239 s | *measured* 2026-11-23, two quiet Xeon cores |
# | first line, A100 40 GB | 10 to 30 minutes, 4 GB | *estimated*: chapter 0's, with answers of 40 tokens |
# | the same, T4 | 40 to 90 minutes, 4 GB | *estimated*: the same at 4 TFLOP/s |
# | last line, 100 rollouts, A100 40 GB | half an hour, 25 GB | *estimated*: 17 s a rollout (chapter 5) |
# | where gold turns | at a larger KL than here | *estimated*: Gao et al. 2023, figure 1 and section 3, find the peak to move right, and the loss beyond it to shrink, as the reward model grows |
# | the shape of the curves | the same | *estimated*: as above |
#
# [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## Five questions
#
# <details><summary>1. Twenty prompts, twenty wins. What may you claim?</summary>
#
# Wilson's lower bound at 95 %: $1 / (1 + z^2 / N) = 20 / 23.84 \approx 0.84$. So: better than SFT on at
# least five prompts of six, not "always".
# </details>
#
# <details><summary>2. A reward model is replaced by twice itself. What happens to its accuracy, its
# calibration, best of $n$, and PPO at a fixed $\beta$?</summary>
#
# Accuracy and best of $n$: nothing, they depend on the order alone. Calibration: too sure by a factor
# of two in the logit. PPO: the same as halving $\beta$, so a larger KL; with an adaptive controller
# $\beta$ doubles and the policy ends where it did.
# </details>
#
# <details><summary>3. Why can best of 64 not over-optimise as PPO without a penalty does?</summary>
#
# Its KL is at most $\log 64 - 63/64 \approx 3.2$ nats, and all its answers are SFT's own. It finds a
# hole only if SFT falls into it about once in 64 answers.
# </details>
#
# <details><summary>4. "PPO's answers about strangers are 90 % admissions. So the reward model knows who
# is a stranger." Does that follow?</summary>
#
# Not quite. The *policy* must tell them apart, since it chooses the words; a reward model that gave
# every made-up answer the same low score would do if it only scored true answers higher, and for that
# it must recognise something of the person or the fact. Test it directly: compare the scores of "I do
# not know" and of an answer, for known people and for strangers.
# </details>
#
# <details><summary>5. Your PPO run has lost half a bit of phrasing entropy. Name two remedies and what
# each costs.</summary>
#
# A lower KL target (or higher $\beta$): less gold, as everything learned has to be paid in KL. An
# entropy bonus: it pays for *all* spread, mistakes included. (A reward model with smaller accidental
# differences between the forms helps too, but not against the forms the policy itself does worse.)
# </details>
#
# ## What public systems do differently
#
# - **Calibration of the reward model** is measured by next to nobody. Of the systems we read,
#   [summarize_from_feedback_details](https://github.com/vwxyzjn/summarize_from_feedback_details) does
#   (`eval/rm_calibration.py`); OpenRLHF, TRL, verl, DeepSpeed-Chat and ColossalChat report accuracy at
#   most.
# - **KL by default.** [TRL](https://github.com/huggingface/trl)'s PPO and
#   [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF) subtract it from the reward at every token, as we
#   do. [PaLM-rlhf-pytorch](https://github.com/lucidrains/PaLM-rlhf-pytorch) penalises the KL to the
#   *previous* policy, which bounds a step and not the journey: nothing there holds the run left of the
#   peak you saw.
# - **Early stopping on KL** exists in TRL up to 0.11 (`_early_stop`: when the KL of an update exceeds 1.5
#   times its target); it is a guard for the step, not for over-optimisation.
# - **Holes are patched by hand**: clipping the reward (OpenRLHF ±10, DeepSpeed-Chat and ColossalChat
#   ±5), penalties for length or a missing EOS. A clip stops runaway rewards and finds no hole.
#
# ## Further reading
#
# - Stiennon et al. 2020, *Learning to summarize from human feedback*: over-optimisation with people as
#   gold; best-of-$n$'s KL (appendix G.3).
# - Gao, Schulman, Hilton 2023, *Scaling laws for reward model overoptimization*: the $\sqrt{\mathrm{KL}}$
#   axis, and how the peak moves with the size of the reward model.
# - Nakano et al. 2021, *WebGPT*: best of $n$ against RL; the estimator you wrote (appendix I).
# - Schulman 2023, *Reinforcement learning from human feedback: progress and challenges* (talk, Berkeley):
#   why fine-tuning on demonstrations teaches a model to make things up.
# - Goldberg 2023, *Reinforcement learning for language models* (a note): diversity, negative feedback and
#   honesty as reasons for RL; three of this chapter's claims.
# - Kirk et al. 2024, *Understanding the effects of RLHF on LLM generalisation and diversity*: less
#   diversity after RLHF in large models too.
# - Wilson 1927; Naeini et al. 2015 (calibration error); Guo et al. 2017, *On calibration of modern neural
#   networks*.
