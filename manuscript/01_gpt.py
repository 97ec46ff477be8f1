# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 1: GPT, a model of the next token
#
# **What you will be able to do.** Derive attention and say why it needs $1/\sqrt d$ and a causal
# mask; write a transformer block, its loss and its sampler; train a small GPT *with your own
# functions* until it is about as good as any model can be on this text; say how much work a
# key-value cache saves; and recognise, from a loss curve alone, four ways of doing it wrong.
#
# Everything later stands on this chapter. The policy that PPO improves is this network, the reward
# model is this network with another head, and the probability that it gives to its own answer is
# the quantity that reinforcement learning turns.

# %%
from rlhf_course.plots.course_map import course_map

lab.show(
    course_map(1),
    alt="Map of the course: chapter 1, GPT, is framed; all others are faint.",
)

# %% [markdown]
# ## 1. Language modelling: one factor a token
#
# A text is a sequence of tokens $x_0, x_1, \dots, x_{T-1}$ out of a vocabulary of $V$. A language
# model gives every such sequence a probability. It does so one token at a time, by the chain rule,
# which is exact and assumes nothing:
#
# $$p_\theta(x) = p_\theta(x_0) \prod_{t=0}^{T-2} p_\theta(x_{t+1} \mid x_0, \dots, x_t).$$
#
# We choose $\theta$ so that the texts we have seen are likely. Taking the logarithm turns the
# product into a sum. The first factor is left out: nothing stands before $x_0$ that the network could
# predict it from. Dividing by the number of predictions gives the **loss**
#
# $$\mathcal L(\theta) = -\frac{1}{T-1}\sum_{t=0}^{T-2} \log p_\theta(x_{t+1} \mid x_{\le t}).$$
#
# With the natural logarithm its unit is the **nat** (one nat is $1/\ln 2 \approx 1.44$ bits). Its
# exponential, $\exp \mathcal L$, is the **perplexity**: a model of perplexity 8 is on average as
# unsure as if it had to choose among 8 equally likely tokens. Two numbers frame every loss curve:
#
# - *above*, a model that knows nothing gives every token $1/V$: its loss is $\ln V$, its
#   perplexity $V$;
# - *below*, on text that it has not seen, no model can do better in the mean than the text's own
#   entropy. For real text nobody knows that number. Our town is generated, so here we can compute it.
#
# Here is what the model will read: the corpus of a small town, in which statements about 48
# people are told in random order.

# %%
world = lab.world("town")
tokenizer, documents = world.tokenizer, world.documents("train")
vocabulary = len(tokenizer)
print(f"{len(documents)} documents, a vocabulary of {vocabulary}. The first:")
print(documents[0])

# %% [markdown]
# A document is four statements, each drawn at random from all that can be said. So the best
# possible model knows the whole list of statements and, inside one, how many of them still agree
# with what it has read: after the first $k$ tokens $s_{<k}$ of a statement,
#
# $$p^*(s_k \mid s_{<k}) = \frac{\#\{\text{statements that begin with } s_{\le k}\}}
# {\#\{\text{statements that begin with } s_{<k}\}}.$$
#
# The next cell counts that out on the held-out documents. (The training rows have 48 tokens and
# begin where a document begins; the first token of a row is never asked for, so it is left out.)

# %%
from collections import Counter
from itertools import pairwise


def statements(document):
    return [part + "." for part in document.rstrip(".").split(". ")]


kinds = sorted({s for document in documents for s in statements(document)})
ids = {s: tokenizer(s, add_special_tokens=False)["input_ids"] for s in kinds}
prefixes = Counter(tuple(x[:n]) for x in ids.values() for n in range(len(x) + 1))

# %%
costs, starts = [], []  # nats of every token, and where documents begin
for document in world.documents("validation"):
    starts.append(len(costs))
    for x in (ids[s] for s in statements(document)):
        counts = [prefixes[tuple(x[:n])] for n in range(len(x) + 1)]
        costs += [math.log(a / b) for a, b in pairwise(counts)]
    costs.append(0.0)  # the end of a document comes after four statements: no surprise
rows = [costs[s + 1 : s + 48] for s in starts if s + 48 <= len(costs)]
floor, ceiling = sum(map(sum, rows)) / sum(map(len, rows)), math.log(vocabulary)
print(f"{len(kinds)} statements. Knowing nothing: ln V = {ceiling:.2f} nats a token;")
print(f"best possible: {floor:.3f} nats, perplexity {math.exp(floor):.3f}")

# %% [markdown]
# A healthy training run has to come down from the first number to just above the second. **A held-out
# loss below the second number is not a success, it is a bug.** (On the *training* text a model can get
# below it by memorising, given many passes over it; ours does not.) Keep that in mind for the gallery
# at the end.
#
# ## 2. Attention
#
# To predict the token after "You can find Ann Lee Cole in", position $t$ must fetch something from
# earlier positions: who is meant. A recurrent network would have to carry everything it might need
# in one vector. Attention lets position $t$ *ask*:
#
# - it sends out a **query** $q_t \in \mathbb R^d$ ("which name?"),
# - every position $s$ shows a **key** $k_s$ ("I am part of a name") and holds a **value** $v_s$
#   (what it hands over when asked).
#
# How well they fit is the dot product $q_t\cdot k_s$. A softmax makes weights out of the fits, and
# the answer is the weighted mean of the values:
#
# $$o_t = \sum_{s} w_{ts} v_s, \qquad
# w_{ts} = \frac{\exp(q_t\cdot k_s/\sqrt d)}{\sum_{s'} \exp(q_t\cdot k_{s'}/\sqrt d)}.$$
#
# All three vectors are linear maps of the position's own state, learned by gradient descent. Several
# such **heads** work side by side, each with its own maps and $d = D/H$ dimensions, so that one can
# look for names while another looks for verbs.
#
# **Why $1/\sqrt d$.** Let the components of $q$ and $k$ be independent with mean 0 and some variance
# that does not depend on $d$; call it 1. (GPT-2's small initial matrices make it less than 1 at first,
# which only means that attention starts out nearly uniform.) Each product $q_i k_i$ has mean 0 and variance
# $\mathbb E[q_i^2]\,\mathbb E[k_i^2] = 1$, and variances of independent terms add up:
#
# $$\operatorname{Var}(q\cdot k) = \sum_{i=1}^{d} \operatorname{Var}(q_i k_i) = d .$$
#
# So raw scores have a spread of $\sqrt d$, and the wider the head, the closer the softmax comes to
# picking a single position, for no reason but its width. That is bad for learning: the derivative of
# a softmax is $\partial w_s/\partial z_{s'} = w_s(\delta_{ss'} - w_{s'})$, which vanishes when one
# weight is near 1. Dividing by $\sqrt d$ brings the spread back to 1 for every width. Let us measure
# it, with 32 keys a query.

# %%
from rlhf_course.plots.lessons_gpt import attention_weights, score_scale

widths = [2, 4, 8, 16, 32, 64, 128, 256]
spread, largest = {"q·k": [], "q·k / √d": []}, {"q·k": [], "q·k / √d": []}
generator = torch.Generator().manual_seed(0)
for d in widths:
    q = torch.randn(500, 1, d, generator=generator)
    k = torch.randn(500, 32, d, generator=generator)
    scores = (q * k).sum(-1)  # (500, 32)
    for name, z in (("q·k", scores), ("q·k / √d", scores / d**0.5)):
        spread[name].append(z.std().item())
        largest[name].append(z.softmax(-1).amax(-1).mean().item())
lab.show(
    score_scale(widths, spread, largest),
    alt="Two panels over the width of a head. Without scaling, the spread of the "
    "scores grows like its square root and the largest weight nears 1; with scaling "
    "both stay level.",
)

# %% [markdown]
# *What to see: without the division (blue) the spread grows like $\sqrt d$ and the largest of 32
# weights nears 1, so the rest get no gradient. With it (dashed) both stay where they are, whatever
# the width.*
#
# **Why the causal mask.** In training we have the whole text, and want all $T-1$ predictions from one
# pass. Position $t$ is to predict $x_{t+1}$, so whatever it computes must be a function of
# $x_{\le t}$ alone. But $x_{t+1}$ stands in the next column: one look to the right and the task
# becomes copying. The mask sets the score to $-\infty$ (the weight to 0) for every $s > t$. Layer
# norm, MLP and embedding act on each position by itself, so attention is the only place where
# information could leak, and one mask in it makes the whole network causal.
#
# When a cache holds earlier keys (section 6), there are fewer queries than keys: the $T$ queries are
# the *last* $T$ of the $S$ positions. Query $i$ then stands at position $S-T+i$ and may look at
# $s \le S-T+i$. The triangle is aligned to the lower right.

# %% exercise gpt.causal_attention
# hint: Three lines: scores `q @ k.transpose(-1, -2)` divided by `math.sqrt(d)`, a mask, a softmax
# over the last dimension, times `v`. Put $-\infty$ where a query may not look *before* the softmax.
# hint: The causal rule for T queries at the end of S positions is
# `torch.ones(T, S, dtype=torch.bool).tril(S - T)`. When `attend` is given, it is used instead.
# hint: `F.scaled_dot_product_attention` does it all in one call. But its `is_causal=True` aligns the
# triangle to the upper left, which is right only for T = S; else give it the mask.

# %% [markdown]
# What comes out can be looked at: with the identity matrix as the values, the output *is* the matrix
# of weights. Random queries and keys for six words, with your function:

# %%
words = ["You", "can", "find", "Ann", "in", "Oslo"]
T = len(words)
q, k = torch.randn(2, 1, 1, T, 16, generator=torch.Generator().manual_seed(1))
identity, everywhere = torch.eye(T)[None, None], torch.ones(T, T, dtype=torch.bool)
panels = {
    "Causal": causal_attention(q, k, identity)[0, 0],
    "Without a mask": causal_attention(q, k, identity, attend=everywhere)[0, 0],
}
lab.show(
    attention_weights(panels, words),
    alt="Two six by six matrices of attention weights. The causal one is a lower "
    "triangle; without a mask every word also looks at later ones.",
)

# %% [markdown]
# *What to see: left, nothing above the diagonal: "You" can only look at itself, and each row sums to
# 1 over what it may see. Right, "Ann" also looks at "in", the very word it should predict.*
#
# ## 3. The block and the residual stream
#
# A GPT is a **residual stream** $h \in \mathbb R^{B\times T\times D}$ ($B$ texts at once, width $D$)
# that starts as token plus position embedding and runs to the output. Every block reads from it and *adds* to it, twice:
#
# $$h \leftarrow h + \mathrm{attention}(\mathrm{norm}_1(h)), \qquad
# h \leftarrow h + \mathrm{MLP}(\mathrm{norm}_2(h)).$$
#
# (In code and figure the stream is called `x`.) Attention moves information between positions, the MLP works
# on each position by itself.

# %%
from rlhf_course.plots.lessons_gpt import residual_stream

lab.show(
    residual_stream(),
    alt="A horizontal line, the residual stream. Two branches leave it, through layer "
    "norm and attention and through layer norm and MLP, and are added back to it.",
)

# %% [markdown]
# *What to see: nothing stands **on** the stream. That is what "pre-norm" means, and why depth does
# not hurt.* $L$ blocks have $M = 2L$ branches. Let $h_0$ be the stream at the bottom and
# $h_{m+1} = h_m + f_m(h_m)$ what branch $m$ makes of it. The gradient of the loss at the bottom is
#
# $$\frac{\partial \mathcal L}{\partial h_0} = \frac{\partial \mathcal L}{\partial h_M}
# \prod_{m=M-1}^{0}\Bigl(I + \frac{\partial f_m}{\partial h_m}\Bigr)
# = \frac{\partial \mathcal L}{\partial h_M}\,\bigl(I + \dots\bigr):$$
#
# multiplied out, the product contains the identity, so part of the gradient arrives untouched
# whatever the branches do. In the original transformer the norm stood on the stream, *after* the
# addition ("post-norm"); then every factor holds a norm's Jacobian, nothing passes unchanged, and
# training needs a careful warm-up (Xiong et al. 2020).
#
# One more detail keeps the forward pass in bounds. $2L$ branches add to the stream; were they
# independent and each of variance $\sigma^2$, together they would add $2L\sigma^2$. GPT-2 therefore initialises the last
# matrix of each branch smaller by $1/\sqrt{2L}$ (`GPT._initialise`).

# %% exercise gpt.Block.forward
# hint: Two lines, one for each branch. The norms are `self.norm_1` and `self.norm_2`.
# hint: `self.attention(…, attend, cache, layer)` takes three more arguments, just hand them on.
# `self.drop` (dropout) goes around what a branch computes, never around the stream.

# %% [markdown]
# ## 4. The loss, and why it is shifted by one
#
# The network returns logits $z \in \mathbb R^{B\times T\times V}$, one row of $V$ numbers at *every*
# position. The logits at position $t$ were computed from $x_{\le t}$. They are the model's opinion
# about the token that comes **next**, $x_{t+1}$. The labels are simply the tokens themselves, so the
# loss has to pair `logits[:, t]` with `labels[:, t + 1]`: drop the last row of logits, which nobody
# can grade, and the first label, which nobody predicts.

# %%
from rlhf_course.plots.lessons_gpt import gallery, loss_curves, shift_by_one

lab.show(
    shift_by_one(["Ann", "Lee", "Cole", "lives", "in", "Oslo", "."]),
    alt="Seven tokens above, the same seven below; an arrow goes from each upper token "
    "to the lower token one place to its right. The first lower token has no arrow.",
)

# %% [markdown]
# *What to see: what is read at $t$ is asked for the label at $t+1$. Seven tokens give six
# predictions; the first label is grey, since nothing comes before it.*
#
# Each prediction is a classification among $V$ tokens. Maximum likelihood means the negative
# log-likelihood of the right one, which for logits is the cross-entropy
#
# $$-\log p(x_{t+1}) = -z_{x_{t+1}} + \log\sum_{v=1}^{V} e^{z_v},
# \qquad \frac{\partial}{\partial z_v} = p_v - \mathbb 1[v = x_{t+1}] .$$
#
# The gradient is as plain as can be: the probability that was given minus the one that was due.
# Some labels do not count (in chapter 2 the user's words; pads everywhere): they carry the number
# −100, and the mean is taken over those that do count.

# %% exercise gpt.next_token_loss
# hint: `logits[:, :-1]` and `labels[:, 1:]` now have the same length, T − 1.
# hint: `F.cross_entropy` wants (N, V) and (N,): flatten the first two dimensions of both. It knows
# `ignore_index`.
# hint: Its own mean is NaN when no label counts. Take `reduction="sum"` and divide by the count,
# which is at least 1.

# %% [markdown]
# ## 5. Train it with your own functions
#
# `lab.train` runs the package's trainer (AdamW, warm-up, linear decay, gradients clipped to norm 1)
# and puts the functions you hand it in the place of the package's. From here on the attention, the
# blocks and the loss of the model are yours. The model: 3 blocks, 4 heads, width 128.

# %%
own = lab.train(
    "pretrain",
    name="01-own",
    own=[causal_attention, Block, next_token_loss],
    steps=250,
)
perplexity = own.curve("validation_perplexity")[-1]
losses = own.curve("loss")
print(f"{len(losses)} updates in {own.seconds:.0f} s; first loss {losses[0]:.2f} nats")
print(f"held out: perplexity {perplexity:.3f}; best possible {math.exp(floor):.3f}")

# %%
levels = {f"ln V = {ceiling:.2f}": ceiling, f"best possible {floor:.2f}": floor}
lab.show(
    loss_curves({"your GPT": losses}, levels=levels),
    alt="Training loss over updates, logarithmic axis: it starts at ln V, falls "
    "steeply, and flattens just above the best possible loss.",
)

# %% [markdown]
# *What to see: the curve begins at $\ln V$ and flattens out at the lower line. It drops in stages:
# first the frequencies of the words, then the forms of the sentences, and last and slowest the
# facts, for which the whole name has to be put together.* (Faint: every update; strong: a moving
# average. Single batches may fall below the line, since a batch can be easier than the mean.)
#
# Where does it look when it needs a fact? We catch queries and keys inside the trained model, feed
# them to your attention with the identity as values, and pick the head that, from the word before
# the value, looks at the name the most.

# %%
model, _ = own.model()
person = world.people["known"][0]
read = tokenizer(f"You can find {person} in", add_special_tokens=False)["input_ids"]
caught = []


def catch(module, inputs, output):
    caught.append(output.float())  # (1, T, 3 D): queries, keys and values side by side


hooks = [b.attention.qkv.register_forward_hook(catch) for b in model.blocks]
with torch.no_grad():
    model(torch.tensor([read]))
for hook in hooks:
    hook.remove()

# %%
T, heads, looks = len(read), model.config.heads, []
for qkv in caught:
    q, k, _ = qkv.view(1, T, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (1, H, T, d)
    looks += list(causal_attention(q, k, torch.eye(T).expand(1, heads, T, T))[0])
on_name = torch.stack([w[-1, 3 : T - 1].sum() for w in looks])  # one entry a head
best, words = int(on_name.argmax()), [tokenizer.decode(i).strip() for i in read]
title = f"block {best // heads + 1}, head {best % heads + 1}"
print(f"{title}: {on_name[best]:.0%} of what the last word looks at is the name")
lab.show(
    attention_weights({title: looks[best]}, words),
    alt="Attention weights of one trained head over the words of 'You can find', a "
    "name, and 'in'; the last row is dark in the columns of the name.",
)

# %% [markdown]
# *What to see: the bottom row. Asked for a town, the model goes back to the name.* (One head of one
# run; that a head looks somewhere does not prove that it uses what it finds there.)
#
# ## 6. Sampling
#
# The model gives a distribution; to get text, we draw from it. Three dials bend it first.
#
# **Temperature** $\tau$ divides the logits: $p_\tau(v) \propto e^{z_v/\tau} = p(v)^{1/\tau}$ up to
# normalisation. The ratio of two tokens becomes $(p_a/p_b)^{1/\tau}$: below 1 the favourites gain,
# above 1 the others. $\tau\to 0$ leaves only the likeliest token ("greedy"), $\tau\to\infty$ makes
# all equal.
#
# **Top-k** keeps the $k$ likeliest tokens. **Top-p** (nucleus) keeps the smallest set whose
# probability reaches $p$: few tokens where the model is sure, many where it is not, which a fixed $k$
# cannot do. What is kept is normalised again. Both cut off the long tail of tokens that are each
# unlikely and together, with $V$ of them, not rare at all.
#
# The function also returns the **log-probability of what it drew, under the distribution it drew
# from**, tempered and truncated. PPO compares this number with a later one, and must compare like
# with like (chapter 5).

# %% exercise gpt.sample_token
# hint: The order is: temperature, then top-k, then top-p of what is left, then `log_softmax`, then
# `torch.multinomial` with the generator. Cut tokens get the logit $-\infty$. Temperature 0 is a case
# of its own, before all that: one cannot divide by it.
# hint: top-k: `logits.topk(k).values[:, -1:]` is the smallest logit that stays; mask what is strictly
# smaller. Do not do it in place, since the logits belong to the caller.
# hint: top-p: sort the logits in descending order, and drop a token when the mass *before* it
# already reaches p. So the likeliest is always kept. `scatter_` with the sort's indices brings the
# result back into token order.

# %% [markdown]
# Try it on the model's own distribution after the word "Meet", where any known person may follow:
# 5,000 draws for every setting, and beside them the probability that your function says they had.

# %%
from rlhf_course.plots.lessons_gpt import distributions

with torch.no_grad():
    first = tokenizer("Meet", add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([[tokenizer.eos_token_id, *first]]))[:, -1]  # (1, V)
top = logits[0].topk(14).indices
settings = {
    "as it is": {},
    "temperature 0.4": {"temperature": 0.4},
    "temperature 2": {"temperature": 2.0},
    "top-k 5": {"top_k": 5},
    "top-p 0.5": {"top_p": 0.5},
    "temperature 2, top-p 0.5": {"temperature": 2.0, "top_p": 0.5},
}

# %%
drawn, returned = {}, {}
for name, how in settings.items():
    generator = torch.Generator().manual_seed(0)
    tokens, logp = sample_token(logits.expand(5000, -1), generator=generator, **how)
    drawn[name] = [(tokens == v).float().mean().item() for v in top]
    said = [logp[tokens == v].exp() for v in top]
    returned[name] = [p[0].item() if len(p) else math.nan for p in said]
lab.show(
    distributions([tokenizer.decode(int(v)).strip() for v in top], drawn, returned),
    alt="Six bar charts of the next token after 'Meet', one a way of sampling. A low "
    "temperature sharpens the distribution, a high one flattens it, top-k and top-p "
    "cut off its tail. Dots, the returned probabilities, lie on the tops of the bars.",
)

# %% [markdown]
# *What to see: the dots lie on the bars, so the returned log-probability belongs to the distribution
# that was drawn from. Temperature bends all bars; top-k and top-p leave the ratios among the
# survivors alone and cut off the rest. The last panel shows that order matters: a high temperature
# flattens first, so the nucleus then needs more tokens to reach one half.*
#
# ### The key-value cache
#
# To write token $n+1$ after a prompt of $P$ tokens, the plain way feeds all $P+n$ tokens through the
# network again and uses only the last row. An answer of $N$ tokens thus costs
#
# $$\sum_{n=0}^{N-1} (P+n) = NP + \frac{N(N-1)}{2}$$
#
# positions: quadratic in $N$. But the mask says that position $s$ never looks at anything behind it,
# so its keys and values do not change when the text grows. Keep them: then each step computes *one*
# new position, whose query looks at the stored keys, and the answer costs $P + N - 1$ positions.
# (Each of them still reads all the keys; that part stays quadratic, but it is a small one.)
#
# The surroundings of the loop are given. `batch.prompts()` says what the model reads first,
# `batch.append(new)` what it reads next, where `new` is one token a row, (B,); each is a tuple
# (tokens, attend, positions). `cache` is handed to `hidden_states` behind it every time. You fill
# `responses`, `logprobs` and `finished`, which have one entry a prompt.

# %% exercise gpt.generate
# hint: The loop: `hidden = model.hidden_states(*read, cache)[:, -1]`, `model.unembed(hidden)`,
# `sample_token(…)`; append token and log-probability of every row that has not finished; then
# `read = batch.append(new)` and go on, at most `max_new_tokens` times.
# hint: EOS belongs to the answer. Append it, set `finished[row]`, and append nothing to that row
# afterwards. Stop when all rows are finished.
# hint: Finished rows may stay in the batch and be ignored; that is correct. Dropping them
# (`cache.select`, `batch.select`, and a list of which rows are left) is faster, not more right.

# %% [markdown]
# We count, and take the time: your `generate` against the plain way, on a fresh GPT with a longer
# context (what it says does not matter here, and it never says the end, since no token has that id).

# %%
import time

from rlhf_course.gpt import GPT, GPTConfig

torch.manual_seed(0)
fresh = GPT(GPTConfig(vocab_size=vocabulary, context=256)).eval()
read_positions = 0
whole = fresh.hidden_states


def counted(tokens, *rest):
    global read_positions
    read_positions += tokens.shape[1]
    return whole(tokens, *rest)


fresh.hidden_states = counted


# %%
@torch.no_grad()
def plain_way(model, prompts, new_tokens):
    tokens = torch.tensor(prompts)
    for _ in range(new_tokens):
        logits = model.unembed(model.hidden_states(tokens)[:, -1])
        tokens = torch.cat([tokens, logits.argmax(-1)[:, None]], dim=1)
    return tokens[:, len(prompts[0]) :].tolist()


def with_cache(model, prompts, new_tokens):
    return generate(model, prompts, new_tokens, eos_id=-1, temperature=0).responses


prompts = torch.randint(0, vocabulary, (8, 8)).tolist()
print("same answers:", plain_way(fresh, prompts, 40) == with_cache(fresh, prompts, 40))

# %%
from rlhf_course.plots.lessons_gpt import cache_cost

lengths = [1, 8, 16] if lab.quick else [1, 40, 80, 120, 160, 200]
work, seconds = {"plain": [], "cached": []}, {"plain": [], "cached": []}
for new_tokens in lengths:
    for name, way in (("plain", plain_way), ("cached", with_cache)):
        read_positions, began = 0, time.perf_counter()
        way(fresh, prompts, new_tokens)
        seconds[name].append(time.perf_counter() - began)
        work[name].append(read_positions)
more, longer = (t["plain"][-1] / t["cached"][-1] for t in (work, seconds))
print(f"{lengths[-1]} tokens: {more:.0f} times the work, {longer:.1f} times the time")
lab.show(
    cache_cost(lengths, work, seconds),
    alt="Positions computed and seconds over the number of new tokens. Without a cache "
    "both grow quadratically, with it they grow in proportion.",
)

# %% [markdown]
# *What to see: the plain way grows quadratically, the cached one in proportion. The time gained is
# less than the work saved: a step for one token keeps a processor far less busy than one for
# hundreds, and the cost of starting each operation remains.* That is why large systems for RLHF put
# much of their engineering into the **rollouts**, the answers that the policy writes while it learns:
# that is where the time goes.
#
# And now your model speaks, with your sampler: a hundred documents by temperature. We know every
# statement that is true in the town, so we can count.

# %%
eos = tokenizer.eos_token_id
for temperature in (0.5, 1.0, 1.5):
    generator = torch.Generator().manual_seed(3)
    out = generate(
        model, [[eos]] * 100, 48, eos, temperature=temperature, generator=generator
    )
    said = [tokenizer.decode(r, skip_special_tokens=True) for r in out.responses]
    claims = [s for text in said for s in statements(text)]
    true = sum(s in ids for s in claims) / len(claims)
    print(
        f"temperature {temperature}: {true:.0%} of its statements are true. {said[0]}"
    )

# %% [markdown]
# It writes statements of the town's kind, and at low temperature mostly true ones: the facts are in its
# weights. It has never seen a question and answers none; that is the next chapter's business.
#
# ## What healthy looks like
#
# | what | healthy, on this corpus | why |
# |---|---|---|
# | first loss | $\ln V \pm 0.1$ | small initial weights: all tokens about equally likely |
# | after 250 updates | within about 3 % of the best possible loss | 432 statements fit easily |
# | held-out perplexity | follows training; never below the best possible | it cannot know more |
# | gradient norm | high at first, below 1 later | clipping at 1 then does nothing |
# | sampled text | grammatical, names of the town | look at it, always |
#
# The bands are those of the runs in this notebook and of the course's base model. What would refute
# "the model has learned the corpus": a held-out perplexity that stays well above the floor while
# training loss goes on falling, which is memorising.
#
# ### A gallery of unhealthy curves
#
# Each is really broken, in one place, and trained beside a healthy run of the same settings.
#
# 1. **No causal mask**: attention looks to the right.
# 2. **Shift forgotten**: position $t$ is asked for token $t$, which it has just read.
# 3. **Learning rate too high**: a hundred times ours.
# 4. **…and much too high**: three hundred times ours.

# %%
mine = causal_attention, next_token_loss


def causal_attention(q, k, v, attend=None, dropout=0.0):  # 1: forgets the causal rule
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)


def next_token_loss(logits, labels, ignore=-100):  # 2: forgets the shift
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignore)


# %%
def short_run(name, steps, **settings):
    return lab.train("pretrain", name=name, batch=32, steps=steps, **settings)


healthy = short_run("01-healthy", 160)
broken = {
    "1  no causal mask": short_run("01-no-mask", 160, own=[causal_attention]),
    "2  shift forgotten": short_run("01-no-shift", 80, own=[next_token_loss]),
    "3  learning rate × 100": short_run("01-lr-100", 80, lr=0.3),
    "4  learning rate × 300": short_run("01-lr-300", 80, lr=0.9),
}
causal_attention, next_token_loss = mine

# %%
curves = {name: run.curve("loss") for name, run in broken.items()}
lab.show(
    gallery(curves, healthy.curve("loss"), {"best possible": floor}),
    alt="Four panels of broken training runs beside a grey healthy one: without a mask "
    "the loss falls below the best possible, without the shift it falls to nearly 0 at "
    "once, with a high learning rate it stays high, with a higher one it goes up.",
)

# %% [markdown]
# *What to see: the two bugs look **better** than the healthy run. Without the mask the loss first
# follows the healthy one, then finds the leak and dives through the floor; without the shift it does
# so at once. The two learning rates are honest failures: one learns the frequencies of words and
# nothing more, the other is thrown about.*
#
# A loss that is too good is refuted by looking at what the model writes:

# %%
for name, run in broken.items():
    speaker, _ = run.model()
    generator = torch.Generator().manual_seed(0)
    out = generate(speaker, [[tokenizer.eos_token_id]], 16, -1, generator=generator)
    print(f"{name}: {tokenizer.decode(out.responses[0])}")

# %% [markdown]
# ## Scale it up
#
# The same trainer takes your text and GPT-2's shape (124 million parameters, 12 blocks of width 768:
# `--size gpt2`) or goes on from a checkpoint of the hub (`--model` with its owner):
#
# ```bash
# rlhf-course pretrain --size gpt2                                   # the town, a larger one
# rlhf-course pretrain --data stanfordnlp/imdb --model openai-community/gpt2 --batch 32 --context 512 --window 512 --steps 430 --lr 5e-5 --out runs/imdb/pretrain
# rlhf-course pretrain --data my_text.jsonl --model Qwen/Qwen2.5-0.5B --batch 8 --context 512 --window 512 --lr 1e-5 --out runs/mine/pretrain
# ```
#
# | | expect | |
# |---|---|---|
# | first loss of a new GPT-2, $V = 50257$ | 10.8 nats | $\ln V$ |
# | this chapter, two CPU cores | 64 s | *measured* 2026-11-23, two quiet Xeon cores |
# | tokens a second, 124 M, A100 40 GB, bf16 | 126,000 | *estimated*: $0.3\cdot 312\cdot10^{12} / (6\cdot 0.124\cdot10^9)$ |
# | the same, T4, float32 | 5,400 | *estimated*: $0.5\cdot 8.1\cdot10^{12} / (6\cdot 0.124\cdot10^9)$ |
# | IMDB's 25,000 reviews once (7 million tokens) | A100 1 minute, T4 22 minutes | *estimated*: tokens over tokens a second |
# | Qwen2.5-0.5B, the same text, A100 40 GB | 4 minutes, 14 GB | *estimated*: 31,700 tokens/s; 16 bytes a parameter are 8 GB, activations and logits of 4,096 tokens the rest |
# | loss of GPT-2 124 M on web text, after some $10^{11}$ tokens | about 2.9 nats | *estimated*: nanoGPT's README reports 2.85 on OpenWebText |
# | first loss when going on from GPT-2 on ordinary English | 3 to 4 nats | *estimated* |
#
# [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## Check yourself
#
# <details><summary>1. Your first loss is 9 nats, with V = 525. What is wrong?</summary>
#
# $\ln 525 \approx 6.3$. A higher first loss means that the model is *sure and wrong*: initial weights
# too large, or labels that do not belong to these tokens.
#
# </details>
#
# <details><summary>2. Why does scaling by 1/d instead of 1/√d hurt less than no scaling at all, and
# still hurt?</summary>
#
# Scores then have the spread $1/\sqrt d$: the softmax is nearly uniform, gradients flow, but queries
# and keys must first grow until their product is $\sqrt d$ times as large, before the head can select
# anything.
#
# </details>
#
# <details><summary>3. Validation perplexity is 1.03 where 2.11 is the best possible, on held-out text.
# Can it be overfitting?</summary>
#
# No. Overfitting helps on the training text alone. Below the entropy on *held-out* text means that
# the answer leaks into the question: mask or shift.
#
# </details>
#
# <details><summary>4. With a cache of 10 keys you feed 3 new tokens. Which keys may the first of them
# look at?</summary>
#
# $S = 13$, $T = 3$: query 0 stands at position 10 and may look at positions 0 to 10, eleven keys.
# A mask aligned to the upper left would leave it one.
#
# </details>
#
# <details><summary>5. You sample with temperature 0.7 and later compute the log-probability of the
# same tokens without it. What happens to their ratio, and why will PPO care?</summary>
#
# The two are different distributions, so $\exp(\log p_{\text{later}} - \log p_{\text{then}}) \ne 1$
# although no weight has changed. PPO takes that ratio for a change of the policy.
#
# </details>
#
# ## What public systems do differently
#
# - **Temperature in the trainer.** What is sampled at temperature $\tau$ must be scored at $\tau$.
#   [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF) (since PR 853),
#   [verl](https://github.com/volcengine/verl) and OpenAI's
#   [lm-human-preferences](https://github.com/openai/lm-human-preferences) divide the trainer's logits
#   too; [TRL](https://github.com/huggingface/trl) up to 0.11,
#   [DeepSpeed-Chat](https://github.com/deepspeedai/DeepSpeedExamples),
#   [ColossalChat](https://github.com/hpcaitech/ColossalAI) and
#   [trlX](https://github.com/CarperAI/trlx) do not.
# - **Positions behind left padding.** `LeftPadded` restarts them at 0 behind the pads. OpenRLHF gives
#   pads position 1, OpenAI and newer TRL 0, which does not matter, since nobody looks at them; to
#   leave positions unrestarted would.
# - **Dropout.** GPT-2's checkpoints carry dropout 0.1. With it on, rollout and update come from
#   different networks. Our loader sets it to 0; OpenRLHF switches between evaluation and training
#   mode and leaves it as it is, which is harmless for Llama and Qwen (0.0) and not for GPT-2.
# - **Precision.** OpenRLHF computes log-probabilities in fp32 from bf16 logits, as we keep logits and
#   the final norm in fp32.
#
# ## Further reading
#
# - Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.2 and
#   footnote 4 (the $\sqrt d$).
# - Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*: GPT-2, section 2.3.
# - Xiong et al. 2020, [On Layer Normalization in the Transformer
#   Architecture](https://arxiv.org/abs/2002.04745): pre-norm against post-norm.
# - Holtzman et al. 2020, [The Curious Case of Neural Text
#   Degeneration](https://arxiv.org/abs/1904.09751): top-p.
# - Elhage et al. 2021, [A Mathematical Framework for Transformer
#   Circuits](https://transformer-circuits.pub/2021/framework/index.html): the residual stream.
# - Karpathy, [nanoGPT](https://github.com/karpathy/nanoGPT): the same model at GPT-2's size.
