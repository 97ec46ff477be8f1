"""Figures of chapter 9: phases, bytes, bundles, slots of a batch, lanes of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from rlhf_course.plots.style import (
    BAD,
    COLOURS,
    INK,
    LIGHT,
    RUNS,
    TEXT,
    Rows,
    dress,
    from_zero,
    legend,
    level,
    percent,
    series,
    smooth,
)

PHASES = {
    "generation": COLOURS["gold"], "scoring": COLOURS["reward"], "update": COLOURS["policy"],
    "sync": COLOURS["proxy"], "moving": COLOURS["reference"],
}  # fmt: skip
"""A phase's colour, the same in all figures of the chapter."""
ROLES = {
    "actor": COLOURS["policy"], "critic": COLOURS["critic"], "reference": COLOURS["reference"],
    "reward": COLOURS["reward"], "rollout": COLOURS["gold"],
}  # fmt: skip
PARTS = {
    "parameters": COLOURS["reference"], "gradients": COLOURS["critic"],
    "optimizer": COLOURS["policy"],
}  # fmt: skip
LIGHT_FILLS = (COLOURS["gold"], COLOURS["critic"])  # black is read better on these

# ---------------------------------------------------------------------------- why generation counts


def phases_over_length(
    title: str, measured: Mapping[int, Mapping[str, float]], operations: float
) -> Figure:
    """Seconds of each phase, stacked, and generation's share of them, over the length of answers.

    measured: tokens of an answer -> phase -> seconds; operations: generation's share of those.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    dress(left, title, "tokens of an answer", "seconds")
    dress(right, "Generation's share", "tokens of an answer", "share of the time")
    at, below = range(len(measured)), np.zeros(len(measured))
    for name in dict.fromkeys(name for phases in measured.values() for name in phases):
        seconds = np.array([phases[name] for phases in measured.values()], dtype=float)
        left.bar(at, seconds, 0.7, below, color=PHASES[name], label=name)
        below += seconds
    left.grid(visible=False, axis="x")
    legend(left, loc="upper left")
    share = [phases["generation"] / sum(phases.values()) for phases in measured.values()]
    right.plot(at, share, "o-", color=PHASES["generation"])
    level(right, operations, "its share of the operations", "--")
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(percent)
    for ax in (left, right):
        ax.set_xticks(at, [str(length) for length in measured])
    return figure


# ------------------------------------------------------------------------------------------- memory


def zero_partitions(
    measured: Mapping[int, Mapping[str, float]], formula: Mapping[int, Mapping[str, float]]
) -> Figure:
    """Bytes of one rank by ZeRO stage: the formula's beside those that are held; stage -> part ->
    bytes. A stage that was not measured has the formula alone."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.subplots()
    dress(ax, "What one rank holds", "ZeRO stage", "MB")
    for at, (stage, expected) in enumerate(formula.items()):
        both = [(at - 0.19, expected, 0.45)]
        if stage in measured:
            both.append((at + 0.19, measured[stage], 1.0))
        for x, parts, strength in both:
            below = 0.0
            for name, colour in PARTS.items():
                ax.bar(x, parts[name] / 1e6, 0.36, below, color=colour, alpha=strength)
                below += parts[name] / 1e6
            ax.text(x, below, f"{below:.1f}", ha="center", va="bottom", fontsize=TEXT)
    ax.set_xticks(range(len(formula)), [str(stage) for stage in formula])
    ax.grid(visible=False, axis="x")
    shown = [Patch(color=colour, label=name) for name, colour in PARTS.items()]
    shown += [Patch(color=INK, alpha=0.45, label="left: formula"),
              Patch(color=INK, label="right: measured")]  # fmt: skip
    legend(ax, handles=shown, loc="upper right")
    return figure


def memory_per_gpu(
    panels: Mapping[str, Mapping[str, Sequence[float]]], gpus: Sequence[int], limit: float
) -> Figure:
    """GB that a GPU holds against the number of GPUs, a panel a model, a line a stage.

    panels: model -> stage -> GB for each number of GPUs; limit: GB of a GPU.
    """
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (model, stages) in zip(axes, panels.items(), strict=True):
        dress(ax, model, "GPUs", "GB on each GPU" if ax is axes[0] else "")
        for (stage, held), look in zip(stages.items(), RUNS, strict=False):
            ax.plot(gpus, held, look[2], color=look[0], linestyle=look[1], label=stage,
                    markersize=4)  # fmt: skip
        ax.axhline(limit, color=INK, linewidth=1)
        ax.annotate(f"{limit:g} GB", (gpus[0], limit), xytext=(0, 3), fontsize=TEXT,
                    textcoords="offset points")  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(gpus, [str(n) for n in gpus])
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    legend(axes[-1])
    return figure


# ---------------------------------------------------------------------------------------- placement


def bundles(layouts: Mapping[str, Sequence[Mapping]]) -> Figure:
    """The bundles of placement groups, a row a layout: nodes, and who has how much of each GPU.

    layouts: title -> what `placement.place` returns.
    """
    figure = Figure(figsize=(10, 0.4 + 1.35 * len(layouts)), layout="constrained")
    axes = figure.subplots(len(layouts), 1, squeeze=False)[:, 0]
    most = max(map(len, layouts.values()))
    for ax, (title, held) in zip(axes, layouts.items(), strict=True):
        dress(ax, title, "bundle (one GPU)", "share")
        for x, bundle in enumerate(held):
            share = bundle["share"]
            for y, (role, rank) in enumerate(bundle["ranks"].items()):
                colour = ROLES[role]
                ax.add_patch(Rectangle((x + 0.04, y * share), 0.92, share * 0.94, color=colour))
                ink = "black" if colour in LIGHT_FILLS else "white"
                ax.text(x + 0.5, (y + 0.47) * share, f"{role} {rank}", ha="center", va="center",
                        fontsize=TEXT - 1, color=ink)  # fmt: skip
            if x and bundle["node"] != held[x - 1]["node"]:
                ax.axvline(x, color=INK, linewidth=1.5, linestyle="--")
        ax.set_xlim(0, most)
        ax.set_ylim(0, 1)
        ax.set_xticks(np.arange(len(held)) + 0.5, [str(x) for x in range(len(held))])
        ax.yaxis.set_major_formatter(percent)
        ax.grid(visible=False)
    return figure


# ----------------------------------------------------------------------------------------- batching


def schedule(lengths: Sequence[int], slots: int, static: bool) -> list[tuple[int, int, int]]:
    """(slot, first step, steps) of each answer. static: in batches of `slots`, the next one when
    the longest answer of the last has ended; else an answer begins as soon as a slot is free."""
    if static:
        starts = np.cumsum([0] + [max(lengths[i : i + slots])
                                  for i in range(0, len(lengths), slots)])  # fmt: skip
        return [(i % slots, int(starts[i // slots]), n) for i, n in enumerate(lengths)]
    free, out = [0] * slots, []
    for n in lengths:
        slot = free.index(min(free))
        out.append((slot, free[slot], n))
        free[slot] += n
    return out


def slots(lengths: Sequence[int], count: int) -> Figure:
    """Static and continuous batching of the same answers: a bar an answer, a row a slot."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, sharex=True)
    for ax, static in zip(axes, (True, False), strict=True):
        placed = schedule(lengths, count, static)
        end = max(start + n for _, start, n in placed)
        busy = sum(lengths) / (end * count)
        dress(ax, f"{'Static' if static else 'Continuous'}: {end} steps, {busy:.0%} of them used",
              "decoding step", "slot of the batch" if static else "")  # fmt: skip
        ax.add_patch(Rectangle((0, -0.5), end, count, color=LIGHT, zorder=0))
        for slot, start, n in placed:
            ax.barh(slot, n, 0.86, start, color=PHASES["generation"], edgecolor="white",
                    linewidth=0.8)  # fmt: skip
        ax.grid(visible=False)
    axes[0].invert_yaxis()
    return figure


def ratios(gaps: Mapping[str, Sequence[float]], clip: float = 0.2) -> Figure:
    """How far PPO's ratio is from 1 before anything was trained, token by token, beside its clip
    range. gaps: precision -> trainer's less engine's log-prob of every token."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Trainer and engine about the same token", "share of the tokens, largest gap right",
          "|log-ratio|, nats")  # fmt: skip
    for (name, values), look in zip(gaps.items(), RUNS, strict=False):
        ordered = np.sort(np.abs(np.asarray(values, dtype=float)))
        ax.plot(np.arange(1, len(ordered) + 1) / len(ordered), np.maximum(ordered, 1e-9),
                color=look[0], linestyle=look[1], linewidth=1.8, label=name)  # fmt: skip
    ax.axhline(np.log(1 + clip), color=INK, linewidth=1)
    ax.annotate(f"clip range, log {1 + clip:g}", (0, np.log(1 + clip)), xytext=(2, 3),
                textcoords="offset points", fontsize=TEXT)  # fmt: skip
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(percent)
    legend(ax, loc="lower right")
    return figure


# ----------------------------------------------------------------------------------------- the loop


def lanes(
    runs: Mapping[str, tuple[Sequence[Mapping[str, float]], int]], steps: range = range(8, 12)
) -> Figure:
    """What engines and trainer did when, in these steps; a panel a run.

    runs: title -> (rows of its timing.jsonl, staleness). The rows hold lengths; a rollout that runs
    ahead is begun with the iteration `staleness` before its own, one behind the other.
    """
    figure = Figure(figsize=(10, 0.6 + 1.35 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    longest = 0.0
    for ax, (title, (rows, staleness)) in zip(axes, runs.items(), strict=True):
        dress(ax, title, "seconds", "")
        began, bars = _bars(rows, staleness)
        zero, end = began[steps[0]], began[min(steps[-1] + 1, len(rows))]
        longest = max(longest, end - zero)
        for lane, step, phase, start, seconds in bars:
            if start + seconds > zero and start < end:
                ax.barh(lane, seconds, 0.6, start - zero, color=PHASES[phase], edgecolor="white")
                _number(ax, step, lane, start - zero + seconds / 2, phase)
        ax.set_yticks([0, 1], ["engines", "trainer"])
        ax.set_ylim(1.5, -0.5)
        ax.grid(visible=False, axis="y")
    axes[0].set_xlim(0, longest)
    used = ("generation", "scoring", "update", "sync")
    legend(axes[0], handles=[Patch(color=PHASES[p], label=p) for p in used], loc="upper right",
           ncols=4, bbox_to_anchor=(1, 1.35))  # fmt: skip
    return figure


def _bars(
    rows: Sequence[Mapping[str, float]], staleness: int
) -> tuple[np.ndarray, list[tuple[int, int, str, float, float]]]:
    """(when each iteration began, and the end; bars of lane, step, phase, start, seconds)."""
    lengths = [sum(row[f"{name}_seconds"] for name in ("rollout", "scoring", "update", "sync"))
               for row in rows]  # fmt: skip
    began, bars, free = np.cumsum([0.0, *lengths]), [], 0.0
    for step, row in enumerate(rows):
        start = max(free, began[max(step - staleness, 0)])
        free = start + row["engine_seconds"]
        bars.append((0, step, "generation", start, row["engine_seconds"]))
        now = began[step] + row["rollout_seconds"]
        for name in ("scoring", "update", "sync"):
            bars.append((1, step, name, now, row[f"{name}_seconds"]))
            now += row[f"{name}_seconds"]
    return began, bars


def _number(ax: Axes, step: int, lane: int, x: float, phase: str) -> None:
    """The step's number on its rollout and on its update."""
    if phase in ("generation", "update"):
        ink = "black" if PHASES[phase] in LIGHT_FILLS else "white"
        ax.text(x, lane, str(step), ha="center", va="center", fontsize=TEXT, color=ink,
                clip_on=True)  # fmt: skip


def learning(runs: Mapping[str, Rows], batch: int) -> Figure:
    """Gold over episodes, age of the answers, and how far the engine's policy was from the
    trainer's; a line a run. A run without engines has the first alone."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = (
        ("gold", "Gold", "utility an answer"), ("staleness", "Age of the answers", "updates"),
        ("rollout_kl", "KL of engine and trainer", "nats a token"),
    )  # fmt: skip
    for ax, (key, title, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        dress(ax, title, "episodes", unit)
        for (name, rows), look in zip(runs.items(), (*RUNS[:2], RUNS[-1]), strict=False):
            steps, values = series(rows, key)
            episodes = (steps + 1) * batch
            if key == "gold":
                ax.plot(episodes, values, color=look[0], linewidth=0.6, alpha=0.4)
                values = smooth(values, 5)
            ax.plot(episodes, values, color=look[0], linestyle=look[1], linewidth=1.8, label=name)
        if key == "staleness":
            from_zero(ax)
    legend(figure.axes[0], loc="lower right")
    return figure


def engine_times(seconds: Mapping[str, Sequence[float]], tokens: int) -> Figure:
    """Useful tokens a second of each way of batching, a dot a repetition."""
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(seconds)), layout="constrained")
    ax = figure.subplots()
    dress(ax, "The same answers, written by one engine", "useful tokens a second", "")
    for y, (name, times) in enumerate(seconds.items()):
        rates = tokens / np.asarray(times, dtype=float)
        colour = BAD if name.startswith("static") else PHASES["generation"]
        ax.barh(y, rates.mean(), 0.6, color=colour, alpha=0.4)
        ax.plot(rates, [y] * len(rates), "o", color=colour, markersize=5)
    ax.set_yticks(range(len(seconds)), list(seconds))
    ax.grid(visible=False, axis="y")
    return figure
