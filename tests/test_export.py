"""`rlhf-course export`: rows in the other libraries' schemas, commands with the run's settings."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from rlhf_course import cli
from rlhf_course.data import read_dialogues, split_rows
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.export import verl
from rlhf_course.export.amounts import Amounts, Rollouts
from rlhf_course.export.command import LIBRARIES, export
from rlhf_course.export.settings import ExportConfig
from rlhf_course.export.source import read_source
from rlhf_course.files import write_json
from rlhf_course.gpt import GPT
from rlhf_course.reward_model import ScalarModel
from rlhf_course.sft import PLAIN_TEMPLATE
from rlhf_course.stages.presets import identity, model_shape, resolve
from rlhf_course.stages.settings import PPOConfig, PretrainConfig, SFTConfig
from rlhf_course.world.tokenizer import train_tokenizer

TEXTS = ["What is two and two?", "Four.", "Say hello to Ada.", "Hello, Ada!", "no", "yes"] * 3
MULTI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
         {"role": "user", "content": "Who?"}]  # fmt: skip
DIALOGUES = [{"prompt": f"Question {i} about «quotes» ' \" $HOME?", "response": f"Answer {i}."}
             for i in range(9)] + [{"prompt": MULTI, "response": "Ada."}]  # fmt: skip
PAIRS = [{"prompt": f"Question {i}?", "responses": [f"good {i}", f"fair {i}", f"bad {i}"]}
         for i in range(10)]  # fmt: skip
PROMPTS = [{"prompt": f"Question {i}?", "answer": i} for i in range(10)]
DATA = {"sft": DIALOGUES, "reward-model": PAIRS, "dpo": PAIRS, "ppo": PROMPTS}
STAGES = [(library, stage) for library in LIBRARIES for stage in DATA
          if library != "verl" or stage in ("sft", "ppo")]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder whose name a shell would break, with data, a policy and a reward model."""
    folder = tmp_path_factory.mktemp("it's $HOME & «more»")
    tokenizer = train_tokenizer(TEXTS, 300, whole_words=False)
    model = GPT(model_shape("tiny", len(tokenizer), 128))
    model.save_pretrained(folder / "policy", tokenizer)
    ScalarModel.from_language_model(model).save_pretrained(folder / "reward", tokenizer)
    for stage, rows in DATA.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{stage}.jsonl").write_text(text, encoding="utf-8")
    return folder


def asked(place: Path, library: str, stage: str, settings: str = "", **more) -> ExportConfig:
    if stage == "ppo" and "reward" not in settings:
        settings += f" --reward-model '{_quoted(place / 'reward')}'"
    return ExportConfig(library, stage=stage, data=str(place / f"{stage}.jsonl"),
                        model=str(place / "policy"), settings=settings, **more)  # fmt: skip


def _quoted(path: Path) -> str:
    """Inside single quotes."""
    return str(path).replace("'", "'\"'\"'")


def words(place, library, stage, settings="") -> list[str]:
    return LIBRARIES[library].command(read_source(asked(place, library, stage, settings))).words


def option(found: list[str], name: str) -> list[str]:
    """The words behind a flag, or behind `name=` in a Hydra override."""
    for word in found:
        if word.startswith(name + "="):
            return [word.partition("=")[2]]
    start = found.index(name) + 1
    end = next((i for i in range(start, len(found)) if found[i].startswith("--")), len(found))
    return found[start:end]


# --- rows -------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(("library", "stage"), STAGES)
def test_the_folder_has_every_row_once(place, tmp_path, library, stage):
    out = export(asked(place, library, stage, out=tmp_path / "out"))
    kind = "parquet" if library == "verl" else "jsonl"
    assert {p.name for p in out.iterdir()} >= {"data", "run.sh"}
    rows = {}
    for name in ("train", "test"):
        file = out / "data" / f"{name}.{kind}"
        rows[name] = (
            lines(file) if kind == "jsonl" else pyarrow.parquet.read_table(file).to_pylist()
        )
    share = {"sft": 0.2, "ppo": 0.2}.get(stage, 0.1)
    each = 3 if stage == "reward-model" else 1  # pairs of three ranked answers; DPO: best, worst
    assert len(rows["test"]) == round(share * 10) * each
    assert len(rows["train"]) + len(rows["test"]) == 10 * each
    assert os.access(out / "run.sh", os.X_OK)


def test_the_rows_held_out_are_those_of_our_own_stage(place):
    source = read_source(asked(place, "trl", "sft"))
    held, train = split_rows(read_dialogues(place / "sft.jsonl"), 0.2, 0)
    assert (source.held, source.train) == (held, train)


def test_trl_rows(place):
    trl = LIBRARIES["trl"]
    rows = {stage: read_source(asked(place, "trl", stage)).rows for stage in DATA}
    by_prompt = {str(row.prompt): trl.row_of(row) for row in rows["sft"]}
    text = DIALOGUES[3]["prompt"]
    assert by_prompt[text] == {"prompt": user(text), "completion": said("Answer 3.")}
    assert by_prompt[str(MULTI)] == {"prompt": MULTI, "completion": said("Ada.")}
    found = [trl.row_of(row) for row in rows["reward-model"] if row.prompt == "Question 4?"]
    assert [(r["chosen"], r["rejected"]) for r in found] == [
        (said("good 4"), said("fair 4")), (said("good 4"), said("bad 4")),
        (said("fair 4"), said("bad 4")),
    ]  # fmt: skip
    (found,) = [trl.row_of(row) for row in rows["dpo"] if row.prompt == "Question 4?"]
    assert found == {"prompt": user("Question 4?"), "chosen": said("good 4"),
                     "rejected": said("bad 4")}  # fmt: skip
    assert trl.row_of(rows["ppo"][0]) == {"prompt": user(rows["ppo"][0].prompt)}


def test_openrlhf_rows(place):
    rows = {stage: read_source(asked(place, "openrlhf", stage)).rows for stage in DATA}
    make = LIBRARIES["openrlhf"].row_of
    (found,) = [make(row) for row in rows["sft"] if row.prompt == MULTI]
    assert found == {"input": MULTI, "output": said("Ada.")}
    assert set(make(rows["dpo"][0])) == {"prompt", "chosen", "rejected"}
    (found,) = [make(row) for row in rows["ppo"] if row.row["answer"] == 7]
    assert found["input"] == user("Question 7?")
    label = {"prompt": "Question 7?", "row": {"prompt": "Question 7?", "answer": 7}}
    assert json.loads(found["label"]) == label


def test_verl_rows(place, tmp_path):
    out = export(asked(place, "verl", "ppo", out=tmp_path / "ppo"))
    rows = pyarrow.parquet.read_table(out / "data" / "train.parquet").to_pylist()
    for index, row in enumerate(rows):
        assert row["extra_info"] == {"split": "train", "index": index}
        assert row["reward_model"]["style"] == "rule"
        known = json.loads(row["reward_model"]["ground_truth"])
        assert row["prompt"] == user(known["prompt"]) == user(known["row"]["prompt"])
        assert row["ability"] == "rlhf" and row["data_source"].endswith("/ppo.jsonl")
    out = export(asked(place, "verl", "sft", out=tmp_path / "sft"))
    rows = pyarrow.parquet.read_table(out / "data" / "train.parquet").to_pylist()
    rows += pyarrow.parquet.read_table(out / "data" / "test.parquet").to_pylist()
    assert {"messages": MULTI + said("Ada.")} in rows


def test_pairs_with_nothing_to_learn_are_left_out_and_counted(place, tmp_path):
    run = tmp_path / "dpo"
    comparisons = tmp_path / "comparisons"
    comparisons.mkdir()
    rows = [
        {"prompt": {"text": "A?", "group": "g", "key": ["k"]}, "responses": ["yes", "yes"],
         "finished": [True, False], "utilities": [1.0, 0.0]},
        {"prompt": {"text": "B?", "group": "g", "key": ["k"]}, "responses": ["yes", "no"],
         "finished": [True, False], "utilities": [1.0, 0.0]},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("comparisons", "heldout"):
        (comparisons / f"{name}.jsonl").write_text(text)
    write_json(comparisons / "done.json", {})
    settings = f"--size tiny --out '{run}'"
    config = ExportConfig("trl", stage="dpo", model=str(place / "policy"), settings=settings)
    source = read_source(config)
    assert [(p.prompt, p.chosen, p.rejected) for p in source.train] == [("B?", "yes", "no")]
    assert "1 of 2 pairs are left out" in " ".join(source.notes)
    assert "2 of 4 answers never ended" in " ".join(source.notes)
    (comparisons / "comparisons.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="no pair of different answers"):
        read_source(config)


# --- commands ---------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(("library", "stage"), STAGES)
def test_a_shell_hands_the_program_exactly_our_words(place, tmp_path, library, stage):
    """A program of that name writes down what it was given, and where it was started."""
    if not shutil.which("bash"):
        pytest.skip("no bash on this machine")
    request = asked(place, library, stage, out=tmp_path / "o'ut $x `y`" / "folder")
    out = export(request)
    expected = LIBRARIES[library].command(read_source(request)).words
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / expected[0]
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "json.dump([os.getcwd(), sys.argv[1:]], open(os.environ['SEEN'], 'w'))\n"
    )
    program.chmod(0o755)
    seen = tmp_path / "seen.json"
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "SEEN": str(seen)}
    done = subprocess.run(["bash", str(out / "run.sh")], env=env, cwd="/", capture_output=True)
    assert done.returncode == 0, done.stderr
    folder, got = json.loads(seen.read_text())
    assert Path(folder) == out.resolve()
    if expected[0] == "python":
        expected = ["python", *expected[1:]]
    assert got == expected[1:]
    model = next(word for word in got if "policy" in word)
    plain = model.partition("=")[2].strip("'").replace("\\'", "'") if "=" in model else model
    assert Path(plain) == place / "policy"


SETTINGS = {
    "sft": "--lr 3e-4 --batch 4 --steps 12 --warmup 3 --seed 7 --weight-decay 0.05 "
           "--max-grad-norm 0.5",
    "reward-model": "--lr 3e-4 --batch 4 --epochs 2 --warmup 3 --seed 7",
    "dpo": "--lr 3e-4 --batch 4 --micro-batch 2 --beta 0.3 --epochs 2 --pairs all",
    "ppo": "--lr 3e-4 --critic-lr 5e-4 --batch 16 --minibatch 8 --micro-batch 4 --epochs 3 "
           "--iterations 5 --clip 0.15 --value-clip 0.3 --gamma 0.99 --lam 0.9 --kl-coef 0.07 "
           "--kl-target 6 --kl-horizon 999 --max-new-tokens 20 --temperature 0.8 --seed 7 "
           "--critic-warmup 2",
}  # fmt: skip
EXPECTED = [
    ("trl", "sft", {"--learning_rate": "0.0003", "--per_device_train_batch_size": "4",
                    "--max_steps": "12", "--warmup_steps": "3", "--seed": "7",
                    "--weight_decay": "0.05", "--max_grad_norm": "0.5",
                    "--lr_scheduler_type": "warmup_stable_decay"}),
    ("trl", "reward-model", {"--learning_rate": "0.0003", "--per_device_train_batch_size": "12",
                             "--max_steps": "6"}),  # 27 pairs, 12 at once, twice
    ("trl", "dpo", {"--beta": "0.3", "--per_device_train_batch_size": "2",
                    "--gradient_accumulation_steps": "2", "--max_steps": "14",
                    "--precompute_ref_log_probs": "True"}),
    ("trl", "ppo", {"--learning_rate": "0.0003", "--total_episodes": "80",
                    "--num_mini_batches": "2", "--num_ppo_epochs": "3",
                    "--per_device_train_batch_size": "4", "--gradient_accumulation_steps": "2",
                    "--cliprange": "0.15", "--cliprange_value": "0.3", "--gamma": "0.99",
                    "--lam": "0.9", "--kl_coef": "0.07", "--response_length": "20",
                    "--temperature": "0.8", "--missing_eos_penalty": "1.0"}),
    ("openrlhf", "sft", {"--adam.lr": "0.0003", "--train.batch_size": "4",
                         "--train.max_epochs": "6", "--lr_warmup_ratio": "0.25",
                         "--train.seed": "7", "--adam.weight_decay": "0.05", "--max_norm": "0.5"}),
    ("openrlhf", "reward-model", {"--train.batch_size": "12", "--train.max_epochs": "3",
                                  "--ds.value_head_prefix": "score"}),
    ("openrlhf", "dpo", {"--model.beta": "0.3", "--train.micro_batch_size": "2",
                         "--eval.split": "train"}),
    ("openrlhf", "ppo", {"--actor.adam.lr": "0.0003", "--critic.adam.lr": "0.0005",
                         "--rollout.batch_size": "16", "--train.batch_size": "8",
                         "--train.micro_batch_size": "4", "--train.max_epochs": "3",
                         "--actor.eps_clip": "0.15", "--critic.value_clip": "0.3",
                         "--algo.advantage.gamma": "0.99", "--algo.advantage.lambd": "0.9",
                         "--algo.kl.init_coef": "0.07", "--algo.kl.target": "0.6",
                         "--algo.kl.horizon": "999", "--rollout.max_new_tokens": "20",
                         "--rollout.temperature": "0.8", "--critic.freezing_steps": "2",
                         "--algo.advantage.estimator": "gae"}),
    ("verl", "sft", {"optim.lr": "0.0003", "data.train_batch_size": "4", "trainer.seed": "7",
                     "trainer.total_training_steps": "12", "optim.lr_warmup_steps": "3",
                     "optim.weight_decay": "0.05", "optim.clip_grad": "0.5"}),
    ("verl", "ppo", {"actor_rollout_ref.actor.optim.lr": "0.0003", "critic.optim.lr": "0.0005",
                     "data.train_batch_size": "16",
                     "actor_rollout_ref.actor.ppo_mini_batch_size": "8",
                     "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "4",
                     "actor_rollout_ref.actor.ppo_epochs": "3",
                     "actor_rollout_ref.actor.clip_ratio": "0.15",
                     "critic.cliprange_value": "0.3", "algorithm.gamma": "0.99",
                     "algorithm.lam": "0.9", "algorithm.kl_ctrl.kl_coef": "0.07",
                     "algorithm.kl_ctrl.target_kl": "0.6", "algorithm.kl_ctrl.horizon": "999",
                     "algorithm.kl_ctrl.type": "adaptive", "data.max_response_length": "20",
                     "actor_rollout_ref.rollout.temperature": "0.8", "trainer.critic_warmup": "2",
                     "trainer.total_training_steps": "7", "algorithm.adv_estimator": "gae"}),
]  # fmt: skip


@pytest.mark.parametrize(("library", "stage", "expected"), EXPECTED)
def test_the_settings_are_the_students(place, library, stage, expected):
    found = words(place, library, stage, SETTINGS[stage])
    for name, value in expected.items():
        assert option(found, name) == [value], name


def test_a_line_down_to_the_floor_is_the_same_line_in_trl(place):
    from transformers import get_scheduler

    from rlhf_course.training import learning_rate

    for schedule in ("linear", "cosine", "constant"):
        found = words(place, "trl", "sft", f"{SETTINGS['sft']} --schedule {schedule}")
        more = option(found, "--lr_scheduler_kwargs") if schedule != "constant" else ["{}"]
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        theirs = get_scheduler(option(found, "--lr_scheduler_type")[0], optimizer, 3, 12,
                               json.loads(more[0]))  # fmt: skip
        rates = []
        for _ in range(12):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
        ours = [learning_rate(3e-4, step, 12, schedule, 3, 0.05) for step in range(12)]
        assert rates[3:] == pytest.approx(ours[3:], rel=1e-6)
        assert rates[:3] == pytest.approx(
            ours[:3], abs=0.05 * 3e-4 + 1e-9
        )  # it begins at the floor


def test_without_a_chat_template_ours_goes_along(place, tmp_path):
    model = tmp_path / "base"
    shutil.copytree(place / "policy", model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))

    def request(library, stage="sft"):
        return ExportConfig(library, stage=stage, data=str(place / "sft.jsonl"), model=str(model),
                            out=tmp_path / library, settings="" if stage == "sft" else
                            f"--reward-model '{_quoted(place / 'reward')}'")  # fmt: skip

    out = export(request("trl"))
    assert (out / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    assert "--chat_template_path ./chat_template.jinja" in (out / "run.sh").read_text()
    found = LIBRARIES["openrlhf"].command(read_source(request("openrlhf"))).words
    assert option(found, "--data.tokenizer_chat_template") == [PLAIN_TEMPLATE]
    found = LIBRARIES["verl"].command(read_source(request("verl"))).words
    quoted = option(found, "model.custom_chat_template")[0]
    assert quoted[0] == quoted[-1] == "'"
    assert quoted[1:-1].replace("\\'", "'").replace("\\\\", "\\") == PLAIN_TEMPLATE
    with pytest.raises(ConfigError, match="has no chat template"):
        LIBRARIES["openrlhf"].command(read_source(request("openrlhf", "ppo")))


def notes(place, library, stage, settings="") -> str:
    command = LIBRARIES[library].command(read_source(asked(place, library, stage, settings)))
    return " ".join(command.notes)


def test_what_has_no_counterpart_is_said(place):
    for library in LIBRARIES:
        ptx = f"--ptx-coef 0.5 --ptx-data '{_quoted(place / 'text.jsonl')}'"
        assert "PPO-ptx (--ptx-coef 0.5)" in notes(place, library, "ppo", ptx)
        assert "ptx" not in notes(place, library, "ppo", "")
        adaptive = notes(place, library, "ppo", "--kl-target 3.0")
        assert "--kl-target 3.0" in adaptive
        assert "kl-target" not in notes(place, library, "ppo", "--kl-controller fixed")
        assert "--mdp sequence" in notes(place, library, "ppo", "--mdp sequence --gamma 0.9")
    for library in ("trl", "openrlhf"):
        said = notes(place, library, "reward-model", "--pooling mean --normalize bias")
        assert "--loss kwise" in said and "--pooling mean" in said and "--normalize bias" in said
        assert "kwise" not in notes(place, library, "reward-model", "--loss pairwise")
    assert "a cosine down to the same floor" in notes(place, "verl", "sft")
    assert "Epochs are whole there" in notes(place, "openrlhf", "sft", "--steps 5 --batch 4")


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        ("openrlhf", "rloo", {"--algo.advantage.estimator": "rloo"}),
        ("openrlhf", "grpo", {"--algo.advantage.estimator": "group_norm",
                              "--algo.kl.estimator": "k3"}),
        ("openrlhf", "reinforce_plus_plus", {"--algo.advantage.estimator": "reinforce"}),
        ("verl", "rloo", {"algorithm.adv_estimator": "rloo", "critic.enable": "False"}),
        ("verl", "grpo", {"algorithm.adv_estimator": "grpo",
                          "actor_rollout_ref.actor.use_kl_loss": "True"}),
    ],
)  # fmt: skip
def test_estimators_without_a_critic(place, library, name, expected):
    found = words(place, library, "ppo", f"--advantages {name} --batch 16")
    for key, value in expected.items():
        assert option(found, key) == [value]
    group = "1" if name == "reinforce_plus_plus" else "4"
    key = {"openrlhf": "--rollout.n_samples_per_prompt", "verl": "actor_rollout_ref.rollout.n"}
    assert option(found, key[library]) == [group]
    assert not any("critic.model" in word or "critic.adam" in word for word in found)


def test_what_hydra_reads_is_what_was_meant():
    assert verl.value_of("./data/train.parquet") == "./data/train.parquet"
    assert verl.value_of("it's a \\ path") == "'it\\'s a \\\\ path'"
    assert verl.value_of("true") == "'true'" and verl.value_of("a=b") == "'a=b'"
    assert verl.value_of(["console", "a b"]) == "[console,'a b']"
    assert verl.value_of(True) == "True" and verl.value_of(1e-05) == "1e-05"
    hydra = pytest.importorskip("hydra", reason="hydra-core is not installed")
    del hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for value in ("it's a \\ path", "a=b,c", "true", "{x}", "é «»", ["a b", "c"], 0.1, False):
        (found,) = parser.parse_overrides([f"key={verl.value_of(value)}"])
        assert found.value() == value


# --- rewards ----------------------------------------------------------------------------------


REWARD = "def length(prompts, responses, rows):\n    return [len(r) + 100 * row['answer'] \
+ (p == row['prompt']) for p, r, row in zip(prompts, responses, rows)]\n"


def test_a_reward_function_goes_along(place, tmp_path, monkeypatch):
    (tmp_path / "my_reward_of_length.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    settings = "--reward my_reward_of_length:length"
    out = export(asked(place, "verl", "ppo", settings, out=tmp_path / "v"))
    found = (out / "run.sh").read_text()
    assert "reward.custom_reward_function.path=./reward.py" in found
    assert "reward_model.enable" not in found
    row = pyarrow.parquet.read_table(out / "data" / "train.parquet").to_pylist()[0]
    number = json.loads(row["reward_model"]["ground_truth"])["row"]["answer"]
    space = runpy(out / "reward.py")
    got = space["compute_score"](row["data_source"], "four", row["reward_model"]["ground_truth"],
                                 row["extra_info"])  # fmt: skip
    assert got == 4 + 100 * number + 1

    out = export(asked(place, "openrlhf", "ppo", settings, out=tmp_path / "o"))
    rows = lines(out / "data" / "train.jsonl")[:2]
    space = runpy(out / "reward.py")
    prompts = ["User: a\nAssistant:", "User: bc\nAssistant:"]
    eos = read_source(asked(place, "openrlhf", "ppo", settings)).tokenizer.eos_token
    queries = [prompts[0] + " four" + eos, prompts[1] + " five!"]
    found = space["reward_func"](queries, prompts, [row["label"] for row in rows])
    numbers = [json.loads(row["label"])["row"]["answer"] for row in rows]
    expected = [len(" four") + 100 * numbers[0] + 1, len(" five!") + 100 * numbers[1] + 1]
    assert found["rewards"].tolist() == expected


def runpy(file: Path) -> dict:
    import runpy

    return runpy.run_path(str(file))


# --- from a run folder ------------------------------------------------------------------------


def run_folder(folder: Path, config, stage: str) -> Path:
    write_json(folder / "config.json", identity(resolve(config, stage)))
    return folder


def test_a_run_folder_is_exported_as_it_was(place, tmp_path):
    config = SFTConfig(size="tiny", seed=3, lr=1.5e-3, batch=8, model=str(place / "policy"))
    run = run_folder(tmp_path / "sft", config, "sft")
    source = read_source(ExportConfig("trl", run=run))
    assert (source.stage, source.config.lr, source.config.seed) == ("sft", 1.5e-3, 3)
    found = LIBRARIES["trl"].command(source).words
    assert option(found, "--learning_rate") == ["0.0015"]
    assert option(found, "--per_device_train_batch_size") == ["8"]
    assert len(source.rows) == 300  # the demonstrations of the tiny town
    cli.main(["export", "--to", "trl", "--run", str(run), "--out", str(tmp_path / "out")])
    assert len(lines(tmp_path / "out" / "data" / "train.jsonl")) == len(source.train)


def test_a_ppo_run_asks_the_prompts_that_it_asked_and_its_kl_is_per_token(place, tmp_path):
    from rlhf_course.stages.prompts import Prompts

    config = PPOConfig(size="tiny", iterations=2, model=str(place / "policy"),
                       reward_model=str(place / "reward"), seed=2)  # fmt: skip
    run = run_folder(tmp_path / "ppo", config, "ppo")
    (run / "metrics.jsonl").write_text('{"step": 0, "length": 8.0}\n{"step": 1, "length": 9.0}\n')
    source = read_source(ExportConfig("openrlhf", run=run))
    prompts = Prompts(source.config, source.tokenizer, 64)
    asked_for = [task.text for step in range(3) for task in prompts(step)]  # one of them warm-up
    assert [row.prompt for row in source.train] == asked_for
    found = LIBRARIES["openrlhf"].command(source).words
    assert float(option(found, "--algo.kl.target")[0]) == pytest.approx(1.7 / 8.5, rel=1e-4)


# --- what is refused --------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused(place, tmp_path):
    wrong = [
        (ExportConfig("trl"), "give either --run"),
        (ExportConfig("trl", run=tmp_path, stage="sft"), "give either --run"),
        (ExportConfig("trl", run=tmp_path, data="x.jsonl"), "--data and --settings do not go"),
        (ExportConfig("trl", run=tmp_path / "none"), "no config.json in it"),
        (ExportConfig("trl", stage="sft", data=str(place / "sft.jsonl")), "begins with new weigh"),
    ]
    for request, message in wrong:
        with pytest.raises(ConfigError, match=message):
            export(ExportConfig(**{**vars(request), "out": tmp_path / "out"}))
    run = run_folder(tmp_path / "pretrain", PretrainConfig(size="tiny"), "pretrain")
    with pytest.raises(ConfigError, match="a stage that has no equivalent"):
        read_source(ExportConfig("trl", run=run))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["reward-model", "dpo"])
def test_verl_has_no_such_stage(place, tmp_path, stage):
    with pytest.raises(ConfigError, match=r"verl 0\.9\.1 trains no .*openrlhf or trl"):
        export(asked(place, "verl", stage, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_trl_has_no_such_ppo(place):
    with pytest.raises(ConfigError, match="no function and no server"):
        words(place, "trl", "ppo", "--reward a:b")
    with pytest.raises(ConfigError, match="no --advantages grpo"):
        words(place, "trl", "ppo", "--advantages grpo")


def test_a_folder_with_something_in_it_is_left_alone(place, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        export(asked(place, "trl", "sft", out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_wrong_settings_are_refused_as_the_stage_would(place):
    with pytest.raises(ConfigError, match="--lr -1"):
        read_source(asked(place, "trl", "sft", "--lr -1"))
    with pytest.raises(SystemExit) as stopped:
        read_source(asked(place, "trl", "sft", "--no-such-flag 3"))
    assert stopped.value.code == 2


# --- amounts ----------------------------------------------------------------------------------


def test_the_parts_of_a_batch_make_the_batch(place):
    for settings in ("--batch 12 --minibatch 64", "--batch 30 --minibatch 8 --micro-batch 3"):
        source = read_source(asked(place, "verl", "ppo", settings))
        sizes = Rollouts.of(source)
        assert sizes.minibatch * sizes.an_epoch == source.config.batch
        assert sizes.minibatch % sizes.micro == 0
    source = read_source(asked(place, "trl", "dpo", "--batch 7 --micro-batch 4"))
    amounts = Amounts.of(source)
    assert amounts.batch == 7 and amounts.batch % amounts.micro == 0
    source = read_source(asked(place, "trl", "sft", "--steps 4 --warmup 9"))
    assert Amounts.of(source).warmup < Amounts.of(source).steps


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_package_itself_takes_it(place, tmp_path, monkeypatch, library):
    """All of it: `python benchmarks/exports.py LIBRARY` in an environment with the library."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed here")
    spec = importlib.util.spec_from_file_location(
        "exports", Path(__file__).parents[1] / "benchmarks" / "exports.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    request = asked(place, library, "sft", "--steps 4 --batch 4", out=tmp_path / "out")
    out = export(request)
    monkeypatch.chdir(out)
    source = read_source(request)
    found = benchmark.CHECKS[library]("sft", source, benchmark.words_of(out))
    assert found["tokens"] == f"{len(source.train)} of {len(source.train)} rows as ours"


# --- models and rows that do not go as they are -----------------------------------------------


def test_an_adapter_is_asked_for_and_one_that_is_there_is_refused(place, tmp_path):
    lora = "--lora 8 --lora-alpha 24 --lora-targets q_proj v_proj"
    found = words(place, "trl", "sft", lora)
    assert option(found, "--lora_r") == ["8"] and option(found, "--lora_alpha") == ["24"]
    assert option(found, "--lora_target_modules") == ["q_proj", "v_proj"]
    assert "--use_peft" in found
    found = words(place, "openrlhf", "sft", lora)
    assert option(found, "--ds.lora.rank") == ["8"] and option(found, "--ds.lora.alpha") == ["24"]
    assert option(found, "--ds.lora.target_modules") == ["q_proj", "v_proj"]
    found = words(place, "verl", "sft", lora)
    assert option(found, "model.lora_rank") == ["8"]
    assert option(found, "model.target_modules") == ["[q_proj,v_proj]"]
    assert not any("lora" in word for word in words(place, "verl", "sft"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(place / "policy")})
    request = asked(place, "trl", "sft")
    request.model = str(adapter)
    with pytest.raises(ConfigError, match="a LoRA adapter, and the other libraries"):
        read_source(request)


def test_rows_beyond_the_context_are_counted_or_an_error(place, tmp_path):
    rows = [*DIALOGUES, {"prompt": "Why? " * 200, "response": "So."}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    request = asked(place, "trl", "sft", "--too-long drop")
    request.data = str(data)
    source = read_source(request)
    assert len(source.rows) == 10 and source.longest <= 128
    assert "1 of 11 rows exceed 128 tokens" in " ".join(source.notes)
    request.settings = ""
    with pytest.raises(DataError, match=r"rows\.jsonl, line 11: \d+ tokens exceed 128; 1 of 11"):
        read_source(request)


def test_data_are_read_by_the_flags_of_the_stage(place, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"ask": row["prompt"], "say": row["response"]} for row in DIALOGUES[:9]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 2), encoding="utf-8")
    columns = "--columns prompt=ask,response=say --duplicates drop"
    request = asked(place, "trl", "sft", columns)
    request.data = str(data)
    assert {row.response for row in read_source(request).rows} == {f"Answer {i}." for i in range(9)}
    assert len(read_source(request).rows) == 9
