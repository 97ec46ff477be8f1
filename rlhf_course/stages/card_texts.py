"""What model cards say in words: of a stage, of a world, and of what a model is not good for."""

from __future__ import annotations

PATHS = ("model", "data", "reward_model", "ptx_data", "reward", "deepspeed")
"""Settings that may hold a path of the machine, or an address."""

TITLES = {
    "pretrain": "A pretrained language model",
    "sft": "A language model fine-tuned on demonstrations",
    "reward_model": "A reward model",
    "dpo": "A language model aligned by DPO",
    "ppo": "A language model aligned by PPO-ptx",
}

STAGES = {
    "pretrain": "A language model that has learned to predict the next token of plain texts.",
    "sft": """Supervised fine-tuning: a language model that imitates demonstrations, with the loss
on the answers alone.""",
    "reward_model": """A language model with a scalar head, trained on comparisons so that the
answer that people prefer gets the higher reward.""",
    "dpo": """Direct preference optimisation (Rafailov et al. 2023): trained on comparisons
directly, without a reward model.""",
    "ppo": """Reinforcement learning from human feedback as in InstructGPT (Ouyang et al. 2022):
PPO on a reward, with a penalty for the distance to the reference.""",
}

WORLDS = {
    "town": (
        "The *town*, a generated world: made-up people, texts about some of them, questions and "
        "answers, and comparisons by a noisy labeler.",
        "It knows one made-up town and nothing else. The people in its answers do not exist, and "
        "an answer about a person that its corpus does not name is invented, or a refusal.",
    ),
    "reviews": (
        "The *reviews*, a generated restaurant guide: moods, dishes, short reviews, and a labeler.",
        "It writes short reviews of restaurants that do not exist, in a small vocabulary; it is no "
        "guide to any real one.",
    ),
}

LIMITS = {
    "pretrain": "It continues texts; it has not learned to answer or to follow instructions.",
    "sft": """It imitates the demonstrations, their mistakes included, and answers as surely where
  it does not know: fine-tuning on facts that a model does not have teaches it to invent.""",
    "reward_model": """It predicts whose answer the labellers of its data preferred. It is no
  measure of truth or safety, scores of different prompts are not comparable, and a policy that is
  optimised against it finds answers that it overrates.""",
    "dpo": """It was moved towards the preferred answers of one data set. DPO also moves probability
  to answers that nobody compared, and prefers what the labellers preferred, be it true or not.""",
    "ppo": """It was optimised for a score. What the score does not see was not improved, and may
  have become worse: variety of the answers falls, and calibration with it.""",
    "learned reward": """The score is a learned reward model, so part of the gain is
  over-optimisation (Gao et al. 2023): judge it by people, or by another measure.""",
    "written reward": """The score is a function that somebody wrote: the model may satisfy its
  letter and not its purpose.""",
    "own data": """It was not examined for harmful, private or untrue content of its data; the
  figures above say how well it does on held-out rows of the same data alone.""",
    "origin": "It inherits what {origin} has learned, with the limits that its card names.",
    "gpt2": """GPT-2 was trained on web pages up to 2017 without filtering for truth; its own card
  reports biases by gender, race and religion, and they are in this model too.""",
}

LOADING = {
    "policy": """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/or/name")
tokenizer = AutoTokenizer.from_pretrained("path/or/name")
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "…"}], tokenize=False, add_generation_prompt=True
)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=True)[0]))
```
""",
    "text": """
```python
from transformers import pipeline

write = pipeline("text-generation", model="path/or/name")
print(write("The beginning of a text", max_new_tokens=64, do_sample=True)[0]["generated_text"])
```
""",
    "adapter": """
A LoRA adapter; `peft` fetches the model below it.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("path/or/name")
tokenizer = AutoTokenizer.from_pretrained("path/or/name")
```
""",
    "reward": """
The reward is the one logit, read at the answer's last token, its EOS.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("path/or/name")
tokenizer = AutoTokenizer.from_pretrained("path/or/name")
turns = [{"role": "user", "content": "…"}]
prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
text = prompt + "the answer" + tokenizer.eos_token
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
reward = model(**inputs).logits[0, 0]
```
""",
    "reward bias": """
This architecture has no place for the head's constant: add `reward_token_bias` of config.json
({bias:.6g}) to the logit, or read it with `rlhf_course.reward_model.ScalarModel`, which does.
""",
    "reward pad": """
There is no pad token apart from EOS here, and in a batch with padding `transformers` finds the last
token by its pad: score one text at a time, or use `rlhf_course.reward_model.ScalarModel`.
""",
    "reward adapter": """
A LoRA adapter under a scalar head; `peft` fetches the model below it.

```python
from rlhf_course.reward_model import ScalarModel

model = ScalarModel.from_pretrained("path/or/name")
```
""",
    "pooled reward": """
The reward is the {pooling} of the token scores over the answer. `transformers` opens the model but
shows the score of the last token alone; this package pools:

```python
import torch
from rlhf_course.reward_model import ScalarModel

model = ScalarModel.from_pretrained("path/or/name")
tokens = torch.tensor([prompt_ids + answer_ids])  # the answer with its EOS
reward = model.rewards(tokens, torch.tensor([len(prompt_ids)]), torch.tensor([len(answer_ids)]))
```
""",
}
