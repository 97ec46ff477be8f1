"""Wrong answers to chapter 3's exercises, each with the sentence that names its mistake."""

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
        "reward_model.last_token_reward",
        (
            "last column",
            "You read the last column of the batch: in a padded row that is a pad. Where a row "
            "ends is told by its length.",
            "return token_scores[:, -1]",
        ),
        (
            "one late",
            "You read one position too far: the token with index `length` is the first pad. "
            "Counting begins at 0.",
            "last = token_scores.shape[1] - 1\n"
            "return token_scores.gather(1, lengths[:, None].clamp(max=last))[:, 0]",
        ),
        (
            "one early",
            "You read the token before the last one, so the model has not seen the EOS yet.",
            "return token_scores.gather(1, (lengths[:, None] - 2).clamp(min=0))[:, 0]",
        ),
        (
            "one length for all",
            "You take one row's length for the whole batch; every row ends elsewhere.",
            "return token_scores[:, int(lengths.max()) - 1]",
        ),
        (
            "every row against every row",
            "You get a (B, B) table: indexing columns with a vector takes those columns of EVERY "
            "row. Pair each row with its own column.",
            "return token_scores[:, lengths - 1]",
        ),
        (
            "first token",
            "You read the first token, where the model has not seen any of the answer.",
            "return token_scores[:, 0]",
        ),
        (
            "mean",
            "You average over the row. The reward is the score at one position only, the last.",
            "import torch\n"
            "keep = torch.arange(token_scores.shape[1]) < lengths[:, None]\n"
            "return torch.where(keep, token_scores, 0.0).sum(1) / lengths",
        ),
        (
            "detached",
            "The values are right, but no gradient reaches the scores: something in your code "
            "(.item(), .tolist(), .detach(), torch.tensor) cuts the graph.",
            "return token_scores.detach().gather(1, lengths[:, None] - 1)[:, 0]",
        ),
        (
            "column vector",
            "You return one column, (B, 1). Rewards are a vector, (B,).",
            "return token_scores.gather(1, lengths[:, None] - 1)",
        ),
    ),
    *mutants(
        "reward_model.mean_reward",
        (
            "prompt too",
            "You average over prompt and response. A prompt is the same for both answers of a "
            "comparison; only the response is to be rewarded.",
            "from rlhf_course import mdp\n"
            "length = prompt_lengths + response_lengths\n"
            "keep = mdp.sequence_mask(length, token_scores.shape[1])\n"
            "return masked_mean(token_scores, keep, dim=1)",
        ),
        (
            "divided by the row",
            "You divide by the number of columns, pads included; divide by the response's length.",
            "import torch\n"
            "return torch.where(response, token_scores, 0.0).sum(1) / token_scores.shape[1]",
        ),
        (
            "divided by prompt and response",
            "The sum is over the response, but you divide by the length of prompt and response.",
            "import torch\n"
            "return torch.where(response, token_scores, 0.0).sum(1) / "
            "(prompt_lengths + response_lengths)",
        ),
        (
            "sum",
            "You return the sum over the response, so that longer answers earn more. Divide it.",
            "import torch\nreturn torch.where(response, token_scores, 0.0).sum(1)",
        ),
        (
            "pads too",
            "You average over everything behind the prompt, the pads included.",
            "from rlhf_course import mdp\n"
            "keep = ~mdp.sequence_mask(prompt_lengths, token_scores.shape[1])\n"
            "return masked_mean(token_scores, keep, dim=1)",
        ),
        (
            "product with the mask",
            "You multiply by the mask: NaN times 0 is NaN, so what stands on prompt and pads gets "
            "into the mean. torch.where (or masked_mean) leaves it out.",
            "return (token_scores * response).sum(1) / response_lengths",
        ),
        (
            "over the batch",
            "You average over the whole batch at once; every row has a mean of its own.",
            "return masked_mean(token_scores, response).expand(len(token_scores))",
        ),
        (
            "without the EOS",
            "You leave out the response's last token. It is the EOS, and it counts.",
            "from rlhf_course import mdp\n"
            "end = prompt_lengths + response_lengths - 1\n"
            "keep = response & mdp.sequence_mask(end, token_scores.shape[1])\n"
            "return masked_mean(token_scores, keep, dim=1)",
        ),
        (
            "as of the actions",
            "Your window begins one position early, at the prompt's last token. That is where the "
            "first ACTION stands (chapter 4); here tokens are scored at their own places.",
            "return masked_mean(token_scores, response.roll(-1, 1), dim=1)",
        ),
        (
            "batch's longest",
            "You divide every row by the longest response of the batch, so short answers earn "
            "less. Divide each by its own length.",
            "import torch\n"
            "return torch.where(response, token_scores, 0.0).sum(1) / response_lengths.max()",
        ),
        (
            "detached",
            "The values are right, but no gradient reaches the scores: something in your code "
            "(.item(), .tolist(), .detach(), torch.tensor) cuts the graph.",
            "return masked_mean(token_scores.detach(), response, dim=1)",
        ),
    ),
    *mutants(
        "reward_model.pairwise_loss",
        (
            "sign",
            "You push the better answer down: look which reward is subtracted from which.",
            [("chosen - rejected", "rejected - chosen")],
        ),
        (
            "negative",
            "You return the log-likelihood. A loss is its negative: what is likely costs little.",
            [("-F.logsigmoid(difference)", "F.logsigmoid(difference)")],
        ),
        (
            "sum",
            "You return the sum over pairs, so that a larger batch takes a larger step. Unless a "
            "denominator is given it is the mean.",
            [("max(len(chosen), 1) if denominator is None", "1 if denominator is None")],
        ),
        (
            "no logarithm",
            "You minimise the probability of a mistake, σ(-difference). The loss is -log σ, whose "
            "gradient does not vanish where the model is badly wrong.",
            [("-F.logsigmoid(difference)", "(-difference).sigmoid()")],
        ),
        (
            "logarithm of sigmoid",
            "Far apart, sigmoid rounds to 0 and its logarithm is -inf. Compute log σ in one step.",
            [("F.logsigmoid(difference)", "difference.sigmoid().log()")],
        ),
        (
            "hinge",
            "You use a hinge, max(0, -difference), which has no gradient once the order is right.",
            [("-F.logsigmoid(difference)", "F.relu(-difference)")],
        ),
        (
            "margin added",
            "The margin is added, so it forgives a distance instead of asking for one.",
            [("difference - margin", "difference + margin")],
        ),
        (
            "margin ignored",
            "The margin changes nothing in your loss.",
            [("difference - margin", "difference")],
        ),
        (
            "margin outside",
            "You add the margin to the loss: that shifts its value and leaves the gradient as it "
            "was. It belongs inside the σ.",
            [
                ("difference = difference - margin", "pass"),
                (
                    "-F.logsigmoid(difference).sum()",
                    "(-F.logsigmoid(difference) + (0 if margin is None else margin)).sum()",
                ),
            ],
        ),
        (
            "denominator ignored",
            "A given denominator is not used: micro-batches would not add up to the full batch.",
            [("if denominator is None else denominator", "")],
        ),
        (
            "mean of a mean",
            "You divide the MEAN by the denominator. It takes the place of the number of pairs.",
            [(".sum()  #", ".mean()  #"), ("max(len(chosen), 1) if", "1 if")],
        ),
        (
            "one side detached",
            "No gradient reaches the rejected answer: both rewards must learn.",
            [("chosen - rejected", "chosen - rejected.detach()")],
        ),
        (
            "no pairs",
            "Without any pair you divide 0 by 0. An empty micro-batch costs 0.",
            [("max(len(chosen), 1)", "len(chosen)")],
        ),
        (
            "in place",
            "You write into the margin or a reward: `-=` on an input changes the caller's tensor.",
            [
                ("difference = chosen - rejected", "difference = chosen.sub_(rejected)"),
            ],
        ),
    ),
    *mutants(
        "reward_model.kwise_loss",
        (
            "ranks upside down",
            "You push the worse answer up: a LOWER rank is better, and the difference is better "
            "minus worse.",
            [("ranks[:, :, None] < ranks[:, None, :]", "ranks[:, :, None] > ranks[:, None, :]")],
        ),
        (
            "ties and itself",
            "You count answers of equal rank as pairs, each answer with itself among them. They "
            "say nothing: only a strictly better rank makes a pair.",
            [("ranks[:, :, None] < ranks[:, None, :]", "ranks[:, :, None] <= ranks[:, None, :]")],
        ),
        (
            "ties count",
            "Tied answers enter your loss as pairs. They say nothing and are left out.",
            [
                (
                    "pairs = ranks[:, :, None] < ranks[:, None, :]  # (B, K, K): i is better",
                    "index = torch.arange(ranks.shape[1])\n"
                    "    pairs = (ranks[:, :, None] < ranks[:, None, :]) | (\n"
                    "        (ranks[:, :, None] == ranks[:, None, :])\n"
                    "        & (index[:, None] < index))  # better",
                )
            ],
        ),
        (
            "mean over all pairs",
            "You average over all pairs of the batch, so a prompt with many answers outweighs the "
            "others: first the mean over a prompt's pairs, then over prompts.",
            "pairs = ranks[:, :, None] < ranks[:, None, :]\n"
            "if mask is not None:\n"
            "    pairs = pairs & mask[:, :, None] & mask[:, None, :]\n"
            "difference = scores[:, :, None] - scores[:, None, :]\n"
            "losses = -F.logsigmoid(torch.where(pairs, difference, 0.0))\n"
            "prompts = pairs.flatten(1).any(1).sum().clamp(min=1)\n"
            "mean = masked_mean(losses, pairs)\n"
            "return mean if denominator is None else mean * prompts / denominator",
        ),
        (
            "sum over pairs",
            "You sum over a prompt's pairs. InstructGPT takes their mean, 1 / (K choose 2), or a "
            "prompt with many answers weighs more.",
            [
                (
                    "masked_mean(losses.flatten(1), pairs",
                    "torch.where(pairs, losses, 0.0).sum((1, 2)",
                ),
                (".flatten(1), dim=1)  # (B,): 0 without", ")  # without"),
            ],
        ),
        (
            "always K choose 2",
            "You always divide by K(K-1)/2. With ties or fewer answers there are fewer pairs.",
            [
                (
                    "masked_mean(losses.flatten(1), pairs.flatten(1), dim=1)",
                    "torch.where(pairs, losses, 0.0).sum((1, 2)) * 2 / "
                    "(ranks.shape[1] * (ranks.shape[1] - 1))",
                )
            ],
        ),
        (
            "mask ignored",
            "Answers that are not there enter your pairs.",
            [("pairs & mask[:, :, None] & mask[:, None, :]", "pairs")],
        ),
        (
            "mask on one side",
            "You look at the mask of one answer of the pair only; both must be there.",
            [(" & mask[:, None, :]", "")],
        ),
        (
            "product with the mask",
            "You multiply by the mask: NaN times 0 is NaN. Choose with torch.where "
            "before the loss.",
            [
                ("torch.where(pairs, difference, 0.0)", "difference"),
                (
                    "masked_mean(losses.flatten(1), pairs.flatten(1), dim=1)",
                    "(losses * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)",
                ),
            ],
        ),
        (
            "chosen after the loss",
            "Your torch.where stands BEHIND the loss: the value is right, but the gradient of what "
            "it leaves out is NaN times 0, which is NaN. Choose the pairs before the loss.",
            [
                (
                    "-F.logsigmoid(torch.where(pairs, difference, 0.0))",
                    "-F.logsigmoid(difference)",
                )
            ],
        ),
        (
            "empty prompts count",
            "You divide by all prompts, also by those without any pair.",
            [("pairs.flatten(1).any(dim=1).sum().clamp(min=1)", "len(scores)")],
        ),
        (
            "no prompt with a pair",
            "Where no prompt has a pair you divide 0 by 0; the loss is 0 there.",
            [("any(dim=1).sum().clamp(min=1)", "any(dim=1).sum()")],
        ),
        (
            "neighbours only",
            "You compare each answer with the next best alone. All pairs count.",
            [
                (
                    "ranks[:, :, None] < ranks[:, None, :]",
                    "ranks[:, :, None] + 1 == ranks[:, None, :]",
                )
            ],
        ),
        (
            "best against the rest",
            "You compare the best answer with the rest alone. All pairs count.",
            [
                (
                    "ranks[:, :, None] < ranks[:, None, :]",
                    "(ranks[:, :, None] < ranks[:, None, :])"
                    " & (ranks == ranks.amin(1, keepdim=True))[:, :, None]",
                )
            ],
        ),
        (
            "logarithm of sigmoid",
            "Far apart, sigmoid rounds to 0 and its logarithm is -inf. Compute log σ in one step.",
            [
                (
                    "-F.logsigmoid(torch.where(pairs, difference, 0.0))",
                    "-torch.where(pairs, difference, 0.0).sigmoid().log()",
                )
            ],
        ),
        (
            "denominator ignored",
            "A given denominator is not used: micro-batches would not add up to the full batch.",
            [("if denominator is None:\n        ", "")],
        ),
        (
            "softmax",
            "You take a softmax over all K answers, the likelihood that one is the best of them. "
            "Asked for is -log σ of the difference, pair by pair.",
            [
                (
                    "-F.logsigmoid(torch.where(pairs, difference, 0.0))",
                    "-scores.log_softmax(1)[:, :, None].expand(pairs.shape)",
                )
            ],
        ),
    ),
    *mutants(
        "reward_model.normalize_rewards",
        (
            "Bessel",
            "You divide by n - 1 (torch.std's default). Asked for is the population's standard "
            "deviation, which exists for a single reward too.",
            [("std(correction=0)", "std()")],
        ),
        (
            "bias has the mean's sign",
            "Your bias adds the mean once more; to bring it to 0 it has to be taken away.",
            [("return 1.0, -mean", "return 1.0, mean"), ("-mean / std", "mean / std")],
        ),
        (
            "bias before the gain",
            "The bias is added AFTER the gain: gain * mean + bias must be 0.",
            [("-mean / std", "-mean")],
        ),
        (
            "gain upside down",
            "Your gain is the standard deviation itself: it spreads the rewards further.",
            [("return 1 / std, -mean / std", "return std, -mean * std")],
        ),
        (
            "variance",
            "You divide by the variance. Take its square root.",
            [("std(correction=0)", "var(correction=0)")],
        ),
        (
            "always gain and bias",
            'You scale with the method "bias" too. It only shifts: its gain is 1.',
            [('if method == "bias":', 'if method == "none":')],
        ),
        (
            "never a gain",
            'With "gain_bias" you only shift; the standard deviation must become 1.',
            [("return 1 / std, -mean / std", "return 1.0, -mean")],
        ),
        (
            "bias then gain",
            "You return (bias, gain). The order is (gain, bias).",
            [
                ("return 1.0, -mean", "return -mean, 1.0"),
                ("return 1 / std, -mean / std", "return -mean / std, 1 / std"),
            ],
        ),
        (
            "equal rewards",
            "Equal rewards get a huge gain from you. There is none that brings their deviation to "
            "1: refuse them with a ValueError.",
            [("if std == 0:", "std = max(std, 1e-8)\n    if std == 0:")],
        ),
        (
            "median",
            "You take away the median. It is the mean that has to become 0.",
            [("rewards.mean().item()", "rewards.median().item()")],
        ),
    ),
]
