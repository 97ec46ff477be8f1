# %% [markdown]
# # Chapter 3: The reward model
#
# The SFT model of chapter 2 answers everybody, and makes up what it does not know. Nobody has told
# it that this is bad. In this chapter a second model learns from people's *choices* which of two
# answers they like better, and turns that into a number: the **reward**. Chapter 5 will train the
# policy to earn it.
#
# **You will be able to**
#
# - say why preferences are collected rather than scores, and derive the loss $-\log\sigma(\Delta)$
#   from a model of a labeler who makes mistakes (Bradley–Terry);
# - train on all pairs of $K$ ranked answers at once, and say what this saves;
# - read the reward at the right token, and recognise a model that reads it at the wrong one;
# - fix what comparisons leave open: the zero and the unit of the reward;
# - judge a reward model: accuracy beside the best possible, calibration, scores by kind of answer.
#
# ## Where we are on the map

# %%
import math
import random
from collections import defaultdict

import torch
from rlhf_course.plots import course_map
from rlhf_course.plots import lessons_reward_model as figures

lab.show(course_map.course_map(3),
         alt="Map of the course: GPT and SFT are built; the reward model is next.")

# %% [markdown]
# *What to see: GPT and SFT stand. The reward model starts from a copy of the SFT model and will
# pay the policy in chapter 5.*
#
# ## 1. What people are asked
#
# The town's labeler is shown one question and several answers, and puts the answers in order, best
# first. Most answers are sampled from the SFT model; one was put there by hand (an admission of
# ignorance, or a damaged answer), so that the model sees what a policy may try later.

# %%
from rlhf_course.stages.comparisons import read_comparisons_run

world = lab.world("town")
folder = lab.folder("comparisons")
comparisons = read_comparisons_run(folder / "comparisons.jsonl")
held = read_comparisons_run(folder / "heldout.jsonl")
print(f"{len(comparisons)} prompts to learn from, {len(held)} held out\n")
long = [c for c in comparisons if len(c.responses) > 3]
sorted_well = {id(c) for c in long if list(c.utilities) == sorted(c.utilities)[::-1]}
familiar = [c for c in long if c.prompt.group == "known" and id(c) in sorted_well]
mistaken = [c for c in long if id(c) not in sorted_well]
for one in familiar[:1] + mistaken[:1]:
    print(f"{one.prompt.text}   ({one.prompt.group})")
    for place, (said, worth) in enumerate(zip(one.responses, one.utilities), 1):
        print(f"  {place}. {said:32} worth {worth:+.1f}")

# %% [markdown]
# The column *worth* is the labeler's true opinion (true +1, "I do not know" 0, false −1, malformed
# −1.5, and 0.3 more for courtesy). **No learner ever sees it.** It is there because this world is
# made up, and lets us check everything. The first example, about a person the corpus knows, was put
# in the order of the worths; the second was not: the labeler makes mistakes, as people do, more
# often where two answers are nearly as good.
#
# ### Why not ask for a score?
#
# One could ask "how good is this answer, from 1 to 10?" and fit the numbers by regression. Below,
# three raters see the same fourteen answers, agree about their order as well as anyone, and each
# has a scale of his own.

# %%
rng = random.Random(1)
worths = [rng.uniform(-1.5, 1.3) for _ in range(14)]
scales = {"severe": (1.0, 3.0), "generous": (0.8, 8.0), "fond of extremes": (3.0, 5.0)}
scores = {
    name: [offset + gain * (w + rng.gauss(0, 0.12)) for w in worths]
    for name, (gain, offset) in scales.items()
}
lab.show(figures.raters(worths, scores),
         alt="Left: three raters' scores over the true worth, on lines of different "
             "slope and height. Right: each orders most pairs as the worths do.")

# %% [markdown]
# *What to see: on the left, the best answer gets a 4 from one rater and nearly a 9 from another. A
# regression on the pooled scores learns above all who was rating. On the right, the order of pairs:
# whoever is asked, nearly all are as the true worths say.*
#
# Comparisons ask for less and get more: no scale has to be agreed on or remembered, a
# labeler who gets tired or strict still orders two answers, and a difference too small for a scale
# can still be seen side by side. The price: a comparison says nothing about *how much* better, and
# nothing about the absolute height. What follows lives with both.
#
# ## 2. From choices to a loss: Bradley and Terry
#
# ### The labeler as a random number generator
#
# Let answer $i$ have the worth $u_i$. At the moment of choosing the labeler feels
#
# $$ v_i = \kappa\,u_i + g_i, $$
#
# the worth times a sharpness $\kappa$, plus noise $g_i$, drawn anew for each answer, and prefers
# the larger $v$. Let the noise follow the standard Gumbel distribution, the law of the largest of
# many small random influences:
#
# $$ F(g) = e^{-e^{-g}}, \qquad f(g) = F'(g) = e^{-g}\,e^{-e^{-g}} . $$
#
# With $\Delta = \kappa\,(u_i - u_j)$, answer $i$ wins when $g_j < g_i + \Delta$. Given $g_i = g$
# this has the probability $F(g + \Delta)$; averaging over $g$,
#
# $$
# P(i \succ j) = \int_{-\infty}^{\infty} f(g)\,F(g+\Delta)\,\mathrm{d}g
#  = \int_{-\infty}^{\infty} e^{-g}\,e^{-e^{-g}}\,e^{-e^{-g}e^{-\Delta}}\,\mathrm{d}g .
# $$
#
# Substitute $t = e^{-g}$, so that $\mathrm{d}t = -e^{-g}\,\mathrm{d}g$ and $t$ runs from $\infty$
# to $0$:
#
# $$
# P(i \succ j) = \int_0^{\infty} e^{-t\,(1 + e^{-\Delta})}\,\mathrm{d}t
#  = \frac{1}{1+e^{-\Delta}} = \sigma(\Delta).
# $$
#
# The difference of two Gumbel variables is *logistic*; this is where the sigmoid comes from. The
# result is the model of Bradley and Terry (1952). Count it, to be sure:

# %%
def gumbel(count):
    return -torch.log(-torch.log(torch.rand(count, generator=generator).clamp(1e-9)))


generator = torch.Generator().manual_seed(0)
gaps = torch.linspace(-5, 5, 21)
wins = [(gumbel(4000) + gap > gumbel(4000)).float().mean().item() for gap in gaps]
lab.show(figures.gumbel_duel(2.0, gaps.tolist(), wins),
         alt="Left: two Gumbel densities, shifted by 2, that overlap. Right: the "
             "counted share of wins lies on the sigmoid of the difference.")

# %% [markdown]
# *What to see: on the left the worse answer sometimes feels better, where the curves overlap. On
# the right the share of duels won lies on* $\sigma(\Delta)$.
#
# ### The loss
#
# A model $r_\theta(x, y)$ with prompt $x$ and answer $y$ is to take the place of $\kappa u$. The
# likelihood of a labeled pair, $y_w$ preferred to $y_l$, is
# $\sigma\big(r_\theta(x,y_w) - r_\theta(x,y_l)\big)$. Maximum likelihood minimises
#
# $$ L(\theta) = -\frac1N \sum_{(x,\,y_w,\,y_l)} \log \sigma(\Delta_\theta), \qquad
#    \Delta_\theta = r_\theta(x, y_w) - r_\theta(x, y_l). $$
#
# From $\sigma' = \sigma\,(1-\sigma)$ and $1 - \sigma(\Delta) = \sigma(-\Delta)$ its gradient is
#
# $$ \frac{\partial}{\partial\Delta}\big(-\log\sigma(\Delta)\big) = -\sigma(-\Delta), $$
#
# in size the probability that the model gives to the *wrong* order. Three things follow.
#
# 1. **It is classification**, with the two answers in place of two classes. A model that cannot
#    tell them apart pays $\log 2 \approx 0.693$ nats: remember this number.
# 2. **Only differences matter.** Replace $r(x,y)$ by $r(x,y) + c(x)$ with *any* function $c$ of the
#    prompt: no $\Delta$ changes, so neither does the loss. Comparisons cannot say how good an answer
#    is in itself, nor whether the answers to one prompt are better than those to another. §5 fixes
#    a constant; the rest of $c(x)$ stays unknown. (PPO compares an answer with what it expects for
#    this very prompt, its *baseline*, chapter 4; what all answers have in common drops out there.)
# 3. **The labeler's sharpness is inside.** A perfect model learns $r = \kappa u + c(x)$. In this
#    town $\kappa = 3$.
#
# A **margin** $m$ asks for more: $-\log\sigma(\Delta - m)$. Llama 2 (Touvron et al. 2023) used it
# for labels that also say *how much* better the winner is.

# %% exercise reward_model.pairwise_loss
# hint: Subtract the rejected from the chosen reward; where there is a margin, it makes the task
#   harder, so it is taken off the difference.
# hint: $\log(\sigma(x))$ in two steps gives $-\infty$ for a pair that is very wrong. Look for one
#   function of `torch.nn.functional` that does both.
# hint: Sum the losses, then divide by `denominator`, or by the number of pairs where it is None. No
#   pair at all costs 0, not NaN.

# %% [markdown]
# Your function, drawn:

# %%
differences = torch.linspace(-6, 6, 121)
losses = [pairwise_loss(d[None], torch.zeros(1)).item() for d in differences]
lab.show(figures.pairwise_loss_shape(differences.tolist(), losses),
         alt="Left: the loss falls from 6 at a difference of -6 through log 2 at 0 "
             "to 0. Right: its gradient's size falls from 1 to 0 along a sigmoid.")

# %% [markdown]
# *What to see: a pair that is ranked wrongly pulls with full strength, one that is ranked surely
# and rightly with hardly any. The loss is linear on the left, so one absurd label cannot outweigh
# all the others, as it could with a squared error.*
#
# ## 3. K answers at a time
#
# Ranking five answers takes a labeler little longer than comparing two, and holds ten pairs.
# With the same Gumbel noise, the whole order has a probability too. The answer that feels best among
# $K$ is $i$ with probability $\int f(g)\prod_{j\ne i}F(g+s_i-s_j)\,\mathrm{d}g$, with $s=\kappa u$,
# and the substitution of §2 gives $e^{s_i} / \sum_j e^{s_j}$, the softmax. Now take the best away.
# Does it matter to the others who won? No: $t_i = e^{-v_i}$ is exponentially distributed with rate
# $e^{s_i}$ (since $P(e^{-g} > t) = P(g < -\log t) = F(-\log t) = e^{-t}$), like the time until an
# alarm clock rings, and the best answer is the one whose clock rings first. Exponential clocks have
# no memory: once one has rung, the others race as if they had just been started. So repeat:
#
# $$ P(y_1 \succ y_2 \succ \dots \succ y_K) = \prod_{k=1}^{K}
#    \frac{e^{s_k}}{\sum_{l \ge k} e^{s_l}} \qquad \text{(Plackett–Luce).} $$
#
# Leave all answers but two out of the ranking and what remains is Bradley–Terry again, since the
# noise of the others plays no part. So every pair of the order is a fair Bradley–Terry observation,
# and InstructGPT (Ouyang et al. 2022, Eq. 1) uses just these pairs:
#
# $$ L = -\frac{1}{\binom K2}\sum_{i<j} \log\sigma(s_i - s_j), \qquad \text{then the mean over
#    prompts.} $$
#
# The ten pairs of an order are not independent (five noises made them all), so this is not the
# exact likelihood. But each pair's term is smallest, in the mean over many labelers, at the true
# difference, so the minimum lies at the same place; and it treats "first against second" and "fourth
# against fifth" alike.
#
# ### Why all pairs of a prompt belong into one batch element
#
# Shuffle the pairs over an epoch, and every answer comes by $K-1$ times, in different updates.
# InstructGPT (§3.5) found that a single such epoch **overfits**: the model meets each text several
# times and begins to remember it. Put all pairs of a prompt into one batch element instead: each
# answer is read *once*, in one update. It is also **cheaper**: $K$ forward passes for
# $\binom K2$ comparisons, where pair by pair needs $K(K-1)$.

# %%
ranked = next(c for c in comparisons if len(c.responses) == 5)
lab.show(figures.kwise_pairs(ranked.responses),
         alt="Left: a table of five answers by five, the ten pairs above the diagonal "
             "filled. Right: answers read, K against K times K minus 1.")

# %% [markdown]
# *What to see: left, the ten differences of one prompt; those under the diagonal are the same pairs
# the wrong way round. Right, what reading them costs: 5 passes instead of 20 at K = 5.*
#
# Identical answers are merged before ranking, so a prompt may have fewer than $K$; `mask` says which
# places are real. Equal ranks are ties, say nothing, and are left out.

# %% exercise reward_model.kwise_loss
# hint: With `scores[:, :, None] - scores[:, None, :]` all differences of a prompt are one (K, K)
#   table. Which of its entries are pairs? Build the bool table from `ranks` in the same way.
# hint: First the mean over each prompt's pairs, then the mean over prompts that have a pair.
#   `masked_mean(x, mask, dim)`, imported above, does the first.
# hint: Put 0 in the place of differences that are no pairs *before* the logarithm. A masked place
#   may hold NaN or infinity, and NaN times 0 is NaN, in the gradient too.

# %% [markdown]
# ## 4. Where is the reward?
#
# The reward model is a copy of the SFT model whose output matrix is replaced by a single vector
# $w$: each position $t$ gets the number $s_t = w^\top h_t + b$. But an answer needs *one* number.
#
# - **At the last token.** Attention is causal, so only there has the model read everything, the
#   end-of-sequence token (EOS) included. This is what InstructGPT and most systems do.
# - **The mean over the answer's tokens.** Every token says what it thinks of the text so far. This
#   is more robust to one odd position, but tokens at the start must vote before they have seen
#   anything.
# - The **sum** would count every fault once; it can also learn to pay for length alone (we will
#   see it do so).
#
# In a batch the rows have different lengths and are padded on the right. **The index of the last
# token must come from the lengths.** The tempting alternative, "the last token that is not the
# pad", breaks where pad and EOS are the same token, as they are by habit with GPT-2:

# %%
_, tokenizer = lab.model("sft")
EOS = tokenizer.eos_token_id
row = tokenizer("They live in Oslo.")["input_ids"] + [EOS]
padded = torch.tensor([row + [EOS] * 4])  # pad == EOS, out of habit
length = torch.tensor([len(row)])
by_content = (padded != EOS).sum(dim=1) - 1
print("from the lengths:       ", tokenizer.decode(padded[0, length - 1]))
print("from `token != pad`:    ", tokenizer.decode(padded[0, by_content]))
print("the last column instead:", tokenizer.decode(padded[0, [-1]]), "(which is a pad)")

# %% [markdown]
# The second reads the full stop, where the model does not know yet whether the answer ends there;
# the third reads a pad, and *which* pad depends on the longest neighbour in the batch. Neither
# raises an error, and both train. The gallery below shows what they cost.

# %% exercise reward_model.last_token_reward
# hint: `lengths` counts tokens; the last token's index is one less.
# hint: `gather` along dimension 1 wants an index of the same number of dimensions: (B, 1).

# %% exercise reward_model.mean_reward
# hint: The line above the blank has made a mask of the response's tokens.
# hint: `masked_mean(x, mask, dim=1)`, imported above, sums where the mask is True and divides by the
#   count. A plain product with the mask would let a NaN on a pad through.

# %% [markdown]
# ## 5. Zero and unit of the reward
#
# After training, $r$ is known only up to a constant. PPO, which compares, should not care about a
# constant either. In practice it does: rewards get clipped at fixed bounds, an answer that never
# ends is given a fixed penalty, and the *critic*, the network that learns to predict the reward
# (chapter 4), starts as a copy of the reward model. And the *unit* matters in the trade against the
# KL penalty of chapter 4, $r - \beta\,\mathrm{KL}$: a model that is twice as sure halves the effect
# of the price $\beta$. So after training one measures and corrects, once (this bias $b$ is added to
# the finished reward; it is not the head's of §4):
#
# $$ r' = g\,r + b. $$
#
# | | measured on | gain $g$ | bias $b$ |
# |---|---|---|---|
# | Stiennon et al. 2020, Ouyang et al. 2022 | the demonstrations | 1 | $-\operatorname{mean}(r)$ |
# | Ziegler et al. 2019 | answers of the reference policy | $1/\operatorname{std}(r)$ | $-\operatorname{mean}(r)/\operatorname{std}(r)$ |
#
# The deviation is the population's (divide by $n$): it describes these answers, and estimates
# nothing.

# %% exercise reward_model.normalize_rewards
# hint: Return two Python floats. "bias" leaves the gain at 1.
# hint: For "gain_bias" solve $g\,\bar r + b = 0$ and $g\cdot\operatorname{std}(r) = 1$.
# hint: `std(correction=0)` is the population's. If it is 0, raise ValueError: no gain can make
#   equal rewards vary.

# %% [markdown]
# ## 6. Experiment: train it with your functions
#
# `lab.train` runs the package's own trainer with *your* functions in the place of the package's.
# Reward at the EOS, K-wise loss, 100 updates of 48 prompts.

# %%
mine = lab.train(
    "reward_model", name="chapter-3-mine", steps=100,
    own=[last_token_reward, mean_reward, pairwise_loss, kwise_loss, normalize_rewards],
)
final = mine.metrics[-1]
print(f"loss             {math.log(2):.3f} (a coin) → {final['loss']:.3f} nats a pair")
print(f"held-out pairs   {final['eval_accuracy']:.1%} in the labeler's order")
print(f"best possible:   {final['bayes_closed_book']:.1%} by a reader of its book")
print(f"                 {final['bayes_full']:.1%} by one who knows all")

# %% [markdown]
# Is that accuracy good? **Labels are noisy, so 100 % is out of reach.** With true worths $u$, the
# better answer wins with probability $p = \sigma(3\,|u_i-u_j|)$, and whoever knows all worths is
# right in a share $p$ of such pairs. Averaged over the held-out pairs this is *the best accuracy of
# anyone who knows all*. Our model has read only the corpus, and cannot know facts about strangers;
# *closed book* is the best accuracy for such a reader. Real data sets hide both numbers; one guesses
# at them from how often two labelers agree (about 73 % in InstructGPT).
#
# ### EOS or mean, K-wise or pairwise?
#
# Three variants, three seeds each (order of the data and initial head), with the package's
# functions, and with **the same number of answers read** in an update: as many as 32 prompts have,
# or half as many pairs.

# %%
different = sum(len(c.responses) for c in comparisons) / len(comparisons)  # of K = 5
variants = {
    "EOS, K-wise": {"batch": 32},
    "mean, K-wise": {"batch": 32, "pooling": "mean"},
    "EOS, pairwise": {"batch": round(32 * different / 2), "loss": "pairwise"},
}
seeds = range(1 if lab.quick else 3)
jobs = {
    f"chapter-3 {name} {seed}": dict(stage="reward_model", steps=64, seed=seed, **how)
    for name, how in variants.items() for seed in seeds
}
jobs["chapter-3 sum"] = dict(stage="reward_model", steps=64, batch=32, pooling="sum")
runs = lab.train_many(jobs)
last = {
    name: [runs[f"chapter-3 {name} {seed}"].metrics[-1] for seed in seeds]
    for name in variants
}

# %%
accuracies = {name: [m["eval_accuracy"] for m in rows] for name, rows in last.items()}
best = final["bayes_closed_book"], final["bayes_full"]
lab.show(figures.accuracy_by_seed(accuracies, *best),
         alt="Held-out accuracy of three variants, a dot a seed, beside the best.")
for one, other in (("EOS, K-wise", "EOS, pairwise"), ("mean, K-wise", "EOS, K-wise")):
    pairs = zip(accuracies[one], accuracies[other])
    by_seed = ", ".join(f"{100 * (a - b):+.1f}" for a, b in pairs)
    print(f"{one} minus {other}: {by_seed} points, seed by seed")

# %% [markdown]
# *What to see: each dot is a whole training run. Two variants differ only if their dots separate by
# more than they scatter.*
#
# What to conclude, and what would refute it:
#
# - **K-wise against pairwise.** At equal reading, K-wise sees two to three times as many pairs. If
#   that helps, every difference in the first printed line is positive; a negative one refutes it
#   for this setting. The gain is small, one to three points when this was written, since the pairs of
#   one prompt share their answers. The *overfitting* that InstructGPT reports cannot show here: no run gets
#   through its data even once.
# - **EOS against mean.** If the differences in the second line have both signs, then nothing is
#   shown but the seeds' scatter. So it was when this was written, and so it is at the end of
#   longer training (`rlhf-course reward-model --pooling mean`): on this world the choice
#   does not decide the accuracy. It decides *what each token's score means*, as the next figure shows.
#
# ### Token by token

# %%
from rlhf_course.stages.reward_model import encode_ranked, score_table

person = world.people["known"][0]
home = world.facts[person]["home"]
elsewhere = next(place for place in world.values["home"] if place != home)
said = {"true": f"They live in {home}.", "false": f"They live in {elsewhere}.",
        "idk": "Sorry, I do not know.", "bad": "They live in"}

# %%
question = f"Where does {person} live?"
probe = encode_ranked(tokenizer, question, list(said.values()), [True] * len(said))


@torch.no_grad()
def read_tokens(model):
    readings = []
    for kind, answer in zip(said, probe.answers):
        row = probe.prompt + answer
        scores = model.token_scores(torch.tensor([row]).to(model.bias.device))[0]
        words = [tokenizer.decode([token]).strip(" <|>") for token in row]
        readings.append((kind, [w.replace("endoftext", "EOS") for w in words],
                         scores.tolist()))
    return readings

# %%
readings = {"last": read_tokens(mine.model()[0]),
            "mean": read_tokens(runs["chapter-3 mean, K-wise 0"].model()[0])}
lab.show(figures.token_scores(readings, len(probe.prompt)),
         alt="Scores at every token of four answers; the prompt is shaded. Left the "
             "model read at the EOS, right the one read as a mean.")

# %% [markdown]
# *What to see: grey is the prompt. Left, nothing but the circle at the EOS was ever trained; what
# the model says before means little (and yet chapter 5's critic will start from it, and has to learn
# the rest). Right, every token of the answer takes part, and the dashed mean is the reward: look
# for the token at which the score turns. Try answers of your own: among malformed ones that no
# labeler has seen ("They live in in.") are some that score high.*
#
# ### Does it know how much it knows?

# %%
from rlhf_course.evaluation import expected_calibration_error, reliability_curve

tests = [
    encode_ranked(tokenizer, c.prompt.text, c.responses, c.finished, source=c)
    for c in held
]


@torch.no_grad()
def differences_of(model):
    """Better minus worse, for every held-out pair."""
    out = []
    for start in range(0, len(tests), 128):
        table, there = (t.cpu() for t in score_table(model, tests[start : start + 128]))
        i, j = torch.triu_indices(table.shape[1], table.shape[1], 1)
        out.append((table[:, i] - table[:, j])[there[:, i] & there[:, j]])
    return torch.cat(out)

# %%
def calibration(model):
    difference = differences_of(model)
    asked = torch.arange(len(difference)) % 2  # every other pair the wrong way round
    p = torch.where(asked == 1, difference, -difference).sigmoid()
    return reliability_curve(p, asked, 8), expected_calibration_error(p, asked, 8)


models = {"EOS, K-wise (yours)": mine.model()[0],
          "mean, K-wise": runs["chapter-3 mean, K-wise 0"].model()[0]}
measured = {name: calibration(model) for name, model in models.items()}
lab.show(figures.reliability({name: curve for name, (curve, _) in measured.items()}),
         alt="Left: observed over predicted share of wins with error bars, near the "
             "diagonal. Right: how often each prediction is made.")
for name, (_, error) in measured.items():
    print(f"{name:20} calibration error {error:.1%}")

# %% [markdown]
# *What to see: of the pairs for which the model says 80 %, about 80 % should be won. Points under
# the diagonal on the right half mean it is too sure. Bars are two standard errors.*
#
# Log-loss rewards honest probabilities, so a model trained for one pass is usually well calibrated
# *on the answers it was trained on*. PPO will leave them.
#
# ### What it has learned
#
# The scores of all held-out answers, by kind. What should we expect? Up to the unknown $c(x)$ a
# perfect reader has $r = 3u$. Of known people, a true answer should stand 3 above "I do not know".
# Of strangers, nobody can tell true from false: a stated value is right once in ten, and the labeler
# prefers it to "I do not know" with probability $0.1\,\sigma(3)+0.9\,\sigma(-3)\approx 0.14$. A
# perfect reader's difference is the logit of that:
# $\log(0.14/0.86)\approx -1.8$.

# %%
@torch.no_grad()
def by_kind(model):
    scores = defaultdict(lambda: defaultdict(list))
    for start in range(0, len(tests), 128):
        table, _ = score_table(model, tests[start : start + 128])
        for test, row in zip(tests[start : start + 128], table.tolist()):
            c = test.source
            for said, ended, score in zip(c.responses, c.finished, row):
                kind = world.verdict(c.prompt, said, ended)
                scores[c.prompt.group][kind].append(score)
    return scores


kinds = by_kind(mine.model()[0])
lab.show(figures.score_distributions({g: kinds[g] for g in ("known", "strangers")}),
         alt="Rewards by kind of answer. Known people: stated values above do not "
             "know. Strangers: stated values below do not know.")

# %% [markdown]
# *What to see: compare the bars of a stated value and of "I do not know" in each panel. About known
# people the value stands above, about strangers below: the sign is turned, although the sentences
# are the same. Compare with +3 and −1.8: a model trained briefly is less sure than the perfect one.*
#
# Nobody told the model who is known. It saw strangers of its own (none of those shown here), learned
# that values stated about *unfamiliar names* lose, and generalises: the reward model has learned
# **familiarity**. What it has hardly learned is truth: look at "false" among the known. The SFT
# model seldom says anything false about people it knows, so there were few such comparisons to
# learn from. A policy that found out could profit. Keep that in mind for chapter 7.
#
# ## 7. What healthy looks like
#
# | | healthy | unhealthy |
# |---|---|---|
# | loss at update 0 | near $\log 2 = 0.693$, up to about 0.75 | far above: the head begins too large |
# | loss later | falls below 0.6 within 50 to 100 updates here | exactly 0.693 for ever: all answers get the same score |
# | held-out accuracy | rises towards the closed-book line, ends within 3 to 10 points of it after 100 updates | 50 %: reads the wrong place; *below* 50 %: a sign is turned |
# | accuracy above the "knows all" line | never by more than chance | the held-out pairs leak into training |
# | margin | grows, and slows down | grows on while accuracy stands: over-confident |
# | calibration error | below about 5 % | above 10 %, with the curve flatter than the diagonal |
# | same answer, other batch | the same reward, to rounding | the reward depends on the padding |
#
# The bands are those of this size of model and data. They held for the seeds above.
#
# ### A gallery of unhealthy runs
#
# Each of these was really trained, with one thing broken and all else as in the healthy run beside
# it (EOS, K-wise, seed 0). A function is broken by handing a wrong one to the trainer, under the
# right name.

# %%
def reads_the_last_column(token_scores, lengths):
    return token_scores[:, -1]  # a pad, in every row but the longest


def reads_the_prompt(token_scores, lengths):
    return token_scores[:, 0]  # the same for all answers to a prompt


def turned(scores, ranks, mask=None, denominator=None):
    return kwise_loss(-scores, ranks, mask, denominator)


def broken(name, function=None, stands_for="", **settings):
    own = [last_token_reward]
    if function is not None:
        function.__name__ = stands_for
        own = [function]
    settings = {"steps": 64, "batch": 32, **settings}
    name = f"chapter-3-broken-{name}"
    return lab.train("reward_model", name=name, own=own, **settings)

# %%
gallery = {
    "reads the last column, a pad": broken(
        "column", reads_the_last_column, "last_token_reward"),
    "reads the prompt": broken("prompt", reads_the_prompt, "last_token_reward"),
    "sign of the loss turned": broken("sign", turned, "kwise_loss"),
    "learning rate 60 times too high": broken("rate", lr=0.03),
}
lab.show(
    figures.unhealthy_reward_models(runs["chapter-3 EOS, K-wise 0"].metrics,
                                    {k: run.metrics for k, run in gallery.items()}),
    alt="Training losses of four broken runs beside the healthy one's.")

# %% [markdown]
# *What to see, panel by panel.*
#
# - **Reads the last column**: the loss falls as it should, and the accuracy is as good as the healthy
#   run's. This is the dangerous one; the next figure shows what is wrong with it.
# - **Reads the prompt**: the loss is exactly $\log 2$, and stays there. All answers to a question
#   have the same score. A flat line at 0.693 always means this.
# - **Sign turned**: the *training* loss looks perfect, since it measures the turned task. Only the
#   accuracy on held-out pairs, computed elsewhere, tells: far below one half.
# - **Learning rate too high**: the loss jumps about and hangs near $\log 2$. The pretrained backbone
#   has been destroyed, and at this rate little or nothing is built in its place.
#
# Now the same answer, followed by more and more pads, as it happens when it stands in a batch with
# longer ones:

# %%
@torch.no_grad()
def with_pads(model, read):
    answer = probe.prompt + probe.answers[0]
    rows = [answer + [tokenizer.pad_token_id] * n for n in range(0, 17, 2)]
    device, length = model.bias.device, torch.tensor([len(answer)])
    scores = [model.token_scores(torch.tensor([row]).to(device)).cpu() for row in rows]
    return [read(score, length).item() for score in scores]


column = gallery["reads the last column, a pad"].model()[0]
lines = {"yours: at the EOS": with_pads(mine.model()[0], last_token_reward),
         "reads the last column": with_pads(column, reads_the_last_column)}
lab.show(figures.score_over(range(0, 17, 2), lines, "One answer in ever longer company",
                            "pads behind the answer"),
         alt="Your model's reward is flat; the broken one's changes with the pads.")

# %% [markdown]
# *What to see: your line is flat. The other model gives the same answer another reward for each
# length of its neighbours: in PPO this is noise that no learning can remove. Its accuracy on batches
# padded like those of its training hid it.*
#
# And the **sum**? Its accuracy is as good as the others'. But a good answer, said again and again:

# %%
@torch.no_grad()
def repeated(model, text, most=5):
    texts = [" ".join([text] * n) for n in range(1, most + 1)]
    test = encode_ranked(tokenizer, question, texts, [True] * most)
    return score_table(model, [test])[0][0].tolist()


pooled = {"EOS": mine, "mean": runs["chapter-3 mean, K-wise 0"],
          "sum": runs["chapter-3 sum"]}
lines = {name: repeated(run.model()[0], said["idk"]) for name, run in pooled.items()}
lab.show(figures.score_over(range(1, 6), lines, "“Sorry, I do not know.”, said n times",
                            "times n", "reward of the model"),
         alt="Rewards of an answer repeated one to five times for EOS, mean and sum.")
accuracy = runs["chapter-3 sum"].metrics[-1]["eval_accuracy"]
print(f"the sum's accuracy on held-out comparisons: {accuracy:.1%}")

# %% [markdown]
# *What to see: to the labeler a repetition is malformed, worth −1.5. A line that rises pays for
# saying the same thing again.* No held-out comparison holds such an answer, so no accuracy can
# show it. A policy under training will find it: chapter 7 calls this over-optimisation.
#
# ## 8. Scale it up
#
# The same trainer reads real comparisons and starts from real models, here from the SFT model of chapter
# 2's last section, which stands beside `--out`:
#
# ```bash
# rlhf-course reward-model --data Anthropic/hh-rlhf --too-long drop --profile colab-a100 --lr 1e-5 --out runs/hh/reward_model
# rlhf-course reward-model --data Anthropic/hh-rlhf --too-long drop --rows 20000 --lr 1e-4 \
#     --lora 16 --gradient-checkpointing --profile colab-t4 --out runs/hh-t4/reward_model
# rlhf-course reward-model --data openai/summarize_from_feedback --recipe summarize-from-feedback \
#     --too-long drop --model openai-community/gpt2 --lr 1e-5 --out runs/tldr-gpt2/reward_model
# ```
#
# (`prompt`/`chosen`/`rejected`, hh-rlhf's two transcripts and ranked `responses` are all understood.)
#
# | | expect | |
# |---|---|---|
# | this chapter, two CPU cores | 104 s | *measured* 2026-11-23, two quiet Xeon cores |
# | GPT-2 124 M, hh-rlhf once (128,640 pairs, a fifth held out, 400 tokens each), A100 40 GB | 7 minutes, 5 GB | *estimated*: $51\cdot10^6$ tokens at 126,000/s |
# | Qwen2.5-0.5B, the same | 27 minutes, 20 GB | *estimated*: at 31,700/s; 16 bytes a parameter, and 8 pairs of 2 × 512 tokens at a time |
# | Qwen2.5-0.5B, LoRA, 16,000 pairs, T4 | 1 h 20 min, 3 GB | *estimated*: $6.4\cdot10^6$ tokens at 1,370/s |
# | accuracy on hh-rlhf after one pass | 60 to 65 % for GPT-2, 62 to 70 % for 0.5 billion parameters | *estimated*: Bai et al. 2022, section 3, find 0.62 to 0.72, rising with the logarithm of size and of data |
# | accuracy on TL;DR's comparisons | 60 to 63 % for GPT-2 | *estimated*: Huang et al. 2024, section 6.1, report 0.63, 0.67, 0.69 for 1, 2.8, 6.9 billion |
# | accuracy on InstructGPT's own comparisons | 72.4 % on its labelers, 69.6 % on others | *estimated* for you, theirs: Ouyang et al. 2022, section 4.1 |
#
# No model reaches 100 %: people agree with each other on 73 to 77 % of such pairs (Ouyang et al. 2022,
# section 3.4), and that is the ceiling. More than one pass overfits, there as here. [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## 9. Five questions to check yourself
#
# <details><summary>1. Your loss stands at 0.6931 for all updates. Name two causes.</summary>
#
# All answers to a prompt get the same score: it is read at a place before the answer (the prompt's
# last token, position 0), or the gradient does not reach the model (a detached score, a frozen
# backbone under a zero head). $\log 2$ is what equal scores cost, whatever they are.
# </details>
#
# <details><summary>2. A colleague's model has 97 % accuracy where the best possible is 84 %.
# Congratulate?</summary>
#
# No. With labels this noisy nobody can, so it has seen the labels: the same comparisons in training
# and held-out set, or a feature that gives the label away (the chosen answer always first, or padded
# differently).
# </details>
#
# <details><summary>3. You add 100 to every score of prompt A and nothing to prompt B's. Which loss
# changes? What changes in PPO?</summary>
#
# No loss changes: every pair has one prompt. In PPO the answers to A would all be rewarded with 100
# more; an advantage compares with the critic's value of *that* prompt, so once the critic has
# learned it nothing changes, but until then the updates are dominated by it.
# </details>
#
# <details><summary>4. Why is the mean taken over a prompt's pairs first, and not over all pairs of
# the batch?</summary>
#
# A prompt with five different answers has ten pairs, one with two has one. Averaged over pairs it
# would count ten times as much, though its ten pairs come from one order by one labeler.
# </details>
#
# <details><summary>5. Should the two answers be compared at the same length, by padding the shorter
# one with EOS?</summary>
#
# No. The reward is read at each answer's own last token, and causal attention never sees what comes
# later. Reading both at the longer one's end would read pads for the shorter.
# </details>
#
# ## 10. What public systems do differently
#
# - **Nobody trains K-wise.** None of the public systems that we compared has InstructGPT's one
#   batch element a prompt; [DeepSpeed-Chat](https://github.com/deepspeedai/DeepSpeedExamples)
#   says in its README that there is no data for it. OpenAI's
#   [lm-human-preferences](https://github.com/openai/lm-human-preferences) comes near: a softmax over
#   four answers of which the best was picked.
# - **Loss over pads.** [trlX](https://github.com/CarperAI/trlx)'s example, DeepSpeed-Chat and
#   [Simple_RLHF](https://github.com/lansinuote/Simple_RLHF) average $-\log\sigma$ over every token from where two answers first differ to the end
#   of the *longer* one, pads of the shorter included.
# - **One token too late.** [ColossalChat](https://github.com/hpcaitech/ColossalAI) attends to one pad
#   more and reads the reward behind the EOS.
# - **pad = EOS.** DeepSpeed-Chat sets it for every tokenizer that is not Llama's, and builds its
#   masks from `token != pad`.
# - **Normalisation.** [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF) stores mean and deviation of
#   the evaluation set's rewards, chosen and rejected together, and applies them only with a flag;
#   [TRL](https://github.com/huggingface/trl) offers a regulariser that keeps rewards near 0.
#   of those we compared, lm-human-preferences is the only one with Ziegler's gain and bias.
# - **Calibration** is measured by one of them,
#   [summarize_from_feedback_details](https://github.com/vwxyzjn/summarize_from_feedback_details).
#
# (State of the second half of 2026; systems change.)
#
# ## Further reading
#
# - Bradley and Terry 1952, *Rank analysis of incomplete block designs*: the model.
# - [Ziegler et al. 2019](https://arxiv.org/abs/1909.08593), *Fine-tuning language models from human preferences*: gain
#   and bias.
# - [Stiennon et al. 2020](https://arxiv.org/abs/2009.01325), *Learning to summarize from human feedback*: pairs, head
#   initialisation, and what is lost when one trusts the model too far.
# - [Ouyang et al. 2022](https://arxiv.org/abs/2203.02155), *Training language models to follow instructions with human
#   feedback*, §3.5 and appendix C.2: K-wise training.
# - [Touvron et al. 2023](https://arxiv.org/abs/2307.09288), *Llama 2*, §3.2: margins, two reward models.
# - [Gao, Schulman and Hilton 2023](https://arxiv.org/abs/2210.10760), *Scaling laws for reward model overoptimization*.
