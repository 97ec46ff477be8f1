"""Wrong answers to chapter 4's exercises, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits or body)."""
    made = []
    for name, says, change in rows:
        kind = "body" if isinstance(change, str) else "edits"
        made.append(Mutant(exercise, name, says=says, **{kind: change}))
    return made


MUTANTS = [
    *mutants(
        "mdp.action_mask",
        (
            "one late",
            "You mark the tokens of the answer, not the actions that emitted them. Token t was "
            "emitted one position before it.",
            [("prompt_lengths[:, None] - 1", "prompt_lengths[:, None]")],
        ),
        (
            "EOS dropped",
            "The action that emits the answer's last token is missing. That is the EOS: the model "
            "would never learn when to stop.",
            [("first + response_lengths[:, None]", "first + response_lengths[:, None] - 1")],
        ),
        (
            "one too many",
            "One action too many: the last token of the answer emits nothing any more that belongs "
            "to it.",
            [("(actions < first +", "(actions <= first +")],
        ),
        (
            "first dropped",
            "The first action is missing: it stands at the prompt's last token, and emits the "
            "answer's first.",
            [("actions >= first", "actions > first")],
        ),
        (
            "prompt counted",
            "You count the prompt's tokens as actions. Nobody chose them, so there is nothing to "
            "learn from them.",
            [("(actions >= first) & (", "(")],
        ),
        (
            "pads counted",
            "The mask goes on behind the answer's end: the pads are marked too.",
            [(" & (actions < first + response_lengths[:, None])", "")],
        ),
        (
            "first row for all",
            "All rows get the mask of the first one; every row has lengths of its own.",
            "actions = torch.arange(length - 1).expand(len(prompt_lengths), -1)\n"
            "first = prompt_lengths[0] - 1\n"
            "return (actions >= first) & (actions < first + response_lengths[0])",
        ),
        (
            "a column for every token",
            "The mask has a column for every token. There is one action fewer: the last position "
            "emits nothing.",
            [("torch.arange(length - 1,", "torch.arange(length,")],
        ),
        (
            "numbers",
            "The mask must be bool, not numbers: it is used to select, not to multiply.",
            [
                ("response_lengths[:, None])  # (B, T-1)", "response_lengths[:, None])).float()"),
                ("return (actions", "return ((actions"),
            ],
        ),
    ),
    *mutants(
        "mdp.token_logprobs",
        (
            "no shift",
            "You ask each position for the probability of its own token, which it has already "
            "seen. Position a predicts token a + 1.",
            [("tokens[:, 1:, None]", "tokens[:, :-1, None]")],
        ),
        (
            "logits shifted",
            "You drop the first position's logits, but that one predicts the second token. It is "
            "the last that predicts nothing here.",
            [("logits[:, :-1]", "logits[:, 1:]")],
        ),
        (
            "no temperature",
            "The temperature is ignored. These would be the log-probabilities of another "
            "distribution than the one that was sampled from.",
            [("_tempered(logits[:, :-1], temperature)", "_tempered(logits[:, :-1], 1.0)")],
        ),
        (
            "multiplied by the temperature",
            "You multiply by the temperature. It divides the logits: a high one makes all tokens "
            "more alike.",
            [
                (
                    "_tempered(logits[:, :-1], temperature)",
                    "_tempered(logits[:, :-1], 1 / temperature)",
                )
            ],
        ),
        (
            "temperature behind the softmax",
            "You divide the log-probabilities by the temperature, so they no longer sum to 1. "
            "Divide the logits, then normalise.",
            [
                (
                    "_tempered(logits[:, :-1], temperature).log_softmax(dim=-1)",
                    "_tempered(logits[:, :-1], 1.0).log_softmax(dim=-1) / temperature",
                )
            ],
        ),
        (
            "in place",
            "You divide the logits in place: whoever passed them in finds them changed, and "
            "autograd what it had saved.",
            [("_tempered(logits[:, :-1], temperature)", "logits[:, :-1].div_(temperature)")],
        ),
        (
            "half precision",
            "You normalise in the dtype of the logits. In half precision a log-probability has two "
            "or three digits: convert to float32 first.",
            [("_tempered(logits[:, :-1], temperature)", "(logits[:, :-1] / temperature)")],
        ),
        (
            "log of softmax",
            "softmax and then log: a small probability is rounded to 0, and its logarithm is "
            "infinite. Take both in one step.",
            [(".log_softmax(dim=-1)", ".softmax(dim=-1).log()")],
        ),
        (
            "probabilities",
            "You return probabilities; wanted are their logarithms, in nats.",
            [(".log_softmax(dim=-1)", ".softmax(dim=-1)")],
        ),
        (
            "softmax over positions",
            "You normalise over the positions. The probabilities of all tokens of the vocabulary "
            "must sum to 1: that is the last dimension.",
            [(".log_softmax(dim=-1)", ".log_softmax(dim=1)")],
        ),
        (
            "detached",
            "The values are right, but no gradient reaches the logits: the policy cannot learn.",
            [("[..., 0]  #", "[..., 0].detach()  #")],
        ),
        (
            "logits",
            "You return the logits of the tokens. They are log-probabilities only once they are "
            "normalised.",
            [(".log_softmax(dim=-1)", "")],
        ),
        (
            "sign",
            "You return minus the log-probability, as for a loss.",
            [("return logp", "return -logp")],
        ),
    ),
    *mutants(
        "mdp.kl_estimate",
        (
            "sign",
            "You subtract the policy from the reference: d has the wrong sign, and with it k1 "
            "and k3.",
            [("logprobs - ref_logprobs", "ref_logprobs - logprobs")],
        ),
        (
            "k3 on the wrong side",
            "Your k3 has exp(d) in it. The tokens come from the policy, so the ratio whose mean is "
            "1 is ref / policy, exp(-d).",
            [("torch.expm1(-d) + d", "torch.expm1(d) - d")],
        ),
        (
            "k3 minus d",
            "Your k3 subtracts d. Added, it makes the mean right: that of exp(-d) - 1 is 0.",
            [("torch.expm1(-d) + d", "torch.expm1(-d) - d")],
        ),
        (
            "k3 without -1",
            "Your k3 is not 0 where the two policies agree: the - 1 is missing.",
            [("torch.expm1(-d) + d", "torch.exp(-d) + d")],
        ),
        (
            "k2 without the half",
            "Your k2 is twice too large.",
            [("d.square() / 2", "d.square()")],
        ),
        (
            "k2 is |d|",
            "Your k2 is the size of d, not half of its square.",
            [("d.square() / 2", "d.abs()")],
        ),
        (
            "k1 is |d|",
            "Your k1 is never negative. It may be, for a single token: without the minus signs its "
            "mean is too large.",
            [("        return d\n", "        return d.abs()\n")],
        ),
        (
            "k2 and k3 swapped",
            "You have swapped k2 and k3.",
            'd = logprobs - ref_logprobs\nif kind == "k1":\n    return d\nif kind == "k3":\n'
            '    return d.square() / 2\nif kind == "k2":\n    return torch.expm1(-d) + d',
        ),
        (
            "always k1",
            "You return k1 whatever `kind` says.",
            "return logprobs - ref_logprobs",
        ),
        (
            "reference detached",
            "The values are right, but no gradient reaches the second argument. What is held "
            "constant is the caller's business.",
            [("logprobs - ref_logprobs", "logprobs - ref_logprobs.detach()")],
        ),
        (
            "detached",
            "The values are right, but no gradient passes: as a loss this teaches nothing.",
            [("logprobs - ref_logprobs", "(logprobs - ref_logprobs).detach()")],
        ),
        (
            "mean",
            "You average. What is wanted is one number for each action; the shape stays.",
            [("logprobs - ref_logprobs", "(logprobs - ref_logprobs).mean()")],
        ),
        (
            "else k3",
            "Whatever is not k1 or k2 is taken for k3, so a misspelt kind goes unnoticed. The last "
            "line, which refuses it, must be reached.",
            [('if kind == "k3":', "if True:")],
        ),
    ),
    *mutants(
        "mdp.token_rewards",
        (
            "one late",
            "The score stands one action too late. The last action is the one that emitted EOS; "
            "what follows is a pad and is never trained.",
            "if score_clip is not None:\n"
            "    scores = scores.clamp(-score_clip, score_clip)\n"
            "rewards = torch.where(mask, -kl_coef * kl, 0.0)\n"
            "last = (last_action(mask) + 1).clamp(max=mask.shape[1] - 1)\n"
            "return rewards.scatter_add(1, last[:, None], scores[:, None])",
        ),
        (
            "in the last column",
            "The score stands in the last column of the batch. In a padded row that is a pad: the "
            "place is each row's own last action.",
            "if score_clip is not None:\n"
            "    scores = scores.clamp(-score_clip, score_clip)\n"
            "last_action(mask)\n"
            "rewards = torch.where(mask, -kl_coef * kl, 0.0)\n"
            "rewards[:, -1] += scores\n"
            "return rewards",
        ),
        (
            "on every action",
            "The score is paid on every action, so a long answer earns it many times.",
            "if score_clip is not None:\n"
            "    scores = scores.clamp(-score_clip, score_clip)\n"
            "last_action(mask)\n"
            "return torch.where(mask, scores[:, None] - kl_coef * kl, 0.0)",
        ),
        (
            "spread",
            "You spread the score over the answer. It was given for the whole, at its end.",
            "if score_clip is not None:\n"
            "    scores = scores.clamp(-score_clip, score_clip)\n"
            "last_action(mask)\n"
            "share = scores / mask.sum(1)\n"
            "return torch.where(mask, share[:, None] - kl_coef * kl, 0.0)",
        ),
        (
            "sign of the KL",
            "You pay for the KL: with a plus sign the policy is rewarded for running away from the "
            "reference.",
            [("-kl_coef * kl", "kl_coef * kl")],
        ),
        (
            "last action pays nothing",
            "The score replaces the last action's KL instead of being added to it.",
            [("penalty.scatter_add(", "penalty.scatter(")],
        ),
        (
            "clipped afterwards",
            "You clip the sum of score and KL. The score alone is clipped; clipping the KL would "
            "make it free beyond the bound.",
            "rewards = torch.where(mask, -kl_coef * kl, 0.0)\n"
            "rewards = rewards.scatter_add(1, last_action(mask)[:, None], scores[:, None])\n"
            "if score_clip is not None:\n"
            "    rewards = rewards.clamp(-score_clip, score_clip)\n"
            "return rewards",
        ),
        (
            "clipped from above only",
            "The score is clipped from above only; a very bad one must be held too.",
            [("clamp(-score_clip, score_clip)", "clamp(max=score_clip)")],
        ),
        (
            "never clipped",
            "`score_clip` is ignored.",
            [("scores.clamp(-score_clip, score_clip)", "scores")],
        ),
        (
            "product with the mask",
            "You multiply by the mask. A NaN or an infinity on a pad times 0 is NaN: select "
            "instead.",
            [("torch.where(mask, -kl_coef * kl, 0.0)", "-kl_coef * kl * mask")],
        ),
        (
            "mask forgotten",
            "Prompt and pads pay for their KL too; rewards must be 0 outside the answer.",
            [("torch.where(mask, -kl_coef * kl, 0.0)", "-kl_coef * kl")],
        ),
        (
            "last place counted from the first",
            "You find the last action by counting from the first one. In a dialogue the mask has "
            "gaps, and the count ends too early.",
            [
                ("last_action(mask)[:, None]", "(mask.int().argmax(1) + mask.sum(1) - 1)[:, None]"),
                ("penalty = ", "last_action(mask)\n    penalty = "),
            ],
        ),
        (
            "whole KL at the end",
            "You charge the whole answer's KL at its last action. Each action pays for its own, so "
            "that the tokens that cost it can be told.",
            "if score_clip is not None:\n"
            "    scores = scores.clamp(-score_clip, score_clip)\n"
            "total = scores - kl_coef * torch.where(mask, kl, 0.0).sum(1)\n"
            "return torch.zeros_like(kl).scatter(1, last_action(mask)[:, None], total[:, None])",
        ),
        (
            "empty answers accepted",
            "An answer without any action is accepted. Its score would be paid at a place that was "
            "never an action.",
            [
                (
                    "last_action(mask)[:, None]",
                    "(mask * torch.arange(mask.shape[1])).amax(1)[:, None]",
                )
            ],
        ),
    ),
    *mutants(
        "mdp.gae",
        (
            "forwards",
            "You add up the past. An action is to be judged by what came after it: go through the "
            "actions backwards.",
            [("reversed(range(mask.shape[1]))", "range(mask.shape[1])")],
        ),
        (
            "bootstrapped from a pad",
            "Behind the last action you go on with the value that stands on the pad. There the "
            "answer has ended, and nothing is to come.",
            "advantages = torch.zeros_like(values)\n"
            "next_value = next_advantage = torch.zeros_like(values[:, 0])\n"
            "for t in reversed(range(mask.shape[1])):\n"
            "    delta = rewards[:, t] + gamma * next_value - values[:, t]\n"
            "    next_value = values[:, t]\n"
            "    advantage = delta + gamma * lam * next_advantage\n"
            "    next_advantage = torch.where(mask[:, t], advantage, next_advantage)\n"
            "    advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)\n"
            "return advantages, torch.where(mask, advantages + values, 0.0)",
        ),
        (
            "gaps zeroed",
            "You set values and rewards outside the mask to 0 and go on as if those were actions. "
            "In a dialogue the next action is the one behind the gap.",
            "rewards = torch.where(mask, rewards, 0.0)\n"
            "values = torch.where(mask, values, 0.0)\n"
            "advantages = torch.zeros_like(values)\n"
            "next_value = next_advantage = torch.zeros_like(values[:, 0])\n"
            "for t in reversed(range(mask.shape[1])):\n"
            "    delta = rewards[:, t] + gamma * next_value - values[:, t]\n"
            "    next_advantage = delta + gamma * lam * next_advantage\n"
            "    next_value = values[:, t]\n"
            "    advantages[:, t] = next_advantage\n"
            "returns = torch.where(mask, advantages + values, 0.0)\n"
            "return torch.where(mask, advantages, 0.0), returns",
        ),
        (
            "lambda missing",
            "λ is missing: you discount by γ alone, as if λ were 1.",
            [("gamma * lam * next_advantage", "gamma * next_advantage")],
        ),
        (
            "gamma missing in the sum",
            "In A_t = δ_t + γ λ A_{t+1} the γ is missing.",
            [("gamma * lam * next_advantage", "lam * next_advantage")],
        ),
        (
            "gamma missing in delta",
            "The next value is not discounted: δ_t = r_t + γ V_{t+1} - V_t.",
            [("rewards[:, t] + gamma * next_value", "rewards[:, t] + next_value")],
        ),
        (
            "TD error only",
            "You return δ, the error of one step; the rest of the sum, λ's part, is missing.",
            [(" + gamma * lam * next_advantage", "")],
        ),
        (
            "sign of the value",
            "You add V_t. The advantage is what comes beyond the value that was expected.",
            [("gamma * next_value - values[:, t]", "gamma * next_value + values[:, t]")],
        ),
        (
            "no next value",
            "The next state's value is missing from δ: each step looks like the answer's last.",
            [(" + gamma * next_value", "")],
        ),
        (
            "returns are advantages",
            "The returns are the advantages again. R = A + V: the critic is to learn the value, "
            "not its own error.",
            [("torch.where(mask, advantages + values, 0.0)", "advantages.clone()")],
        ),
        (
            "Monte-Carlo returns",
            "Your returns are the discounted rewards to come. With λ < 1 they are A + V, a mixture "
            "of those and of the critic's own values.",
            [
                (
                    "    return advantages, torch.where(mask, advantages + values, 0.0)",
                    "    total = torch.zeros_like(values[:, 0])\n"
                    "    returns = torch.zeros_like(values)\n"
                    "    for t in reversed(range(mask.shape[1])):\n"
                    "        now = rewards[:, t] + gamma * total\n"
                    "        total = torch.where(mask[:, t], now, total)\n"
                    "        returns[:, t] = torch.where(mask[:, t], now, 0.0)\n"
                    "    return advantages, returns",
                )
            ],
        ),
        (
            "own value as next value",
            "At the end of the answer you take its last value for the next one, as if it went on. "
            "Behind the last action nothing is to come, for truncated answers too.",
            [
                (
                    "    for t in",
                    "    last = (mask * torch.arange(mask.shape[1])).amax(1)\n"
                    "    next_value = values.gather(1, last[:, None])[:, 0]\n"
                    "    for t in",
                )
            ],
        ),
        (
            "next value updated too early",
            "The next value is replaced before δ is computed, so V_t is compared with itself.",
            "next_value = next_advantage = torch.zeros_like(values[:, 0])\n"
            "advantages = torch.zeros_like(values)\n"
            "for t in reversed(range(mask.shape[1])):\n"
            "    next_value = torch.where(mask[:, t], values[:, t], next_value)\n"
            "    delta = rewards[:, t] + gamma * next_value - values[:, t]\n"
            "    advantage = delta + gamma * lam * next_advantage\n"
            "    next_advantage = torch.where(mask[:, t], advantage, next_advantage)\n"
            "    advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)\n"
            "return advantages, torch.where(mask, advantages + values, 0.0)",
        ),
        (
            "pads unmasked",
            "The returns are not 0 outside the mask: they hold the values of prompt and pads.",
            [("torch.where(mask, advantages + values, 0.0)", "advantages + values")],
        ),
        (
            "advantages everywhere",
            "The advantages are not 0 outside the mask.",
            [("torch.where(mask[:, t], advantage, 0.0)", "advantage")],
        ),
        (
            "in place",
            "You write the results into `rewards`: whoever passed them in finds them changed.",
            [("advantages = torch.zeros_like(values)", "advantages = rewards")],
        ),
    ),
    *mutants(
        "mdp.sequence_advantages",
        (
            "sign of the KL",
            "You pay for the KL: with a plus sign the policy is rewarded for running away from the "
            "reference.",
            [("scores - kl_coef", "scores + kl_coef")],
        ),
        (
            "sum and mean swapped",
            "You have swapped the sum and the mean over an answer.",
            [('kl_reduction == "sum"', 'kl_reduction == "mean"')],
        ),
        (
            "always the sum",
            "You sum the KL whatever `kl_reduction` says.",
            [('masked_sum if kl_reduction == "sum" else masked_mean', "masked_sum")],
        ),
        (
            "mean over all columns",
            "The mean divides by the row's width, prompt and pads included. An answer has only its "
            "own actions.",
            "total = masked_sum(kl, mask, dim=1)\n"
            'if kl_reduction == "mean":\n'
            "    total = total / mask.shape[1]\n"
            "returns = scores - kl_coef * total\n"
            "return torch.where(mask, (returns - values)[:, None], 0.0), returns",
        ),
        (
            "no value",
            "The value is not subtracted: A = R - V.",
            [("(returns - values)[:, None]", "returns[:, None]")],
        ),
        (
            "value in the return",
            "Your returns are advantages. The critic is to learn R, not what is left of it.",
            [(", 0.0), returns", ", 0.0), returns - values")],
        ),
        (
            "no KL",
            "The KL has no price: it is missing from the return.",
            [(" - kl_coef * reduce(kl, mask, dim=1)", "")],
        ),
        (
            "outside the answer too",
            "The advantage stands on prompt and pads too; there it must be 0.",
            [
                (
                    "torch.where(mask, (returns - values)[:, None], 0.0)",
                    "(returns - values)[:, None].expand_as(kl)",
                )
            ],
        ),
        (
            "at the last token only",
            "Only the answer's last token gets the advantage. Here the whole answer is one action: "
            "every token shares it.",
            [
                (
                    "torch.where(mask, (returns - values)[:, None], 0.0)",
                    "torch.zeros_like(kl).scatter("
                    "1, (mask * torch.arange(mask.shape[1])).amax(1)[:, None], "
                    "(returns - values)[:, None])",
                )
            ],
        ),
        (
            "split among the tokens",
            "You divide the advantage by the answer's length. Every token gets the whole of it.",
            [("(returns - values)[:, None]", "((returns - values) / mask.sum(dim=1))[:, None]")],
        ),
        (
            "pads counted in the KL",
            "The KL of prompt and pads is charged too.",
            [("reduce(kl, mask, dim=1)", "reduce(kl, torch.ones_like(mask), dim=1)")],
        ),
        (
            "every token its own KL",
            "Every token pays for its own KL alone. Here the answer's KL is one number and its "
            "tokens share it.",
            "reduce = masked_sum if kl_reduction == 'sum' else masked_mean\n"
            "returns = scores - kl_coef * reduce(kl, mask, dim=1)\n"
            "own = (scores - values)[:, None] - kl_coef * kl\n"
            "return torch.where(mask, own, 0.0), returns",
        ),
        (
            "batch mean",
            "You reduce over the whole batch: every answer pays for the others' KL.",
            [("reduce(kl, mask, dim=1)", "reduce(kl, mask)")],
        ),
    ),
]
