# %% [markdown]
# # Chapter 4: An answer as a Markov decision process
#
# We have a policy that answers and a reward model that gives each answer *one* number. But the
# policy does not choose answers, it chooses tokens, one after the other. Which of them earned the
# reward? This chapter sets the problem up as reinforcement learning and builds everything that PPO
# needs to know about an answer: probabilities, rewards, and advantages for each token.
#
# **You will be able to**
#
# - write text generation as states, actions and rewards, and find the right index for each;
# - derive the policy gradient for text, and say why a baseline does not bias it;
# - put the KL penalty into the reward, and choose between the estimators k1, k2, k3;
# - derive generalised advantage estimation (GAE) as a mixture, and say what $\lambda$ trades;
# - train with each token as an action, and with the whole answer as one; and *measure* which gives
#   the noisier gradient.
#
# ## Where we are on the map

# %%
from rlhf_course.plots import course_map
from rlhf_course.plots import lessons_mdp as figures

lab.show(course_map.course_map(4),
         alt="Map of the course: GPT, SFT and reward model stand; the MDP is next.")

# %% [markdown]
# *What to see: the reward comes from chapter 3, the policy from chapter 2. What is built here turns
# one into credit for the other's tokens; chapter 5 takes the steps.*
#
# ## 1. Text as a Markov decision process
#
# | reinforcement learning | text |
# |---|---|
# | state $s_t$ | the prompt and the answer so far, $(x, y_0, \dots, y_{t-1})$ |
# | action $a_t$ | the next token $y_t$, one of $V$ |
# | policy $\pi_\theta(a_t \mid s_t)$ | the language model's next-token distribution |
# | transition | append the token: $s_{t+1} = (s_t, a_t)$, **deterministic** |
# | episode | one answer, until EOS or the length limit |
# | reward $r_t$ | 0 for every token, and the reward model's score at the last (so far) |
# | return $R = \sum_t \gamma^t r_t$ | the score, with $\gamma = 1$ |
#
# The *discount* $\gamma \le 1$ makes later rewards count less. A *Markov* decision process is one in
# which what happens next depends on the state and the action alone, not on how one came there; here
# that holds trivially, since the state is the whole text. And $\pi_\theta(y\mid x)$, the probability
# of a whole answer, is the product of its actions' probabilities.
#
# Two things are unusual. The transition holds no surprise: all randomness is the policy's own. And
# the episode is short with a reward at its end only, so there is no reason to discount: $\gamma = 1$
# throughout ($\gamma<1$ would pay less for a good answer because it is long).
#
# ### The action axis, and the shift by one
#
# Take the row $x_0, \dots, x_{T-1}$ of prompt and answer together, as the code sees it (its `tokens`;
# in all other sections $x$ is the prompt alone). The model is causal: what stands at position $a$
# was computed from $x_0 \dots x_a$. So the logits at position $a$ are the distribution from which token $a+1$ was drawn:
#
# $$ \log \pi(x_{a+1} \mid x_0 \dots x_a) = \log\operatorname{softmax}(z_a)[x_{a+1}] . $$
#
# Call "the choice made at position $a$" **action $a$**. There are $T-1$ of them, and action $a$
# *emits* token $a+1$. The first token of the answer, at index $P$ (the prompt's length), was emitted
# by action $P-1$, at the last token of the *prompt*. So there are two clocks: the theory counts the
# answer's tokens, $t = 0, 1, \dots$, the code counts positions in the row, and $a = P - 1 + t$. The
# answer's $a_t$ is the *token* chosen at time $t$.

# %%
tokens = ["Where", "does", "Kit", "live", "?", "They", "live", "in", "Oslo", "EOS",
          "pad", "pad"]
lab.show(figures.action_axis(tokens, prompt=5, response=5),
         alt="Twelve tokens in a row, below them eleven actions, shifted by one. "
             "Actions 4 to 8 emit the answer; the score belongs to action 8.")

# %% [markdown]
# *What to see: five tokens of answer, blue; the five actions that emitted them, pink, stand one to
# the left. The last one emitted EOS, and it is an action like any other: the decision to stop. A
# score on the column of the pad would reward nobody.*

# %% exercise mdp.action_mask
# hint: Compare `torch.arange(length - 1)` with the first action of each row, as a (B, 1) column.
# hint: The first action is at P - 1, and there are R of them. Nothing here looks at what the tokens
#   are: a pad that equals EOS must make no difference.

# %% exercise mdp.token_logprobs
# hint: Drop the last position of the logits and the first of the tokens; now they are aligned.
# hint: Divide by the temperature (the function `_tempered` above the blank does it in a new tensor
#   and in float32) before the normalisation over the vocabulary.
# hint: `gather` the emitted token's logit, and subtract `logsumexp`, or gather from `log_softmax`.

# %% [markdown]
# What does a mistake of one cost? Here is an answer of the SFT model and what it gave to each token;
# beside it the same logits without the shift.

# %%
from rlhf_course.sft import encode_prompt

world = lab.world("town")
reference, tokenizer = lab.model("sft")
device = next(reference.parameters()).device
person = world.people["known"][0]
prompt = encode_prompt(tokenizer, f"Where does {person} live?")
said = f"They live in {world.facts[person]['home']}."
answer = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
row = torch.tensor([prompt + answer], device=device)
with torch.no_grad():
    logits = reference(row)
right = token_logprobs(logits, row)[0, len(prompt) - 1 :].exp()
beside = logits.softmax(-1).gather(-1, row[..., None])[0, len(prompt) :, 0]
words = [tokenizer.decode([t]).strip() for t in answer[:-1]] + ["EOS"]
lab.show(figures.shift_by_one(words, right.tolist(), beside.tolist()),
         alt="Bars for each token of an answer: with the shift the probabilities are "
             "high, without it nearly zero.")

# %% [markdown]
# *What to see: a trained model is nearly sure of the words that grammar demands. Without the shift
# one asks how likely the model finds the same word **again**, having just read it. Nothing crashes:
# the ratios of new to old probabilities that PPO looks at (chapter 5) still begin at 1, and the
# training wanders off.*
#
# ## 2. The policy gradient
#
# ### From answers to tokens
#
# We want to raise $J(\theta) = \mathbb{E}_{y\sim\pi_\theta(\cdot\mid x)}[R(x,y)]$. One cannot
# differentiate through the drawing of tokens, nor through $R$. But the sum over all answers depends
# on $\theta$ through the probabilities alone (the KL term of §3 is dealt with there), and, since
# $\nabla\log p = \nabla p/p$, we have $\nabla p = p\,\nabla\log p$:
#
# $$ \nabla J = \sum_y R(x,y)\,\nabla \pi_\theta(y\mid x)
#    = \sum_y \pi_\theta(y\mid x)\,R(x,y)\,\nabla\log\pi_\theta(y\mid x)
#    = \mathbb{E}_y\big[R\,\nabla\log\pi_\theta(y\mid x)\big]. $$
#
# The last form is an expectation over the policy's own answers: sample some, average, done. In
# general the probability of an episode holds the environment's transition probabilities too, which
# do not depend on $\theta$ and drop out of $\nabla\log$. For text there are none to begin with:
# the next state is the old one with the token behind it, so
#
# $$ \pi_\theta(y\mid x) = \prod_{t}\pi_\theta(a_t\mid s_t), \qquad
#    \nabla J = \mathbb{E}\Big[\sum_{t} \nabla\log\pi_\theta(a_t\mid s_t)\; R\Big]. $$
#
# Every token is pushed by the same $R$, deserving or not. That is unbiased, and very noisy. Two
# steps take noise out and leave the mean as it is. Both stand on one fact.
#
# ### The fact: a score function has mean zero
#
# The vector $\nabla\log\pi_\theta(a\mid s)$ is called the *score function* (a word of statistics; it
# has nothing to do with the reward model's score). In any state $s$,
#
# $$ \mathbb{E}_{a\sim\pi_\theta(\cdot\mid s)}\big[\nabla\log\pi_\theta(a\mid s)\big]
#    = \sum_a \pi_\theta(a\mid s)\,\frac{\nabla\pi_\theta(a\mid s)}{\pi_\theta(a\mid s)}
#    = \nabla\sum_a\pi_\theta(a\mid s) = \nabla 1 = 0 . $$
#
# So any factor $c(s)$ that is *fixed once the state is known* may stand before it, and the product
# has mean zero too:
# $\mathbb{E}[c(s_t)\,\nabla\log\pi(a_t\mid s_t)]
#  = \mathbb{E}_{s_t}\big[c(s_t)\;\mathbb{E}_{a_t}[\nabla\log\pi(a_t\mid s_t)]\big] = 0$.
#
# **Reward-to-go.** A reward $r_k$ with $k<t$ was paid before action $t$: it is a function of $s_t$.
# Its product with $\nabla\log\pi(a_t\mid s_t)$ has mean zero and may be dropped:
#
# $$ \nabla J = \mathbb{E}\Big[\sum_t \nabla\log\pi_\theta(a_t\mid s_t)\, G_t\Big],
#    \qquad G_t = \sum_{k\ge t} r_k . $$
#
# **Baseline.** Subtract any function of the state, $b(s_t)$, from $G_t$: it was proved just now that
# this changes nothing in the mean. The simplest good choice is what one expects anyway, the **value**
# $V(s) = \mathbb{E}[G_t\mid s_t = s]$. What remains is the **advantage**: with
# $Q(s,a) = \mathbb{E}[G_t\mid s_t=s, a_t=a]$,
#
# $$ \boxed{\;\nabla J = \mathbb{E}\Big[\sum_t \nabla\log\pi_\theta(a_t\mid s_t)\,
#    A(s_t,a_t)\Big], \qquad A(s,a) = Q(s,a) - V(s)\;} $$
#
# ($G_t$ may be replaced by its mean given $s_t, a_t$, which is $Q$: beside it stands nothing but a
# function of $s_t$ and $a_t$.) A token is pushed up if things go better than expected *from there*,
# and down if worse. Nobody knows $V$; a second network, the **critic**, learns it from the answers
# (§4).
#
# The baseline must not see the action. $V$ at position $a$ is computed from $x_0\dots x_a$, which is
# $s_t$: right. $V$ at position $a+1$ has read the action; then $c$ is no longer fixed given the
# state and the proof breaks. The gallery shows what becomes of it.
#
# ### How much does a baseline help?
#
# The smallest possible case: one state, three answers worth 10, 11 and 12, minibatches of 32.

# %%
generator = torch.Generator().manual_seed(0)
logits3 = torch.tensor([0.2, 0.0, -0.2])
pi, worth = logits3.softmax(0), torch.tensor([10.0, 11.0, 12.0])
draws = torch.multinomial(pi, 32 * 20000, True, generator=generator).view(-1, 32)
score = (draws == 2).float() - pi[2]  # d log π(drawn) / d logit 2
without = (worth[draws] * score).mean(dim=1)
with_one = ((worth[draws] - pi @ worth) * score).mean(dim=1)
truth = (pi[2] * (worth[2] - pi @ worth)).item()
lab.show(figures.baseline(without.tolist(), with_one.tolist(), truth),
         alt="Two histograms around the same true gradient: wide without a baseline, "
             "narrow with one.")
print(f"means {without.mean():.3f} and {with_one.mean():.3f}, truth {truth:.3f}; "
      f"deviations {without.std():.2f} and {with_one.std():.2f}")

# %% [markdown]
# *What to see: both are centred on the dashed line; one of them needs many more samples to find it.
# Without a baseline all three answers are "good" (10, 11, 12), and whichever is drawn is pushed up.*
#
# ## 3. The KL penalty is a reward
#
# Left alone, the policy would leave the language for whatever the reward model overrates. RLHF
# therefore puts a price $\beta$ on its distance from the **reference** $\pi_{\rm ref}$, the SFT model
# with which it began, and maximises
#
# $$ J(\theta) = \mathbb{E}_{y\sim\pi_\theta}\big[r(x,y)\big]
#    - \beta\,\mathrm{KL}\big(\pi_\theta(\cdot\mid x)\,\|\,\pi_{\rm ref}(\cdot\mid x)\big), \qquad
#    \mathrm{KL} = \mathbb{E}_{y\sim\pi_\theta}\Big[\log\frac{\pi_\theta(y\mid x)}
#    {\pi_{\rm ref}(y\mid x)}\Big]. $$
#
# By the chain rule of probability the log-ratio of the answer is the **sum of its tokens'**:
#
# $$ \log\frac{\pi_\theta(y\mid x)}{\pi_{\rm ref}(y\mid x)} = \sum_t d_t, \qquad
#    d_t = \log\pi_\theta(a_t\mid s_t) - \log\pi_{\rm ref}(a_t\mid s_t), $$
#
# so the penalty can be paid token by token, as part of the reward (Ziegler et al. 2019):
#
# $$ r_t = -\beta\, d_t + [\,t\text{ is the last action}\,]\; r(x,y). $$
#
# But now the reward itself depends on $\theta$, and the derivation above treated it as fixed. Is a
# term missing? It would be $\mathbb{E}[-\beta\sum_t\nabla d_t] = -\beta\,\mathbb{E}[\sum_t
# \nabla\log\pi_\theta(a_t\mid s_t)] = 0$, by the fact above. Nothing is missing; $d_t$ is treated as
# a number.
#
# ### Three estimators
#
# With $d = \log\pi - \log\pi_{\rm ref}$ of a token drawn from $\pi$ (Schulman 2020):
#
# - $k_1 = d$. Its mean is the KL, by definition. It is negative for about half of the tokens though
#   no KL is, so it is noisy.
# - $k_3 = e^{-d} - 1 + d$. Since
#   $\mathbb{E}_\pi[e^{-d}] = \sum_a \pi(a)\frac{\pi_{\rm ref}(a)}{\pi(a)} = 1$, the part
#   $e^{-d}-1$ has mean zero and $k_3$ is unbiased too. Since $e^{-d}\ge 1-d$, it is never negative.
#   While $d$ is small, $e^{-d}-1\approx -d$ cancels $k_1$'s noise. When $\pi$ has all but given up a
#   token that the reference likes, $e^{-d}$ is huge, and rare: then $k_3$ is the *worse* one.
# - $k_2 = d^2/2$. Around $d=0$ it is $k_3$'s second-order term: small variance, and a bias that
#   grows with the distance.
#
# All this is about *values*, for a KL that is paid as a reward. Where the KL is put into the loss and
# differentiated (GRPO does so, chapter 8), the gradients count. For one token, its state given, the
# true one is, by the argument just used,
# $\nabla\mathrm{KL} = \mathbb{E}[d\,\nabla\log\pi] + \mathbb{E}[\nabla d] = \mathbb{E}[d\,\nabla\log\pi]$.
# Differentiating the estimators on tokens at hand gives
# $\nabla k_1 = \nabla\log\pi$, whose mean is zero: useless; $\nabla k_2 = d\,\nabla\log\pi$:
# right; and $\nabla k_3 = (1-e^{-d})\,\nabla\log\pi$: right for small $d$ only.

# %% exercise mdp.kl_estimate
# hint: Write the three formulas with $d$ as above; the shape stays as it is.
# hint: $e^{-d}-1$ loses all its digits when $d$ is small: there is a function `torch.expm1`.
# hint: $e^{-d}$ overflows for very negative $d$: clamp it from below at `-MAX_LOG_RATIO` first.

# %% exercise mdp.token_rewards
# hint: First the penalty, 0 outside the mask (with `torch.where`: NaN times 0 is NaN).
# hint: `last_action(mask)` gives each row's last action, (B,). `scatter_add` along dimension 1 adds
#   the score there, with an index of shape (B, 1).
# hint: Only the score is clipped, and before it is added.

# %% [markdown]
# ## 4. Generalised advantage estimation
#
# We need $A(s_t, a_t)$, and have one sampled answer and a critic $V$ that is only an estimate. How
# far should one trust the sample, and from where on the critic?
#
# **n-step estimates.** Follow the sample for $n$ steps, then believe the critic:
#
# $$ \hat A^{(n)}_t = r_t + \gamma r_{t+1} + \dots + \gamma^{n-1} r_{t+n-1}
#    + \gamma^n V(s_{t+n}) - V(s_t). $$
#
# Define the *TD error* $\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)$: the surprise of one step. The
# sum telescopes,
#
# $$ \sum_{l=0}^{n-1}\gamma^l\delta_{t+l}
#    = \sum_{l=0}^{n-1}\gamma^l r_{t+l} + \sum_{l=0}^{n-1}\big(\gamma^{l+1}V(s_{t+l+1})
#      - \gamma^l V(s_{t+l})\big) = \hat A^{(n)}_t . $$
#
# $n=1$ trusts the critic after one token: little noise, all of the critic's error. The largest $n$
# runs to the end, where $V=0$: no bias (§2: any baseline will do), all the noise of the tokens to
# come.
#
# **The mixture.** Take all of them, with weights that fall by the factor $\lambda$ at each step and
# sum to one:
#
# $$ \hat A_t = (1-\lambda)\sum_{n=1}^{\infty}\lambda^{n-1}\hat A^{(n)}_t
#    = (1-\lambda)\sum_{n=1}^{\infty}\lambda^{n-1}\sum_{l=0}^{n-1}\gamma^l\delta_{t+l}. $$
#
# Exchange the sums: $\delta_{t+l}$ is in every $n > l$, so its weight is
# $\gamma^l(1-\lambda)\sum_{n>l}\lambda^{n-1} = \gamma^l\lambda^l$, and
#
# $$ \boxed{\;\hat A_t = \sum_{l\ge0}(\gamma\lambda)^l\,\delta_{t+l}
#    \quad\Longleftrightarrow\quad \hat A_t = \delta_t + \gamma\lambda\,\hat A_{t+1}\;} $$
#
# one pass from the end to the beginning (Schulman et al. 2016). When the episode ends after $N$ more
# actions, all $\hat A^{(n)}$ with $n\ge N$ are the same, and share what weight is left,
# $\lambda^{N-1}$. For $\lambda=1$ that is everything: $\hat A_t = G_t - V(s_t)$. For $\lambda=0$
# nothing: $\hat A_t=\delta_t$. The critic is trained towards $\hat A_t + V(s_t)$, which the code calls
# the *return* too (`returns`): for $\lambda=1$ it is $G_t$.

# %%
lab.show(figures.gae_weights((0.0, 0.5, 0.8, 0.95, 1.0), steps=8),
         alt="Left: weights of n-step estimates for five values of lambda; right: the "
             "weights lambda to the l of the TD errors.")

# %% [markdown]
# *What to see: with 8 tokens to go, $\lambda=0.95$ still gives most of its weight to the estimate
# that runs to the end. On answers as short as ours, 0.95 is close to 1; on answers of a thousand
# tokens it looks about twenty tokens ahead.*

# %% exercise mdp.gae
# hint: Loop over the columns from the last to the first, and carry two numbers a row: the next
#   action's value and the next action's advantage. Both begin at 0.
# hint: In a column that is no action of this row (`torch.where` on `mask[:, t]`), the two carried
#   numbers stay as they are and the result is 0.
# hint: At an action: `delta = r + gamma * next_value - V`, then
#   `advantage = delta + gamma * lam * next_advantage`. The returns are `advantages + values`.

# %% [markdown]
# ## 5. The other MDP: the whole answer as one action
#
# One may also say: the state is the prompt, the action is the *answer*, and there is one step. This
# is a contextual bandit. Reward, value and advantage are one number each:
#
# $$ R = r(x,y) - \beta\sum_t d_t, \qquad A = R - V(x), \qquad
#    \nabla J = \mathbb{E}\big[A\,\nabla\log\pi_\theta(y\mid x)\big]
#    = \mathbb{E}\Big[\sum_t A\,\nabla\log\pi_\theta(a_t\mid s_t)\Big]. $$
#
# Every token gets the same $A$. Read the last form once more: it looks like *many agents*, one a
# token, who act one after the other and share one payoff. When the update later clips each token's
# probability ratio on its own (chapter 5), that is what it is: a multi-agent MDP. ColossalChat's
# first version was built so.
#
# Both gradients are right in the mean. The sequence-level one knows no credit: in a false answer the
# harmless "They live in" is pushed down as hard as the wrong town. Over many answers this cancels;
# within a minibatch it is noise. What it asks of the critic is less: one value, at the prompt. Most
# critic-free methods of chapter 8 (RLOO, GRPO) give one advantage to the whole answer, too.

# %% exercise mdp.sequence_advantages
# hint: `masked_sum` and `masked_mean`, imported above, reduce the KL over the tokens of each row.
# hint: One return a row, (B,); the advantage is broadcast over the row's actions and 0 elsewhere.

# %% [markdown]
# ## 6. Experiment: both MDPs, with your functions
#
# PPO itself is the next chapter's; here we only need that it takes advantages and improves the
# policy. The trainer calls *your* six functions. No pretraining term ("ptx", chapter 6), and a fixed
# $\beta$, to keep things simple: 4 *rollouts* (128 answers each, sampled and scored) on which the
# critic alone learns, its warm-up, then 20 on which both do.

# %%
own = [action_mask, token_logprobs, kl_estimate]
own += [token_rewards, gae, sequence_advantages]
how = dict(iterations=20, batch=128, critic_warmup=4, ptx_coef=0.0,
           kl_controller="fixed", kl_coef=0.1)
token = lab.train("ppo", name="chapter-4-token", own=own, **how)
sequence = lab.train("ppo", name="chapter-4-sequence", own=own, mdp="sequence", **how)

# %% [markdown]
# One run says little. Two more seeds of each (with the package's functions, side by side), and a
# very short run whose policy has only begun to move, for the measurements below.

# %%
others = {
    f"chapter-4 {mdp} {seed}": dict(stage="ppo", mdp=mdp, seed=seed, **how)
    for mdp in ("token", "sequence") for seed in ([] if lab.quick else [1, 2])
}
short = {**how, "iterations": 4, "critic_warmup": 6}
others["chapter-4 early"] = dict(stage="ppo", **short)
runs = lab.train_many(others)
seeds = {
    f"{mdp}-level": [first.metrics] + [
        run.metrics for name, run in runs.items() if name.startswith(f"chapter-4 {mdp}")
    ]
    for mdp, first in (("token", token), ("sequence", sequence))
}
lab.show(figures.compare_runs(seeds),
         alt="Gold utility, reward, KL and the critic's explained variance over the "
             "iterations for both MDPs, three seeds each.")


# %%
def ends(key):
    return {
        name: [sum(row[key] for row in rows[-5:]) / 5 for rows in of_seeds]
        for name, of_seeds in seeds.items()
    }


for key in ("reward", "gold", "kl"):
    for name, values in ends(key).items():
        shown = ", ".join(f"{value:+.2f}" for value in values)
        print(f"{key:7} {name:15} last five iterations, by seed: {shown}")

# %% [markdown]
# *What to see: faint lines are seeds, strong ones their means. Both climb. In the first four
# iterations the KL is 0, since the critic alone is learning. The critic's **explained variance** is
# $1 - \mathbb{E}[(R-V)^2]/\operatorname{Var}(R)$: 1 if it predicts all returns, 0 if it knows no more
# than their mean, negative if it does worse than that.* (The two MDPs' shares are not comparable: one
# predicts before every token, the other once, before the first.)
#
# Whether one MDP learns faster than the other here is for the printed seeds to say: a difference
# counts only if the seeds of one lie apart from those of the other. On this world, with answers of
# eight tokens, do not expect much. **What would refute** the claim that token-level credit
# helps: longer answers, many seeds, and no difference in reward at equal KL. What differs for certain
# is how noisy the gradient is, and that can be measured directly.
#
# ### Whose merit was it?
#
# First, one answer under the magnifying glass. The critic of the short run reads along.

# %%
from safetensors.torch import load_file

early = runs["chapter-4 early"]
policy, _ = early.model()
reward_model, _ = lab.model("reward_model")
checkpoint = sorted((early.folder / "checkpoints").glob("step-*"))[-1]
saved = load_file(checkpoint / "tensors.safetensors")
key = "module/critic/"
critic = reward_model.as_critic().requires_grad_(False)
_ = critic.load_state_dict({
    k.removeprefix(key): v for k, v in saved.items() if k.startswith(key)
})

# %%
@torch.no_grad()
def read(tokens, prompt_lengths, response_lengths, finished):
    """(log-probs, reference's, values, scores, mask) of answers."""
    mask = action_mask(prompt_lengths, response_lengths, tokens.shape[1])
    values = torch.where(mask, critic.token_scores(tokens)[:, :-1], 0.0)
    scores = reward_model.rewards(tokens, prompt_lengths, response_lengths)
    scores = torch.where(finished, scores, -5.0)  # never ended: the town's own penalty
    ours, theirs = (token_logprobs(m(tokens), tokens) for m in (policy, reference))
    return ours, theirs, values, scores, mask

# %%
stranger = world.people["asked"][0]
prompt = encode_prompt(tokenizer, f"Where does {stranger} live?")
answer = [*tokenizer("They live in Lima, friend.")["input_ids"], tokenizer.eos_token_id]
one = torch.tensor([prompt + answer], device=device)
sizes = [torch.tensor([len(part)], device=device) for part in (prompt, answer)]
ours, theirs, V, scores, mask = read(one, *sizes, torch.tensor([True], device=device))
kl = torch.where(mask, kl_estimate(ours, theirs), 0.0)
rewards = token_rewards(scores, kl, mask, kl_coef=0.1)
start = V[torch.arange(len(V)), mask.int().argmax(1)]
strips = {f"token, λ = {lam:g}": gae(rewards, V, mask, 1.0, lam)[0]
          for lam in (0.0, 0.95, 1.0)}
strips["sequence"] = sequence_advantages(scores, kl, start, mask, 0.1)[0]
words = [tokenizer.decode([t]).strip() for t in answer[:-1]] + ["EOS"]
lab.show(figures.credit(words, V[mask].tolist(), {k: a[mask].tolist() for k, a in
                        strips.items()}, scores.item()),
         alt="Above the critic's value before each token of an answer about a "
             "stranger, below the tokens' advantages under four estimators.")

# %% [markdown]
# *What to see: above, the critic's opinion of the sentence so far. Where it falls or rises, the token
# just written gets the blame or the merit: that is the row λ = 0. With λ = 1 a token is held
# responsible for all that comes after it. The last row makes no difference between tokens.* (Where
# the critic's opinion jumps at a word that decides nothing, it is the critic that errs. λ = 0 takes it
# at its word; λ = 1 corrects it by what really came.)
#
# ### The variance of the gradient, measured
#
# Now 2048 answers, in minibatches of 32. From each minibatch one gradient $g$ of the policy for each
# way to compute advantages. The noise is the trace of their covariance,
# $\mathbb{E}\lVert g - \bar g\rVert^2$, the expected squared distance from the mean gradient.

# %%
from rlhf_course.sampling import generate
from rlhf_course.stages.rollouts import Task, as_tensors

prompts = world.prompts("ppo", 256 if lab.quick else 2048, seed=777)
tasks = [Task(p.text, encode_prompt(tokenizer, p.text), source=p) for p in prompts]
sampled = generate(policy, [task.tokens for task in tasks], 12, tokenizer.eos_token_id,
                   generator=torch.Generator(device).manual_seed(1), batch_size=512)
a = as_tensors(tasks, sampled, tokenizer, device)

# %%
lengths = a.prompt_lengths, a.response_lengths
ours, theirs, V, scores, mask = read(a.tokens, *lengths, a.finished)
kl = torch.where(mask, kl_estimate(ours, theirs), 0.0)
rewards = token_rewards(scores, kl, mask, kl_coef=0.1)
start, nothing = V[torch.arange(len(V)), mask.int().argmax(1)], torch.zeros_like(V)
lams = (0.0, 0.5, 0.8, 0.95, 1.0)
advantages = {
    "sequence, no baseline": sequence_advantages(scores, kl, 0 * start, mask, 0.1)[0],
    "token, no baseline": gae(rewards, nothing, mask, 1.0, 1.0)[0],
    "sequence, V(prompt)": sequence_advantages(scores, kl, start, mask, 0.1)[0],
}
for lam in lams[::-1]:
    advantages[f"token, V, λ = {lam:g}"] = gae(rewards, V, mask, 1.0, lam)[0]

# %%
parameters = list(policy.requires_grad_(True).parameters())


def gradients(rows):
    """The policy gradient of these answers under each estimator, as long vectors."""
    logprobs = token_logprobs(policy(a.tokens[rows]), a.tokens[rows])
    out = {}
    for name, A in advantages.items():
        objective = torch.where(mask[rows], logprobs * A[rows], 0.0).sum() / len(rows)
        parts = torch.autograd.grad(objective, parameters, retain_graph=True)
        out[name] = torch.cat([part.flatten() for part in parts])
    return out

# %%
total = {name: [0.0] * 4 for name in advantages}  # sums of g, in four folds
squares = {name: [0.0] * 4 for name in advantages}  # sums of |g|²
minibatches = torch.arange(len(a.tokens), device=device).split(32)
for number, rows in enumerate(minibatches):
    for name, g in gradients(rows).items():
        total[name][number % 4] = total[name][number % 4] + g
        squares[name][number % 4] += g.square().sum().item()

# %%
M = len(minibatches) / 4  # minibatches in a fold


def variance(name, fold):
    """The trace of the covariance: E|g|² - |E g|², with Bessel's correction."""
    mean = total[name][fold] / M
    return (squares[name][fold] / M - mean.square().sum().item()) * M / max(M - 1, 1)


variances = {name: [variance(name, fold) for fold in range(4)] for name in advantages}
lab.show(figures.gradient_variance(variances),
         alt="Variance of the gradient for eight estimators: largest without a "
             "baseline, smallest for token-level GAE with small lambda.")
print("times the variance of token-level GAE with λ = 0.95, fold by fold:")
for name in ("sequence, no baseline", "sequence, V(prompt)", "token, V, λ = 1"):
    folds = zip(variances[name], variances["token, V, λ = 0.95"])
    print(f"  {name:22}", ", ".join(f"{v / w:.2f}" for v, w in folds))

# %% [markdown]
# *What to see: grey without a baseline, orange the sequence-level MDP, blue the token-level one. Dots
# are four folds of the data, bars their mean; a faint line joins what was measured on the same
# answers.*
#
# The folds lie far apart, the lines run side by side: the variance of a policy gradient is
# heavy-tailed. A few answers with a token that the policy itself found very unlikely, and a bad
# score, make most of it, whatever the estimator. So compare along the lines, not across them.
#
# - **The baseline does most of the work.** Reward-to-go alone gains almost nothing here, because
#   nearly all of the reward stands at the end: every token still gets the whole score.
# - **Between the two MDPs**: at $\lambda=1$, token-level credit subtracts $V(s_t)$, which has read the
#   answer so far; the sequence-level one subtracts what was known before the first word. Whether the
#   former is quieter depends on how good the critic is in the middle of an answer. An imperfect
#   $V(s_t)$ can even be noisier than $V(x)$; then the row λ = 1 does not lie to the left of the
#   orange one, on some fold or on all.
# - **$\lambda<1$ is where token-level credit pays**: the surprises of later tokens count less.
#
# ### What λ costs
#
# Less variance was bought with bias: below 1 the critic's errors enter the mean gradient. Measure it
# as the squared distance of the mean gradients at $\lambda$ and at 1. (A naive square would count
# noise as bias, so it is the product of the differences in two *different* folds, whose noises are
# independent. It can come out slightly negative.)

# %%
def product(x, y, fold):
    """An estimate of (E x)·(E y) free of noise: from two different folds."""
    other = (fold + 1) % 4
    return (x[fold] / M @ (y[other] / M)).item()


full = total["token, V, λ = 1"]
length = sum(product(full, full, fold) for fold in range(4)) / 4
biases = []
for lam in lams:
    difference = [g - f for g, f in zip(total[f"token, V, λ = {lam:g}"], full)]
    biases.append([product(difference, difference, k) / length for k in range(4)])
noise = [variances[f"token, V, λ = {lam:g}"] for lam in lams]
lab.show(figures.lambda_tradeoff(lams, noise, biases),
         alt="Left the variance of the gradient rises with lambda; right the squared "
             "bias falls to zero at lambda 1.")

# %% [markdown]
# *What to see: left, four folds and their mean; right, the bias in units of the gradient itself,
# where 1 means that the error is as long as the signal. Come from the right, from $\lambda=1$: at the
# usual 0.95 the left curve has begun to fall and the right one has hardly begun to rise. A better critic
# would move the right curve down; with $\lambda=1$ a bad critic does no harm but noise.*
#
# ### The KL estimators, measured
#
# The same answers, and a policy that is further from the reference (the end of your token-level run).
# Here the exact KL of each visited state is affordable, since one can sum over the whole vocabulary.

# %%
@torch.no_grad()
def exact_and_estimated(moved, count=512):
    ids = [task.tokens for task in tasks[:count]]
    out = generate(moved, ids, 12, tokenizer.eos_token_id, batch_size=512,
                   generator=torch.Generator(device).manual_seed(2))
    b = as_tensors(tasks[:count], out, tokenizer, device)
    p, q = (m(b.tokens)[:, :-1].float().log_softmax(-1) for m in (moved, reference))
    exact = (p.exp() * (p - q)).sum(-1)[b.mask]
    ours, theirs = (
        x.gather(-1, b.tokens[:, 1:, None])[..., 0][b.mask] for x in (p, q)
    )
    return exact, {k: kl_estimate(ours, theirs, k) for k in ("k1", "k2", "k3")}

# %%
exact, estimates = exact_and_estimated(token.model()[0])
lab.show(figures.kl_estimators(exact.tolist(),
                               {k: e.tolist() for k, e in estimates.items()}),
         alt="Left the three estimators as curves over the log-ratio; in the middle "
             "their bias with error bars; right their standard deviations.")
print(f"exact KL {exact.mean():.3f} nats a token; means: "
      + ", ".join(f"{k} {e.mean():.3f}" for k, e in estimates.items()))

# %% [markdown]
# *What to see: in the middle, bars are two standard errors. An unbiased estimator's covers 0. Right,
# whose single values scatter most.*
#
# The textbook says: k3, unbiased and quiet. Look whether your run agrees: once the policy is more
# than a little way from the reference, a few tokens that the reference prefers strongly make
# $e^{-d}$ huge, and k3 scatters as much as k1 or more. (Its bar may even be too short: the largest
# values are so rare that a sample may not hold them.) In the reward we use k1: its sum over an
# answer is exactly the sequence log-ratio, which is what the derivation asks for.
#
# ## 7. What healthy looks like
#
# | | healthy | unhealthy |
# |---|---|---|
# | KL at the first rollout | 0 to rounding | anything else: shift, temperature or dropout differ |
# | mean k1 | above 0 in every batch of some size | *persistently* negative: tokens were not drawn from these probabilities |
# | reward | rises within the first ten iterations | flat while KL stays 0: the reward does not arrive |
# | KL afterwards | rises with the reward, then bends: β holds it near 1 to 2 nats an answer here | straight up without end |
# | explained variance of the critic | above 0.5 at the end of its warm-up, 0.7 to 0.9 later (token-level); lower, 0.5 to 0.7, for one value a prompt | below 0, or suspiciously near 1 |
# | share of answers that end | stays near 100 % | falls: EOS is not trained as an action |
#
# ### A gallery of unhealthy runs
#
# Four wrong versions of your functions, each trained for ten iterations.

# %%
def score_too_late(scores, kl, mask, kl_coef, score_clip=None):
    late = (last_action(mask) + 1).clamp(max=mask.shape[1] - 1)
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    return penalty.scatter_add(1, late[:, None], scores[:, None])


def sign_turned(scores, kl, mask, kl_coef, score_clip=None):
    return token_rewards(scores, -kl, mask, kl_coef, score_clip)


def without_eos(prompt_lengths, response_lengths, length):  # as if pad were EOS
    return action_mask(prompt_lengths, (response_lengths - 1).clamp(min=1), length)


def peeking(rewards, values, mask, gamma=1.0, lam=0.95):
    seen = torch.where(mask, values.roll(-1, dims=1) * mask.roll(-1, dims=1), 0.0)
    return gae(rewards, seen, mask, gamma, lam)

# %%
broken = {
    "score one action late": (score_too_late, "token_rewards"),
    "sign of the KL turned, β = 0.5": (sign_turned, "token_rewards"),
    "EOS is no action": (without_eos, "action_mask"),
    "the baseline peeks": (peeking, "gae"),
}
gallery = {}
for name, (function, stands_for) in broken.items():
    function.__name__ = stands_for
    settings = {**how, "iterations": 10}
    if function is sign_turned:
        settings["kl_coef"] = 0.5
    run = lab.train("ppo", name=f"chapter-4-broken-{len(gallery)}", own=[function],
                    **settings)
    gallery[name] = run.metrics
lab.show(figures.unhealthy_runs(token.metrics[:14], gallery),
         alt="Reward, KL and length of four broken runs, each beside the healthy one.")

# %% [markdown]
# *What to see, column by column; grey is your healthy run.*
#
# - **Score one action late.** It lands on a pad, which is never trained. KL and reward stay where
#   they were, or nearly: all that is left is the penalty, which is smallest if nothing moves. The
#   most common bug in public code (see below).
# - **Sign of the KL turned.** The policy is paid for leaving the reference. For some iterations
#   all looks well, then the KL runs away, the language falls apart, and the answers no longer end.
#   With a small β it takes longer to be seen; we took 0.5.
# - **EOS is no action.** The decision to stop gets no credit or blame, and *these curves do not show
#   it*: the SFT model already ends its answers, and nothing here rewards ending them otherwise. A
#   test finds this bug in a second. A run shows it when it matters: where answers run on without
#   end, or grow with each iteration.
# - **The baseline peeks.** $V$ has read the action, so the advantage asks whether things went better
#   than expected *after* this token: what the token itself did, good or bad, is subtracted. The
#   policy learns slower, from what is left over, and no curve says "error".
#
# ## 8. Scale it up
#
# The choice of MDP is one flag, for any model. With the SFT and the reward model of chapters 2 and 3,
# which stand beside `--out`:
#
# ```bash
# rlhf-course ppo --data Anthropic/hh-rlhf --too-long drop --profile colab-a100 --iterations 100 --batch 256 --lr 1e-6 --critic-lr 1e-5 --mdp token --out runs/hh/token
# rlhf-course ppo --data Anthropic/hh-rlhf --too-long drop --profile colab-a100 --iterations 100 --batch 256 --lr 1e-6 --critic-lr 1e-5 --mdp sequence --out runs/hh/sequence
# ```
#
# | | expect | |
# |---|---|---|
# | this chapter, two CPU cores | 96 s | *measured* 2026-11-23, two quiet Xeon cores |
# | either run, Qwen2.5-0.5B, 100 rollouts of 256 answers of 128 tokens, A100 40 GB | half an hour, 25 GB | *estimated*: 17 s a rollout (chapter 5) |
# | with GPT-2 | 10 minutes, 8 GB | *estimated*: 6 s a rollout, a third of it for launching kernels |
# | noise of a token's advantage, answers of 200 to 1000 tokens | sequence: of the whole answer; token: of about the next twenty tokens | *estimated*: $1/(1-\lambda)$ with $\lambda=0.95$ |
#
# The critic has more to learn with long answers and starts worse; and a $\beta$ for the *sum* of the KL
# means something else, since the sum grows with length. [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## 9. Five questions to check yourself
#
# <details><summary>1. A prompt has 7 tokens, the answer 3 with EOS, the row 12. Which actions does
# the mask hold? Where does the score go?</summary>
#
# Actions 6, 7 and 8 (they emit tokens 7, 8 and 9). The score goes to action 8. The action axis has 11
# entries.
# </details>
#
# <details><summary>2. Why may a baseline depend on the state but not on the action?</summary>
#
# The proof takes $b(s_t)$ out of the expectation over $a_t$, and what is left is
# $\nabla\sum_a\pi = 0$. If $b$ depends on $a_t$ it stays inside, and
# $\mathbb{E}[b(s,a)\nabla\log\pi]$ is a gradient of its own: that of the mean of $b$.
# </details>
#
# <details><summary>3. The mean of k1 over a batch is −0.3 nats an answer, rollout after rollout. What
# is broken?</summary>
#
# A KL is never negative, so the tokens were not drawn from the distribution whose log-probabilities
# stand there: sampled at another temperature, or with top-p, by another engine, or log-probabilities
# with dropout on, or off by one.
# </details>
#
# <details><summary>4. With γ = 1 and λ = 1, what are the critic's targets? And with λ = 0?</summary>
#
# $\hat A_t+V(s_t)$: for λ = 1 the reward-to-go $G_t$ itself; for λ = 0 it is $r_t + V(s_{t+1})$, the
# critic's own guess one step later. The first is noisy and right, the second moves with the critic.
# </details>
#
# <details><summary>5. Your colleague uses the mean of the KL over tokens instead of the sum, and the
# same β. What happens?</summary>
#
# The penalty is weaker by the length of the answer, some eight times here, and weakest per token for
# the longest answers. Drift is cheap, and cheaper the longer one talks.
# </details>
#
# ## 10. What public systems do differently
#
# - **Score on a pad.** [DeepSpeed-Chat](https://github.com/deepspeedai/DeepSpeedExamples) and
#   [Simple_RLHF](https://github.com/lansinuote/Simple_RLHF) put the score one action late when pad and EOS differ; when they are the same, the
#   index is right but the EOS action is masked out of the loss. [trlX](https://github.com/CarperAI/trlx)
#   is two late, or one. [TRL](https://github.com/huggingface/trl)'s newer PPO adds the score at the
#   first pad too, and widens the value mask by one, which dilutes it over one more step.
#   [ColossalChat](https://github.com/hpcaitech/ColossalAI) (2026) adds it to *every* action of the
#   row. [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF), TRL 0.11 and
#   [verl](https://github.com/volcengine/verl) have it right.
# - **The baseline peeks** in ColossalChat: it takes the values without the shift by one.
# - **Temperature.** TRL 0.11, DeepSpeed-Chat, ColossalChat, Simple_RLHF and trlX do not divide the
#   logits by it: wrong as soon as it is not 1.
# - **KL.** trlX sums its KL statistic over the prompt's tokens too. OpenRLHF and verl hand the
#   *per-token* mean to their controllers, [lm-human-preferences](https://github.com/openai/lm-human-preferences)
#   the sum over the answer: a target of 6 is not the same thing.
# - **λ.** 0.95 in most; OpenRLHF uses 1 by default. In dialogues of several turns OpenRLHF restarts
#   from 0 at every gap, verl carries value and advantage over it, and so do we.
# - **The sequence-level MDP** was ColossalChat's in 2023 (v0.3: mean KL, one value for the answer, the
#   advantage broadcast), and is [PaLM-rlhf-pytorch](https://github.com/lucidrains/PaLM-rlhf-pytorch)'s default.
#
# (State of the second half of 2026; systems change.)
#
# ## Further reading
#
# - [Sutton and Barto](http://incompleteideas.net/book/the-book-2nd.html), *Reinforcement Learning*,
#   2nd edition, chapters 3, 12 and 13.
# - Williams 1992, *Simple statistical gradient-following algorithms*: REINFORCE and its baseline.
# - [Schulman et al. 2016](https://arxiv.org/abs/1506.02438), *High-dimensional continuous control using generalized
#   advantage estimation*.
# - [Schulman 2020](http://joschu.net/blog/kl-approx.html), *Approximating KL divergence*: k1, k2, k3.
# - [Ziegler et al. 2019](https://arxiv.org/abs/1909.08593), *Fine-tuning language models from human preferences*: the KL
#   as a reward.
# - [Ahmadian et al. 2024](https://arxiv.org/abs/2402.14740), *Back to basics*: the case for the answer as one action.
