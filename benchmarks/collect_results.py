"""The README's result tables from finished demos: every seed, the median, and the bar.

for seed in 0 1 2; do rlhf-course demo --seed $seed; done
python benchmarks/collect_results.py runs/town-small-seed{0,1,2}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median


def bars_of(reports: list[dict]) -> list[tuple[str, list[float], str]]:
    """(figure, its value for each seed, the bar)."""
    rows = []
    for i, bar in enumerate(reports[0]["bars"]):
        sign = "≥" if bar["comparison"] == ">=" else "≤"
        rows.append((bar["name"], [r["bars"][i]["value"] for r in reports], f"{sign} {bar['bar']}"))
    return rows


def rest_of(reports: list[dict]) -> list[tuple[str, list[float], str]]:
    """What has no bar: every policy, reward models, time and memory."""
    rows = []
    for name in reports[0]["policies"]:
        if not all(name in r["policies"] for r in reports):
            continue
        policies = [r["policies"][name] for r in reports]
        bases = [r["pretrained_perplexity"] for r in reports]
        forgotten = [p["perplexity"] / base for p, base in zip(policies, bases, strict=True)]
        rows.append((f"`{name}`: gold", [p["gold"] for p in policies], ""))
        rows.append((f"`{name}`: perplexity / pretrained", forgotten, ""))
        if "kl" in policies[0]:
            rows.append((f"`{name}`: KL to SFT, nats", [p["kl"] for p in policies], ""))
            for group in policies[0]["groups"]:
                wins = [p["groups"][group]["win_rate"] for p in policies]
                rows.append((f"`{name}`: win rate, {group}", wins, ""))
        for group, shares in policies[0]["shares"].items():
            kind = {"known": "true", "strangers": "idk"}.get(group)
            if kind in shares:
                values = [p["shares"][group][kind] for p in policies]
                rows.append((f"`{name}`: {group}, {kind}", values, ""))
    for pooling in reports[0]["reward_models"]:
        if all(pooling in r["reward_models"] for r in reports):
            ratios = [r["reward_models"][pooling]["ratio_closed_book"] for r in reports]
            rows.append((f"reward model, {pooling}: accuracy / best possible", ratios, ""))
    return rows


def main() -> None:
    """Print one Markdown table."""
    if len(sys.argv) < 3 or sys.argv[1] not in ("bars", "rest"):
        sys.exit(__doc__)
    folders = [Path(name) for name in sys.argv[2:]]
    reports = [json.loads((f / "report.json").read_text(encoding="utf-8")) for f in folders]
    seeds = " | ".join(f"seed {r['seed']}" for r in reports)
    print(f"| figure | {seeds} | median | bar |\n|---|{'---:|' * (len(reports) + 1)}---|")
    for name, values, bar in (bars_of if sys.argv[1] == "bars" else rest_of)(reports):
        digits = 0 if max(map(abs, values)) >= 100 else 3
        cells = " | ".join(f"{v:.{digits}f}" for v in (*values, median(values)))
        print(f"| {name} | {cells} | {bar} |")


if __name__ == "__main__":
    main()
