"""What each variant asks for: its signature, docstring, solution, hints and sentences.

All of it is told as changes to the exercise as it stands in the package, so that a variant follows
when the exercise is revised, or says that it no longer fits.
"""

from __future__ import annotations

from rlhf_course.coursework import variant_forms as forms
from rlhf_course.coursework.variant_forms import Variant

# ------------------------------------------------------------------------------ mdp.kl_estimate

KINDS = """\
        k1 = d                   unbiased, may be negative    the one for the reward
        k2 = d^2 / 2             biased, low variance         the one for a loss
        k3 = exp(-d) - 1 + d     unbiased, never negative     the one for the logs
"""
GRADIENTS = """\
    As a loss on samples at hand their gradients by log pi are 1, d and 1 - exp(-d): k1's has
    expectation 0, k2's is the KL's own in expectation, k3's is not. A batch mean of k1 that stays
    negative says that the tokens were not drawn from `logprobs`. ValueError for another kind.
"""
GRADIENT = {
    "k1": """\
    As a loss on samples at hand its gradient by log pi is 1, of expectation 0: useless. A batch
    mean that stays negative says that the tokens were not drawn from `logprobs`.
""",
    "k2": """\
    As a loss on samples at hand its gradient by log pi is d, which is the KL's own in expectation.
""",
    "k3": """\
    As a loss on samples at hand its gradient by log pi is 1 - exp(-d), which is not the KL's own.
    Finite where d is very negative: d is held above -MAX_LOG_RATIO.
""",
}
ESTIMATE = {
    "k1": "return logprobs - ref_logprobs",
    "k2": "d = logprobs - ref_logprobs\nreturn d.square() / 2",
    "k3": "d = (logprobs - ref_logprobs).clamp(min=-MAX_LOG_RATIO)\n"
    "return torch.expm1(-d) + d  # expm1, because exp(-d) - 1 loses every digit of a small d",
}
SHAPE = "The shape stays as it is, and both arguments keep their gradient: nothing is averaged."
KL_HINTS = {
    "k1": ("$d = \\log\\pi - \\log\\pi_{\\rm ref}$, and the tokens are the policy's.", SHAPE),
    "k2": ("Half the square of $d$, with $d$ as above.", SHAPE),
    "k3": (
        "$e^{-d}-1$ loses all its digits when $d$ is small: there is a function `torch.expm1`.",
        "$e^{-d}$ overflows for very negative $d$: clamp it from below at `-MAX_LOG_RATIO` first.",
    ),
}
MEANS = {
    "k1": "over all tokens of a policy, k1 has the KL as its mean",
    "k2": "over all tokens of a policy, k2 has half the mean of d² as its mean",
    "k3": "over all tokens of a policy, k3 has the KL as its mean",
}


def kl_estimate(kind: str) -> Variant:
    """`kl_estimate` of one kind, without the argument."""
    (row,) = [line for line in KINDS.splitlines() if line.strip().startswith(kind)]
    others = [other for other in ESTIMATE if other != kind]
    return Variant(
        "mdp.kl_estimate",
        kind,
        group="kl",
        says=f"write the estimate {kind}, and no other; the function has no argument `kind`.",
        form=forms.one_kind(kind),
        head=[
            (', kind: str = "k1")', ")"),
            ("Per-action estimate of", f"Per-action estimate {kind} of"),
            (KINDS, row + "\n"),
            (GRADIENTS, GRADIENT[kind]),
        ],
        answer=ESTIMATE[kind],
        tail=[("\n    raise ValueError(f\"kind must be 'k1', 'k2' or 'k3', not {kind!r}\")", "")],
        hints=KL_HINTS[kind],
        after=f"takes any `kind`: yours answers for {kind}, the course's for the others",
        titles={
            "test_k1_of_one_action": "k1 of one action, by hand",
            "test_the_expectation_of_the_estimates": MEANS[kind],
        },
        sentences={
            "sign": "You subtract the policy from the reference: d has the wrong sign.",
            "always k1": "That is k1, d itself.",
            "k2 and k3 swapped": f"That is {others[-1]}; {kind} is another formula.",
        },
        mistakes=[("k2", "That is k2, half the square of d.", ESTIMATE["k2"])] * (kind == "k1")
        + [("k3", "That is k3, exp(-d) - 1 + d.", ESTIMATE["k3"])] * (kind == "k1"),
    )


# ----------------------------------------------------------------------------------- ppo.whiten

WHITENED = """\
mean, variance, _ = masked_moments(x, mask, group)
whitened = (in_float64(x) - mean) * torch.rsqrt(variance + eps)
return torch.where(mask, whitened.to(x.dtype).to(x.device), 0.0)"""
UNSHIFTED = WHITENED.replace("(variance + eps)", "(variance + eps) + mean")
MOMENTS = "`mean, variance, _ = masked_moments(x, mask, group)`."
LAST_STEP = (
    "Return it in `x`'s dtype and on its device, and exactly 0 outside the mask: `torch.where`."
)
NO_ARGUMENT = [("    shift_mean: bool = True,\n", "")]
ADDED_BACK = "    shift_mean=False adds the mean back (for rewards, whose sign must survive).\n"

SHIFT = Variant(
    "ppo.whiten",
    "shift",
    group="whiten",
    says="the mean is always taken out; the function has no argument `shift_mean`.",
    form=forms.one_mean(True),
    head=[*NO_ARGUMENT, (ADDED_BACK, "")],
    answer=WHITENED,
    hints=(MOMENTS, "`(in_float64(x) - mean) * torch.rsqrt(variance + eps)`.", LAST_STEP),
    after="takes `shift_mean` too: yours answers, and the mean is added where it is wanted",
    titles={"test_whitening_keeps_the_mean_if_told": "two other numbers, and a pad"},
    mistakes=[("mean kept", "The mean is still in it. Here it is taken out.", UNSHIFTED)],
)
NO_SHIFT = Variant(
    "ppo.whiten",
    "no shift",
    group="whiten",
    says="the mean is always added back, as for rewards; the function has no argument "
    "`shift_mean`. So the mean of the result is the mean of `x`, and its variance is 1.",
    form=forms.one_mean(False),
    head=[
        *NO_ARGUMENT,
        ("(x - mean) / sqrt(var + eps), with", "(x - mean) / sqrt(var + eps) + mean, with"),
        (ADDED_BACK, "    The mean is added back: for rewards, whose sign must survive.\n"),
    ],
    answer=UNSHIFTED,
    hints=(
        MOMENTS,
        "`(in_float64(x) - mean) * torch.rsqrt(variance + eps)`, and `mean` added.",
        LAST_STEP,
    ),
    after="takes `shift_mean` too: yours answers, and the mean is taken out where it is to be",
    titles={
        "test_two_numbers_whitened": "1 and 3 stay: their distance from the mean, 2, is 1 already",
        "test_whitening_keeps_the_mean_if_told": "the mean is added back",
        "test_nothing_to_whiten": "equal numbers, or a single one, stay what they are",
    },
    sentences={
        "shift_mean ignored": "The mean is missing from the result: here it is added back.",
        "never shifted": "You divide x by the spread. What is wanted is the whitened x plus the "
        "mean: only the distances from the mean are scaled.",
        "pads not 0": "Outside the mask stand numbers; they must be 0.",
    },
)

# -------------------------------------------------------------------------------------- mdp.gae

TERMINAL = Variant(
    "mdp.gae",
    "terminal",
    group="end",
    says="an answer that was cut off ends like any other: behind its last action the value is 0.",
)
BOOTSTRAPPED = Variant(
    "mdp.gae",
    "bootstrap",
    group="end",
    says="an answer that was cut off goes on. Behind each row's last action the critic's value is "
    "`last_values`, a fourth argument; it is 0 in the rows that ended with EOS.",
    form=forms.BOOTSTRAP,
    head=[
        (
            "rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95",
            "rewards: Tensor,\n    values: Tensor,\n    mask: Tensor,\n"
            "    last_values: Tensor,\n    gamma: float = 1.0,\n    lam: float = 0.95,",
        ),
        (
            "mask (B, T-1) bool -> (advantages, returns), both (B, T-1):",
            "mask (B, T-1) bool, last_values (B,)\n    -> (advantages, returns), both (B, T-1):",
        ),
        (
            "After the last action both are 0, for truncated answers too.",
            "After the last action A is 0, and V is the\n    row's `last_values`: "
            "what the critic says where the answer was cut off, 0 where it ended.",
        ),
    ],
    answer=[
        (
            "next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)",
            "next_value, next_advantage = last_values, torch.zeros_like(last_values)  # (B,)",
        )
    ],
    hints=(
        "Loop over the columns from the last to the first, and carry two numbers a row: the next "
        "action's value, which begins at `last_values`, and the next action's advantage, at 0.",
        "In a column that is no action of this row (`torch.where` on `mask[:, t]`), the two "
        "carried numbers stay as they are and the result is 0.",
        "At an action: `delta = r + gamma * next_value - V`, then `advantage = delta + gamma * lam "
        "* next_advantage`. The returns are `advantages + values`.",
    ),
    after="has no `last_values`: yours answers, for rows that have ended",
    titles={
        "test_the_advantage_of_one_action": "one action: its return is the reward and γ times the "
        "value behind it, its advantage what that is above its own value",
        "test_no_value_behind_the_last_action": "behind the last action comes `last_values`, "
        "whatever stands on the pads",
    },
    sentences={
        "bootstrapped from a pad": "Behind the last action you go on with the value that stands on "
        "the pad. What comes there is `last_values`.",
        "own value as next value": "At the end of the answer you take its last value for the next "
        "one. What comes there is `last_values`.",
    },
    mistakes=[
        (
            "last values ignored",
            "`last_values` is ignored: behind the last action your value is 0, as if every answer "
            "had ended.",
            [("next_advantage = last_values,", "next_advantage = torch.zeros_like(last_values),")],
        ),
    ],
)

# -------------------------------------------------------------------------------------- padding

LEFT = "the rows are padded on the left: pads, prompt, response. Each ends in its last column."
RIGHT = "the rows are padded on the right: prompt, response, pads."
ORDER = "a row is pads, prompt, response, and ends in its last column"

LEFT_MASK = Variant(
    "mdp.action_mask",
    "left",
    group="padding",
    says=LEFT,
    form=forms.LEFT_MASK,
    head=[
        (
            "length = T -> (B, T-1) bool.",
            f"length = T -> (B, T-1) bool.\n    Padded on the left: {ORDER}.",
        ),
    ],
    answer="""\
        actions = torch.arange(length - 1, device=prompt_lengths.device)
        return actions >= (length - 1 - response_lengths)[:, None]  # (B, T-1)
    """,
    hints=(
        "A row ends with its answer. Which action emits the token in the last column, and where "
        "does the first of the R actions stand?",
        "Compare `torch.arange(length - 1)` with the first action of each row, as a (B, 1) column. "
        "Nothing here looks at what the tokens are: a pad that equals EOS must make no difference.",
    ),
    after="is of rows padded on the right: yours answers, and its rows are moved",
    titles={
        "test_the_actions_of_one_answer": "a prompt of 2 and an answer of 3 tokens in a row of 6: "
        "the actions are 2, 3 and 4",
    },
    sentences={"pads counted": "The mask goes on beyond the answer: pads are marked too."},
    mistakes=[
        (
            "padded on the right",
            "Your rows begin with the prompt. Here they are padded on the left: they begin with "
            "the pads, and the answer ends in the last column.",
            "actions = torch.arange(length - 1, device=prompt_lengths.device)\n"
            "first = prompt_lengths[:, None] - 1\n"
            "return (actions >= first) & (actions < first + response_lengths[:, None])",
        ),
    ],
)
LEFT_MEAN = Variant(
    "reward_model.mean_reward",
    "left",
    group="padding",
    says=LEFT,
    form=forms.LEFT_SCORES,
    head=[
        ("tokens, P … P+R-1; prompt", "tokens, the last R; prompt"),
        ("int -> (B,).\n", f"int -> (B,).\n    Padded on the left: {ORDER}.\n"),
        (
            "    response = _response_mask(token_scores, prompt_lengths, response_lengths)\n",
            "    length = token_scores.shape[1]\n"
            "    if (response_lengths < 1).any():\n"
            '        raise ValueError("empty answer: a response needs at least one token")\n'
            "    if (prompt_lengths + response_lengths > length).any():\n"
            '        raise ValueError(f"prompt + response is longer than the row of {length}")\n',
        ),
    ],
    answer="""\
        columns = torch.arange(length, device=token_scores.device)
        response = columns >= length - response_lengths[:, None]  # (B, T)
        return masked_mean(token_scores, response, dim=1)  # (B,)
    """,
    hints=(
        "Make a mask of the response's tokens, (B, T): the last R columns of each row.",
        "`masked_mean(x, mask, dim=1)`, imported above, sums where the mask is True and divides "
        "by the count. A plain product with the mask would let a NaN on a pad through.",
    ),
    after="is of rows padded on the right: yours answers, and its rows are moved",
    sentences={
        "pads too": "You average over pads too.",
        "as of the actions": "Your window begins one position early, at the prompt's last token. "
        "That is where the first ACTION stands (chapter 4); here tokens are scored at their own "
        "places.",
    },
    mistakes=[
        (
            "padded on the right",
            "Your rows begin with the prompt. Here they are padded on the left: they begin with "
            "the pads, and the response ends in the last column.",
            "columns = torch.arange(length, device=token_scores.device)\n"
            "end = prompt_lengths + response_lengths\n"
            "response = (columns >= prompt_lengths[:, None]) & (columns < end[:, None])\n"
            "return masked_mean(token_scores, response, dim=1)",
        ),
    ],
)
RIGHT_MASK = Variant("mdp.action_mask", "right", group="padding", says=RIGHT)
RIGHT_MEAN = Variant("reward_model.mean_reward", "right", group="padding", says=RIGHT)

VARIANTS: tuple[Variant, ...] = (
    LEFT_MEAN,
    RIGHT_MEAN,
    LEFT_MASK,
    RIGHT_MASK,
    *(kl_estimate(kind) for kind in ESTIMATE),
    TERMINAL,
    BOOTSTRAPPED,
    SHIFT,
    NO_SHIFT,
)
"""All of them. Those of one group stand in one order in each of its exercises."""
