"""The script that `rlhf-course export --to trl` writes for PPO, since TRL ships none for it."""

from __future__ import annotations

SCRIPT = '''\
"""PPO with TRL's experimental trainer, on the prompts in data/ (see run.sh for the settings)."""

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
)
from trl import ModelConfig, ScriptArguments, get_peft_config
from trl.experimental.ppo import PPOConfig, PPOTrainer

parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
script, args, model = parser.parse_args_into_dataclasses()

tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def load(kind, path, **more):
    found = kind.from_pretrained(path, dtype=model.dtype, **more)
    found.config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > found.get_input_embeddings().num_embeddings:
        found.resize_token_embeddings(len(tokenizer))
    return found


policy = load(AutoModelForCausalLM, args.sft_model_path)
peft_config = get_peft_config(model)
reference = None if peft_config else load(AutoModelForCausalLM, args.sft_model_path)
reward, value = (
    load(AutoModelForSequenceClassification, args.reward_model_path, num_labels=1) for _ in "rv"
)


def encode(row):
    ids = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return {"input_ids": ids, "lengths": len(ids)}


rows = load_dataset(script.dataset_name)
rows = rows.map(encode, remove_columns=rows["train"].column_names)
trainer = PPOTrainer(
    args=args,
    processing_class=tokenizer,
    model=policy,
    ref_model=reference,
    reward_model=reward,
    value_model=value,
    train_dataset=rows["train"],
    eval_dataset=rows.get("test", rows["train"].select(range(min(64, len(rows["train"]))))),
    peft_config=peft_config,
)
trainer.train()
# Not trainer.save_model: that of TRL 1.12 fails with transformers 5.19.
trainer.accelerator.unwrap_model(trainer.model).policy.save_pretrained(args.output_dir)
tokenizer.save_pretrained(args.output_dir)
'''
