"""What a user does wrong: one clear error, exit code 2, nothing half-written, never a traceback.

Every message says what was wrong, where, and what to do. Commands run inside this process, in an
empty folder that also has to be empty afterwards.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_course import cli
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.reward_model import ScalarModel
from rlhf_course.runs import read_metrics
from rlhf_course.stages import ppo as ppo_stage
from rlhf_course.stages import sft as sft_stage
from rlhf_course.world import make_world
from rlhf_course.world.tokenizer import train_tokenizer

CONTEXT = 32
GOOD = {"prompt": "Where does she live?", "response": "In Oslo."}
PAIR = {"prompt": "Where does she live?", "chosen": "In Oslo.", "rejected": "In Rome."}
QUICK = ["--threads", "1", "--validation", "0", "--checkpoint-every", "1"]
SFT = ["sft", "--data", "data.jsonl", "--steps", "3", "--batch", "2", *QUICK]
REWARD_MODEL = ["reward-model", "--data", "data.jsonl", "--steps", "2", "--batch", "2", *QUICK]
PPO = ["ppo", "--data", "data.jsonl", "--iterations", "3", "--batch", "4", "--critic-warmup", "0",
       "--max-new-tokens", "4", *QUICK]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """gpt, llama, reward: saved models that know the same tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_world("town", "tiny").tokenizer
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(len(tokenizer), CONTEXT, layers=1, heads=2, width=64))
    gpt.save_pretrained(folder / "gpt", tokenizer)
    ScalarModel.from_language_model(gpt).save_pretrained(folder / "reward", tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    HuggingFaceLM(LlamaForCausalLM(config)).save_pretrained(folder / "llama", tokenizer)
    return folder


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """fails(*arguments) -> the message of a command that has to exit with 2 and to leave no file
    behind but those in `data.jsonl`, modules, and what stood in `runs` before."""
    monkeypatch.chdir(tmp_path)

    def fails(*arguments) -> str:
        before = files(tmp_path)
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as error:  # tyro's
            code = error.code
        told = capsys.readouterr()
        assert code == 2, told
        assert "Traceback" not in told.err + told.out
        after = files(tmp_path)
        assert after == before, f"{set(after) ^ set(before)} was written or changed"
        return " ".join(told.err.split())

    return fails


def files(folder: Path) -> dict[str, float]:
    """Every file with the time it was changed, but for what importing a module leaves."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }  # fmt: skip


def write(*rows, name="data.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- data ----------------------------------------------------------------------------------------

OF_ALL = [
    ([], r"data\.jsonl: no row in it\. Give a data set"),
    ([GOOD | PAIR, "{prompt: x}"], r"data\.jsonl, line 2: not valid JSON"),
    ([GOOD | PAIR, "[1, 2]"], r"data\.jsonl, line 2: not a row: every row is an object"),
    ([{"input": "x"}], r"data\.jsonl, line 1: no known set of fields\. Found: input\. Needed: "),
    ([GOOD | PAIR | {"prompt": 7}], r'line 1: "prompt" holds a number, 7, where a text is needed'),
    ([GOOD | PAIR | {"prompt": "  "}], r'line 1: "prompt" is empty\. Fill it in or remove the row'),
]
OF_SFT = [
    ([GOOD, GOOD | {"response": ""}], r'line 2: "response" is empty\. Fill it in'),
    ([GOOD | {"response": None}], r'"response" holds nothing \(null\)'),
    ([GOOD, GOOD | {"response": "x" * 100}],
     r"line 2: \d+ tokens, exceed the context of 32; 1 of 2 rows are too long, this one the most\. "
     r".*--too-long drop.* --too-long cut.* a longer context"),
    ([GOOD | {"prompt": "x " * 99}, GOOD], r"line 1: \d+ tokens, exceed the context of 32"),
    ([GOOD, GOOD | {"response": "x" * 1_000_000}], r"line 2: \d{6,} tokens, exceed the context"),
    ([GOOD, GOOD | {"response": "A <|endoftext|> B"}],
     r"data\.jsonl, line 2: an answer contains the text '<\|endoftext\|>'.* Remove it"),
]  # fmt: skip
OF_COMPARISONS = [
    ([PAIR | {"rejected": PAIR["chosen"]}],
     r"line 1: two of the compared answers are the same .*In Oslo.* Remove the row"),
    ([PAIR | {"chosen": ""}], r'"chosen" is empty'),
    ([{"prompt": "x", "responses": ["y"]}], r'"responses" holds a list of 1, not two or more'),
    ([PAIR, PAIR | {"rejected": "x " * 50}],
     r"data\.jsonl, line 2: \d+ tokens, exceed the context of 32; 1 of 2 rows"),
    ([PAIR | {"rejected": "<|endoftext|>"}], r"data\.jsonl, line 1: an answer contains"),
]  # fmt: skip
OF_PROMPTS = [
    ([GOOD, GOOD | {"prompt": "x " * 50}],
     r"data\.jsonl, line 2: \d+ tokens, and with 4 for the answer they exceed the context of 32; "
     r"1 of 2 rows are too long.*--too-long drop"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "told"), OF_ALL + OF_SFT)
def test_sft_data(fails, models, rows, told):
    assert search(told, fails(*with_rows(rows, SFT), "--model", models / "gpt"))


@pytest.mark.parametrize(("rows", "told"), OF_ALL + OF_COMPARISONS)
def test_reward_model_data(fails, models, rows, told):
    assert search(told, fails(*with_rows(rows, REWARD_MODEL), "--model", models / "gpt"))


@pytest.mark.parametrize(("rows", "told"), OF_ALL + OF_PROMPTS)
def test_ppo_data(fails, models, rows, told):
    arguments = [*with_rows(rows, PPO), "--model", models / "gpt"]
    assert search(told, fails(*arguments, "--reward-model", models / "reward"))


@pytest.mark.parametrize("command", [SFT, REWARD_MODEL, PPO], ids=lambda c: c[0])
def test_a_missing_data_file(fails, models, command):
    message = fails(*command, "--model", models / "gpt", "--reward-model", models / "reward") \
        if command is PPO else fails(*command, "--model", models / "gpt")  # fmt: skip
    assert search(r"data\.jsonl: no such file or folder \(looked in ", message)


def with_rows(rows, command):
    write(*rows)
    return command


def search(pattern: str, message: str):
    assert re.search(pattern, message), message
    return True


def test_text_that_is_too_short_to_pretrain_on(fails):
    write(*[{"text": "A few words only."}] * 20)
    message = fails("pretrain", "--data", "data.jsonl", "--size", "tiny", "--threads", "1")
    assert search(r"the (held-out|training) part of the text has \d+ tokens, fewer than one row.* "
                  "Give more text", message)  # fmt: skip


def test_too_few_rows_to_hold_any_out(fails, models):
    write(GOOD)
    message = fails(*SFT[:-4], "--model", models / "gpt", "--validation", "0.2")
    assert search(r"1 rows are too few to hold out 0\.2 of them", message)


def test_every_dialogue_would_be_cut_to_nothing(fails, models):
    write(GOOD | {"prompt": "x " * 99})
    message = fails(*SFT, "--model", models / "gpt", "--too-long", "cut")
    assert search(r"no row is left .*: 1 prompt fills the context of 32 tokens", message)


def test_after_an_error_the_mended_command_runs_in_the_same_folder(fails, models, capsys):
    write(GOOD, "not JSON")
    command = [*SFT, "--model", str(models / "gpt"), "--out", "runs/mine"]
    fails(*command)
    assert not Path("runs").exists()
    write(GOOD, GOOD)
    assert cli.main([*command, "--lr", "0.001"]) == 0
    assert Path("runs/mine/done.json").exists()


# --- models --------------------------------------------------------------------------------------


def ppo_with(models: Path, **changed: str) -> list[str]:
    write(GOOD, GOOD)
    chosen = {"model": models / "gpt", "reward_model": models / "reward"} | changed
    flags = (("--" + name.replace("_", "-"), str(value)) for name, value in chosen.items())
    return [*PPO, *(word for pair in flags for word in pair)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "{}/reward"},
         r"reward: holds a GPT2ForSequenceClassification, not a causal language model\. Give the "
         r"directory of a language model \(a reward model goes to --reward-model\)"),
        ({"reward_model": "{}/gpt"},
         r"gpt: holds GPT2LMHeadModel, not a reward model .* Train one with `rlhf-course reward-"),
        ({"reward_model": "{}/llama"}, r"llama: holds LlamaForCausalLM, not a reward model"),
        ({"model": "{}/nowhere"}, r"model '.*/nowhere': no such directory\. Give a directory with"),
        ({"model": "./nowhere"}, r"model '\./nowhere': no such directory"),
        ({"reward_model": "{}/nowhere"}, r"model '.*/nowhere': no such directory"),
        ({"model": "small"},
         r"--model small: a size names a new model, without weights, and this stage needs a "
         r"trained one\. Give a directory or a hub name"),
        ({"model": "nobody/nothing"},
         r"model 'nobody/nothing': neither a size, nor a local directory, nor in the hub's cache, "
         r"and the hub could not serve it \(HF_HUB_OFFLINE is set\)\. Check .* HF_ENDPOINT"),
    ],
)  # fmt: skip
def test_the_wrong_model(fails, models, monkeypatch, changed, told):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    changed = {name: value.format(models) for name, value in changed.items()}
    assert search(told, fails(*ppo_with(models, **changed)))


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in sorted(tensors) if "layers.0" in name or ".h.0." in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "layers.0" in name or ".h.0." in name)
    tensors[name].view(-1)[3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    key = "n_embd" if "n_embd" in config else "hidden_size"
    (folder / "config.json").write_text(json.dumps(config | {key: 128}))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize("role", ["gpt", "llama", "reward"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_a_tensor, r"copy: .*missing.* (Use|Restore) the checkpoint"),
        (with_a_nan, r"copy: the weight \S+ holds NaN .* name another model"),
        (cut_short, r"copy\S*: .*(damaged or cut short|cannot load it) \(.*\)\. "),
        (of_another_shape, r"copy: .*(wrong shape|misshapen|cannot load it).*\. \w+"),
        (without_config, r"copy: no config\.json, so this is not a model directory\. Give the"),
        (a_pickle, r"copy: .*(is a pickle, which is not read|safetensors).* Save the model"),
        (without_tokenizer, r"copy: no readable tokenizer beside the model .* Save it there"),
    ],
)
def test_a_damaged_model(fails, models, tmp_path, role, damage, told):
    shutil.copytree(models / role, tmp_path / "copy")
    damage(tmp_path / "copy")
    flag = "reward_model" if role == "reward" else "model"
    assert search(told, fails(*ppo_with(models, **{flag: "copy"})))


def test_a_reward_model_that_reads_other_tokens(fails, models, tmp_path):
    shutil.copytree(models / "reward", tmp_path / "copy")
    train_tokenizer(["quite other words"], whole_words=False).save_pretrained(tmp_path / "copy")
    message = fails(*ppo_with(models, reward_model="copy"))
    told = r"copy: the reward model has another tokenizer than the policy \(\d+ tokens, \d+ there\)"
    assert search(told + ", so one would read other words .* Take models of one origin", message)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sft"], r"pretrain/model: not there; this stage starts from it\. Run `rlhf-course "
                  r"pretrain` first, with the same --world .*--seed, or name .* --model"),
        (["comparisons"], r"sft/model: not there"),
        (["reward-model"], r"sft/model: not there"),
        (["ppo"], r"sft/model: not there"),
        (["evaluate"], r"sft/model: not there"),
        (["reward-model", "--model", "{}/gpt"], r"comparisons\.jsonl: not there.* Run `rlhf-course "
                                                 r"comparisons`"),
    ],
)  # fmt: skip
def test_the_stage_before_is_missing(fails, models, arguments, told):
    arguments = [a.format(models) for a in arguments]
    assert search(told, fails(*arguments, "--size", "tiny", "--threads", "1"))


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required|missing|choose|expected"),
        (["dance"], "dance"),
        (["ppo", "--dance"], "--dance"),
        (["ppo", "--size", "huge"], "huge"),
        (["sft", "--world", "mars"], "mars"),
        (["ppo", "--iterations", "three"], "three"),
        (["ppo", "--mdp", "bandit"], "bandit"),
    ],
)
def test_what_the_parser_refuses(fails, arguments, told):
    message = fails(*arguments)
    assert told.split("|")[0] in message.lower() or search(told, message.lower())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("ppo --reward a:b --reward-model c", "--reward and --reward-model: two sources of the"),
        ("ppo --sequence-ratio", r"--sequence-ratio needs --mdp sequence"),
        ("ppo --mdp sequence --sequence-ratio --dual-clip 3", "--dual-clip does nothing with"),
        ("ppo --dual-clip 1", r"--dual-clip 1\.0: give a finite number above 1"),
        (
            "ppo --data x --reward a:b --ptx-coef 0.1",
            "--ptx-coef with --data needs text: give --pt",
        ),
        ("ppo --ptx-data x --ptx-coef 0", "--ptx-data does nothing without --ptx-coef"),
        ("ppo --data x --ptx-data y", "--ptx-data does nothing without --ptx-coef"),
        ("ppo --world reviews --known-share 0.5", "--known-share belongs to the town"),
        ("ppo --micro-batch 65", "--micro-batch 65 exceeds --minibatch 64"),
        ("ppo --kl-horizon 6", r"--kl-horizon 6\.0: too short for --batch 32"),
        ("ppo --temperature 0", r"--temperature 0\.0: give a finite number above 0"),
        ("ppo --temperature nan", "--temperature nan: give a finite number"),
        ("ppo --lr 0", r"--lr 0\.0: give a finite number above 0"),
        ("ppo --lr nan", "--lr nan: give"),
        ("ppo --lr inf", "--lr inf: give"),
        ("ppo --gamma 1.5", r"--gamma 1\.5: give a number from 0 to 1"),
        ("ppo --clip -0.2", r"--clip -0\.2: give"),
        ("ppo --minibatch 0", "--minibatch 0: give at least 1"),
        ("ppo --iterations 0", "--iterations 0: give at least 1"),
        ("ppo --kl-coef -1", r"--kl-coef -1\.0: give at least 0"),
        ("ppo --checkpoint-every 0", "--checkpoint-every 0: give at least 1"),
        ("ppo --threads 0", "--threads 0: give at least 1"),
        ("sft --eval-every 0", "--eval-every 0: give at least 1"),
        ("sft --packing True --corpus-rows 4", "--packing and --corpus-rows do not go together"),
        ("sft --data x --corpus-rows 4 --packing False", "--corpus-rows needs an embedded world"),
        ("sft --warmup -1", "--warmup -1: give at least 0"),
        ("sft --too-long drop", "--too-long says how --data is read: give --data"),
        ("reward-model --rejected shuffled", "--rejected says how --data is read: give --data"),
        ("ppo --data x --recipe tulu", "--recipe tulu: there are hh-rlhf, .*, and none"),
        ("sft --data x --rows 0", "--rows 0: give at least 1"),
        ("pretrain --data x --too-long cut", "--too-long does nothing here"),
        ("sft --data data.jsonl --columns prmpt=a", "--columns prmpt=a: 'prmpt' is no field of"),
        ("sft --validation 1 --data data.jsonl", r"held-out fraction 1\.0: give a number"),
        ("pretrain --window 100", "--window 100: a row must fit the context of 64 tokens"),
        ("pretrain --data data.jsonl --vocab-size 100", "a vocabulary of 100: give at least 260"),
        ("comparisons --answers 1", "--answers 1: give at least 2"),
        ("comparisons --answers 3 --hot-answers 3", "--hot-answers 3: of --answers 3 one is inj"),
        ("evaluate --temperature -1", r"--temperature -1\.0: give a finite number"),
        ("world --out data.jsonl", "data.jsonl exists and is not empty"),
    ],
)
def test_flags_out_of_range_or_against_each_other(fails, arguments, told):
    write(*[GOOD | {"text": "word " * 3}] * 40)
    arguments = arguments.split()
    if "--threads" not in arguments and arguments[0] != "world":
        arguments += ["--threads", "1"]
    assert search(told, fails(*arguments, "--size", "tiny"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(fails):
    message = fails("pretrain", "--device", "cuda", "--size", "tiny")
    assert search(
        r"--device cuda: this torch \(.*\) sees no such device\. Use --device cpu", message
    )


# --- folders -------------------------------------------------------------------------------------


def sft_into(models: Path, out: str, *more: str) -> list[str]:
    write(GOOD, GOOD)
    return [*SFT, "--model", str(models / "gpt"), "--out", out, *more]


def test_a_folder_below_a_file(fails, models):
    Path("file").write_text("mine")
    message = fails(*sft_into(models, "file/sft"))
    assert search(r"cannot write file/sft: \S*file is no folder .* Choose another folder", message)


def test_a_folder_that_holds_something_else(fails, models):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        message = fails(*sft_into(models, "mine", *more))
        assert search(r"mine: not empty, and not a run folder\. Choose another --out", message)


def test_a_folder_that_holds_another_run(fails, models):
    assert cli.main(sft_into(models, "runs/sft")) == 0
    message = fails(*sft_into(models, "runs/sft", "--lr", "0.5"))
    told = r"runs/sft: holds a run with another configuration \(lr: 0\.002 there, 0\.5 now\)\. "
    assert search(told + "Choose another --out, or replace it with --overwrite", message)
    # Even asked to replace it: first everything is loaded.
    write(GOOD, "not JSON")
    fails(*SFT, "--model", models / "gpt", "--out", "runs/sft", "--overwrite")
    assert Path("runs/sft/done.json").exists()


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0,
                    reason="permissions do not bind everybody")  # fmt: skip
def test_a_folder_that_may_not_be_written_to(fails, models, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert search("cannot write locked/sft", fails(*sft_into(models, "locked/sft")))


def test_a_full_disk_keeps_the_last_checkpoint(models, tmp_path, monkeypatch, capsys):
    from rlhf_course import runs

    monkeypatch.chdir(tmp_path)
    command, save, calls = sft_into(models, "runs/sft"), runs.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(runs, "save_file", full)
    assert cli.main(command) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert search(r"cannot write runs/sft/checkpoints/step-000003: No space left on device\. Free "
                  "some space or choose another folder with --out", message)  # fmt: skip
    found = sorted(path.name for path in Path("runs/sft/checkpoints").iterdir())
    assert found == ["step-000001", "step-000002"]
    assert not Path("runs/sft/model").exists()
    assert cli.main(command) == 0
    assert [row["step"] for row in read_metrics("runs/sft")] == [0, 1, 2]


def test_a_full_disk_while_the_model_is_written(models, tmp_path, monkeypatch, capsys):
    from rlhf_course import checkpoints

    monkeypatch.chdir(tmp_path)

    def full(*args):  # how the tokenizers library tells of it
        raise Exception("No space left on device (os error 28)")

    command = sft_into(models, "runs/sft")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tokenizer", full)
        assert cli.main(command) == 2
    message = capsys.readouterr().err
    assert search(
        r"cannot write runs/sft/model: No space left on device", " ".join(message.split())
    )
    assert not Path("runs/sft/model").exists()
    assert not Path("runs/sft/done.json").exists()
    assert cli.main(command) == 0
    assert Path("runs/sft/model/config.json").exists()


# --- reward functions ----------------------------------------------------------------------------


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """Write my_reward.py; it is read anew in every test."""

    def put(source: str) -> None:
        (tmp_path / "my_reward.py").write_text(source)
        sys.modules.pop("my_reward", None)
        import importlib

        importlib.invalidate_caches()

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield put
    sys.modules.pop("my_reward", None)


def with_reward(models: Path, name: str = "my_reward:score") -> list[str]:
    write(GOOD, GOOD)
    return [*PPO, "--model", str(models / "gpt"), "--reward", name]


SCORE = "def score(prompts, responses, rows):\n    "


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (SCORE + "raise KeyError('sql')",
         r"the reward function raised KeyError: 'sql' \(my_reward\.py, line 2\)\. It got 2 "
         r"prompts; the first is 'Where does she live\?' with the answer '.*'\. Mend it and start "
         r"the same command again: the run goes on from its last checkpoint"),
        (SCORE + "return [1.0]", r"returned 1 scores for 2 answers\. It must return one number"),
        (SCORE + "return []", r"returned 0 scores for 2 answers"),
        (SCORE + "return 'good'", r"returned 'good', a str\. It must return a list of numbers"),
        (SCORE + "return None", r"returned None, a NoneType\. It must return a list"),
        (SCORE + "return 1.0", r"returned 1\.0, a float\. It must return a list"),
        (SCORE + "return {'a': 1, 'b': 2}", r"returned \{'a': 1, 'b': 2\}, a dict"),
        (SCORE + "return ['1', '2']", r"returned '1', which is not a finite number .* for the"),
        (SCORE + "return [0, float('nan')]", r"returned nan, which is not a finite number"),
        (SCORE + "return [float('-inf'), 0]", r"returned -inf, which is not a finite number"),
        (SCORE + "return [0, 1e39]", r"returned 1e\+39, which is not a finite number \(float32\)"),
        (SCORE + "return [0, 10 ** 400]", r"returned 1000.* … .*0, which is not a finite number"),
        (SCORE + "return [0, [1, 2]]", r"returned \[1, 2\], which is not a finite number"),
        (SCORE + "return (1 / 0 for _ in responses)", r"raised ZeroDivisionError.*line 2\)"),
        (SCORE + "import torch; return torch.zeros(2, 2)", r"returned tensor\(\[0\., 0\.\]\), whi"),
        ("def other(): pass", r"--reward 'my_reward:score': module 'my_reward' has no score"),
        ("score = 3", r"module 'my_reward' has something that is not a function called score"),
        ("def score(:", r"cannot import 'my_reward' \(SyntaxError.*my_reward\.py, line 1\)"),
        ("x = 1\n1 / 0", r"\(ZeroDivisionError: division by zero \(my_reward\.py, line 2\)\)\. "),
    ],
)  # fmt: skip
def test_a_reward_function_that_fails(fails, models, reward_module, source, told):
    reward_module(source)
    assert search(told, fails(*with_reward(models)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:score", r"cannot import 'no_such_module' \(ModuleNotFoundError: .*\)\. "
                                 "Run from the folder that holds it, or install it"),
        ("my_reward", "--reward 'my_reward': give module:function, such as my_rewards:valid_sql"),
        (":score", "give module:function"),
        ("my_reward:", "give module:function"),
        (".my_reward:score", "give module:function"),
    ],
)  # fmt: skip
def test_a_reward_function_that_is_not_there(fails, models, name, told):
    assert search(told, fails(*with_reward(models, name)))


@pytest.mark.parametrize("returned", ["[0.0] * 2", "torch.zeros(2)", "numpy.ones(2)", "(0, True)",
                                      "iter([1, 2])", "list(torch.ones(2))"])  # fmt: skip
def test_a_reward_function_may_return_any_sequence_of_numbers(
    models, reward_module, monkeypatch, tmp_path, returned
):
    monkeypatch.chdir(tmp_path)
    reward_module(f"import numpy, torch\n{SCORE}return {returned}")
    assert cli.main(with_reward(models)) == 0


# --- NaN and Inf ---------------------------------------------------------------------------------


def test_a_reward_that_becomes_nan_stops_the_run_at_its_last_checkpoint(
    models, reward_module, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    source = "import os\n" + SCORE + "bad = os.path.exists('bad')\n    return [%s, 1.0]"
    reward_module(source % "float('nan') if bad and len(open('n').read()) > 1 else 0.0")
    Path("bad").touch()
    Path("n").write_text("")
    command = [*with_reward(models), "--out", "runs/ppo"]
    # The first two iterations are good, the third is not.
    collect, calls = ppo_stage.collect, []
    monkeypatch.setattr(
        ppo_stage, "collect",
        lambda *a: (calls.append(1), Path("n").write_text("x" * (len(calls) - 1)), collect(*a))[2],
    )  # fmt: skip
    assert cli.main(command) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert search("the reward function returned nan, which is not a finite number", message)
    assert sorted(p.name for p in Path("runs/ppo/checkpoints").iterdir()) == [
        "step-000001", "step-000002",
    ]  # fmt: skip
    assert len(read_metrics("runs/ppo")) == 2
    kept = load_file("runs/ppo/checkpoints/step-000002/tensors.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in kept.values())
    Path("bad").unlink()
    assert cli.main(command) == 0, "mended, the same command goes on"
    assert [row["step"] for row in read_metrics("runs/ppo")] == [0, 1, 2]


def poison(module: torch.nn.Module) -> None:
    with torch.no_grad():
        list(module.parameters())[-1].fill_(math.nan)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("loss", r"sft step 1: loss, grad_norm is NaN or infinite\. Nothing was updated in this "
                 r"step, and the last checkpoint is good: lower the learning rate \(--lr\)"),
        ("gradient", r"sft step 1: grad_norm is NaN or infinite"),
    ],
)  # fmt: skip
def test_nan_in_sft_names_the_term(models, tmp_path, monkeypatch, capsys, place, told):
    monkeypatch.chdir(tmp_path)
    answer_loss, calls = sft_stage.answer_loss, []

    class NaNGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def loss(*args):
        calls.append(1)
        value = answer_loss(*args)
        if len(calls) != 2:
            return value
        return value * math.nan if place == "loss" else NaNGradient.apply(value)

    monkeypatch.setattr(sft_stage, "answer_loss", loss)
    command = sft_into(models, "runs/sft")
    assert cli.main(command) == 2
    assert search(told, " ".join(capsys.readouterr().err.split()))
    assert [p.name for p in Path("runs/sft/checkpoints").iterdir()] == ["step-000001"]
    assert cli.main(command) == 0
    weights = load_file("runs/sft/model/model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("policy", r"the policy's logits are NaN or infinite, so no answer could be sampled\. The "
                   r"last checkpoint stands: lower the learning rate \(--lr\)"),
        ("reward_model", r"the reward model gives NaN or infinite scores.* --reward-model"),
        ("critic", r"ppo step 1, before any update: .*values is NaN or infinite"),
        ("reference", r"ppo step 1, before any update: kl.* is NaN or infinite"),
    ],
)  # fmt: skip
def test_a_model_that_breaks_in_ppo_is_named(models, tmp_path, monkeypatch, capsys, part, told):
    monkeypatch.chdir(tmp_path)
    iterate = ppo_stage.PPOTrainer.iterate

    def breaking(self, step):
        if step == 1:
            poison(getattr(self, part))
        return iterate(self, step)

    monkeypatch.setattr(ppo_stage.PPOTrainer, "iterate", breaking)
    command = [*ppo_with(models), "--out", "runs/ppo"]
    assert cli.main(command) == 2
    assert search(told, " ".join(capsys.readouterr().err.split()))
    assert [p.name for p in Path("runs/ppo/checkpoints").iterdir()] == ["step-000001"]
    assert len(read_metrics("runs/ppo")) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 0
