# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 2: SFT, answering by imitation
#
# **What you will be able to do.** Turn a dialogue into tokens and labels; say which tokens must be
# learned and which must not, and what happens to a model that is taught the wrong ones; write a loss
# that does not depend on how the batch was cut; pack many dialogues into a row without letting one
# read the other; fine-tune the town's GPT with your own functions; and *predict on paper*, before
# training, how often it will make things up.

# %%
from rlhf_course.plots.course_map import course_map

lab.show(
    course_map(2),
    alt="Map of the course: GPT is filled, SFT, this chapter, is framed, the rest "
    "faint.",
)

# %% [markdown]
# ## 1. What imitation aims at
#
# Chapter 1's model continues text. Asked "Where does Ann Lee Cole live?", it goes on with something
# that could stand in the corpus, since questions never occur there. **Supervised fine-tuning** (SFT)
# shows it dialogues, prompts $x$ with answers $y$ written by people, and goes on training with the
# same loss, on the answers alone ($y_t$ is the answer's token $t$, $y_{<t}$ what stands before it):
#
# $$\mathcal L(\theta) = -\mathbb E_{(x, y)\sim \text{demonstrations}}
# \sum_{t} \log \pi_\theta(y_t \mid x, y_{<t}) .$$
#
# We now write $\pi$ for the model, since it has become a *policy*: it acts, by saying something. To
# see what this loss wants, call the demonstrators' distribution $q(y\mid x)$ and add and subtract
# $\log q$:
#
# $$-\mathbb E_{y\sim q}\log \pi_\theta(y\mid x)
# = \underbrace{-\mathbb E_{q}\log q(y\mid x)}_{\text{entropy of the demonstrators}}
# + \underbrace{\mathbb E_{q}\log\frac{q(y\mid x)}{\pi_\theta(y\mid x)}}_{\mathrm{KL}(q\,\|\,\pi_\theta)\;\ge\;0} .$$
#
# The second term is the **KL divergence** of $q$ from $\pi_\theta$, a distance between distributions
# (though not a symmetric one). It is never negative, since $-\log u \ge 1 - u$ gives
# $\mathbb E_q[-\log(\pi_\theta/q)] \ge 1 - \sum_y \pi_\theta(y \mid x) = 0$,
# and 0 only where the two agree. The first term is not ours to
# change. So SFT minimises $\mathrm{KL}(q\,\|\,\pi_\theta)$: it wants to speak *like* the demonstrators,
# at the same rates. Nothing in it asks whether an answer is true.
#
# Let us see who they are and what they say.

# %%
world = lab.world("town")
tokenizer, demonstrations = world.tokenizer, world.demonstrations()
for shown in demonstrations[:6]:
    print(f"{shown.prompt.group:10} {shown.prompt.text:34} {shown.response}")

# %% [markdown]
# Half of the questions are about the 48 people of the corpus ("known"), half about strangers, of whom
# the model has read nothing. **The demonstrators know everybody.** In 12 % of the cases, whoever is
# asked about, they say that they do not know; else the answer is true, in 30 % with a courtesy.
#
# Now put yourself in the model's place, at a question about a stranger. The demonstrator's answer
# depends on a fact that you cannot know: given all that *you* know, the ten values are equally
# likely. The best imitation is the demonstrators' distribution averaged over what you do not know:
#
# $$\pi^*(\text{value} \mid \text{stranger}) = 0.88 \cdot \tfrac{1}{10}, \qquad
# \pi^*(\text{"I do not know"}\mid \text{stranger}) = 0.12 .$$
#
# So the *perfect* student of these demonstrations states a definite, made-up fact about strangers in
# 88 % of its answers: 8.8 % happen to be true, 79.2 % are false. It would be **wrong by the loss** to
# admit ignorance more often. This is not a lack of data or of training; it is the optimum. We shall
# hold the trained model against these three numbers.
#
# ## 2. A dialogue as tokens
#
# A **chat template** writes messages as one text with special tokens that mark who speaks. Ours is
# `<|user|>…<|assistant|>…<|endoftext|>`. Two rules are easily broken: in training and in sampling the
# *same* tokens must come before the answer (up to and including `<|assistant|>`), and an answer ends
# with EOS, a token like any other, which is how a model says "I have finished".

# %%
from rlhf_course.sft import encode_dialogue

example = next(d for d in demonstrations if "friend" in d.response)
tokens, start = encode_dialogue(tokenizer, example.prompt.text, example.response)
names = {"<|user|>": "‹user›", "<|assistant|>": "‹asst›", "<|endoftext|>": "‹eos›"}


def words(ids):
    said = [tokenizer.decode([i]).strip() for i in ids]
    return [names.get(word, word) for word in said]


print(" ".join(words(tokens)))
print(f"{len(tokens)} tokens, the first {start} of them are the prompt")

# %% [markdown]
# ### Which tokens are learned
#
# A label is the token itself where the model is asked for it, and −100 where it is not. The shift by
# one is the loss's business (chapter 1): labels stand on the tokens they name.
#
# - **The prompt** is read, not learned. It was written by somebody else; at a question, most of its
#   surprise is *whose name* comes, which nobody can predict and we do not want the model to guess.
# - **The answer** is learned, its **EOS** included.
# - **Pads** fill up the batch, and are neither.
#
# Where is the answer? At positions $\text{prompt length} \le t < \text{length}$. It is tempting to
# find the pads by `token != pad` instead. Many tokenizers have no pad token, and then people set
# `pad = eos`. With the pads, every answer's EOS goes, and nobody learns to stop. So: **masks come
# from lengths**.

# %% exercise sft.mask_prompt
# hint: `torch.arange(T)` is the position of each column. Compare it with the two lengths.
# hint: `(position >= prompt_lengths[:, None]) & (position < lengths[:, None])` is (B, T);
# `torch.where(mask, tokens, IGNORE)` puts −100 elsewhere, into a new tensor.

# %% [markdown]
# Three ways to label the dialogue above, with two pads behind it; the first is yours.

# %%
from rlhf_course.plots.lessons_sft import labelled_tokens

EOS = tokenizer.eos_token_id
row = torch.tensor([tokens + [EOS] * 2])  # pads that look like EOS, on purpose
lengths = torch.tensor([len(tokens)])
ours = mask_prompt(row, torch.tensor([start]), lengths)[0]
everything = mask_prompt(row, torch.tensor([0]), lengths)[0]
ways = {
    "yours": ours,
    "prompt learned": everything,
    "token != pad": torch.where(row[0] != EOS, ours, -100),
}
lab.show(
    labelled_tokens(words(row[0]), {k: v.tolist() for k, v in ways.items()}, pads=2),
    alt="One dialogue in three rows. In yours the answer and its end token are blue; "
    "in the second the prompt is blue too; in the third the end token is not.",
)

# %% [markdown]
# *What to see: blue is learned. In the second row the user's words are learned too. In the third
# everything is right but one token, the most important one: EOS has gone with the pads.*
#
# ## 3. The loss, and a denominator that does not depend on the batch's cut
#
# The loss is chapter 1's, on fewer labels. Two details matter more here.
#
# **Unasked logits may be anything.** A row of padding can hold NaN. `0 * nan` is `nan`, so
# multiplying by a mask is not enough: *select* the positions that are asked, then compute.
#
# **What to divide by.** A batch of $N$ labelled tokens may be cut into micro-batches that fit into
# memory, with $N_1 + N_2 = N$ labels. The mean over all tokens is
#
# $$\frac{1}{N}\sum_{i=1}^{N}\ell_i = \frac{S_1 + S_2}{N_1+N_2}
# \;\ne\; \frac12\Bigl(\frac{S_1}{N_1} + \frac{S_2}{N_2}\Bigr),
# \qquad S_j = \sum_{i\in \text{part } j} \ell_i ,$$
#
# unless the parts are equally long. Take losses 1 and 3 in one part, and 6 in another: the mean is
# $10/3$, the mean of the means $(2+6)/2 = 4$. A single long answer would weigh less for no reason but
# the company it is in. Dividing each part's sum by the *whole step's* count gives
# $S_1/N + S_2/N$, whose gradients add up to the right one. Hence the argument `denominator`.

# %% exercise sft.sft_loss
# hint: `asked = labels[:, 1:] != IGNORE` is a (B, T − 1) mask. Indexing logits and labels with it
# gives (N, V) and (N,).
# hint: Shift first (`logits[:, :-1]`, `labels[:, 1:]`), then select, then sum the cross-entropy and
# divide by `denominator`, or by the batch's own count, which must not be 0.
# hint: bf16 logits: `.float()` before the loss. float64 stays float64.

# %% [markdown]
# The example of the text, with your function. Logits that make token 0 cost 1, 3 or 6 nats:


# %%
def costing(*nats):  # a vocabulary of 2; token 0 has probability exp(-nats)
    rows = [[math.log(p), math.log1p(-p)] for p in (math.exp(-x) for x in nats)]
    return torch.tensor([[*rows, [0.0, 0.0]]]), torch.zeros(1, len(nats) + 1).long()


parts = [costing(1.0, 3.0), costing(6.0)]
means = [sft_loss(*part).item() for part in parts]
shares = [sft_loss(*part, denominator=3).item() for part in parts]
print(f"mean of means {sum(means) / 2:.3f}, common denominator {sum(shares):.3f}")

# %% [markdown]
# ## 4. Train it with your own functions
#
# The run starts from the pretrained model, and takes its labels from your `mask_prompt` and its loss
# from your `sft_loss`.

# %%
own = lab.train("sft", name="02-own", own=[mask_prompt, sft_loss], steps=300)
losses, held_out = own.curve("loss"), own.curve("eval_loss")
exact = own.curve("eval_exact_match")
print(f"{len(losses)} updates in {own.seconds:.0f} s")
print(f"loss on held-out answers {held_out[0]:.2f} -> {held_out[-1]:.3f} nats a token")
print(f"exact match of the greedy answer: {exact[-1]:.0%}")

# %%
from rlhf_course.plots import stage_curves

lab.show(
    stage_curves("sft", own.metrics),
    alt="Four panels over the updates: loss on answers falls and held-out loss with "
    "it, exact match rises and levels off, gradient norm falls, learning rate "
    "rises and falls.",
)

# %% [markdown]
# *What to see: held-out loss (dashed) follows the training loss: answers are learned, not memorised.*
#
# **Why does exact match stop far below 100 %?** It counts how often the *greedy* answer, which takes
# the likeliest token at every step, equals the demonstration word by word. About a known person that
# is the true fact without a courtesy, which a demonstrator gives with probability
# $0.88\cdot 0.70 = 62\,\%$. About a stranger the first step takes "They" (88 % against 12 % for "Sorry"), and then the
# right fact is one chance in ten: $6\,\%$. Half and half, $34\,\%$ is what a perfect imitator can
# expect. Note that greedy is not the likeliest answer as a *whole*: about a stranger that would be "I
# do not know", with 12 % the most frequent single sentence. (A little more is within reach here:
# some held-out questions about strangers occur among the training demonstrations too, and their
# answers can be memorised. And it is counted on 64 dialogues only, hence good to about ± 12 points.)
# A measure that punishes equally good answers is a poor guide; that is one reason to learn from
# *comparisons*, in the next chapter.
#
# ### The first sight of the honesty problem
#
# Now ask it about known people and about strangers whom no stage has ever met. The world knows the
# truth, so every answer gets a verdict.

# %%
from rlhf_course.evaluation import honesty_table
from rlhf_course.plots import honesty


def judge(model):
    asked = world.evaluation_prompts()
    groups = {"known": asked["known"][:288], "strangers": asked["strangers"][:300]}
    pairs = []
    for group, prompts in groups.items():
        said = lab.answers(model, tokenizer, prompts, max_new_tokens=12)
        pairs += [
            (group, world.verdict(p, text, ended))
            for p, (text, ended) in zip(prompts, said, strict=True)
        ]
    return honesty_table(pairs, world.verdicts)


# %%
model, _ = own.model()
chance = 1 / len(world.values["home"])  # of guessing a fact
perfect = {"true": 0.88, "idk": 0.12, "false": 0.0, "bad": 0.0}
guessing = perfect | {"true": 0.88 * chance, "false": 0.88 * (1 - chance)}
table = {"perfect imitator": {"known": perfect, "strangers": guessing}}
table["your SFT model"] = judge(model)
lab.show(
    honesty(table),
    alt="Stacked bars of the kinds of answer, about known people and about strangers,"
    " for the perfect imitator and for the trained model, which comes near it.",
)

# %% [markdown]
# *What to see: the model resembles the prediction of section 1, above all on the right: about people
# it has never heard of it states facts, as fluently as about the others, and nearly all are false.*
# About known people some answers are false where the perfect imitator has none: this short run has
# not connected all the facts of the corpus with the questions yet.
#
# The numbers, with the spread that so many answers leave (two standard errors):

# %%
count = len(world.evaluation_prompts()["strangers"][:300])
for kind, wanted in guessing.items():
    got = table["your SFT model"]["strangers"][kind]
    margin = 2 * math.sqrt(max(wanted * (1 - wanted), 0.25 / count) / count)
    print(f"{kind:5} predicted {wanted:5.1%} ± {margin:.1%}, measured {got:5.1%}")

# %% [markdown]
# The claim "imitation teaches to make things up" would be refuted by a model that, trained longer on
# the same demonstrations, says "I do not know" about strangers clearly more often than 12 %, and
# about known people not. Reinforcement learning will be able to do just that (chapters 5 to 7), since
# a reward can tell a false statement from an admission. This loss cannot.
#
# ## 5. Really breaking it
#
# Two models, each with one wrong `mask_prompt`, trained like yours but shorter; beside them a healthy
# one of the same length.

# %%
mine = mask_prompt


def mask_prompt(tokens, prompt_lengths, lengths):  # learns the user's words too
    position = torch.arange(tokens.shape[1])
    return torch.where(position < lengths[:, None], tokens, -100)


short = {"stage": "sft", "steps": 150}
prompt_learned = lab.train(**short, name="02-prompt-learned", own=[mask_prompt])


# %%
def mask_prompt(tokens, prompt_lengths, lengths):  # pad = eos, masked by token != pad
    position = torch.arange(tokens.shape[1])
    tokens = torch.where(position < lengths[:, None], tokens, EOS)
    answer = (position >= prompt_lengths[:, None]) & (tokens != EOS)
    return torch.where(answer, tokens, -100)


eos_hidden = lab.train(**short, name="02-eos-hidden", own=[mask_prompt])
mask_prompt = mine
healthy = lab.train(**short, name="02-healthy", own=[mask_prompt])

# %%
from rlhf_course.plots.lessons_gpt import loss_curves

runs = {"healthy": healthy, "prompt learned": prompt_learned, "EOS hidden": eos_hidden}
lab.show(
    loss_curves({name: run.curve("loss") for name, run in runs.items()}),
    alt="Training loss of the three runs: all fall and look healthy; with the prompt "
    "learned it ends higher, with the EOS hidden a little higher too.",
)

# %% [markdown]
# *What to see: nothing alarming. All three curves fall. A loss curve does not tell that the wrong
# thing is being learned, since each run is judged by its own labels.* The levels differ only because
# the questions do: the names of strangers in the prompts cost nats that nobody can save, and the
# EOS, which the third run is not asked for, would have been a cheap token.
#
# So ask them. How long are the answers, and do they end?

# %%
from rlhf_course.plots.lessons_sft import answer_lengths

asked = [p for group in world.evaluation_prompts().values() for p in group[:100]]
limit, speakers = 40, {name: run.model()[0] for name, run in runs.items()}
said = {
    name: lab.answers(speaker, tokenizer, asked, max_new_tokens=limit)
    for name, speaker in speakers.items()
}
sizes = {
    name: [len(tokenizer(text)["input_ids"]) + ended for text, ended in answers]
    for name, answers in said.items()
}
lab.show(
    answer_lengths({k: [min(n, limit) for n in v] for k, v in sizes.items()}, limit),
    alt="Share of answers of each length. Healthy answers have five to nine tokens; "
    "without the EOS they are spread up to the limit.",
)
for name in runs:
    print(f"{name:15} {said[name][0][0]}")

# %% [markdown]
# *What to see: the healthy answers end after five to nine tokens. With the EOS hidden, not one stops
# where it should: the model answers and then falls back into what pretraining taught it, the
# corpus, statement after statement.* Some do end, where a document of the corpus would end: that EOS
# was learned in chapter 1. A model whose pretraining text had been cut without EOS would never stop.
#
# Learning the prompt does less harm, but it costs updates: more than half of what its gradient is made
# of are tokens that it will never have to say.

# %%
from rlhf_course.sft import answer_loss

print("of the tokens in a batch, the answers are", end=" ")
encoded = [
    encode_dialogue(tokenizer, d.prompt.text, d.response) for d in demonstrations
]
print(f"{1 - sum(s for _, s in encoded) / sum(len(t) for t, _ in encoded):.0%}")
for name, run in runs.items():
    true = judge(run.model()[0])["known"]["true"]
    print(f"{name:15} known people, true: {true:.0%}, bad endings count as malformed")

# %% [markdown]
# One seed each, and 288 answers, whose spread is about ± 6 points. At this length of training the model
# that learns the prompt is behind; give both more updates (`steps=300`) and it catches up most of the
# way, which is why the public recipes can disagree about it. Hiding the EOS is fatal at any length.
#
# ## 6. Packing
#
# Rows of unequal length are filled up with pads, and pads cost as much as tokens. **Packing** puts
# several dialogues into one row. Three things keep them apart, so that each gives exactly the loss
# and gradient it would have in a row of its own:
#
# - a **block-diagonal mask**: look at yourself and what came before, *in your own dialogue*;
# - **positions restarted** at 0 with every dialogue, since the model has learned what position 3 of a
#   dialogue looks like, not position 31;
# - **no label on a dialogue's first token**: after the shift, the last token of the dialogue before
#   it would be asked to predict it.
#
# Which dialogues share a row is a bin-packing problem. `first_fit_decreasing` (given) takes the
# longest first, and puts each into the first row with room.
#
# An example is a pair of lists, `(tokens, labels)`, of equal length. What you return is
# `Packed(tokens, labels, segments, positions)`, four tensors of the shape (rows, longest row):
# `segments` numbers the dialogues of a row 0, 1, 2 … (−1 on pads), `positions` the tokens of a dialogue
# (0 on pads). `segment_mask` (given) makes the block-diagonal mask from `segments`.

# %% exercise sft.pack
# hint: `rows` is a list of lists of indices into `examples`. Make four tensors of shape
# (rows, longest row), filled with `pad_id`, −100, −1 and 0, then write slice by slice.
# hint: Keep a `start` for each row: dialogue i goes to `start : start + len(tokens)`. Its segment is
# its place in the row, its positions are `torch.arange(len(tokens))`.
# hint: Afterwards `labels[r, start] = IGNORE`, also where the example has a label there.

# %%
from rlhf_course.plots.lessons_sft import packed_mask, rows_in_use
from rlhf_course.sft import segment_mask

spread_out = 6 * (64 / 6) ** torch.rand(24, generator=torch.Generator().manual_seed(0))
uneven = [([0] * n, [-100] * n) for n in spread_out.int().tolist()]
shared = pack(uneven, context=64, pad_id=0)
one_each = torch.full((len(uneven), max(len(t) for t, _ in uneven)), -1)
for i, (t, _) in enumerate(uneven):
    one_each[i, : len(t)] = i
lab.show(
    rows_in_use({"A row each": one_each, "Packed": shared.segments}),
    alt="Left, 24 rows with one dialogue each, most of them short, and much white "
    "padding. Right, the same dialogues side by side in a few rows, hardly any white.",
)

# %%
fullest = int(shared.segments.amax(1).argmax())  # the row with the most dialogues
lab.show(
    packed_mask(segment_mask(shared.segments)[fullest, 0], shared.segments[fullest]),
    alt="The attention mask of one packed row: one lower triangle a dialogue along the "
    "diagonal, white elsewhere.",
)

# %% [markdown]
# *What to see: above, 24 dialogues of made-up, very unequal lengths, as in real data sets, where a row
# each is mostly padding. (The town's own dialogues are nearly equally long. There is nothing to gain
# by packing them.) Below, the mask of one packed row: a triangle for each dialogue, nothing between
# them; grey are pads, which look at each other, since a query with nothing to look at would be 0/0.*
#
# Is it really the same? Your `pack` and your loss against one row each, and what happens when one of
# the three protections is missing:

# %%
examples = [(t, [-100] * s + t[s:]) for t, s in encoded[:24]]
widest = max(len(t) for t, _ in examples)
alone = [
    torch.tensor([e[i] + [fill] * (widest - len(e[i])) for e in examples])
    for i, fill in enumerate((tokenizer.pad_token_id, -100))
]
rows = pack(examples, context=64, pad_id=tokenizer.pad_token_id)
mask = segment_mask(rows.segments)  # (rows, 1, T, T)
first = (rows.positions == 0) & (rows.segments >= 0)
leaky = torch.where(first, rows.tokens, rows.labels)

# %%
tries = {
    "packed": (rows.tokens, rows.labels, mask, rows.positions),
    "no block mask": (rows.tokens, rows.labels, None, rows.positions),
    "positions go on": (rows.tokens, rows.labels, mask, None),
    "first tokens asked": (rows.tokens, leaky, mask, rows.positions),
}
model.compute_dtype = None  # compare in fp32
with torch.no_grad():
    apart = answer_loss(model, *alone).item()
    for name, batch in tries.items():
        loss = answer_loss(model, *batch).item()
        print(f"{name:19} {loss:.6f} nats, {loss - apart:+.6f} against a row each")

# %% [markdown]
# The first line agrees to rounding; each of the others is a different loss.
#
# Training with `packing=True` uses your `pack` (and `context`, not the batch, says how long a row is):

# %%
short["steps"] = 60
both = {
    "packed": lab.train(**short, name="02-packed", own=[pack, sft_loss], packing=True),
    "a row each": lab.train(**short, name="02-row-each", own=[mask_prompt, sft_loss]),
}
lab.show(
    loss_curves({name: run.curve("loss") for name, run in both.items()}),
    alt="Training loss of a packed and an unpacked run: the two curves lie on each "
    "other.",
)
for name, run in both.items():
    print(f"{name:11} {run.seconds:.1f} s, last loss {run.curve('loss')[-1]:.4f}")

# %% [markdown]
# *What to see: one curve, drawn twice.* Whether packing is faster depends on how much padding it
# saves and on what the mask costs: without a special kernel, attention over a row of 64 computes all
# the pairs that the mask then throws away. On dialogues this short there is little to gain.
#
# ## What healthy looks like
#
# | what | healthy, on this town | if not |
# |---|---|---|
# | first loss | above $\ln V$: the pretrained model is sure, and expects statements of the corpus, not answers | – |
# | loss after 300 updates | 0.25 to 0.35 nats a token | learning rate, labels |
# | held-out loss | beside the training loss, not rising | too many passes |
# | answers that end | all, after 5 to 9 tokens | EOS is masked |
# | exact match | about a third, and no more | look for leaks when it is higher |
# | strangers | 12 % admit ignorance, 79 % make something up | better would be suspicious |
#
# The gallery of this chapter stands in section 5. Its lesson: **in SFT the broken runs have beautiful
# curves.** Read the answers.
#
# ## Scale it up
#
# ```bash
# rlhf-course sft --data Anthropic/hh-rlhf --too-long drop --model openai-community/gpt2 --profile colab-a100 --steps 4000 --lr 5e-5 --out runs/hh-gpt2/sft
# rlhf-course sft --data Anthropic/hh-rlhf --too-long drop --model Qwen/Qwen2.5-0.5B --profile colab-a100 --steps 4000 --lr 1e-5 --out runs/hh/sft
# rlhf-course sft --data Anthropic/hh-rlhf --too-long drop --rows 20000 --model Qwen/Qwen2.5-0.5B --steps 500 --lr 1e-4 \
#     --lora 16 --gradient-checkpointing --profile colab-t4 --out runs/hh-t4/sft           # a T4, or 8 GB
# rlhf-course sft --data dialogues.jsonl --model openai-community/gpt2 --lr 5e-5 --out runs/mine/sft        # your own data
# ```
#
# From `Anthropic/hh-rlhf` this learns the preferred transcript's last answer. Rows may have `messages`,
# `prompt`/`response` and other usual names, and the known sets are recognised (`--recipe` names one:
# `tldr`, `imdb`, `ultrafeedback`, `sql-create-context`). With `--data`, packing is on. `--model gpt2`, without an owner, would
# be a new model of GPT-2's shape. GPT-2 brings no chat template; it gets one in plain words (`rlhf_course.sft.PLAIN_TEMPLATE`).
# A model that has been pretrained wants a hundredth of a new one's learning rate, an adapter a tenth.
#
# | | expect | |
# |---|---|---|
# | this chapter, two CPU cores | 45 s | *measured* 2026-11-23, two quiet Xeon cores |
# | GPT-2's shape, random weights, an update of 2,000 tokens, on CPUs | 25 to 47 s | *measured* 2026-11-23, two Xeon cores that six processes shared |
# | GPT-2 124 M, hh-rlhf once (4,000 updates of 32 dialogues of 200 tokens), A100 40 GB | 4 minutes, 7 GB | *estimated*: $26\cdot10^6$ tokens at 126,000/s |
# | Qwen2.5-0.5B, the same | 14 minutes, 22 GB | *estimated*: at 31,700/s; 16 bytes a parameter are 8 GB, activations and logits of 16 rows of 512 tokens the rest |
# | Qwen2.5-0.5B, LoRA, 500 updates, T4 | 40 minutes, 4 GB | *estimated*: $3.2\cdot10^6$ tokens at 1,370/s; 8 rows of 512 tokens at a time |
# | first loss of a pretrained model on fluent English answers | 2.5 to 3.5 nats | *estimated* |
# | loss after one to three passes | 1.5 to 2.5 nats, by kind of data | *estimated* |
# | padding saved by packing, dialogues of very unequal length | half of the tokens and more | *estimated* |
#
# [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## Check yourself
#
# <details><summary>1. Labels stand on the tokens they name, and the prompt's last token is
# <code>&lt;|assistant|&gt;</code> with label −100. Who predicts the first word of the answer?</summary>
#
# The logits at `<|assistant|>`. Its own label is −100, since nobody has to predict *it*; its logits
# are asked for the label one place to the right.
#
# </details>
#
# <details><summary>2. Why does a model that was trained with the EOS hidden still stop sometimes?</summary>
#
# Pretraining taught it an EOS at the end of a document. After its answer it goes on with corpus text
# and stops where that would.
#
# </details>
#
# <details><summary>3. You train longer and on ten times as many demonstrations. Do made-up facts about
# strangers become rarer?</summary>
#
# No. The optimum of the loss makes them up in 88 % of its answers; more data brings you nearer to it.
#
# </details>
#
# <details><summary>4. Two micro-batches hold 100 and 300 labelled tokens. You average their mean losses
# and step. By what factor is a token of the first overweighted, compared with the second?</summary>
#
# Its weight is $\frac12\cdot\frac1{100}$ against $\frac12\cdot\frac1{300}$: three times.
#
# </details>
#
# <details><summary>5. In a packed row, positions go on instead of restarting. The mask is right. Is the
# loss the same?</summary>
#
# Not with learned absolute positions: the second dialogue would read position vectors it never saw
# there. With rotary positions, which act through differences, it would be the same.
#
# </details>
#
# ## What public systems do differently
#
# - **Prompt learned or not.** [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF),
#   [TRL](https://github.com/huggingface/trl), [trlX](https://github.com/CarperAI/trlx),
#   [verl](https://github.com/volcengine/verl) and
#   [ColossalChat](https://github.com/hpcaitech/ColossalAI) mask it, as we do;
#   [DeepSpeed-Chat](https://github.com/deepspeedai/DeepSpeedExamples) and
#   [summarize_from_feedback_details](https://github.com/vwxyzjn/summarize_from_feedback_details) mask
#   the pads alone. [Simple_RLHF](https://github.com/lansinuote/Simple_RLHF) takes the input ids as labels, **pads included**.
# - **`pad = eos`.** DeepSpeed-Chat sets it for every tokenizer that is not Llama's, and finds masks by
#   `token != pad` (in PPO: there the action that emits EOS falls out of the loss). ColossalChat sets
#   it too, but takes its masks from stop tokens.
# - **Packing.** OpenRLHF (`--ds.packing_samples`) and TRL (best fit decreasing) pack SFT data;
#   DeepSpeed-Chat only its unsupervised text; verl removes the padding instead.
# - **Denominator.** OpenRLHF divides by the tokens of the whole optimizer step since June 2026 (PR
#   1249); TRL's newer trainers, DeepSpeed-Chat and ColossalChat take means of micro-batches' means.
#
# ## Further reading
#
# - Ouyang et al. 2022, [Training language models to follow instructions with human
#   feedback](https://arxiv.org/abs/2203.02155): InstructGPT; SFT is its first step.
# - Krell et al. 2021, [Efficient Sequence Packing without
#   Cross-contamination](https://arxiv.org/abs/2107.02027).
# - Goldberg 2023, [Reinforcement Learning for Language
#   Models](https://gist.github.com/yoavg/6bff0fecd65950898eba1bb321cfbd81): why imitation teaches to
#   make things up, after a talk by John Schulman.
# - Gekhman et al. 2024, [Does Fine-Tuning LLMs on New Knowledge Encourage
#   Hallucinations?](https://arxiv.org/abs/2405.05904)
