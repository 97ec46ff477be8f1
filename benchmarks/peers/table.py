"""The results as a table for the README."""

from __future__ import annotations

import statistics
import textwrap

DTYPE = {"float32": "fp32", "bfloat16": "bf16"}


def median_ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours / theirs, turn by turn: median, smallest, largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _ratio(one: dict) -> str:
    told = one["ours"]
    return f"**{told['median']:.2f}** ({told['min']:.2f} … {told['max']:.2f})"


def _row(contest: dict, who: str) -> str:
    case, found = contest["case"], contest["found"]
    digits = 0 if found["ours"]["rate"]["median"] > 100 else 1
    ours, theirs = found["ours"], found[who]
    rates = (f"{one['rate']['median']:,.{digits}f}" for one in (ours, theirs))
    memory = ours["peak_bytes"] / theirs["peak_bytes"]
    name = contest["name"].replace(case["dtype"], DTYPE[case["dtype"]])
    return (f"| {name} | {who} | {' | '.join(rates)} | {contest['unit']}/s | {_ratio(theirs)} | "
            f"{memory:.2f} |")  # fmt: skip


def _growth(sweeps: dict) -> list[str]:
    """How cost grows: a line for each sweep."""
    lines = [
        "| ours, one thread | from | to | seconds | slope (log-log) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, sweep in sweeps.items():
        first, last = sweep["points"][0], sweep["points"][-1]
        seconds = " … ".join(f"{p['seconds']['median']:.3g}" for p in (first, last))
        what = f"{name.split(',')[0]}, {sweep['quantity']}"
        slope = _spread(sweep["slopes"] | {"median": sweep["slope"]})
        lines.append(f"| {what} | {first['x']:,} | {last['x']:,} | {seconds} | {slope} |")
    return lines


def _spread(found: dict) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} … {found['max']:.2f})"


def _processes(found: dict) -> list[str]:
    """Threads and processes, in multiples of one process of one thread."""
    ways = list(next(iter(found["sizes"].values()))["ways"])[1:]
    lines = [
        f"| SFT, times as fast as one thread | {' | '.join(ways)} |",
        "|---" + "|---:" * len(ways) + "|",
    ]
    for size, one in found["sizes"].items():
        cells = (_spread(one["ways"][way]["times_alone"]) for way in ways)
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return lines


def markdown(results: dict) -> str:
    """One table: a line for each contest and peer, then the share of the machine's limit."""
    parts = results["parts"]
    lines = [
        "| work | peer | ours | peer's | | ours / peer's | memory, ours / peer's |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for part in ("sft", "accumulation", "reward_model", "rollout", "ppo"):
        for contest in parts.get(part, ()):
            lines += [_row(contest, who) for who in contest["found"] if who != "ours"]
    limits = [c for c in parts.get("sft", ()) if "limit" in c]
    if limits:
        lines += ["", "| SFT | matrix product, GFLOP/s | share, 6 N a token | share, "
                  "operations done |", "|---|---:|---:|---:|"]  # fmt: skip
    for contest in limits:
        case, limit = contest["case"], contest["limit"]
        rate = limit["operations_per_second"]["median"] / 1e9
        lines.append(f"| {case['size']} {DTYPE[case['dtype']]} | {rate:,.0f} | "
                     f"{limit['all logits']:.0%} | {limit['done']:.0%} |")  # fmt: skip
    if "scaling" in parts:
        lines += ["", *_growth(parts["scaling"]["growth"]), "",
                  *_processes(parts["scaling"]["processes"])]  # fmt: skip
    if "demo" in parts:
        demo = parts["demo"]
        met = sum(bar["met"] for bar in demo["bars"])
        lines += ["", f"`make demo`: {demo['seconds'] / 60:.1f} minutes, {met} of "
                  f"{len(demo['bars'])} bars met, {demo['memory_gb']:.2f} GB."]  # fmt: skip
    machine = results["machine"]
    stack = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    where = f"{machine['cores']} cores of {machine['processor']}; {stack}"
    turns = f"medians of {results['repeats']} turns, in brackets the smallest and largest ratio"
    lines += ["", textwrap.fill(f"{where}; {turns}.", 130)]
    return "\n".join(lines)
