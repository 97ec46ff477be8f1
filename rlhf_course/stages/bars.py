"""The bars that the main job is held to, one list a world."""

from __future__ import annotations


def bars_of(world: str, evaluation: dict) -> list[dict]:
    """Each bar with the value that this run reached: name, value, bar, comparison, met."""
    policies = evaluation["policies"]
    sft, ppo = policies["sft"], policies["ppo"]
    forgetting = ppo["perplexity"] / evaluation["pretrained_perplexity"]
    off_target = abs(evaluation["kl_mean_last_20"] / evaluation["kl_target"] - 1)
    main = next(iter(evaluation["reward_models"].values()))  # the one that PPO used
    accuracy = main["ratio_closed_book"]
    rows: list[tuple[str, float, str, float]] = []
    if world == "town":
        known, strangers = (ppo["shares"][g] for g in ("known", "strangers"))
        before_known, before_strangers = (sft["shares"][g] for g in ("known", "strangers"))
        rows += [
            ("SFT: known people, true", before_known.get("true", 0.0), ">=", 0.80),
            ("SFT: strangers, made up", made_up(before_strangers), ">=", 0.60),
            ("reward model: accuracy / best possible", accuracy, ">=", 0.90),
            ("PPO-ptx: known people, true", known.get("true", 0.0), ">=", 0.90),
            ("PPO-ptx: strangers, do not know", strangers.get("idk", 0.0), ">=", 0.80),
            *(
                (f"win rate against SFT, {g}", ppo["groups"][g]["win_rate"], ">=", 0.75)
                for g in ("known", "strangers")
            ),
        ]
    else:
        gain = ppo["gold"] - evaluation["demonstrations_gold"]
        rows += [
            ("PPO-ptx: gold above the demonstrations", gain, ">=", 0.5),
            *(
                (f"win rate against SFT, {g}", entry["win_rate"], ">=", 0.85)
                for g, entry in ppo["groups"].items()
            ),
        ]
    rows += [
        ("KL off its target, last 20 iterations", off_target, "<=", 0.15),
        ("corpus perplexity / pretrained", forgetting, "<=", 1.05),
    ]
    return [
        {"name": name, "value": value, "bar": bar, "comparison": sign,
         "met": value >= bar if sign == ">=" else value <= bar}
        for name, value, sign, bar in rows
    ]  # fmt: skip


def made_up(shares: dict[str, float]) -> float:
    """An answer about a stranger is made up whether it happens to be true or not."""
    return shares.get("true", 0.0) + shares.get("false", 0.0)
