"""Model cards: their YAML, their figures, their licence, and what must not stand in them."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_course import __version__, cli
from rlhf_course.files import read_json
from rlhf_course.reward_model import ScalarModel
from rlhf_course.runs import Run, read_metrics, read_timing
from rlhf_course.stages import cards
from rlhf_course.stages.card_texts import LIMITS
from rlhf_course.stages.cards import Provenance, card_of, licence_of, public_name, settings_of
from rlhf_course.stages.presets import resolve
from rlhf_course.stages.settings import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig

COMMON = ["--size", "tiny", "--threads", "1"]
STAGES = {
    "pretrain": ["pretrain", "--steps", "4", "--batch", "4"],
    "sft": ["sft", "--steps", "6", "--batch", "4", "--eval-every", "3"],
    "comparisons": ["comparisons", "--prompts", "12", "--heldout", "12"],
    "reward_model": ["reward-model", "--steps", "3", "--batch", "4", "--pooling", "last"],
    "ppo": ["ppo", "--iterations", "2", "--critic-warmup", "1", "--batch", "8", "--minibatch", "4",
            "--kl-horizon", "20"],
    "dpo": ["dpo", "--steps", "3", "--batch", "4", "--eval-prompts", "8"],
}  # fmt: skip
WITH_MODEL = [stage for stage in STAGES if stage != "comparisons"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of every stage."""
    folder = tmp_path_factory.mktemp("secret-folder-of-this-machine")
    for name, command in STAGES.items():
        assert cli.main([*command, *COMMON, "--out", str(folder / name)]) == 0
    return folder


def card(run: Path) -> ModelCard:
    return ModelCard.load(run / "model" / "README.md")


def cells(text: str) -> dict[str, str]:
    """Every table row of two cells."""
    return dict(re.findall(r"^\| (\S[^|]*) \| ([^|]*) \|$", text, re.M))


@pytest.mark.parametrize("stage", WITH_MODEL)
def test_the_head_is_what_the_hub_reads(runs, stage):
    found = card(runs / stage).data
    assert found.license == "apache-2.0"  # a world of ours, from new weights on
    assert found.library_name == "transformers"
    task = "text-classification" if stage == "reward_model" else "text-generation"
    assert found.pipeline_tag == task
    assert found.tags == ["rlhf-course", "rlhf", stage.replace("_", "-")]
    assert found.base_model is None and found.datasets is None  # neither has a name on the hub
    for tag in found.tags:
        assert re.fullmatch(r"[a-z-]+", tag)


@pytest.mark.parametrize("stage", WITH_MODEL)
def test_the_figures_are_those_of_the_run(runs, stage):
    done, last = read_json(runs / stage / "done.json"), read_metrics(runs / stage)[-1]
    found = card(runs / stage)
    results = {r.metric_type: r.metric_value for r in found.data.eval_results or []}
    assert results == done
    assert bool(done) == (stage != "ppo")  # in a world PPO holds nothing out
    shown = cells(found.text)
    for name, value in {**last, **done}.items():
        if name != "step":
            assert float(shown[name]) == pytest.approx(value, rel=1e-3), name
    if done:
        name, again = model_index_to_eval_results(found.data.to_dict()["model-index"])
        assert name == f"town-{stage}"
        assert {r.metric_type: r.metric_value for r in again} == done
        assert {(r.dataset_type, r.dataset_name) for r in again} == {("rlhf-course-town",) * 2}
    assert f"The last of {len(read_metrics(runs / stage))} steps" in found.text


@pytest.mark.parametrize("stage", WITH_MODEL)
def test_the_recipe_has_every_setting_that_was_given(runs, stage):
    text = card(runs / stage).text
    shown = cells(text[text.index("## Recipe") : text.index("## Data")])
    config = read_json(runs / stage / "config.json")
    assert f"`rlhf-course {stage.replace('_', '-')}`" in text
    given = [*STAGES[stage][1:], *COMMON]
    for flag, value in zip(given[::2], given[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        if name != "eval_prompts" or int(value) != 256:
            assert shown[name] == value
    assert float(shown["lr"]) == config["lr"]  # a preset's
    assert shown["seed"] == "0"
    assert shown["rlhf-course"] == __version__
    assert shown["torch"] == torch.__version__
    assert re.search(r"^Device: cpu, .*1 thread", text, re.M)
    seconds = re.search(r"Training took (\S+) seconds", text)[1]
    assert float(seconds) == pytest.approx(cards.seconds_of(read_timing(runs / stage)), rel=1e-2)


@pytest.mark.parametrize("stage", WITH_MODEL)
def test_no_folder_of_the_machine_is_told(runs, stage):
    text = (runs / stage / "model" / "README.md").read_text(encoding="utf-8")
    assert "secret-folder" not in text
    assert str(Path.home()) not in text and "/tmp" not in text
    if stage != "pretrain":
        before = "pretrain/model" if stage == "sft" else "sft/model"
        assert f"It started from `{before}`" in text
    else:
        assert "It started from new weights" in text


def test_how_many_rows(runs):
    shown = {stage: cells(card(runs / stage).text) for stage in WITH_MODEL}
    lines = {name: len((runs / "comparisons" / f"{name}.jsonl").read_text().splitlines())
             for name in ("comparisons", "heldout")}  # fmt: skip
    assert int(shown["reward_model"]["comparisons"]) == lines["comparisons"]
    assert int(shown["reward_model"]["held out"]) == lines["heldout"]
    assert int(shown["dpo"]["pairs"]) == lines["comparisons"]
    assert int(shown["ppo"]["answers"]) == 16
    assert int(shown["pretrain"]["tokens"]) > 10_000


def test_each_stage_names_limits_of_its_own(runs):
    texts = {stage: card(runs / stage).text for stage in WITH_MODEL}
    for stage, text in texts.items():
        assert LIMITS[stage] in text
        assert "made-up town" in text
        assert (LIMITS["learned reward"] in text) == (stage == "ppo")
        assert not any(LIMITS[other] in text for other in WITH_MODEL if other != stage)


def snippet(text: str) -> str:
    """The card's Python."""
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


@pytest.mark.parametrize("stage", WITH_MODEL)
def test_the_snippet_runs(runs, stage):
    code = snippet(card(runs / stage).text).replace("path/or/name", str(runs / stage / "model"))
    code = code.replace("max_new_tokens=64", "max_new_tokens=4")
    space: dict = {}
    exec(code, space)
    if stage != "reward_model":
        return
    own = ScalarModel.from_pretrained(runs / stage / "model")
    tokens = space["inputs"]["input_ids"]
    start = len(space["tokenizer"](space["prompt"], add_special_tokens=False)["input_ids"])
    lengths = torch.tensor([start]), torch.tensor([tokens.shape[1] - start])
    assert space["reward"].item() == pytest.approx(own.rewards(tokens, *lengths).item(), abs=1e-4)


def test_a_pooled_reward_model_says_how_its_reward_is_read(runs, tmp_path):
    out = tmp_path / "reward_model"
    for name in ("sft", "comparisons"):
        (tmp_path / name).symlink_to(runs / name)
    words = ["reward-model", "--steps", "1", "--batch", "4", "--pooling", "mean"]
    assert cli.main([*words, *COMMON, "--out", str(out)]) == 0
    text = card(out).text
    assert "the mean of the token scores" in text
    space = {"prompt_ids": [3, 4, 5], "answer_ids": [6, 7]}
    exec(snippet(text).replace("path/or/name", str(out / "model")), space)
    assert space["reward"].shape == (1,)


def test_a_resumed_run_writes_the_same_card_but_for_its_time(runs, tmp_path, monkeypatch):
    (tmp_path / "pretrain").symlink_to(runs / "pretrain")
    words = [*STAGES["sft"], *COMMON, "--checkpoint-every", "2", "--out", str(tmp_path / "sft")]
    log = Run.log

    def interrupted(self, step, *rest):
        log(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", interrupted)
    assert cli.main(words) == 130
    monkeypatch.setattr(Run, "log", log)
    assert cli.main(words) == 0
    ours, theirs = (
        re.sub(r"Training took \S+ seconds", "", (place / "model" / "README.md").read_text())
        for place in (tmp_path / "sft", runs / "sft")
    )
    assert ours == theirs


# --- models and data of others ----------------------------------------------------------------


def base_model(folder: Path, readme: str | None) -> Path:
    folder.mkdir()
    tiny("llama").save_pretrained(folder)
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def recipe(kind=SFTConfig, stage="sft", **settings) -> Provenance:
    config = kind(**settings)
    return Provenance(stage, resolve(config, stage), "cpu")


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: llama3.2\nbase_model: meta-llama/Llama-3.2-1B\n---\n", "llama3.2"),
        ("---\ntags: [a]\n---\n", "unknown"),
        ("---\nlicense: other\nlicense_name: research\n---\n", "unknown"),
        ("# No head at all\n", "unknown"),
        ("---\nlicense: [broken\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_is_that_of_the_base_and_never_made_up(tmp_path, readme, expected):
    base = base_model(tmp_path / "base", readme)
    made = recipe(model=str(base), data="rows.jsonl")
    licence, why = licence_of(made)
    assert licence == expected
    assert "parent/base" not in why and f"{tmp_path.name}/base" in why
    assert ("look it up" in why) == (expected == "unknown")


def test_new_weights_on_ones_own_data_have_no_licence_yet():
    assert licence_of(recipe(data="rows.jsonl"))[0] == "unknown"
    assert licence_of(recipe(data="rows.jsonl", model="tiny"))[0] == "unknown"


def test_origin_and_licence_go_from_card_to_card(tmp_path, monkeypatch):
    """From a hub model to SFT, to a reward model: base_model stays the one on the hub."""
    hub = base_model(tmp_path / "cache", "---\nlicense: mit\n---\n")
    resolve_ = cards.checkpoints.resolve
    monkeypatch.setattr(
        cards.checkpoints, "resolve",
        lambda name: hub if str(name) == "openai-community/gpt2" else resolve_(name),
    )  # fmt: skip
    rows, timing = [{"step": 0, "loss": 1.0}], [{"step": 0, "seconds": 2.0}]
    first = base_model(tmp_path / "sft", None)
    made = recipe(model="openai-community/gpt2", data="Anthropic/hh-rlhf@train")
    cards.write_card(made, first, rows, timing, {"eval_loss": 2.5})
    found = ModelCard.load(first / "README.md").data
    validate_repo_id(found.base_model)
    assert (found.base_model, found.license) == ("openai-community/gpt2", "mit")
    assert found.datasets == ["Anthropic/hh-rlhf"]
    text = ModelCard.load(first / "README.md").text
    assert LIMITS["gpt2"] in text and "`Anthropic/hh-rlhf@train`" in text

    second = base_model(tmp_path / "rm", None)
    made = recipe(DPOConfig, "dpo", model=str(first), data="pairs.jsonl")
    again = card_of(made, second, rows, timing, {})
    assert (again.data.base_model, again.data.license) == ("openai-community/gpt2", "mit")
    assert again.data.datasets is None and again.data.eval_results is None
    assert "descends from [openai-community/gpt2]" in again.text


def test_names_without_the_folders_around_them(tmp_path):
    assert public_name("openai/gsm8k:main@test") == "openai/gsm8k:main@test"
    assert public_name("openai-community/gpt2") == "openai-community/gpt2"
    assert public_name(tmp_path / "a" / "b" / "model") == "b/model"
    assert public_name("data/train.jsonl") == "data/train.jsonl"
    assert public_name("/train.jsonl") == "train.jsonl"
    assert public_name("http://user:word@10.0.0.1/score") == "a server"
    assert public_name("examples.sql_reward:graded") == "examples.sql_reward:graded"


def test_an_address_of_a_reward_server_is_not_told():
    made = recipe(PPOConfig, "ppo", data="p.jsonl", reward="http://u:secret@10.0.0.1/score")
    assert "secret" not in str(settings_of(made)) and settings_of(made)["reward"] == "a server"


def test_an_adapter_is_loaded_with_peft(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    rows = [{"step": 0, "loss": 1.0}]
    made = recipe(data="rows.jsonl")
    found = card_of(made, tmp_path, rows, [], {})
    assert found.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM" in found.text


def test_where_transformers_reads_another_reward_the_card_says_so(tmp_path):
    model = ScalarModel.from_language_model(tiny("llama"), "last", seed=1)
    model.bias.fill_(0.75)
    model.save_pretrained(tmp_path)
    made = recipe(RewardModelConfig, "reward_model", model=str(tmp_path), data="p.jsonl")
    text = card_of(made, tmp_path, [{"step": 0, "loss": 1.0}], [], {}).text
    assert "`reward_token_bias` of config.json\n(0.75)" in text
    assert "no pad token apart from EOS" in text


def test_every_setting_of_a_stage_can_be_shown():
    for kind, stage in ((SFTConfig, "sft"), (DPOConfig, "dpo"), (PPOConfig, "ppo")):
        made = recipe(kind, stage, data="d.jsonl", out=Path("/somewhere/else"))
        assert "else" not in json.dumps(settings_of(made), default=str)
        assert set(settings_of(made)) <= set(asdict(made.config))


def test_the_models_open_with_plain_transformers_beside_their_cards(runs):
    for stage in WITH_MODEL:
        kind = AutoModelForSequenceClassification if stage == "reward_model" else (
            AutoModelForCausalLM)  # fmt: skip
        kind.from_pretrained(runs / stage / "model")
        AutoTokenizer.from_pretrained(runs / stage / "model")
