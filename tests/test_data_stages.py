"""A data set of one's own through all stages from the command line, each finding the one before."""

import gzip
import json
from pathlib import Path

import pytest

from rlhf_course import cli
from rlhf_course.runs import read_metrics
from rlhf_course.stages import presets
from rlhf_course.stages.settings import PPOConfig, RewardModelConfig, SFTConfig

QUICK = ["--size", "tiny", "--threads", "1"]
SFT = ["--steps", "2", "--batch", "4", "--vocab-size", "300"]
PPO = ["--iterations", "1", "--batch", "4", "--minibatch", "4", "--critic-warmup", "0",
       "--max-new-tokens", "8"]  # fmt: skip


def hh_rows() -> list[dict]:
    """40 rows in hh-rlhf's schema: some long, some that cannot be used."""
    rows = []
    for i in range(40):
        start = f"\n\nHuman: Is {i} odd?\n\nAssistant: Let me see.\n\nHuman: And now?\n\nAssistant:"
        if i == 7:
            start = "\n\nHuman: " + "so it goes " * 400 + start
        rows.append({"chosen": f"{start} It is {i % 2}.", "rejected": f"{start} Who can say."})
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["chosen"] = rows[5]["chosen"].replace(" It is 1.", " ")
    rows[9]["rejected"] = rows[9]["rejected"].replace("Is 9 odd?", "Is 9 even?")
    rows[11] = rows[10]
    return rows


def sql_rows() -> list[dict]:
    return [
        {"question": f"How many are older than {n}?", "context": f"CREATE TABLE t{n} (age INTEGER)",
         "answer": f"SELECT COUNT(*) FROM t{n} WHERE age > {n}"}
        for n in range(40)
    ]  # fmt: skip


def run(*arguments) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def report(stage: str, name: str) -> dict:
    return json.loads(
        (Path("runs") / f"{name}-tiny-seed0" / stage / "data.json").read_text("utf-8")
    )


@pytest.fixture(scope="module")
def hh(tmp_path_factory):
    """A folder in which sft, reward-model and ppo have learned from hh.jsonl.gz."""
    folder = tmp_path_factory.mktemp("hh")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with gzip.open("hh.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in hh_rows())
        run("sft", "--data", "hh.jsonl.gz", *QUICK, *SFT)
        run("reward-model", "--data", "hh.jsonl.gz", *QUICK, "--steps", "2", "--batch", "4")
        run("ppo", "--data", "hh.jsonl.gz", *QUICK, *PPO)
        run("dpo", "--data", "hh.jsonl.gz", *QUICK, "--steps", "2", "--batch", "4",
            "--eval-prompts", "4", "--max-new-tokens", "4")  # fmt: skip
    return folder


def test_each_stage_finds_the_one_before_and_reports_its_data(hh, monkeypatch):
    monkeypatch.chdir(hh)
    done = {stage: report(stage, "hh") for stage in ("sft", "reward_model", "ppo", "dpo")}
    assert {stage: (d["recipe"], d["read"]) for stage, d in done.items()} == dict.fromkeys(
        done, ("hh-rlhf", 40)
    )
    assert done["sft"]["used"] == 38  # the empty answer, and the long one
    assert done["reward_model"]["used"] == done["dpo"]["used"] == 36
    assert {name: c["count"] for name, c in done["reward_model"]["dropped"].items()} == {
        "identical answers": 1, "empty text": 1, "different prompts": 1,
        f"longer than the context of {done['sft']['context']} tokens": 1}  # fmt: skip
    assert done["reward_model"]["dropped"]["identical answers"]["first"] == ["hh.jsonl.gz, line 4"]
    assert done["reward_model"]["duplicates"] == {"count": 1, "first": ["hh.jsonl.gz, line 12"]}
    for d in done.values():
        assert d["read"] == d["used"] + sum(c["count"] for c in d["dropped"].values())
        assert d["policies"]["too_long"] == "drop"
        assert d["context"] == done["sft"]["context"]
    assert len(read_metrics(hh / "runs/hh-tiny-seed0/ppo")) == 1


def test_a_second_call_finds_the_run_complete(hh, monkeypatch, capsys):
    monkeypatch.chdir(hh)
    run("sft", "--data", "hh.jsonl.gz", *QUICK, *SFT)
    assert "complete already" in capsys.readouterr().out


def test_text_to_sql_through_all_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sql.json").write_text(json.dumps(sql_rows()), encoding="utf-8")
    run("sft", "--data", "sql.json", *QUICK, *SFT)
    run("ppo", "--data", "sql.json", "--reward", "examples.sql_reward:graded", *QUICK, *PPO)
    run("reward-model", "--data", "sql.json", *QUICK, "--steps", "2", "--batch", "4")
    assert report("sft", "sql")["recipe"] == report("ppo", "sql")["recipe"] == "sql-create-context"
    assert report("reward_model", "sql")["used"] == 40
    assert "another row's query" in " ".join(report("reward_model", "sql")["notes"])


def test_dialogues_longer_than_the_context_are_cut_when_asked(hh, monkeypatch):
    monkeypatch.chdir(hh)
    model = "runs/hh-tiny-seed0/sft/model"
    run("sft", "--data", "hh.jsonl.gz", "--model", model, *QUICK, *SFT, "--too-long", "cut",
        "--out", "runs/cut/sft")  # fmt: skip
    found = json.loads(Path("runs/cut/sft/data.json").read_text("utf-8"))
    assert found["changed"] == {"oldest turns of the prompt left out": {
        "count": 1, "first": ["hh.jsonl.gz, line 8"], "told": ""}}  # fmt: skip
    assert found["used"] == 39


def test_text_is_read_by_the_same_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"body": f"Number {i} is a number like any other. " * 9} for i in range(60)]
    rows[4]["body"] = " "
    Path("text.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run("pretrain", "--data", "text.jsonl", "--columns", "text=body", "--bad-rows", "drop", *QUICK,
        "--steps", "2", "--batch", "2", "--vocab-size", "300", "--window", "32")  # fmt: skip
    found = report("pretrain", "text")
    assert (found["read"], found["used"], found["held_out"]) == (60, 59, 6)
    assert found["dropped"]["empty text"]["first"] == ["text.jsonl, line 5"]


def test_runs_from_before_these_flags_are_still_the_same_runs():
    """What a run is known by: the new flags show only where they are used."""
    told = presets.identity(presets.resolve(SFTConfig(), "sft"))
    assert (told["truncate"], told["context"]) == (False, 256)
    new = {"columns", "recipe", "bad_rows", "too_long", "duplicates", "rows", "rejected"}
    for config, stage in ((SFTConfig(), "sft"), (PPOConfig(), "ppo"),
                          (RewardModelConfig(), "reward_model")):  # fmt: skip
        assert not new & set(presets.identity(presets.resolve(config, stage)))
    used = presets.identity(presets.resolve(SFTConfig(data="x.jsonl", rows=5), "sft"))
    assert used["rows"] == 5
    assert "truncate" not in presets.identity(presets.resolve(PPOConfig(), "ppo"))
