"""The README's result tables from finished demos: every seed, the median, and the bar.

for seed in 0 1 2; do rlhf-course demo --seed $seed; done
python benchmarks/collect_results.py runs/town-small-seed{0,1,2}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median


def rows_of(reports: list[dict]) -> list[tuple[str, list[float], str]]:
    """(figure, its value for each seed, the bar) of the demos' bars, then of what has none."""
    rows = []
    for i, bar in enumerate(reports[0]["bars"]):
        sign = "≥" if bar["comparison"] == ">=" else "≤"
        rows.append((bar["name"], [r["bars"][i]["value"] for r in reports], f"{sign} {bar['bar']}"))
    first = reports[0]["policies"]
    for name in first:
        if name == "sft" or not all(name in r["policies"] for r in reports):
            continue
        policies = [r["policies"][name] for r in reports]
        pretrained = [r["pretrained_perplexity"] for r in reports]
        ratio = [p["perplexity"] / base for p, base in zip(policies, pretrained, strict=True)]
        rows.append((f"{name}: gold", [p["gold"] for p in policies], ""))
        rows.append((f"{name}: KL, nats", [p["kl"] for p in policies], ""))
        rows.append((f"{name}: perplexity / pretrained", ratio, ""))
        for group in policies[0]["groups"]:
            wins = [p["groups"][group]["win_rate"] for p in policies]
            rows.append((f"{name}: win rate, {group}", wins, ""))
    pools = reports[0]["reward_models"]
    for pooling in pools:
        ratios = [r["reward_models"][pooling]["ratio_closed_book"] for r in reports]
        rows.append((f"reward model, {pooling}: accuracy / best possible", ratios, ""))
    rows.append(("seconds in all", [sum(r["seconds"].values()) for r in reports], ""))
    rows.append(("memory, GB", [r["memory_gb"] for r in reports], ""))
    return rows


def main() -> None:
    """Print one Markdown table."""
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        sys.exit(__doc__)
    reports = [json.loads((f / "report.json").read_text(encoding="utf-8")) for f in folders]
    seeds = " | ".join(f"seed {r['seed']}" for r in reports)
    print(f"| figure | {seeds} | median | bar |\n|---|{'---:|' * (len(reports) + 1)}---|")
    for name, values, bar in rows_of(reports):
        digits = 0 if max(map(abs, values)) >= 100 else 3
        cells = " | ".join(f"{v:.{digits}f}" for v in (*values, median(values)))
        print(f"| {name} | {cells} | {bar} |")


if __name__ == "__main__":
    main()
