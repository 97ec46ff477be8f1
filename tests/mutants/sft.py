"""Wrong answers to chapter 2's exercises, each with the sentence that names its mistake."""

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
        "sft.mask_prompt",
        (
            "the prompt's last token",
            "You ask for the prompt's last token too. The shift by one is the loss's business: a "
            "label stands on the token that it names.",
            [("position >= prompt_lengths[:, None]", "position >= prompt_lengths[:, None] - 1")],
        ),
        (
            "the answer's first token",
            "You do not ask for the answer's first token: it stands at index `prompt_length`.",
            [("position >= prompt_lengths[:, None]", "position > prompt_lengths[:, None]")],
        ),
        (
            "EOS hidden",
            "You hide the last token of the answer, the EOS: the model would never learn to stop.",
            [("position < lengths[:, None]", "position < lengths[:, None] - 1")],
        ),
        (
            "first pad",
            "You ask for the first pad: a row's last token has the index length - 1.",
            [("position < lengths[:, None]", "position <= lengths[:, None]")],
        ),
        (
            "pads learned",
            "You ask for the pads. Nobody should learn to write them.",
            [(" & (position < lengths[:, None])", "")],
        ),
        (
            "prompt learned",
            "You ask for the prompt too: the model would learn to imitate the user.",
            [("(position >= prompt_lengths[:, None]) & ", "")],
        ),
        (
            "inside out",
            "You keep the prompt and the pads, and hide the answer.",
            [("torch.where(answer, tokens, IGNORE)", "torch.where(answer, IGNORE, tokens)")],
        ),
        (
            "pads by their token",
            "You tell pads by `tokens != 0`. A pad may look like an ordinary token or like the "
            "EOS: only the lengths know.",
            [("(position < lengths[:, None])", "(tokens != 0)")],
        ),
        (
            "answer's length",
            "You take `lengths` for that of the answer. It is that of prompt and answer together.",
            [("position < lengths[:, None]", "position < (prompt_lengths + lengths)[:, None]")],
        ),
        (
            "zeros",
            "You write 0 where nothing is asked. 0 is a token; -100 is what the loss leaves out.",
            [("tokens, IGNORE)", "tokens, 0)")],
        ),
        (
            "shifted",
            "You shift the labels by one. The loss does that already; twice is once too often.",
            [
                (
                    "torch.where(answer, tokens, IGNORE)",
                    "torch.where(answer, tokens, IGNORE).roll(-1, 1)",
                )
            ],
        ),
        (
            "in place",
            "You write -100 into the tokens that were handed to you: the model reads them yet.",
            [("torch.where(answer, tokens, IGNORE)", "tokens.masked_fill_(~answer, IGNORE)")],
        ),
        (
            "one prompt length",
            "You take the first row's prompt length for all rows.",
            [("prompt_lengths[:, None]", "prompt_lengths[0]")],
        ),
    ),
    *mutants(
        "sft.sft_loss",
        (
            "no shift",
            "You compare the logits at position t with the label at t, which the model has just "
            "read. They answer for the label at t + 1.",
            [("labels[:, 1:].flatten()", "labels[:, :-1].flatten()")],
        ),
        (
            "shift the other way",
            "You shift the wrong way: position t is compared with the label at t - 1.",
            [
                ("labels[:, 1:].flatten()", "labels[:, :-1].flatten()"),
                ("logits[:, :-1].flatten", "logits[:, 1:].flatten"),
            ],
        ),
        (
            "mean over all positions",
            "You divide by all positions, prompts and pads included.",
            [("max(len(asked), 1)", "following.numel()")],
        ),
        (
            "mean of rows' means",
            "You average row by row and then over the rows, so a token of a short answer weighs "
            "more. The mean is over tokens.",
            "import torch\n"
            "total, rows = logits.new_zeros((), dtype=torch.float32), 0\n"
            "total = total.to(torch.promote_types(logits.dtype, torch.float32))\n"
            "for row, wanted in zip(logits[:, :-1], labels[:, 1:]):\n"
            "    asked = wanted != IGNORE\n"
            "    if asked.any():\n"
            "        total = total + F.cross_entropy(row[asked].to(total.dtype), wanted[asked])\n"
            "        rows += 1\n"
            "if denominator is None:\n"
            "    return total / max(rows, 1)\n"
            "count = (labels[:, 1:] != IGNORE).sum()\n"
            "return total / max(rows, 1) * count / denominator",
        ),
        (
            "sum",
            "You return the sum, so a batch with longer answers takes a larger step.",
            [("max(len(asked), 1) if", "1 if")],
        ),
        (
            "product with the mask",
            "You multiply the losses by a mask: NaN times 0 is NaN. Pick the labelled positions "
            "before you compute anything.",
            "import torch\n"
            "asked = labels[:, 1:] != IGNORE\n"
            "wide = torch.promote_types(logits.dtype, torch.float32)\n"
            "logp = logits[:, :-1].to(wide).log_softmax(-1)\n"
            "each = -logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]\n"
            "total = (each * asked).sum()\n"
            "return total / (asked.sum().clamp(min=1) if denominator is None else denominator)",
        ),
        (
            "denominator ignored",
            "A given denominator is not used: micro-batches would not add up to the full batch.",
            [(" if denominator is None else denominator", "")],
        ),
        (
            "mean of a mean",
            "You divide the MEAN by the denominator. It takes the place of the count.",
            [('reduction="sum"', 'reduction="mean"'), ("max(len(asked), 1) if", "1 if")],
        ),
        (
            "nothing asked",
            "Without any label you divide 0 by 0. Such a row costs 0.",
            [("max(len(asked), 1)", "len(asked)")],
        ),
        (
            "first label counted",
            "You count the labels before the shift: one on a row's first token, which nothing "
            "predicts, makes the mean too small.",
            [("max(len(asked), 1)", "(labels != IGNORE).sum().clamp(min=1)")],
        ),
        (
            "negative",
            "You return the log-likelihood. A loss is its negative.",
            [("return total", "return -total")],
        ),
        (
            "half precision",
            "You compute in the logits' own precision: bfloat16 has three digits. Go to float32.",
            [("predicted = predicted.float()", "pass")],
        ),
        (
            "always float32",
            "You turn float64 logits into float32; wider precision is to be kept.",
            [("if predicted.dtype != torch.float64:", "if True:")],
        ),
        (
            "logarithm of softmax",
            "A softmax that rounds to 0 has the logarithm -inf. Use log_softmax or cross_entropy.",
            [
                (
                    'F.cross_entropy(predicted, following[asked], reduction="sum")',
                    "-predicted.softmax(-1).gather(-1, following[asked][:, None]).log().sum()",
                )
            ],
        ),
        (
            "softmax twice",
            "You normalise before cross_entropy, which takes raw logits and normalises itself.",
            [("F.cross_entropy(predicted,", "F.cross_entropy(predicted.softmax(-1),")],
        ),
    ),
    *mutants(
        "sft.pack",
        (
            "positions go on",
            "Your positions count through the row. Every dialogue begins at 0 again, as it would "
            "in a row of its own.",
            [
                (
                    "positions[r, here] = torch.arange(len(ids))",
                    "positions[r, here] = torch.arange(start, here.stop)",
                )
            ],
        ),
        (
            "first token asked",
            "A dialogue's first token keeps its label: the dialogue before it, which has nothing "
            "to do with it, would be asked to predict it.",
            [("labels[r, start] = IGNORE", "pass")],
        ),
        (
            "first label of the row only",
            "You take the first label away at the beginning of the row only; every dialogue has a "
            "first token that nothing predicts.",
            [("labels[r, start] = IGNORE", "labels[r, 0] = IGNORE")],
        ),
        (
            "segments from 1",
            "Your segments begin at 1; the first dialogue of a row is 0.",
            [("segments[r, here] = segment", "segments[r, here] = segment + 1")],
        ),
        (
            "segments of the batch",
            "Your segments number the dialogues of the whole batch, not those of a row.",
            [("segments[r, here] = segment", "segments[r, here] = i")],
        ),
        (
            "pads in dialogue 0",
            "Your pads have segment 0, as if they belonged to the row's first dialogue. It is -1.",
            [("torch.full(shape, -1)", "torch.zeros(shape, dtype=torch.long)")],
        ),
        (
            "pad_id ignored",
            "You pad with 0. The caller says which token is the pad.",
            [("torch.full(shape, pad_id)", "torch.zeros(shape, dtype=torch.long)")],
        ),
        (
            "pads learned",
            "Your pads have the label pad_id, so the model learns to write them. It is -100.",
            [("torch.full(shape, IGNORE)", "torch.full(shape, pad_id)")],
        ),
        (
            "as long as the context",
            "Your rows have the length of the context, with columns of pads alone: wasted work.",
            [("max(sum(lengths[i] for i in row) for row in rows))", "context)")],
        ),
        (
            "written over",
            "Every dialogue of a row is written to its beginning, over the one before.",
            [("start = here.stop", "pass")],
        ),
        (
            "labels shifted",
            "You shift the labels by one. The loss does that; a label stands on its own token.",
            [
                (
                    "labels[r, here] = torch.tensor(wanted)",
                    "labels[r, here] = torch.tensor([*wanted[1:], IGNORE])",
                )
            ],
        ),
        (
            "one dialogue a row",
            "You keep only the first dialogue of every row; the others are lost.",
            [("enumerate(row):", "enumerate(row[:1]):")],
        ),
        (
            "caller's labels",
            "You write -100 into the labels that were handed to you. Change your own tensor.",
            [
                (
                    "ids, wanted = examples[i]",
                    "ids, wanted = examples[i]\n            wanted[0] = IGNORE",
                )
            ],
        ),
        (
            "pads count on",
            "Your positions go on counting over the pads; there they are 0.",
            [
                (
                    "positions[r, here] = torch.arange(len(ids))",
                    "positions[r, start:] = torch.arange(shape[1] - start)",
                )
            ],
        ),
    ),
]
