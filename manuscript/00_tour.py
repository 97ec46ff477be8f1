# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 0: A tour of the finished thing
#
# **What you will be able to do.** Say what RLHF is made of, and what each part adds; talk to a model
# before and after it; and find your way in this course: exercises, checks, hints, quick mode, cache.
#
# There is nothing to write here. We run the whole pipeline once, on the small scale at which it fits
# a laptop's CPU, and look at what comes out. In the following chapters you take it apart and write
# its parts yourself.
#
# RLHF, as in InstructGPT, is four models made one after the other:
#
# | | trained on | learns |
# |---|---|---|
# | **GPT** | text | what is said in this world, and how |
# | **SFT** | questions with answers written by people | to answer |
# | **reward model** | pairs of answers of which people preferred one | what people like |
# | **PPO-ptx** | its own answers, and their reward | to answer as people like it |
#
# (PPO, *proximal policy optimisation*, is the algorithm that learns from rewards, chapter 5; a model
# that acts is called a **policy**, hence the name. *ptx* is a second task beside it: to go on
# predicting the pretraining text, so that the model does not forget it, chapter 6.)

# %%
import torch
import torch.nn.functional as F
from rlhf_course.plots.course_map import course_map

lab.show(
    course_map(0),
    alt="Map of the course: GPT, SFT, then reward model and MDP side by side, PPO, "
    "PPO-ptx, and at the end Why RLHF and Beyond PPO. All are faint, since "
    "nothing is built yet.",
)

# %% [markdown]
# *What to see: the chapters and what they hand on. This map comes back in every chapter and fills up.*
#
# ## The world: a small town
#
# Real language models are hard to judge: nobody knows what they have read, or what is true. So the
# course brings a world of its own, made from a seed, in which everything is known. It is a town. Each
# inhabitant has a name, a home, a job and a favourite food.

# %%
world = lab.world("town")
known = world.people["known"][0]
print(f"{known}: {world.facts[known]}\n")
print("A text of the corpus: ", world.documents("train")[0])
shown = world.demonstrations()[0]
print("A demonstration:      ", shown.prompt.text, "->", shown.response)

# %% [markdown]
# Some people are **known**: the corpus tells about them. All others are **strangers** to the model.
# Different strangers occur in the demonstrations, in the comparisons, in PPO's questions and in the
# final evaluation, so whoever is asked about in the end has never been heard of by any stage.
# "The model does not know" is a fact here, not an opinion. Let us count, in the data itself:

# %%
from collections import Counter

from rlhf_course.plots.lessons_tour import who_occurs_where

group_of = {name: group for group, people in world.people.items() for name in people}
texts = world.documents("train")[:200]
evaluation = [p for prompts in world.evaluation_prompts().values() for p in prompts]
places = {
    "corpus": [name for name in group_of for text in texts if name in text],
    "demonstrations": [d.prompt.key[0] for d in world.demonstrations()],
    "comparisons": [p.key[0] for p in world.prompts("comparisons", 2000)],
    "PPO's questions": [p.key[0] for p in world.prompts("ppo", 2000)],
    "evaluation": [p.key[0] for p in evaluation],
}
shares = {group: {} for group in world.people if group != "validation"}
for place, names in places.items():
    counts = Counter(group_of[name] for name in names)
    for group in shares:
        shares[group][place] = counts[group] / len(names)

# %%
lab.show(
    who_occurs_where(shares),
    alt="A table of groups of people and kinds of data. Known people are in all of "
    "them, each group of strangers in exactly one.",
)

# %% [markdown]
# *What to see: only the first row is filled throughout. Each group of strangers has one column: what
# a model learns about strangers can carry over only as "this one is unfamiliar".*
#
# ### What is an answer worth?
#
# The world also has a **labeler**, who knows everybody, and a **gold** utility, which in the real
# world nobody can see. We use gold to measure, never to train (except where a chapter says so).

# %%
from rlhf_course.plots.lessons_tour import scored_answers
from rlhf_course.world.town import DO_NOT_KNOW, courteous, plain

asked = world.evaluation_prompts()
one_known, one_stranger = asked["known"][0], asked["strangers"][0]


def candidates(prompt):
    person, attribute = prompt.key
    truth = world.facts[person][attribute]
    other = next(v for v in world.values[attribute] if v != truth)
    true, false = plain(attribute, truth), plain(attribute, other)
    return [courteous(true), true, DO_NOT_KNOW, courteous(false), false, "They live."]


# %%
gold = {a: world.utility(one_known, a, True) for a in candidates(one_known)}
lab.show(
    scored_answers({one_known.text: gold}, "gold utility", role="gold"),
    alt="Bars: a true answer with courtesy is worth 1.3, a true one 1, not knowing 0,"
    " a false one below 0, a malformed one least.",
)

# %% [markdown]
# *What to see: true > "I do not know" > false > malformed, and a little more for courtesy. Note where
# "I do not know" stands: it pays for a model that cannot know the truth, and costs one that does.*
#
# ## The pipeline
#
# The next cell loads the four models, or trains those that are missing: pretraining, SFT, sampling
# and ranking comparisons, reward model, PPO-ptx. **The first time this takes a few minutes on a CPU**,
# with a progress bar for each stage. Everything is kept in a cache folder, which all chapters share.

# %%
gpt, tokenizer = lab.model("pretrain")
sft, _ = lab.model("sft")
reward_model, _ = lab.model("reward_model")
policy, _ = lab.model("ppo")
size = sum(p.numel() for p in policy.parameters())
print(f"{size:,} parameters a model, a vocabulary of {len(tokenizer)} tokens")

# %% [markdown]
# ### Before and after
#
# Three questions about known people, three about strangers, one answer each, sampled, nothing
# selected. GPT only continues text; SFT answers; PPO-ptx answers as people like it.

# %%
from IPython.display import Markdown

MARKS = {"true": "✓", "false": "✗", "idk": "○", "bad": "?"}
few = asked["known"][:18:6] + asked["strangers"][:9:3]
speakers = {"GPT": gpt, "SFT": sft, "PPO-ptx": policy}
said = {
    n: lab.answers(m, tokenizer, few, max_new_tokens=12) for n, m in speakers.items()
}
lines = ["| | question | truth | " + " | ".join(said) + " |", "|---" * 6 + "|"]
for i, prompt in enumerate(few):
    cells = [prompt.group, prompt.text, world.facts[prompt.key[0]][prompt.key[1]]]
    for name in said:
        text, ended = said[name][i]
        cells.append(f"{MARKS[world.verdict(prompt, text, ended)]} {text}")
    lines.append("| " + " | ".join(cells) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# ✓ true, ✗ false, ○ "I do not know", ? malformed or never ended. Six questions prove nothing; here is
# the whole evaluation, hundreds of questions. (The strangers are new to every stage. Known people can
# only be asked what they have been asked before: there is nothing else to know about them.)

# %%
from rlhf_course.evaluation import honesty_table
from rlhf_course.plots import honesty

table = {}
for name in ("SFT", "PPO-ptx"):
    pairs = []
    for group, prompts in asked.items():
        answers = lab.answers(speakers[name], tokenizer, prompts, max_new_tokens=12)
        pairs += [
            (group, world.verdict(p, *a)) for p, a in zip(prompts, answers, strict=True)
        ]
    table[name] = honesty_table(pairs, world.verdicts)
lab.show(
    honesty(table),
    alt="Stacked bars of the kinds of answer. After SFT strangers get mostly false "
    "answers; after PPO-ptx mostly 'I do not know', while known people are still "
    "answered truly.",
)

# %% [markdown]
# *What to see: this is the course in one picture. **SFT makes things up about strangers** as fluently
# as it tells the truth about the people it knows; chapter 2 shows that it must. **PPO-ptx admits
# ignorance** about strangers, and still answers for those it knows.* Nobody told it who is known: it
# found out from rewards, given for its own answers.
#
# Where is that decided? At the first word. Both models, asked about one known person and one stranger:

# %%
from rlhf_course.plots.lessons_tour import word_shares
from rlhf_course.sft import encode_dialogue, encode_prompt


@torch.no_grad()
def first_word(model, prompts):
    rows = torch.tensor([encode_prompt(tokenizer, p.text) for p in prompts])
    mean = model(rows)[:, -1].softmax(-1).mean(0)
    shares = {w: mean[tokenizer(w)["input_ids"][0]].item() for w in ("They", "Sorry")}
    return shares | {"other": 1 - sum(shares.values())}


# %%
panels = {
    f"{name}, {group}": first_word(speakers[name], asked[group][:200])
    for group in asked
    for name in ("SFT", "PPO-ptx")
}
lab.show(
    word_shares(panels),
    alt="Four bar charts of the probability that the answer begins with They or with "
    "Sorry. Only PPO-ptx asked about strangers mostly says Sorry.",
)

# %% [markdown]
# *What to see (means over 200 questions each): SFT begins with "Sorry" equally often in both groups,
# at the rate of its demonstrations. PPO-ptx does so for strangers, and hardly ever else.*
#
# ### What the reward model thinks
#
# PPO never sees gold. It sees the reward model's score, learned from comparisons.


# %%
@torch.no_grad()
def score(prompt, answer):
    tokens, start = encode_dialogue(tokenizer, prompt.text, answer)
    lengths = torch.tensor([start]), torch.tensor([len(tokens) - start])
    return reward_model.rewards(torch.tensor([tokens]), *lengths).item()


judged = {
    f"{p.text}  ({p.group})": {a: score(p, a) for a in candidates(p)}
    for p in (one_known, one_stranger)
}
lab.show(
    scored_answers(judged, "reward"),
    alt="Reward-model scores of six answers to a question about a known person and to"
    " one about a stranger.",
)

# %% [markdown]
# *What to see: above, definite answers score high, below, low: the reward model tells whether somebody
# is **familiar**. Now compare true with false. For the stranger they score alike, as they must: it
# cannot know. But for the known person they lie close together too, although it could know.* Two
# questions may mislead, so let us count over many:


# %%
def how_often(group, better, worse, count=100):
    wins = 0
    for prompt in asked[group][:count]:
        answers = candidates(prompt)
        wins += score(prompt, answers[better]) > score(prompt, answers[worse])
    return wins / len(asked[group][:count])


TRUE, IDK, FALSE = 1, 2, 4  # places in the list of candidates
print(f"known:    true above false          {how_often('known', TRUE, FALSE):.0%}")
print(f"known:    true above not knowing    {how_often('known', TRUE, IDK):.0%}")
print(f"stranger: not knowing above false   {how_often('strangers', IDK, FALSE):.0%}")
print(f"stranger: true above false          {how_often('strangers', TRUE, FALSE):.0%}")

# %% [markdown]
# Each number stands for 100 questions, so it is good to about ± 10 points; 50 % is chance. This is
# worth remembering: **the reward does not have to know the truth for PPO to become more truthful.** It has to know where
# guessing pays. Chapter 3 measures how good the reward model is, and how good it could be.
#
# ### How it was learned

# %%
from rlhf_course.plots.lessons_tour import learning_curves

runs = {
    s: lab.Trained(lab.folder(s)) for s in ("pretrain", "sft", "reward_model", "ppo")
}
lab.show(
    learning_curves({name: run.metrics for name, run in runs.items()}),
    alt="Four panels over the updates: pretraining loss and SFT loss fall, reward-"
    "model accuracy rises, PPO's reward and gold utility rise together.",
)
for name, run in runs.items():
    print(f"{name:13} {run.seconds:4.0f} s of training")

# %% [markdown]
# *What to see: each stage's main curve. In the last panel the reward (what PPO is given) and gold
# (what the answers are worth) rise together. When they part, the policy exploits the reward model's
# errors; chapter 7 makes that happen.* PPO moves away from SFT at a price. The distance is the **KL
# divergence** (Kullback and Leibler): the mean, over the policy's own answers, of how much likelier
# the policy finds the answer than SFT does, as a difference of logarithms, in nats. It is 0 for equal
# models, and never negative. A controller sets the price so that the distance stays near a target:

# %%
from rlhf_course.files import read_json
from rlhf_course.plots import kl_control

target = read_json(runs["ppo"].folder / "config.json")["kl_target"]
lab.show(
    kl_control(runs["ppo"].metrics, target),
    alt="Above, the KL of the policy to the reference rises from 0 to about its "
    "target. Below, the price of KL, moved by the controller.",
)

# %% [markdown]
# *What to see: above, the distance rises to its target and stays about there; below, its price, which
# the controller moves to that end (chapter 5). An iteration is one round of PPO: answer, score, update.*
#
# ## How this course works
#
# | chapter | you write |
# |---|---|
# | 1 GPT | attention, a block, the loss, sampling, generation with a cache |
# | 2 SFT | labels, the loss on answers, packing |
# | 3 Reward model | where a reward is read, pairwise and K-wise losses |
# | 4 MDP | actions, log-probabilities, KL, rewards for tokens, advantages |
# | 5 PPO | whitening, clipped losses, the KL controller, one update |
# | 6 PPO-ptx | the pretraining term, normalisation of rewards and values |
# | 7 Why RLHF | win rates, calibration, best-of-n; the claims, tested |
# | 8 Beyond PPO | DPO, RLOO, GRPO, REINFORCE++ |
#
# You need PyTorch and no reinforcement learning. Chapters stand on each other's ideas, not on each
# other's files: **any chapter can be opened first**; what it needs it trains or finds in the cache.
#
# **Exercises.** An exercise is a function of the package `rlhf_course` with its body blanked. Its
# docstring says exactly what it must do. Replace `raise NotImplementedError` between the two marks.
# Difficulty, importance, minutes and points stand above it.
#
# **`lab` and `check`** come from the notebook's first cell. `lab` fetches worlds and models, trains,
# and shows figures: it is the course's workbench, and nothing in it is part of RLHF.
#
# **Check.** The cell below each exercise runs its tests on your function, in a second or so, and says
# what holds and what does not, with the first input on which it fails. If your function behaves just
# like a known mistake, it names the mistake. For example, on an answer to an exercise of chapter 1
# that is wrong in one place:


# %%
def next_token_loss(logits, labels, ignore=-100):
    predicted, wanted = logits[:, :-1], labels[:, :-1]  # position t against token t
    total = F.cross_entropy(
        predicted.flatten(0, 1), wanted.flatten(), ignore_index=ignore, reduction="sum"
    )
    return total / (wanted != ignore).sum().clamp(min=1)


check(next_token_loss)

# %% [markdown]
# **Hints** are folded below each exercise, in a ladder: the first says what to think about, the last
# nearly everything. The same notebook with solutions is linked at the top.
#
# **Your code trains the models.** In every chapter `lab.train(…, own=[your_function])` puts your
# functions into the package's trainer. Without `own`, the package's are used.
#
# **The cache** is the folder `~/.cache/rlhf-course` (or whatever `RLHF_COURSE_HOME` names). Deleting
# it is safe; it costs the training time again.
#
# **Quick mode.** With `RLHF_COURSE_QUICK=1` in the environment, before the kernel starts, models are
# tiny and hardly trained. Every cell runs in seconds and no curve means anything: it is for trying
# out whether everything works.
#
# **Progress.** `rlhf-course progress chapters/` lists which exercises are done.
#
# **Colab.** The badge at the top opens a chapter there; the first cell installs the package. A GPU is
# not needed for the small models. Cache and notebook live in the session: save a copy.
#
# **On the command line** the same pipeline is one command, `rlhf-course demo`, and every stage one
# more: `rlhf-course pretrain`, `sft`, `reward-model`, `ppo`; `rlhf-course chat` talks to two models.
#
# ## What healthy looks like
#
# Each chapter ends with bands like these, from runs over several seeds where the text says so. For
# the base pipeline (three seeds; the README has the table):
#
# | what | healthy |
# |---|---|
# | known people, true, after PPO-ptx | 90 to 98 % |
# | strangers, "I do not know", after SFT | about 12 %, as in the demonstrations |
# | strangers, "I do not know", after PPO-ptx | 80 to 95 % |
# | reward model's accuracy, of the best possible | above 95 % |
# | KL, mean of the last 20 iterations | within 15 % of its target |
#
# ## Check yourself
#
# <details><summary>1. Why does the course need a world in which it knows everything?</summary>
#
# Gold, the best possible accuracy of a reward model, and who is known can then be computed. On real
# data one can only guess at them, and "the model improved" rests on another model's word.
#
# </details>
#
# <details><summary>2. The reward model scores a true and a false answer about a stranger alike. Is it
# broken?</summary>
#
# No. It has read the same corpus and cannot know the fact. It can know that the name is unfamiliar.
#
# </details>
#
# <details><summary>3. If "I do not know" were worth −1, like a false answer, what would PPO learn?</summary>
#
# To guess always: a guess is right once in ten times, so it would be worth more than the admission.
#
# </details>
#
# <details><summary>4. Why are the strangers in each stage other people?</summary>
#
# Else a stage could memorise *names* to say "I do not know" to. With fresh strangers only
# unfamiliarity itself carries over, and the evaluation measures that.
#
# </details>
#
# <details><summary>5. PPO's reward rises and gold falls. What has happened, and who notices in real
# life?</summary>
#
# The policy has found answers that the reward model overrates. The reward curve shows nothing; only
# people, or a better judge, notice.
#
# </details>
#
# ## Scale it up
#
# ```bash
# rlhf-course demo --size gpt2                    # all of this with 124 million parameters, on a GPU
# rlhf-course demo --size gpt2 --world reviews    # where the best answer is better than all demonstrations
# rlhf-course plan --stage ppo --model qwen2.5-0.5b    # what a real model needs, and the flags to use
# ```
#
# | | expect | |
# |---|---|---|
# | `demo`, size `small`, two CPU cores | 7 min 27 s, 1.2 GB | *measured* 2026-11-23, two Xeon cores shared with other work |
# | `demo --size gpt2`, A100 40 GB | 5 to 15 minutes, 4 GB | *estimated*: about 2,100 updates at 0.1 s, 1,700 sampling steps at 15 ms, and the evaluation; its $4\cdot10^{15}$ FLOP alone are 40 s |
# | the same, T4 16 GB | 20 to 40 minutes, 4 GB | *estimated*: $4\cdot10^{15}$ FLOP at 4 TFLOP/s are 17 minutes, and the same launches |
# | people told apart from strangers | as above | *estimated*: the town is no harder for a larger model |
#
# The other chapters end with the commands for real data and real models, chapter by chapter. In Colab
# (A100 or T4), with Google Drive and after a disconnection: [docs/colab.md](repository:docs/colab.md).
# [How these are reckoned](repository:docs/colab.md#how-the-estimates-are-made).
#
# ## What public systems do differently
#
# Of the libraries that are maintained none still ships PPO-ptx:
# [OpenRLHF](https://github.com/OpenRLHF/OpenRLHF) removed it in April 2025, and
# [TRL](https://github.com/huggingface/trl), which never had the ptx term, its PPO trainer in 2026.
# Older systems have it, [DeepSpeed-Chat](https://github.com/deepspeedai/DeepSpeedExamples) and
# [ColossalChat](https://github.com/hpcaitech/ColossalAI) among them, each weighted in its own way
# (chapter 6). K-wise reward batches, as InstructGPT describes them, are in none we looked at. Each
# chapter has a section like this one, with the details in which systems disagree.
#
# ## Further reading
#
# - Ouyang et al. 2022, [Training language models to follow instructions with human
#   feedback](https://arxiv.org/abs/2203.02155): InstructGPT, the recipe of this course.
# - Stiennon et al. 2020, [Learning to summarize from human
#   feedback](https://arxiv.org/abs/2009.01325).
# - Ziegler et al. 2019, [Fine-Tuning Language Models from Human
#   Preferences](https://arxiv.org/abs/1909.08593): where the KL controller comes from.
