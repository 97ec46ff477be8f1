"""The peers, each at its best documented settings on a CPU.

All: AdamW in its fused form, no gradient checkpointing, no evaluation, no logging, rows tokenised
beforehand and in the given order, so that every update sees the same rows as ours.
TRL: `chunked_nll`, which makes logits of the answers alone. transformers: as its Trainer comes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch

from peers.cases import PAD, PPO_BATCHES, Case

Turn = Callable[..., None]
IGNORE = -100


def arguments(case: Case, parts: int = 1, **more) -> dict:
    """What all trainers are given. parts: passes an update, by accumulation of gradients."""
    return {
        "output_dir": tempfile.gettempdir(), "gradient_accumulation_steps": parts,
        "per_device_train_batch_size": case.rows // parts, "max_steps": 10**6,
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
        "bf16": case.dtype == "bfloat16", "gradient_checkpointing": False, "use_cpu": True,
        "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "seed": 0, **more,
    }  # fmt: skip


def counted(
    kind: type, case: Case, turn: Turn, count: Callable[[dict], int], unit: str, parts: int = 1
) -> type:
    """A trainer that takes a turn every `case.updates` updates of so many passes."""

    class Counted(kind):
        done, units = 0, 0

        def training_step(self, model, inputs, *rest):
            if self.done % (case.updates * parts) == 0:
                turn(**({unit: self.units} if self.done else {}))
                self.units = 0
            self.units += count(inputs)
            self.done += 1
            return super().training_step(model, inputs, *rest)

    return Counted


def load(case: Case, kind: str = "policy", **more):
    """A model as transformers opens it: fp32 weights, its fused attention."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    how = {"dtype": torch.float32, "attn_implementation": "sdpa", **more}
    return auto.from_pretrained(case.model(kind), **how)


def tokenizer_of(case: Case):
    """The one that lies beside the models."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(case.model())


def sft_trainer(case: Case, turn: Turn, parts: int = 1) -> None:
    """TRL's SFTTrainer on prompts and completions."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = case.dialogues(case.rows * case.updates)
    data = Dataset.from_list([
        {"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in rows
    ])  # fmt: skip
    kind = counted(SFTTrainer, case, turn, _tokens, "tokens", parts)
    more = {"packing": case.packing, "max_length": case.shape.context,
            "loss_type": "chunked_nll"}  # fmt: skip
    if case.packing:  # a row of the packed data is one of `context` tokens
        more["per_device_train_batch_size"] = max(
            1, sum(len(p) + len(a) for p, a in rows) // case.updates // case.shape.context
        )
    args = SFTConfig(**arguments(case, parts, **more))
    kind(load(case), args, train_dataset=data, processing_class=tokenizer_of(case)).train()


def _tokens(inputs: dict) -> int:
    """Tokens that are no pads."""
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return inputs["input_ids"].numel()


def trainer(case: Case, turn: Turn, parts: int = 1) -> None:
    """transformers' Trainer with rows padded to the longest of the batch, labels on the answer."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    data = [
        {"input_ids": p + a, "labels": [IGNORE] * len(p) + a, "attention_mask": [1] * len(p + a)}
        for p, a in case.dialogues(case.rows * case.updates)
    ]
    kind = counted(Trainer, case, turn, _tokens, "tokens", parts)
    collate = DataCollatorForSeq2Seq(tokenizer_of(case), label_pad_token_id=IGNORE)
    args = TrainingArguments(**arguments(case, parts))
    kind(load(case), args, train_dataset=data, data_collator=collate).train()


def reward_trainer(case: Case, turn: Turn, parts: int = 1) -> None:
    """TRL's RewardTrainer."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    data = Dataset.from_list([
        {"chosen_ids": p + a, "rejected_ids": p + b}
        for p, a, b in case.pairs(case.rows * case.updates)
    ])  # fmt: skip
    kind = counted(RewardTrainer, case, turn, lambda i: len(i["input_ids"]) // 2, "pairs", parts)
    args = RewardConfig(**arguments(case, parts, max_length=case.shape.context))
    tokenizer = tokenizer_of(case)
    kind(load(case, "reward"), args, train_dataset=data, processing_class=tokenizer).train()


def ppo_trainer(case: Case, turn: Turn) -> None:
    """TRL's PPO: policy, value model, reference and reward model. It samples until the longest
    answer of the batch has ended, at most `longest` tokens; its later passes are as long."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turn()

        def on_step_end(self, *_, **__):
            turn(episodes=case.rows)

    data = Dataset.from_list([{"input_ids": p} for p, _ in case.dialogues(case.rows * PPO_BATCHES)])
    more = {
        "per_device_train_batch_size": case.minibatch,
        "gradient_accumulation_steps": case.rows // case.minibatch,
        "num_mini_batches": case.rows // case.minibatch, "num_ppo_epochs": case.epochs,
        "total_episodes": case.rows * 10**5, "response_length": case.longest,
        "local_rollout_forward_batch_size": case.rows, "num_sample_generations": 0,
        "temperature": 1.0, "kl_coef": 0.1, "stop_token": None if case.even else "eos",
    }  # fmt: skip
    given = arguments(case, **more)
    for name in ("max_steps", "train_sampling_strategy"):
        del given[name]
    low = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    kind = "policy" if case.even else "ending"
    trainer = PPOTrainer(
        PPOConfig(**given), tokenizer_of(case), load(case, kind), load(case, kind, dtype=low),
        load(case, "reward", dtype=low), data, load(case, "reward"), eval_dataset=data,
        callbacks=[Turns()],
    )  # fmt: skip
    # Else the accelerator would join the minibatches of an epoch into one step of the optimiser.
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.train()


def huggingface_generate(case: Case, turn: Turn) -> None:
    """transformers' `generate`; answers of unequal length end by a stopping criterion."""
    from transformers import StoppingCriteria

    class Lengths(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.tensor(lengths) <= ids.shape[1] - width

    model = load(case).eval()
    if case.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    prompts = [p for p, _ in case.dialogues(case.rows)]
    lengths = [a for _, a in case.lengths(case.rows)]
    width = max(map(len, prompts))
    tokens = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": max(lengths), "eos_token_id": None,
           "pad_token_id": PAD}  # fmt: skip
    if not case.even:
        how["stopping_criteria"] = [Lengths()]
    turn()
    while True:
        with torch.inference_mode():
            model.generate(tokens, attention_mask=mask, **how)
        turn(tokens=sum(lengths))


def vllm(case: Case, turn: Turn) -> None:
    """vLLM on a CPU, its engine in this process, its model compiled (a fifth faster at 10 M
    parameters); its threads are bound when it starts."""
    from vllm import LLM, SamplingParams

    longest = min(case.prompt * 2 + case.longest, case.shape.context)
    engine = LLM(
        str(case.model()), skip_tokenizer_init=True, generation_config="vllm", dtype=case.dtype,
        max_model_len=longest, max_num_seqs=case.rows, seed=0,
        enable_prefix_caching=False, kv_cache_memory_bytes=1 << 29,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": p} for p, _ in case.dialogues(case.rows)]
    lengths = [a for _, a in case.lengths(case.rows)]
    how = [SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    turn()
    while True:
        engine.generate(prompts, how, use_tqdm=False)
        turn(tokens=sum(lengths))
