"""The sections of the report: each takes the workspace and returns HTML, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Callable

from rlhf_course.plots import (
    CAPTIONS,
    honesty,
    kl_control,
    overoptimisation,
    perplexity_bars,
    reward_accuracy,
    stage_curves,
)
from rlhf_course.plots.style import VERDICTS
from rlhf_course.report.page import (
    Html,
    element,
    join,
    number,
    paragraph,
    percent,
    picture,
    table,
    verdict,
)
from rlhf_course.report.workspace import GROUPS, POOLINGS, Workspace, in_order, label, stage_of

# ---------------------------------------------------------------------------------- what came out


def results(w: Workspace) -> Html:
    """The bars, and what this run reached."""
    bars = w.evaluation.get("bars", [])
    if not bars:
        return Html("")
    met = sum(bool(bar["met"]) for bar in bars)
    rows = [
        (
            bar["name"],
            number(bar["value"]),
            f"{'≥' if bar['comparison'] == '>=' else '≤'} {number(bar['bar'])}",
            element(
                "span", "met" if bar["met"] else "missed", class_="yes" if bar["met"] else "no"
            ),
        )
        for bar in bars
    ]
    return join([
        paragraph(f"{met} of {len(bars)} bars met. Policies are measured by their answers to the "
                  "evaluation prompts, sampled at temperature 1."),
        table(("what", "value", "bar", ""), rows, "bars"),
    ])  # fmt: skip


def dialogues(w: Workspace) -> Html:
    """Prompts with the answers of every policy side by side."""
    samples = w.evaluation.get("samples", [])
    parts: list[Html] = []
    for group in dict.fromkeys(sample.get("group", "") for sample in samples):
        parts.append(element("h3", GROUPS.get(group, group).capitalize()))
        parts += [_dialogue(sample) for sample in samples if sample.get("group", "") == group]
    if not parts:
        return Html("")
    intro = "The same questions before and after PPO. Gold is the world's own utility; the models "
    return join([paragraph(intro, "learned from noisy rankings by it."), *parts])


def _dialogue(sample: dict) -> Html:
    answers = [
        element(
            "div",
            element("div", label(name), class_="who"),
            element("div", answer.get("text") or "(nothing)", class_="said"),
            verdict(answer.get("verdict")),
            element("span", f"gold {number(answer.get('gold'))}", class_="worth"),
            class_="answer",
        )
        for name, answer in in_order(sample.get("answers", {})).items()
    ]
    prompt = element("div", sample.get("prompt", ""), class_="prompt")
    return element("div", prompt, element("div", *answers, class_="answers"), class_="dialogue")


def kinds_of_answer(w: Workspace) -> Html:
    """Shares of true, false, "I do not know" and malformed answers by group."""
    shares = {
        label(name): {GROUPS.get(g, g): table for g, table in p["shares"].items()}
        for name, p in w.policies.items()
        if p.get("shares")
    }
    if not shares:
        return Html("")
    groups = list(dict.fromkeys(group for tables in shares.values() for group in tables))
    logged = {kind for t in shares.values() for group in t.values() for kind in group}
    kinds = [kind for kind in VERDICTS if kind in logged] + sorted(logged - set(VERDICTS))
    rows = [
        (
            f"{group}: {name}" if len(groups) > 1 else name,
            *(percent(tables[group].get(kind, 0.0)) for kind in kinds),
        )
        for group in groups
        for name, tables in shares.items()
        if group in tables
    ]
    caption = CAPTIONS["honesty" if "strangers" in groups else "quality"]
    headings = (
        "asked about: policy" if len(groups) > 1 else "policy",
        *(VERDICTS.get(kind, (kind,))[0] for kind in kinds),
    )
    return join([picture(honesty(shares), caption), table(headings, rows)])


FIGURES = (
    ("gold", "gold"), ("proxy", "proxy"), ("kl", "KL to SFT, nats"), ("perplexity", "perplexity"),
    ("length", "tokens an answer"), ("eos_rate", "ended"), ("distinct_2", "distinct 2-grams"),
    ("answer_entropy_bits", "entropy of answers, bits"),
    ("phrasing_entropy_bits", "entropy of phrasings, bits"),
)  # fmt: skip


def policies(w: Workspace) -> Html:
    """All figures of every policy, and its win rate against SFT by group."""
    if not w.policies:
        return Html("")
    columns = [(k, name) for k, name in FIGURES if any(k in p for p in w.policies.values())]
    rows = [
        (label(name), *(number(p.get(key)) for key, _ in columns)) for name, p in w.policies.items()
    ]
    wins = [
        (
            f"{label(name)}: {GROUPS.get(group, group)}",
            percent(entry["win_rate"]),
            f"{percent(entry.get('win_low'))} to {percent(entry.get('win_high'))}",
            number(entry.get("gold")),
            number(entry.get("prompts")),
        )
        for name, p in w.policies.items()
        for group, entry in p.get("groups", {}).items()
        if entry.get("win_rate") is not None
    ]
    parts = [table(("policy", *(name for _, name in columns)), rows)]
    demonstrations = w.evaluation.get("demonstrations_gold")
    if demonstrations is not None:
        parts.append(paragraph(f"The demonstrations' own gold is {number(demonstrations)}."))
    if wins:
        parts.append(element("h3", "Wins against SFT by gold utility, ties half"))
        parts.append(
            table(("policy: prompts", "win rate", "95 % interval", "gold", "prompts"), wins)
        )
    return join(parts)


# ------------------------------------------------------------------------------ how it came about


def curves(w: Workspace) -> Html:
    """What every stage logged; alternatives and ablations folded away."""
    parts = []
    for name, rows in w.runs.items():
        stage = next(
            (s for s in ("pretrain", "sft", "reward_model", "ppo") if name.startswith(s)), None
        )
        if stage is None or not rows:
            continue
        figure = stage_curves(stage, rows, w.kl_target(name))
        least = 820 if stage == "ppo" else 640
        if name == stage:
            parts += [element("h3", label(name)), picture(figure, CAPTIONS[stage], least)]
        else:
            summary = element("summary", f"Curves: {label(name)}")
            parts.append(element("details", summary, picture(figure, CAPTIONS[stage], least)))
    return join(parts)


def reward_models(w: Workspace) -> Html:
    """Accuracy beside the best possible, poolings compared, calibration."""
    models = w.evaluation.get("reward_models", {})
    if not models:
        return Html("")
    columns = (
        ("eval_accuracy", "accuracy", percent), ("bayes_closed_book", "best, closed book", percent),
        ("ratio_closed_book", "ratio", number), ("bayes_full", "best, knowing all", percent),
        ("ratio_full", "ratio", number), ("eval_calibration_error", "calibration error", number),
        ("eval_margin", "margin", number),
    )  # fmt: skip
    columns = [c for c in columns if any(c[0] in model for model in models.values())]
    rows = [
        (POOLINGS.get(pooling, pooling), *(show(model.get(key)) for key, _, show in columns))
        for pooling, model in models.items()
    ]
    intro = "The reward is read at the last token (EOS), or pooled over the answer's tokens. "
    named = {POOLINGS.get(pooling, pooling): model for pooling, model in models.items()}
    return join([
        paragraph(intro, "Ratios are to the best possible accuracy on these noisy labels."),
        picture(reward_accuracy(named), CAPTIONS["reward_accuracy"]),
        table(("reward read", *(name for _, name, _ in columns)), rows),
    ])  # fmt: skip


def kl_and_overoptimisation(w: Workspace) -> Html:
    """The controller at work, and gold against proxy over √KL."""
    runs = {name: rows for name, rows in w.runs.items() if name.startswith("ppo") and rows}
    target = w.kl_target("ppo")
    parts = []
    if "ppo" in runs and target:
        parts.append(picture(kl_control(runs["ppo"], target), CAPTIONS["kl_control"]))
    best = w.evaluation.get("best_of_n") or None
    compared = {label(n): rows for n, rows in runs.items() if any("gold" in row for row in rows)}
    if compared:
        parts.append(picture(overoptimisation(compared, best), CAPTIONS["overoptimisation"]))
    if best:
        parts.append(element("h3", "Best of n answers of the SFT model, chosen by the proxy"))
        rows = zip(*(best[key] for key in ("n", "kl", "gold", "proxy")), strict=True)
        shown = [tuple(map(number, row)) for row in rows]
        parts.append(table(("n", "KL, nats", "gold", "proxy"), shown))
    return join(parts)


def ptx(w: Workspace) -> Html:
    """What the pretraining term keeps."""
    perplexities = {n: p["perplexity"] for n, p in w.policies.items() if "perplexity" in p}
    if not perplexities:
        return Html("")
    pretrained = w.evaluation.get("pretrained_perplexity")
    parts = []
    if pretrained and {"ppo", "ppo_no_ptx"} <= perplexities.keys():
        kept, lost = (perplexities[name] / pretrained for name in ("ppo", "ppo_no_ptx"))
        parts.append(paragraph(
            f"With the pretraining term the corpus perplexity is ×{number(kept)} that of the "
            f"pretrained model, without it ×{number(lost)}."
        ))  # fmt: skip
    bars = {"pretrained": pretrained} if pretrained else {}
    bars |= {label(name): value for name, value in perplexities.items()}
    return join([*parts, picture(perplexity_bars(bars, pretrained), CAPTIONS["perplexity"])])


# --------------------------------------------------------------------------------- how to repeat it


def commands(w: Workspace) -> Html:
    """The exact commands, and the settings they resolved to; of variants what differs."""
    lines = w.evaluation.get("commands", [])
    parts = [element("pre", "\n".join(lines))] if lines else []
    for name, config in w.configs.items():
        stage = stage_of(name)
        base = w.configs.get(stage, {}) if name != stage else {}
        shown = {k: v for k, v in config.items() if k not in base or base[k] != v}
        heading = f"{label(name)}, where it differs from {label(stage)}" if base else label(name)
        entries = [
            element("div", element("dt", key), element("dd", _plain(value)))
            for key, value in sorted(shown.items())
        ]
        parts += [element("h3", heading), element("dl", *entries)]
    return join(parts)


def _plain(value: object) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def environment(w: Workspace) -> Html:
    """Seconds a stage, memory, device, versions."""
    e, parts = w.evaluation, []
    if e.get("seconds"):
        rows = [(label(name), f"{value:.1f}") for name, value in in_order(e["seconds"]).items()]
        rows.append(("all", f"{math.fsum(e['seconds'].values()):.1f}"))
        parts.append(table(("stage", "seconds"), rows))
    about = [("device", e.get("device")), ("peak memory, GB", e.get("memory_gb"))]
    about += list(e.get("versions", {}).items())
    about = [(name, number(value)) for name, value in about if value is not None]
    if about:
        parts.append(table(("", ""), about))
    return join(parts)


SECTIONS: tuple[tuple[str, str, Callable[[Workspace], Html]], ...] = (
    ("results", "Results", results),
    ("dialogues", "Before and after", dialogues),
    ("answers", "Kinds of answer", kinds_of_answer),
    ("policies", "Every policy", policies),
    ("reward-model", "Reward model", reward_models),
    ("kl", "KL and over-optimisation", kl_and_overoptimisation),
    ("ptx", "With and without ptx", ptx),
    ("curves", "Curves of every stage", curves),
    ("commands", "Commands and settings", commands),
    ("environment", "Time, machine, versions", environment),
)
