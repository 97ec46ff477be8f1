"""Wrong answers to chapter 5's exercises, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits or body)."""
    made = []
    for name, says, change in rows:
        kind = "body" if isinstance(change, str) else "edits"
        made.append(Mutant(exercise, name, says=says, **{kind: change}))
    return made


def backward(*lines):
    """The body of an update up to its gradients; `lines` follow."""
    return "\n".join((
        "policy_optimizer.zero_grad(set_to_none=True)",
        "critic_optimizer.zero_grad(set_to_none=True)",
        "stats = policy_backward(policy, batch, settings)",
        *lines,
    ))  # fmt: skip


MORE = "if more_policy_gradient is not None:\n    stats.update(more_policy_gradient())"
CRITIC = "stats.update(critic_backward(critic, batch, settings, normalize))"
CLIP_POLICY = (
    "clip = nn.utils.clip_grad_norm_\n"
    'stats["policy_grad_norm"] = float(clip(policy.parameters(), settings.max_grad_norm))'
)
CLIP_CRITIC = 'stats["value_grad_norm"] = float(clip(critic.parameters(), settings.max_grad_norm))'
CHECK = 'check_finite(stats, "PPO update")'
STEPS = "policy_optimizer.step()\ncritic_optimizer.step()\nreturn stats"

MUTANTS = [
    *mutants(
        "ppo.whiten",
        (
            "per row",
            "Each row is whitened by itself. Between answers, then, no difference is left, and it "
            "was the difference that said which of them is better.",
            "count = mask.sum(1, keepdim=True).clamp(min=1)\n"
            "kept = torch.where(mask, in_float64(x), 0.0)\n"
            "mean = kept.sum(1, keepdim=True) / count\n"
            "variance = torch.where(mask, kept - mean, 0.0).square().sum(1, keepdim=True) / count\n"
            "whitened = (kept - mean) * torch.rsqrt(variance + eps)\n"
            "if not shift_mean:\n"
            "    whitened = whitened + mean\n"
            "return torch.where(mask, whitened.to(x.dtype), 0.0)",
        ),
        (
            "Bessel",
            "You divide the squares by n - 1. Wanted is the population's variance, by n, which a "
            "single entry has too.",
            [
                (
                    "torch.rsqrt(variance + eps)",
                    "torch.rsqrt(variance * count / (count - 1).clamp(min=1) + eps)",
                ),
                ("variance, _ =", "variance, count ="),
            ],
        ),
        (
            "pads in the moments",
            "Mean and variance are taken over the pads too.",
            [("masked_moments(x, mask, group)", "masked_moments(x, torch.ones_like(mask), group)")],
        ),
        (
            "pads not 0",
            "Outside the mask stand shifted numbers; they must be 0.",
            [
                (
                    "torch.where(mask, whitened.to(x.dtype).to(x.device), 0.0)",
                    "whitened.to(x.dtype).to(x.device)",
                )
            ],
        ),
        (
            "product with the mask",
            "You multiply by the mask. A NaN on a pad times 0 is NaN: select instead.",
            [
                (
                    "torch.where(mask, whitened.to(x.dtype).to(x.device), 0.0)",
                    "whitened.to(x.dtype).to(x.device) * mask",
                )
            ],
        ),
        (
            "eps beside the deviation",
            "You add eps to the standard deviation; it belongs under the root, to the variance.",
            [("* torch.rsqrt(variance + eps)", "/ (variance.sqrt() + eps)")],
        ),
        (
            "no eps",
            "eps is not added to the variance: equal numbers give 0 / 0.",
            [("variance + eps", "variance")],
        ),
        (
            "variance at least eps",
            "You use eps as the variance's lower bound; it is added.",
            [("variance + eps", "variance.clamp(min=eps)")],
        ),
        (
            "divided by the variance",
            "You divide by the variance; its root has the unit of x.",
            [("torch.rsqrt(variance + eps)", "(variance + eps).reciprocal()")],
        ),
        (
            "only centred",
            "The mean is taken out, but nothing is divided by the spread.",
            [(" * torch.rsqrt(variance + eps)", "")],
        ),
        (
            "shift_mean ignored",
            "shift_mean=False changes nothing: the mean must be added back.",
            [("if not shift_mean:", "if False:")],
        ),
        (
            "never shifted",
            "With shift_mean=False you divide x by the spread. What is wanted is the whitened x "
            "plus the mean: only the distances from the mean are scaled.",
            [("whitened + mean", "in_float64(x) * torch.rsqrt(variance + eps)")],
        ),
        (
            "gradient",
            "A gradient passes to x. Whitened advantages are constants to the update.",
            [("(in_float64(x) - mean)", "(x.double() - mean)")],
        ),
        (
            "one pass in float32",
            "You take E[x²] - E[x]² in float32: far from 0 two large numbers are subtracted, and "
            "no digit of the variance is left. Subtract the mean first.",
            [
                (
                    "mean, variance, _ = masked_moments(x, mask, group)",
                    "kept, n = torch.where(mask, x.detach(), 0.0), mask.sum()\n"
                    "    mean = kept.sum() / n\n"
                    "    variance = (kept.square().sum() / n - mean.square()).clamp(min=0)",
                )
            ],
        ),
        (
            "float64",
            "The result is in float64; it must have the dtype of x.",
            [("whitened.to(x.dtype)", "whitened.double()")],
        ),
    ),
    *mutants(
        "ppo.policy_loss",
        (
            "sign",
            "You return the objective. It is to be maximised, so the loss is minus it.",
            [("loss = -token_mean(", "loss = token_mean(")],
        ),
        (
            "maximum",
            "You take the larger of the two terms. The smaller one is the pessimistic one, which "
            "takes away the gain of going too far.",
            [("torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)")],
        ),
        (
            "no clip",
            "The clipped term plays no part: nothing stops a token that has moved enough.",
            [("torch.minimum(unclipped, clipped)", "unclipped")],
        ),
        (
            "clip only",
            "You use the clipped term alone. A token beyond the clip then gets no gradient even "
            "where it moved the wrong way; the minimum of both pulls it back.",
            [("torch.minimum(unclipped, clipped)", "clipped")],
        ),
        (
            "clips swapped",
            "clip_low and clip_high have changed places.",
            [("1 - clip_low, 1 + clip_high", "1 - clip_high, 1 + clip_low")],
        ),
        (
            "clipped from above only",
            "The ratio is clipped from above only: a bad token may be pushed down without end.",
            [("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(max=1 + clip_high)")],
        ),
        (
            "ratio inverted",
            "Your ratio is old over new. It must grow with the new probability.",
            [
                (
                    "torch.where(mask, logprobs - old_logprobs, 0.0)",
                    "torch.where(mask, old_logprobs - logprobs, 0.0)",
                )
            ],
        ),
        (
            "log-ratio for the ratio",
            "You use the difference of the log-probabilities for the ratio; that is its logarithm.",
            [
                (
                    "log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()",
                    "log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
                )
            ],
        ),
        (
            "masked too late",
            "What stands on the pads goes through the exponential before it is masked, and its "
            "gradient, inf or NaN times 0, is NaN.",
            [("torch.where(mask, logprobs - old_logprobs, 0.0)", "logprobs - old_logprobs")],
        ),
        (
            "log-ratio not bounded",
            "A log-ratio of 100 makes the ratio infinite, and its gradient NaN. Hold it within "
            "MAX_LOG_RATIO before the exponential.",
            [("log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()", "log_ratio.exp()")],
        ),
        (
            "mean over pads",
            "You average over all entries, pads included: the more padding, the smaller the loss.",
            [
                (
                    "-token_mean(objective, mask, denominator)",
                    "-torch.where(mask, objective, 0.0).sum()"
                    " / (denominator if denominator is not None else mask.numel())",
                )
            ],
        ),
        (
            "mean of means",
            "You average each answer first, then the answers: a token of a short answer weighs "
            "more than one of a long one.",
            [
                (
                    "loss = -token_mean(objective, mask, denominator)",
                    "kept = torch.where(mask, objective, 0.0)\n"
                    "    rows = kept.sum(1) / mask.sum(1).clamp(min=1)\n"
                    "    loss = -rows.mean()\n"
                    "    if denominator is not None:\n"
                    "        loss = -kept.sum() / denominator",
                )
            ],
        ),
        (
            "summed",
            "You add up the tokens and divide by nothing.",
            [
                (
                    "-token_mean(objective, mask, denominator)",
                    "-token_mean(objective, mask, 1 if denominator is None else denominator)",
                )
            ],
        ),
        (
            "denominator ignored",
            "`denominator` is ignored: the losses of micro-batches do not add up to the batch's.",
            [("-token_mean(objective, mask, denominator)", "-token_mean(objective, mask)")],
        ),
        (
            "dual clip everywhere",
            "The dual clip bounds tokens with A > 0 too, and turns their loss round. It is for "
            "A < 0 alone.",
            [("torch.where(advantages < 0, bounded, objective)", "bounded")],
        ),
        (
            "dual clip on the wrong side",
            "The dual clip makes the loss of a bad token at least c |A|; it should make it at most "
            "that.",
            [("torch.maximum(objective, dual_clip", "torch.minimum(objective, dual_clip")],
        ),
        (
            "dual clip ignored",
            "`dual_clip` is ignored.",
            [("if dual_clip is not None:", "if False:")],
        ),
        (
            "dual clip on the ratio",
            "The dual clip replaces the clip at 1 + clip_high. It comes after it, and bounds the "
            "term of a token with A < 0 by c A.",
            [
                (
                    "ratio.clamp(1 - clip_low, 1 + clip_high)",
                    "ratio.clamp(1 - clip_low, dual_clip or 1 + clip_high)",
                )
            ],
        ),
        (
            "weights ignored",
            "`weights` are ignored.",
            [("objective * weights.detach()", "objective")],
        ),
        (
            "gradient through the weights",
            "A gradient passes to the weights. They are constants: detach them.",
            [("weights.detach()", "weights")],
        ),
        (
            "detached",
            "The value is right, but no gradient reaches the new log-probabilities: nothing is "
            "learned.",
            [("logprobs - old_logprobs, 0.0)", "logprobs.detach() - old_logprobs, 0.0)")],
        ),
        (
            "log-probability times advantage",
            "You differentiate log π alone, as REINFORCE does, and clip nothing. That is the "
            "gradient for the first update only, where the ratio is 1.",
            [
                (
                    "objective = torch.minimum(unclipped, clipped)",
                    "objective = (1 + log_ratio) * advantages",
                )
            ],
        ),
    ),
    *mutants(
        "ppo.value_loss",
        (
            "no half",
            "The loss is twice too large: the factor 0.5 is missing.",
            [("loss = 0.5 * ", "loss = ")],
        ),
        (
            "minimum",
            "You take the smaller of the two squares. It is the larger, so that running ahead is "
            "worth nothing.",
            [("torch.maximum(error,", "torch.minimum(error,")],
        ),
        (
            "clipped only",
            "You use the clipped square alone: a value that moved away from its target is not "
            "pulled back.",
            [("torch.maximum(error, (near - returns).square())", "(near - returns).square()")],
        ),
        (
            "clipped around 0",
            "You clip the value itself. What is held within the range is its distance from the old "
            "value.",
            [
                (
                    "old_values + (values - old_values).clamp(-clip, clip)",
                    "values.clamp(-clip, clip)",
                )
            ],
        ),
        (
            "clipped by a ratio",
            "You clip the value's ratio to the old one, as for probabilities. Values may be 0 or "
            "negative: clip the difference.",
            [
                (
                    "old_values + (values - old_values).clamp(-clip, clip)",
                    "torch.maximum(torch.minimum(values, old_values * (1 + clip)), "
                    "old_values * (1 - clip))",
                )
            ],
        ),
        (
            "clipped from above only",
            "The value may rise by `clip` only, but fall as far as it likes.",
            [(".clamp(-clip, clip)", ".clamp(max=clip)")],
        ),
        (
            "range of 0.2 always",
            "The range is 0.2 whatever `clip` says.",
            [(".clamp(-clip, clip)", ".clamp(-0.2, 0.2)")],
        ),
        (
            "never clipped",
            "`clip` is ignored.",
            [("if clip is not None:", "if False:")],
        ),
        (
            "pads counted",
            "You average over all entries, pads included: the more padding, the smaller the loss.",
            [
                (
                    "token_mean(worst, mask, denominator)",
                    "(torch.where(mask, worst, 0.0).sum()"
                    " / (denominator if denominator is not None else mask.numel()))",
                )
            ],
        ),
        (
            "masked too late",
            "The pads are squared before they are masked. The gradient of NaN² is NaN, even where "
            "it is multiplied by 0.",
            [("torch.where(mask, x, 0.0) for x in", "x for x in")],
        ),
        (
            "denominator ignored",
            "`denominator` is ignored: the losses of micro-batches do not add up to the batch's.",
            [("token_mean(worst, mask, denominator)", "token_mean(worst, mask)")],
        ),
        (
            "absolute error",
            "You take the error's size, not its square: the critic would learn the median.",
            [
                (
                    "worst = error = (values - returns).square()",
                    "worst = error = (values - returns).abs()",
                ),
                ("(near - returns).square()", "(near - returns).abs()"),
            ],
        ),
        (
            "detached",
            "The value is right, but no gradient reaches the values: the critic learns nothing.",
            [("torch.where(mask, x, 0.0) for x in", "torch.where(mask, x.detach(), 0.0) for x in")],
        ),
        (
            "targets learn",
            "A gradient reaches the returns. They are the target: whoever may move the target "
            "need not learn.",
            [("returns.detach())", "returns)")],
        ),
        (
            "old values learn",
            "A gradient reaches the old values. They are what the critic said at the rollout, a "
            "constant.",
            [("old_values.detach(), ", "old_values, ")],
        ),
    ),
    *mutants(
        "ppo.AdaptiveKLController.update",
        (
            "sign",
            "The price falls when the KL is too high, and the policy runs away. It must rise.",
            [("(1 + error * episodes", "(1 - error * episodes")],
        ),
        (
            "clipped after scaling",
            "You clip after the error was multiplied by episodes / horizon. Clipped before it, one "
            "wild batch counts no more than one that is 20 % off.",
            "error = (float(kl) / self.target - 1) * episodes / self.horizon\n"
            "error = min(max(error, -0.2), 0.2)\n"
            "self.value = max(self.value * (1 + error), self.floor)\n"
            "return self.value",
        ),
        (
            "not clipped",
            "The error is not clipped: one wild batch moves the price as far as it likes.",
            [("min(max(float(kl) / self.target - 1, -0.2), 0.2)", "float(kl) / self.target - 1")],
        ),
        (
            "clipped from above only",
            "The error is clipped from above only; it may be no less than -0.2 either.",
            [
                (
                    "min(max(float(kl) / self.target - 1, -0.2), 0.2)",
                    "min(float(kl) / self.target - 1, 0.2)",
                )
            ],
        ),
        (
            "clipped from below only",
            "The error is clipped from below only; it may be no more than 0.2 either.",
            [
                (
                    "min(max(float(kl) / self.target - 1, -0.2), 0.2)",
                    "max(float(kl) / self.target - 1, -0.2)",
                )
            ],
        ),
        (
            "difference for ratio",
            "You take KL - target. The error is relative, KL / target - 1, so that it has no unit.",
            [("float(kl) / self.target - 1", "float(kl) - self.target")],
        ),
        (
            "relative to the KL",
            "You divide the difference by the KL; the error is relative to the target.",
            [("float(kl) / self.target - 1", "1 - self.target / max(float(kl), 1e-8)")],
        ),
        (
            "added",
            "You add the correction to the price. It multiplies: a small price changes by little.",
            [
                (
                    "self.value * (1 + error * episodes / self.horizon)",
                    "self.value + error * episodes / self.horizon",
                )
            ],
        ),
        (
            "episodes ignored",
            "The number of episodes is ignored: a batch of 1000 moves the price no further than "
            "one of 1.",
            [("error * episodes / self.horizon", "error / self.horizon")],
        ),
        (
            "horizon ignored",
            "Neither episodes nor horizon count: the price moves by the whole error at each batch.",
            [("error * episodes / self.horizon", "error")],
        ),
        (
            "upside down",
            "horizon / episodes is upside down: a longer horizon must make the price slower.",
            [("error * episodes / self.horizon", "error * self.horizon / episodes")],
        ),
        (
            "no floor",
            "`floor` is ignored.",
            [
                (
                    "max(self.value * (1 + error * episodes / self.horizon), self.floor)",
                    "self.value * (1 + error * episodes / self.horizon)",
                )
            ],
        ),
        (
            "floor taken for a ceiling",
            "The floor works as a ceiling: take the larger of the two.",
            [("self.value = max(", "self.value = min(")],
        ),
        (
            "not kept",
            "The new price is returned, but not kept: the next batch begins at the old one.",
            [("self.value = max(", "value = max("), ("return self.value", "return value")],
        ),
        (
            "old price returned",
            "You keep the new price, but return the one from before.",
            [
                ("self.value = max(", "before = self.value\n        self.value = max("),
                ("return self.value", "return before"),
            ],
        ),
    ),
    *mutants(
        "ppo.ppo_step",
        (
            "old gradients kept",
            "The gradients from before are still there: they are added to until somebody sets them "
            "to zero.",
            [
                ("    policy_optimizer.zero_grad(set_to_none=True)\n", ""),
                ("    critic_optimizer.zero_grad(set_to_none=True)\n", ""),
            ],
        ),
        (
            "critic's old gradients kept",
            "You drop the policy's old gradients, but not the critic's.",
            [("    critic_optimizer.zero_grad(set_to_none=True)\n", "")],
        ),
        (
            "zeroed after backward",
            "You set the gradients to zero after they were computed, so there is nothing left to "
            "step with.",
            "stats = policy_backward(policy, batch, settings)\n"
            f"{MORE}\n{CRITIC}\n"
            "policy_optimizer.zero_grad(set_to_none=False)\n"
            "critic_optimizer.zero_grad(set_to_none=False)\n"
            f"{CLIP_POLICY}\n{CLIP_CRITIC}\n{CHECK}\n{STEPS}",
        ),
        (
            "never shortened",
            "Long gradients are not shortened to max_grad_norm.",
            backward(
                MORE,
                CRITIC,
                CLIP_POLICY.replace("settings.max_grad_norm", 'float("inf")'),
                CLIP_CRITIC.replace("settings.max_grad_norm", 'float("inf")'),
                CHECK,
                STEPS,
            ),
        ),
        (
            "critic never shortened",
            "The critic's gradient is not shortened to max_grad_norm.",
            backward(
                MORE,
                CRITIC,
                CLIP_POLICY,
                CLIP_CRITIC.replace("settings.max_grad_norm", 'float("inf")'),
                CHECK,
                STEPS,
            ),
        ),
        (
            "shortened together",
            "You shorten both models' gradients as one vector: a wild critic then slows the "
            "policy. Each has its own length.",
            backward(
                MORE,
                CRITIC,
                "norm = nn.utils.get_total_norm",
                'stats["policy_grad_norm"] = float(norm([p.grad for p in policy.parameters()]))',
                'stats["value_grad_norm"] = float(norm([p.grad for p in critic.parameters()]))',
                "both = [*policy.parameters(), *critic.parameters()]",
                "nn.utils.clip_grad_norm_(both, settings.max_grad_norm)",
                CHECK,
                STEPS,
            ),
        ),
        (
            "shortened after the step",
            "You shorten the gradients after the step was made, when it is too late.",
            backward(
                MORE,
                CRITIC,
                "policy_optimizer.step()\ncritic_optimizer.step()",
                CLIP_POLICY,
                CLIP_CRITIC,
                CHECK,
                "return stats",
            ),
        ),
        (
            "lengths after shortening",
            "The lengths you report are those after shortening. They never exceed max_grad_norm, "
            "so nobody would see a gradient explode.",
            backward(
                MORE,
                CRITIC,
                CLIP_POLICY,
                CLIP_CRITIC,
                'for name in ("policy_grad_norm", "value_grad_norm"):',
                "    stats[name] = min(stats[name], settings.max_grad_norm)",
                CHECK,
                STEPS,
            ),
        ),
        (
            "more ignored",
            "more_policy_gradient is never called: PPO-ptx would be plain PPO.",
            [("if more_policy_gradient is not None:", "if False:")],
        ),
        (
            "more after shortening",
            "more_policy_gradient is called when the gradient was already shortened. The sum of "
            "both is to be shortened.",
            backward(CRITIC, CLIP_POLICY, MORE, CLIP_CRITIC, CHECK, STEPS),
        ),
        (
            "more without its terms",
            "What more_policy_gradient returns is dropped; its terms belong to the diagnostics.",
            [("stats.update(more_policy_gradient())", "more_policy_gradient()")],
        ),
        (
            "critic never steps",
            "Only the policy moves: the critic's optimizer makes no step.",
            [("    critic_optimizer.step()\n", "")],
        ),
        (
            "policy never steps",
            "Only the critic moves: the policy's optimizer makes no step.",
            [("    policy_optimizer.step()\n", "")],
        ),
        (
            "policy steps first",
            "The policy has already moved when the critic's loss turns out to be NaN. Check "
            "everything first, then move both.",
            backward(
                MORE,
                CLIP_POLICY,
                CHECK,
                "policy_optimizer.step()",
                CRITIC,
                CLIP_CRITIC,
                CHECK,
                "critic_optimizer.step()\nreturn stats",
            ),
        ),
        (
            "not checked",
            "Nothing is checked: a NaN goes straight into the weights, and the models are lost.",
            [('    check_finite(stats, "PPO update")\n', "")],
        ),
        (
            "checked too late",
            "You check after the steps were made, when the weights are lost already.",
            backward(
                MORE,
                CRITIC,
                CLIP_POLICY,
                CLIP_CRITIC,
                "policy_optimizer.step()\ncritic_optimizer.step()",
                CHECK,
                "return stats",
            ),
        ),
        (
            "normalize not passed on",
            "`normalize` is not passed on: the critic is trained on targets in the wrong unit.",
            [("settings, normalize))", "settings))")],
        ),
        (
            "two steps",
            "The policy's optimizer makes two steps with one gradient.",
            [("policy_optimizer.step()", "policy_optimizer.step()\n    policy_optimizer.step()")],
        ),
    ),
]
