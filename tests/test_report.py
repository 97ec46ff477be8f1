"""The report: one page that stands on its own, whatever of a workspace is there."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from made_up_runs import RUNS, SHARES, ppo_rows
from rich.console import Console

from rlhf_course import plots
from rlhf_course.errors import CheckpointError, ConfigError
from rlhf_course.report import build_report, page, sections, summary_table
from rlhf_course.report.workspace import Workspace, label

HOSTILE = '<script>alert("x")</script> & <b>bold</b> it\'s'


def policy(shares: dict, perplexity: float, **more) -> dict:
    groups = {
        g: {"gold": 0.4, "prompts": 60, "win_rate": 0.8, "win_low": 0.71, "win_high": 0.87}
        for g in shares
    }
    return {"gold": 0.52, "shares": shares, "perplexity": perplexity, "proxy": 0.6, "length": 7.9,
            "eos_rate": 0.998, "distinct_2": 0.31, "answer_entropy_bits": 5.4, "groups": groups,
            **more}  # fmt: skip


def evaluation() -> dict:
    said = {"sft": {"text": HOSTILE, "gold": -1.0, "verdict": "false"},
            "ppo": {"text": "Sorry, I do not know.", "gold": 0.0, "verdict": "idk"}}  # fmt: skip
    return {
        "world": "town", "size": "tiny", "seed": 3, "device": "cpu, float32, 1 thread",
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "commands": ["rlhf-course pretrain --seed 3", "rlhf-course ppo --ptx-coef 0 > log"],
        "seconds": {"pretrain": 80.25, "sft": 10.5, "ppo": 120.0}, "memory_gb": 1.42,
        "pretrained_perplexity": 2.0, "demonstrations_gold": 0.77,
        "policies": {"sft": policy(SHARES["before"], 2.02),
                     "ppo": policy(SHARES["after"], 2.04, kl=1.53),
                     "ppo_no_ptx": policy(SHARES["after"], 21.4, kl=1.61)},
        "reward_models": {"last": {"eval_accuracy": 0.731, "bayes_closed_book": 0.8,
                                   "ratio_closed_book": 0.914, "bayes_full": 0.84},
                          "mean": {"eval_accuracy": 0.702}},
        "kl_target": 1.5, "kl_mean_last_20": 1.53,
        "best_of_n": {"n": [1, 2], "kl": [0.0, 0.193], "gold": [0.1, 0.33], "proxy": [0.0, 0.41]},
        "bars": [{"name": "strangers, do not know", "value": 0.8765, "bar": 0.8,
                  "comparison": ">=", "met": True},
                 {"name": "KL off its target", "value": 0.21, "bar": 0.15,
                  "comparison": "<=", "met": False}],
        "samples": [{"group": "strangers", "prompt": "Where does <Ann> live?", "answers": said}],
    }  # fmt: skip


CONFIGS = {
    "pretrain": {"steps": 60, "lr": 0.003}, "sft": {"steps": 60}, "comparisons": {"answers": 5},
    "reward_model": {"pooling": "last"},
    "ppo": {"kl_coef": 0.3, "kl_controller": "adaptive", "kl_target": 1.5, "ptx_coef": 0.1},
}  # fmt: skip
CONFIGS["ppo_no_ptx"] = CONFIGS["ppo"] | {"ptx_coef": 0.0}


def make_workspace(folder: Path, content: dict | None, runs=CONFIGS) -> Path:
    """Run folders and evaluation.json as the demo leaves them."""
    folder.mkdir()
    for name in runs:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIGS[name]))
        rows = ppo_rows(ptx=False) if name == "ppo_no_ptx" else RUNS.get(name, [{"step": 0}])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "metrics.jsonl").write_text(text)
    if content is not None:
        (folder / "evaluation.json").write_text(json.dumps(content, sort_keys=True))
    return folder


class Page(HTMLParser):
    """A page's elements, attributes and text; fails on elements that are not closed in order."""

    VOID = ("meta", "img")

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.cells, self.titles = [], []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_report(make_workspace(tmp_path_factory.mktemp("run") / "town", evaluation()))


@pytest.fixture(scope="module")
def source(built):
    return built.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read(source):
    return Page(source)


def test_the_page_is_one_file_that_loads_nothing(built, source, read):
    assert built.name == "report.html"
    assert [file.name for file in built.parent.iterdir() if file.is_file()].count(
        "report.html"
    ) == 1
    assert not [file for file in built.parent.iterdir() if ".part" in file.name]
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(read.tags)
    assert "http://" not in source
    assert "https://" not in source
    assert "url(" not in source
    assert "@import" not in source
    assert all(value.startswith("#") for value in read.values("href"))
    assert len(read.values("src")) == 10
    for value in read.values("src"):
        kind, data = value.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        picture = ElementTree.fromstring(base64.b64decode(data))
        assert picture.tag.endswith("svg")
        links = [v for node in picture.iter() for k, v in node.attrib.items() if k.endswith("href")]
        assert links
        assert all(link.startswith("#") for link in links)
    assert all(len(text) > 40 for text in read.values("alt"))


def test_every_section_is_there_and_linked(read):
    anchors = [anchor for anchor, _, _ in sections.SECTIONS]
    assert [
        value for tag, key, value in read.attributes if (tag, key) == ("section", "id")
    ] == anchors
    assert read.values("href") == [f"#{anchor}" for anchor in anchors]
    assert read.titles == [title for _, title, _ in sections.SECTIONS]
    for stage in ("Pretraining", "SFT", "Reward model", "PPO-ptx"):
        assert stage in read.text
    assert "Curves: PPO without ptx" in read.text
    for caption in ("pretrain", "sft", "reward_model", "ppo", "kl_control", "overoptimisation",
                    "honesty", "perplexity", "reward_accuracy"):  # fmt: skip
        assert plots.CAPTIONS[caption] in read.text


def test_text_is_escaped(source, read):
    assert "<script" not in source
    assert "<b>" not in source
    assert HOSTILE in read.text  # as text, to the letter
    assert "Where does <Ann> live?" in read.text
    assert "rlhf-course pretrain --seed 3\nrlhf-course ppo --ptx-coef 0 > log" in read.text
    assert page.element("p", "<", page.Html("<br>"), id='"') == '<p id="&quot;">&lt;<br></p>'


def test_the_figures_of_the_evaluation_are_in_the_tables(read):
    cells, text = read.cells, " ".join(read.text)
    row = cells.index("strangers, do not know")
    assert cells[row : row + 4] == ["strangers, do not know", "0.876", "≥ 0.8", "met"]
    row = cells.index("KL off its target")
    assert cells[row : row + 4] == ["KL off its target", "0.21", "≤ 0.15", "missed"]
    assert "1 of 2 bars met." in text
    row = cells.index("strangers: SFT")
    assert cells[row + 1 : row + 5] == ["10.0 %", "15.0 %", "70.0 %", "5.0 %"]
    row = cells.index("at the EOS")
    assert cells[row + 1 : row + 4] == ["73.1 %", "80.0 %", "0.914"]
    row = cells.index("mean over tokens")
    assert cells[row + 1 : row + 4] == ["70.2 %", "–", "–"]
    row = cells.index("PPO-ptx: strangers")
    assert cells[row + 1 : row + 5] == ["80.0 %", "71.0 % to 87.0 %", "0.4", "60"]
    assert "×1.02 that of the pretrained model, without it ×10.7" in text
    assert cells[cells.index("all") + 1] == "210.8"
    assert cells[cells.index("torch") + 1] == "2.13.0"
    assert read.text.index(HOSTILE) < read.text.index("Sorry, I do not know.")  # SFT first
    assert [c for c in cells if c in ("SFT", "PPO-ptx", "PPO without ptx")] == [
        "SFT", "PPO-ptx", "PPO without ptx",  # every policy
        "SFT", "PPO-ptx",  # seconds
    ]  # fmt: skip
    assert "gold −1" in read.text
    assert "size tiny · seed 3 · cpu, float32, 1 thread · 3.5 minutes" in read.text


def test_settings_are_listed_and_those_of_an_ablation_as_differences(source):
    settings = source[source.index('id="commands"') :]
    block = re.search(r"where it differs from PPO-ptx</h3><dl>(.*?)</dl>", settings).group(1)
    assert block == "<div><dt>ptx_coef</dt><dd>0</dd></div>"
    assert "<div><dt>lr</dt><dd>0.003</dd></div>" in settings


def test_the_same_figure_gives_the_same_bytes_and_no_setting_changes():
    before = dict(matplotlib.rcParams)
    first, second = (
        page.picture(plots.kl_control(RUNS["ppo"], 1.5), "A caption.") for _ in range(2)
    )
    assert first == second
    assert dict(matplotlib.rcParams) == before


def without_pictures(monkeypatch):
    """Rendering takes most of the time, and what is missing shows before it."""
    for name in ("stage_curves", "kl_control", "overoptimisation"):
        monkeypatch.setattr(sections, name, lambda *_: None)
    monkeypatch.setattr(sections, "picture", lambda *_: page.Html("<figure></figure>"))


def test_any_key_of_the_evaluation_may_be_missing(monkeypatch, tmp_path):
    without_pictures(monkeypatch)
    folder = make_workspace(tmp_path / "w", None, runs=["ppo"])
    whole = evaluation()
    cases = [{k: v for k, v in whole.items() if k != gone} for gone in whole]
    for gone in whole["policies"]["ppo"]:
        fewer = {k: v for k, v in whole["policies"]["ppo"].items() if k != gone}
        cases.append(whole | {"policies": whole["policies"] | {"ppo": fewer}})
    bare = {"sft": {}, "ppo": {"groups": {"known": {}}}}
    cases += [{}, {"policies": bare}, whole | {"samples": [{}], "reward_models": {"last": {}}}]
    for case in cases:
        (folder / "evaluation.json").write_text(json.dumps(case))
        Page(build_report(folder).read_text(encoding="utf-8"))
        Console(file=io.StringIO()).print(summary_table(case))


def test_any_run_may_be_missing(monkeypatch, tmp_path):
    without_pictures(monkeypatch)
    for gone in CONFIGS:
        folder = make_workspace(tmp_path / gone, evaluation(), [n for n in CONFIGS if n != gone])
        read = Page(build_report(folder).read_text(encoding="utf-8"))
        assert "Results" in read.text
    only_runs = Page(build_report(make_workspace(tmp_path / "runs", None)).read_text("utf-8"))
    assert "Curves of every stage" in only_runs.text
    assert "Results" not in only_runs.text
    only_figures = build_report(make_workspace(tmp_path / "figures", evaluation(), []))
    assert "Results" in Page(only_figures.read_text("utf-8")).text


def test_a_folder_with_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to report"):
        build_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named_and_the_old_report_stays(monkeypatch, tmp_path):
    without_pictures(monkeypatch)
    folder = make_workspace(tmp_path / "w", evaluation(), ["sft"])
    before = build_report(folder).read_bytes()
    (folder / "sft" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "lo')
    with pytest.raises(CheckpointError, match=r"sft.metrics\.jsonl"):
        build_report(folder)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        build_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_reviews_have_kinds_of_answer_but_no_honesty(monkeypatch, tmp_path):
    without_pictures(monkeypatch)
    shares = {"reviews": {"apt": 0.5, "vague": 0.25, "flawed": 0.2, "malformed": 0.05}}
    content = {"world": "reviews", "policies": {"sft": policy(shares, 2.3)}}
    folder = make_workspace(tmp_path / "w", content, [])
    found = Workspace.read(folder)
    cells = Page(sections.kinds_of_answer(found)).cells
    assert cells == ["policy", "apt", "vague", "flawed", "malformed",
                     "SFT", "50.0 %", "25.0 %", "20.0 %", "5.0 %"]  # fmt: skip


def test_numbers():
    assert page.number(0.12345) == "0.123"
    assert page.number(-1.5) == "−1.5"
    assert page.number(1e-17) == "0"
    assert page.number(576) == "576"
    assert page.number(None) == page.number(math.nan) == page.number(math.inf) == "–"
    assert page.percent(0.125) == "12.5 %"
    assert page.percent(None) == page.percent(math.nan) == "–"


def test_names():
    assert label("ppo") == "PPO-ptx"
    assert label("ppo_no_ptx") == "PPO without ptx"
    assert label("ppo_no_kl_no_ptx") == "PPO without KL and ptx"
    assert label("ppo_sequence") == "PPO, sequence"
    assert label("reward_model_mean") == "Reward model, mean"
    assert label("my_policy") == "my policy"


def test_runs_stand_in_the_order_of_the_pipeline(tmp_path):
    found = Workspace.read(make_workspace(tmp_path / "w", None, reversed(CONFIGS)))
    assert list(found.runs) == [
        "pretrain",
        "sft",
        "comparisons",
        "reward_model",
        "ppo",
        "ppo_no_ptx",
    ]
    assert found.kl_target("ppo") == 1.5
    found.configs["ppo"]["kl_coef"] = 0.0
    assert found.kl_target("ppo") is None


def test_the_terminal_gets_a_table():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(evaluation()))
    lines = console.export_text().splitlines()
    assert lines[0].strip() == "town, tiny, seed 3"
    (met,) = [line for line in lines if "strangers, do not know" in line]
    assert [cell.strip() for cell in met.split("│")[1:-1]] == [
        "strangers, do not know", "0.876", ">= 0.8", "met",
    ]  # fmt: skip
    (missed,) = [line for line in lines if "KL off its target" in line]
    assert "0.21" in missed
    assert "missed" in missed
    (minutes,) = [line for line in lines if "minutes" in line]
    assert "3.5" in minutes
