"""Chat: two checkpoints side by side, in a terminal and over a pipe."""

import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rlhf_course.errors import ConfigError, ModelError
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.sft import answer_loss, encode_dialogue
from rlhf_course.stages import chat as module
from rlhf_course.stages.chat import HELP, Chat, ChatConfig, chat, names_of
from rlhf_course.world import make_world
from rlhf_course.world.town import DO_NOT_KNOW


@pytest.fixture(scope="module")
def world():
    return make_world("town", "tiny", 0)


@pytest.fixture(scope="module")
def known(world):
    """A question about a known person, and the true answer."""
    demonstration = next(
        d
        for d in world.demonstrations()
        if d.prompt.group == "known" and world.verdict(d.prompt, d.response, True) == "true"
    )
    return demonstration.prompt.text, demonstration.response


@pytest.fixture(scope="module")
def stranger(world):
    return world.evaluation_prompts()["strangers"][0].text


@pytest.fixture(scope="module")
def config(world, known, stranger, tmp_path_factory):
    """Two GPTs of one layer: the first has learned two answers by heart, the second nothing."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), world.tokenizer
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=len(tokenizer), context=48, layers=1, heads=1, width=32)
    learned, fresh = GPT(shape), GPT(shape)
    rows = [encode_dialogue(tokenizer, *pair) for pair in (known, (stranger, DO_NOT_KNOW))]
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    labels = torch.full_like(tokens, -100)
    for i, (row, start) in enumerate(rows):
        labels[i, start : len(row)] = tokens[i, start : len(row)]
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-2)
    for _ in range(80):
        loss = answer_loss(learned, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    learned.save_pretrained(folder / "learned" / "model", tokenizer)
    fresh.save_pretrained(folder / "fresh" / "model", tokenizer)
    return ChatConfig(
        model=str(folder / "learned" / "model"),
        against=str(folder / "fresh" / "model"),
        size="tiny",
        temperature=0.0,
        max_new_tokens=12,
        device="cpu",
        dtype="float32",
        threads=1,
    )


def say(monkeypatch, capsys, config: ChatConfig, *lines: str) -> list[str]:
    """What chat prints when these lines come through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat(config)
    return capsys.readouterr().out.splitlines()


def test_over_a_real_pipe(config, world, known, stranger):
    question, answer = known
    gold = world.utility(Chat(config).questions[question], answer, True)
    code = (
        "import sys; from rlhf_course.stages.chat import ChatConfig, chat\n"
        f"chat({config!r})\nprint('ended')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=f"{question}\n\n  {stranger}  \n/quit\n{question}\n",
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"> {question}"
    assert lines[1] == f"learned: {answer}  [true, gold {gold:+.2f}]"
    assert lines[2].startswith("fresh: ")
    assert "bad, gold -1.50" in lines[2]
    assert lines[3:5] == [f"> {stranger}", f"learned: {DO_NOT_KNOW}  [idk, gold +0.00]"]
    assert lines[6:] == ["ended"]  # nothing behind /quit is asked


def test_the_labeler_judges_questions_of_the_world_alone(config, world, known):
    talk = Chat(config)
    question, answer = known
    said = talk.ask(question)[0]
    prompt = talk.questions[question]
    assert (said.text, said.finished) == (answer, True)
    assert said.verdict == "true"
    assert said.gold == world.utility(prompt, answer, True)
    other = talk.ask("How do you do?")[0]
    assert other.verdict is None
    assert other.gold is None
    assert other.judgement in ("", "never ended")


def test_an_answer_cut_off_is_judged_so(config, world, known):
    tokens, start = encode_dialogue(world.tokenizer, *known)
    all_but_eos = len(tokens) - start - 1
    said = Chat(replace(config, max_new_tokens=all_but_eos)).ask(known[0])[0]
    assert said.text == known[1]  # word for word, and yet
    assert (said.finished, said.verdict, said.gold) == (False, "bad", -1.5)
    assert said.judgement == "bad, gold -1.50, never ended"


def test_temperature_zero_always_says_the_same(monkeypatch, capsys, config, known):
    lines = say(monkeypatch, capsys, config, known[0], "/again")
    assert lines[:3] == lines[3:]


def test_again_draws_anew_and_a_session_repeats_itself(monkeypatch, capsys, config, known):
    wild = replace(config, temperature=1.0)
    first = say(monkeypatch, capsys, wild, known[0], "/again", "/again")
    fresh = [line for line in first if line.startswith("fresh: ")]
    assert [line for line in first if line.startswith(">")] == [f"> {known[0]}"] * 3
    assert len(fresh) == len(set(fresh)) == 3
    assert say(monkeypatch, capsys, wild, known[0], "/again", "/again") == first
    other = say(monkeypatch, capsys, replace(wild, seed=1), "How do you do?")
    assert other != say(monkeypatch, capsys, wild, "How do you do?")


def test_commands(monkeypatch, capsys, config, known):
    lines = say(
        monkeypatch, capsys, config, "/again", "/temperature 1.5", "/temperature x",
        "/temperature -1", "/temperature nan", "/sing", "/help",
    )  # fmt: skip
    assert lines[:2] == ["nothing was asked yet", "temperature 1.5"]
    assert all("give a number, 0 or more" in line for line in lines[2:5])
    assert lines[5] == "/sing: unknown; /help lists the commands"
    assert lines[6:] == HELP.splitlines()
    wild = say(monkeypatch, capsys, replace(config, temperature=1.0), known[0])
    assert say(monkeypatch, capsys, config, "/temperature 1", known[0])[1:] == wild


def test_a_question_too_long_is_said_and_the_talk_goes_on(monkeypatch, capsys, config, known):
    lines = say(monkeypatch, capsys, config, "live " * 60, known[0])
    assert "learned reads 48 with its answer. Ask a shorter one." in lines[0]
    assert lines[1] == f"> {known[0]}"


def test_what_is_typed_is_no_markup(monkeypatch, capsys, config):
    assert say(monkeypatch, capsys, config, "[bold]you[/bold] [x")[0] == "> [bold]you[/bold] [x"


class Terminal(io.StringIO):
    """A stdin that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_in_a_terminal_panels_stand_side_by_side(monkeypatch, capsys, config, known, stranger):
    monkeypatch.setattr("sys.stdin", Terminal(f"{known[0]}\n"))
    monkeypatch.setattr(module.console, "_width", 100)
    chat(config)
    printed = capsys.readouterr().out
    assert stranger in printed  # an example to begin with
    lines = printed.splitlines()
    top = next(line for line in lines if "learned ─" in line)
    assert "fresh ─" in top
    assert any(known[1] in line and line.count("│") == 4 for line in lines)
    assert any("true, gold" in line and "bad, gold -1.50" in line for line in lines)
    assert lines[-1] == "Goodbye."


def test_control_c_ends_politely(monkeypatch, capsys, config):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", interrupted)
    chat(config)
    assert capsys.readouterr().out.splitlines()[-1] == "Goodbye."


def test_bad_settings_say_what_to_do(config, tmp_path):
    with pytest.raises(ConfigError, match="--temperature -1"):
        Chat(replace(config, temperature=-1.0))
    with pytest.raises(ConfigError, match="--max-new-tokens 0"):
        Chat(replace(config, max_new_tokens=0))
    with pytest.raises(ModelError, match="rlhf-course ppo"):
        Chat(ChatConfig(size="tiny", runs=tmp_path))


def test_names_are_short_and_differ():
    assert names_of("runs/a/ppo/model", "runs/a/sft/model") == ("ppo", "sft")
    assert names_of("gpt2", "org/other") == ("gpt2", "other")
    assert names_of("a/ppo/model", "b/ppo/model") == ("ppo (1)", "ppo (2)")
