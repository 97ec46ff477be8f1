"""Wrong answers to chapter 1's exercises, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant

# Right answers written by hand, for mistakes that the package's shorter ones leave no room for.
ATTENTION = """
scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
if attend is None:
    T, S = q.shape[2], k.shape[2]
    attend = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
weights = scores.masked_fill(~attend, -torch.inf).softmax(-1)
return F.dropout(weights, dropout) @ v
"""
SAMPLE = """
import torch
logits = logits.float()
if temperature == 0:
    logprobs, tokens = logits.log_softmax(-1).max(-1)
    return tokens, logprobs
logits = logits / temperature
if 0 < top_k < logits.shape[-1]:
    last = logits.topk(top_k, dim=-1).values[:, -1:]
    logits = logits.masked_fill(logits < last, -torch.inf)
if top_p < 1:
    ordered, order = logits.sort(dim=-1, descending=True)
    odds = ordered.softmax(-1)
    drop = odds.cumsum(-1) - odds >= top_p
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, -torch.inf)
    logits = torch.empty_like(logits).scatter_(-1, order, ordered)
logprobs = logits.log_softmax(-1)
tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)
return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]
"""


def altered(text, *edits):
    """The text with each `old`, which must occur once, replaced by its `new`."""
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits or body)."""
    made = []
    for name, says, change in rows:
        kind = "body" if isinstance(change, str) else "edits"
        made.append(Mutant(exercise, name, says=says, **{kind: change}))
    return made


MUTANTS = [
    *mutants(
        "gpt.causal_attention",
        (
            "no scale",
            "The scores are not divided by √d. They grow with the width, and the softmax becomes "
            "nearly hard.",
            altered(ATTENTION, (" / q.shape[-1] ** 0.5", "")),
        ),
        (
            "divided by d",
            "You divide the scores by d. It is the root of d that their spread grows with.",
            altered(ATTENTION, ("q.shape[-1] ** 0.5", "q.shape[-1]")),
        ),
        (
            "width of the whole batch",
            "You divide by the root of the number of positions; it is that of a head's width.",
            altered(ATTENTION, ("q.shape[-1] ** 0.5", "k.shape[2] ** 0.5")),
        ),
        (
            "sees the future",
            "Your positions see what comes after them: the model could copy the token it is to "
            "predict.",
            altered(ATTENTION, (".tril(S - T)", "")),
        ),
        (
            "not itself",
            "Your positions do not see themselves; the first one then sees nothing, and softmax "
            "over nothing is NaN.",
            altered(ATTENTION, (".tril(S - T)", ".tril(S - T - 1)")),
        ),
        (
            "one too many",
            "Your positions see one token of the future.",
            altered(ATTENTION, (".tril(S - T)", ".tril(S - T + 1)")),
        ),
        (
            "only the future",
            "Your triangle is the wrong way round: positions see what comes after them.",
            altered(ATTENTION, (".tril(S - T)", ".triu(S - T)")),
        ),
        (
            "upper left",
            "With a cache there are more keys than queries, and your triangle stands in the upper "
            "left corner (as `is_causal` puts it). The queries are the LAST positions.",
            "causal = attend is None\n"
            "return F.scaled_dot_product_attention(\n"
            "    q, k, v, attn_mask=attend, dropout_p=dropout, is_causal=causal)",
        ),
        (
            "upper left for several",
            "For a single query you are right, but several queries behind a cache get a triangle "
            "in the upper left corner. They are the LAST positions.",
            [("1 < q.shape[2] < k.shape[2]", "k.shape[2] < 0")],
        ),
        (
            "mask after the softmax",
            "You mask after the softmax: the weights no longer add up to 1.",
            altered(
                ATTENTION,
                (
                    ".masked_fill(~attend, -torch.inf).softmax(-1)",
                    ".softmax(-1).masked_fill(~attend, 0.0)",
                ),
            ),
        ),
        (
            "zero for minus infinity",
            "A masked score of 0 is still a weight of exp(0). It must be -inf.",
            altered(ATTENTION, ("~attend, -torch.inf", "~attend, 0.0")),
        ),
        (
            "causal as well",
            "You apply the causal rule on top of `attend`, which takes its place.",
            altered(
                ATTENTION,
                ("if attend is None:\n    T", "if True:\n    T"),
                ("attend = torch.ones(T", "rule = torch.ones(T"),
                (
                    "weights = scores",
                    "attend = rule if attend is None else rule & attend\nweights = scores",
                ),
            ),
        ),
        (
            "attend ignored",
            "`attend` changes nothing in your attention.",
            altered(ATTENTION, ("if attend is None:\n    T", "if True:\n    T")),
        ),
        (
            "attend upside down",
            "You read `attend` the wrong way round: True is where a query MAY look.",
            altered(
                ATTENTION,
                ("if attend is None:", "if attend is not None:\n    attend = ~attend\nelse:"),
            ),
        ),
        (
            "softmax over the queries",
            "Your softmax runs over the queries. The weights of one query add up to 1 over keys.",
            altered(ATTENTION, (".softmax(-1)", ".softmax(-2).nan_to_num(0.0)")),
        ),
        (
            "overflow",
            "exp of a large score is inf. Use softmax, which takes the largest score away first.",
            altered(
                ATTENTION,
                ("-torch.inf).softmax(-1)", "-torch.inf).exp()"),
                ("return", "weights = weights / weights.sum(-1, keepdim=True)\nreturn"),
            ),
        ),
        (
            "dropout forgotten",
            "`dropout` does nothing in your attention.",
            altered(ATTENTION, ("F.dropout(weights, dropout)", "weights")),
        ),
        (
            "dropout on the result",
            "Your dropout falls on the result. It is the weights that are dropped.",
            altered(
                ATTENTION, ("F.dropout(weights, dropout) @ v", "F.dropout(weights @ v, dropout)")
            ),
        ),
    ),
    *mutants(
        "gpt.Block.forward",
        (
            "no stream past attention",
            "What attention says REPLACES the stream. It has to be added to it.",
            [("x = x + self.drop(self.attention", "x = self.drop(self.attention")],
        ),
        (
            "no stream past the MLP",
            "What the MLP says REPLACES the stream. It has to be added to it.",
            [("return x + self.drop", "return self.drop")],
        ),
        (
            "norm behind",
            "You normalise the stream after adding (as the first Transformer did). GPT-2 "
            "normalises what a sub-layer reads, and leaves the stream alone.",
            "x = self.norm_1(x + self.drop(self.attention(x, attend, cache, layer)))\n"
            "return self.norm_2(x + self.drop(self.mlp(x)))",
        ),
        (
            "no norms",
            "Your sub-layers read the stream as it is. Each has a norm before it.",
            [("self.norm_1(x)", "x"), ("self.norm_2(x)", "x")],
        ),
        (
            "norm in the stream",
            "You add to the NORMALISED stream; the stream itself is what goes on.",
            "x = self.norm_1(x)\n"
            "x = x + self.drop(self.attention(x, attend, cache, layer))\n"
            "x = self.norm_2(x)\n"
            "return x + self.drop(self.mlp(x))",
        ),
        (
            "norm_1 twice",
            "Both sub-layers read norm_1. The MLP has a norm of its own, norm_2.",
            [("self.norm_2(x)", "self.norm_1(x)")],
        ),
        (
            "side by side",
            "Your MLP reads the stream as it was before attention. It comes second and reads the "
            "sum.",
            "attended = self.drop(self.attention(self.norm_1(x), attend, cache, layer))\n"
            "return x + attended + self.drop(self.mlp(self.norm_2(x)))",
        ),
        (
            "MLP first",
            "You run the MLP before attention.",
            "x = x + self.drop(self.mlp(self.norm_2(x)))\n"
            "return x + self.drop(self.attention(self.norm_1(x), attend, cache, layer))",
        ),
        (
            "attend lost",
            "`attend` does not reach the attention: packed dialogues and pads would be read.",
            [("attend, cache, layer)", "None, cache, layer)")],
        ),
        (
            "cache lost",
            "`cache` does not reach the attention: in generation it would see the newest token "
            "alone.",
            [("attend, cache, layer)", "attend, None, layer)")],
        ),
        (
            "layer lost",
            "`layer` does not reach the attention: all layers would write into the first one's "
            "cache.",
            [("attend, cache, layer)", "attend, cache)")],
        ),
        (
            "no dropout",
            "Your block never uses `self.drop`.",
            [("self.drop(self.attention", "(self.attention"), ("self.drop(self.mlp", "(self.mlp")],
        ),
        (
            "dropout on the stream",
            "Your dropout falls on the sum, so it tears holes into the stream. It belongs to what "
            "is added.",
            "x = self.drop(x + self.attention(self.norm_1(x), attend, cache, layer))\n"
            "return self.drop(x + self.mlp(self.norm_2(x)))",
        ),
        (
            "in place",
            "`x += …` writes into the tensor that was handed to you. Make a new one: x = x + ….",
            [("x = x + self.drop(self.attention", "x += self.drop(self.attention")],
        ),
    ),
    *mutants(
        "gpt.next_token_loss",
        (
            "no shift",
            "You compare position t with the token that stands at t, which it has just read. It "
            "predicts the one at t + 1.",
            [("logits[:, :-1], labels[:, 1:]", "logits[:, :-1], labels[:, :-1]")],
        ),
        (
            "shift the other way",
            "You shift the wrong way: position t is compared with the token before it.",
            [("logits[:, :-1], labels[:, 1:]", "logits[:, 1:], labels[:, :-1]")],
        ),
        (
            "shift by two",
            "You shift by two: position t is asked for the token at t + 2.",
            [("logits[:, :-1], labels[:, 1:]", "logits[:, :-2], labels[:, 2:]")],
        ),
        (
            "mean over all positions",
            "You divide by all positions, the ignored ones included.",
            [("(wanted != ignore).sum().clamp(min=1)", "max(wanted.numel(), 1)")],
        ),
        (
            "sum",
            "You return the sum, which grows with the batch. It is a mean per token.",
            [(" / (wanted != ignore).sum().clamp(min=1)", "")],
        ),
        (
            "mean of rows' means",
            "You average row by row and then over the rows, so a token of a short row weighs more. "
            "The mean is over tokens.",
            "rows = []\n"
            "for row, wanted in zip(logits[:, :-1], labels[:, 1:]):\n"
            "    if (wanted != ignore).any():\n"
            "        rows.append(F.cross_entropy(row, wanted, ignore_index=ignore))\n"
            "return sum(rows, logits.new_zeros(())) / max(len(rows), 1)",
        ),
        (
            "nothing counted",
            "Where nothing is counted you divide 0 by 0; the loss is 0 there.",
            [(".sum().clamp(min=1)", ".sum()")],
        ),
        (
            "first label counted",
            "You count the labels before the shift: the first of a row is asked of nobody, and "
            "makes the mean too small.",
            [("(wanted != ignore).sum()", "(labels != ignore).sum()")],
        ),
        (
            "ignore forgotten",
            "You leave out -100 whatever `ignore` says.",
            [("ignore_index=ignore", "ignore_index=-100"), ("wanted != ignore", "wanted != -100")],
        ),
        (
            "negative",
            "You return the log-likelihood. A loss is its negative.",
            [("return total", "return -total")],
        ),
        (
            "bits",
            "You measure in bits. A nat is the natural logarithm's unit.",
            [("return total", "return total / 0.6931471805599453")],
        ),
        (
            "softmax twice",
            "You normalise before cross_entropy, which takes raw logits and normalises itself.",
            [("predicted.flatten(0, 1)", "predicted.flatten(0, 1).softmax(-1)")],
        ),
        (
            "logarithm of softmax",
            "A softmax that rounds to 0 has the logarithm -inf. Use log_softmax or cross_entropy.",
            "odds, wanted = logits[:, :-1].softmax(-1), labels[:, 1:]\n"
            "keep = wanted != ignore\n"
            "each = -odds[keep].gather(-1, wanted[keep][:, None]).log()\n"
            "return each.sum() / keep.sum().clamp(min=1)",
        ),
    ),
    *mutants(
        "gpt.sample_token",
        (
            "temperature upside down",
            "You multiply by the temperature. A high one must flatten the distribution: divide.",
            altered(SAMPLE, ("logits / temperature", "logits * temperature")),
        ),
        (
            "temperature of the probabilities",
            "You divide the probabilities by the temperature, and normalising undoes that. It is "
            "the logits that are divided.",
            altered(
                SAMPLE,
                (
                    "logits = logits / temperature",
                    "logits = (logits.softmax(-1) / temperature).log()",
                ),
            ),
        ),
        (
            "log-probs of the model",
            "The tokens are right, but the log-probs are the untempered model's. PPO needs those "
            "of the distribution that was drawn from.",
            altered(
                SAMPLE,
                (
                    "logits = logits / temperature",
                    "model = logits.log_softmax(-1)\nlogits = logits / temperature",
                ),
                ("logprobs.gather(-1, tokens)", "model.gather(-1, tokens)"),
            ),
        ),
        (
            "log-probs before the cut",
            "The log-probs are those before top_k and top_p. What is left is a distribution of its "
            "own, with larger probabilities.",
            altered(
                SAMPLE,
                (
                    "logits = logits / temperature",
                    "logits = logits / temperature\nwhole = logits.log_softmax(-1)",
                ),
                ("logprobs.gather(-1, tokens)", "whole.gather(-1, tokens)"),
            ),
        ),
        (
            "probabilities",
            "You return probabilities where log-probs are asked for.",
            altered(
                SAMPLE,
                ("logprobs.gather(-1, tokens)[:, 0]", "logprobs.exp().gather(-1, tokens)[:, 0]"),
            ),
        ),
        (
            "temperature 0 draws",
            "Temperature 0 is not handled: you divide by 0.",
            altered(SAMPLE, ("temperature == 0", "temperature < 0")),
        ),
        (
            "greedy is certain",
            "At temperature 0 you return the log-prob 0. Asked for is the untempered model's.",
            altered(SAMPLE, ("return tokens, logprobs", "return tokens, logprobs * 0")),
        ),
        (
            "always greedy",
            "You always take the likeliest token. Nothing is drawn.",
            altered(
                SAMPLE,
                (
                    "torch.multinomial(logprobs.exp(), 1, generator=generator)",
                    "logprobs.argmax(-1, keepdim=True)",
                ),
            ),
        ),
        (
            "all alike",
            "All tokens that are left come equally often. Draw with their probabilities.",
            altered(SAMPLE, ("logprobs.exp(), 1,", "logprobs.isfinite().float(), 1,")),
        ),
        (
            "drawn with log-probs",
            "multinomial takes probabilities. You hand it logits, with the least subtracted.",
            altered(
                SAMPLE,
                (
                    "logprobs.exp(), 1,",
                    "(logits - logits.clamp(min=-50).amin() + 1)"
                    ".clamp(min=0) * logprobs.isfinite(), 1,",
                ),
            ),
        ),
        (
            "k + 1",
            "Your top_k keeps one token too many.",
            altered(SAMPLE, ("topk(top_k, dim=-1)", "topk(top_k + 1, dim=-1)")),
        ),
        (
            "k - 1",
            "Your top_k drops the k-th token itself: only what is BELOW it goes.",
            altered(
                SAMPLE, ("logits < last", "(logits <= last) & (logits < logits.amax(1)[:, None])")
            ),
        ),
        (
            "ties dropped",
            "Your top_k keeps exactly k tokens. What ties with the last of them stays too.",
            altered(
                SAMPLE,
                (
                    "last = logits.topk(top_k, dim=-1).values[:, -1:]",
                    "kept = torch.full_like(logits, -torch.inf)",
                ),
                (
                    "logits = logits.masked_fill(logits < last, -torch.inf)",
                    "best = logits.topk(top_k, dim=-1)\n"
                    "    logits = kept.scatter_(-1, best.indices, best.values)",
                ),
            ),
        ),
        (
            "top_k ignored",
            "`top_k` changes nothing in what you draw.",
            altered(SAMPLE, ("if 0 < top_k <", "if logits.shape[-1] < 0 < top_k <")),
        ),
        (
            "top_p too small",
            "Your nucleus lacks the token with which its probability reaches p.",
            altered(SAMPLE, ("odds.cumsum(-1) - odds >= top_p", "odds.cumsum(-1) > top_p")),
        ),
        (
            "top_p too large",
            "Your nucleus has one token too many: it ends with the one that reaches p.",
            altered(
                SAMPLE,
                (
                    "odds.cumsum(-1) - odds >= top_p",
                    "odds.cumsum(-1) - odds - odds.roll(1, -1) >= top_p",
                ),
            ),
        ),
        (
            "top_p of each token",
            "You keep the tokens whose own probability is p or more. It is their sum that counts.",
            altered(SAMPLE, ("odds.cumsum(-1) - odds >= top_p", "odds < top_p")),
        ),
        (
            "top_p 0 keeps nothing",
            "With a small top_p you keep nothing. The likeliest token always stays.",
            altered(SAMPLE, ("drop[:, 0] = False", "pass")),
        ),
        (
            "top_p of all tokens",
            "Your top_p counts the mass of all tokens. It comes after top_k and counts what that "
            "has left.",
            altered(
                SAMPLE,
                (
                    "logits = logits / temperature",
                    "logits = logits / temperature\nall_odds = logits.softmax(-1)",
                ),
                ("odds = ordered.softmax(-1)", "odds = all_odds.gather(-1, order)"),
            ),
        ),
        (
            "order not undone",
            "After sorting, you do not bring the logits back: you draw ranks, not tokens.",
            altered(SAMPLE, ("torch.empty_like(logits).scatter_(-1, order, ordered)", "ordered")),
        ),
        (
            "first row's order",
            "You cut all rows by the first row's order. Each has its own.",
            altered(
                SAMPLE,
                (
                    "scatter_(-1, order, ordered)",
                    "scatter_(-1, order[:1].expand_as(order), ordered)",
                ),
            ),
        ),
        (
            "generator ignored",
            "You do not hand the generator on: the draws cannot be repeated.",
            altered(SAMPLE, (", generator=generator", "")),
        ),
        (
            "in place",
            "`logits /= temperature` writes into the tensor that was handed to you.",
            altered(SAMPLE, ("logits = logits / temperature", "logits /= temperature")),
        ),
        (
            "one column",
            "Your tokens are one column, (B, 1). They are a vector, (B,).",
            altered(SAMPLE, ("return tokens[:, 0], logprobs", "return tokens, logprobs")),
        ),
    ),
    *mutants(
        "gpt.generate",
        (
            "first position",
            "You predict from the first position of what was read. What comes next is told by the "
            "LAST.",
            [("cache)[:, -1]", "cache)[:, 0]")],
        ),
        (
            "mask lost",
            "You do not hand `attend` on: short prompts then read the pads before them.",
            [("*read, cache)", "read[0], None, read[2], cache)")],
        ),
        (
            "positions lost",
            "You do not hand the positions on: the tokens of short prompts stand where the pads "
            "have shifted them.",
            [("*read, cache)", "read[0], read[1], None, cache)")],
        ),
        (
            "no cache",
            "You read the newest token without the cache, so the model has forgotten the rest.",
            "read = batch.prompts()\n"
            "for _ in range(max_new_tokens):\n"
            "    hidden = model.hidden_states(read[0], None, None)[:, -1]\n"
            "    new, logp = sample_token(\n"
            "        model.unembed(hidden), temperature, top_k, top_p, generator)\n"
            "    for row, (token, lp) in enumerate(zip(new.tolist(), logp.tolist())):\n"
            "        if not finished[row]:\n"
            "            responses[row].append(token)\n"
            "            logprobs[row].append(lp)\n"
            "            finished[row] = token == eos_id\n"
            "    if all(finished):\n"
            "        break\n"
            "    read = batch.append(new)",
        ),
        (
            "read again",
            "You read the whole sequence anew at every step, on top of a cache that already holds "
            "it. Behind the prompts only the newest token is read.",
            "import torch\n"
            "tokens, attend, positions = batch.prompts()\n"
            "for _ in range(max_new_tokens):\n"
            "    fresh = model.new_cache(len(part), tokens.shape[1])\n"
            "    hidden = model.hidden_states(tokens, attend, positions, fresh)[:, -1]\n"
            "    new, logp = sample_token(\n"
            "        model.unembed(hidden), temperature, top_k, top_p, generator)\n"
            "    for row, (token, lp) in enumerate(zip(new.tolist(), logp.tolist())):\n"
            "        if not finished[row]:\n"
            "            responses[row].append(token)\n"
            "            logprobs[row].append(lp)\n"
            "            finished[row] = token == eos_id\n"
            "    if all(finished):\n"
            "        break\n"
            "    tokens = torch.cat([tokens, new[:, None]], 1)\n"
            "    batch.append(new)\n"
            "    column = torch.arange(tokens.shape[1])\n"
            "    positions = (column - batch.pads[:, None]).clamp(min=0)\n"
            "    attend = (column >= batch.pads[:, None])[:, None] & (column <= column[:, None])\n"
            "    attend = (attend | (column == column[:, None]))[:, None]",
        ),
        (
            "the likeliest goes on",
            "You go on from the likeliest token and not from the one that was drawn.",
            [
                (
                    "read = batch.append(new)",
                    "best = logits.argmax(-1)\n"
                    "                best = best if len(best) == len(new) else best[keep]\n"
                    "                read = batch.append(best)",
                )
            ],
        ),
        (
            "EOS left out",
            "You leave the EOS out of the answer. It belongs to it, an action like any other.",
            [
                (
                    "if not finished[row]:",
                    "finished[row] = finished[row] or token == eos_id\n"
                    "                    if not finished[row]:",
                ),
                ("                        finished[row] = token == eos_id\n", ""),
            ],
        ),
        (
            "no end",
            "You do not stop at EOS: answers go on until max_new_tokens.",
            [("finished[row] = token == eos_id", "finished[row] = False")],
        ),
        (
            "behind the EOS",
            "A row that has finished goes on collecting tokens while others are at work.",
            [
                ("if not finished[row]:\n", "if True:\n"),
                (
                    "finished[row] = token == eos_id",
                    "finished[row] = finished[row] or token == eos_id",
                ),
                ("if len(running) <= len(alive) // 2:", "if False:"),
            ],
        ),
        (
            "all stop together",
            "You stop all rows as soon as one of them has finished.",
            [("if not running:", "if len(running) < len(alive):")],
        ),
        (
            "rows mixed up",
            "After finished rows were dropped, you write tokens to the wrong rows: the batch has "
            "become shorter, and row i of it is no longer prompt i.",
            [("for row, token, lp in zip(alive,", "for row, token, lp in zip(range(len(alive)),")],
        ),
        (
            "cache not selected",
            "You drop finished rows from the tokens but not from the cache, or the other way "
            "round.",
            [("cache.select(keep)", "pass")],
        ),
        (
            "limit at the end",
            "You report `finished` for answers that ran into max_new_tokens. Only EOS finishes.",
            [
                (
                    "read = batch.append(new)",
                    "read = batch.append(new)\n"
                    "            if len(responses[alive[0]]) == max_new_tokens:\n"
                    "                finished[:] = [True] * len(part)",
                )
            ],
        ),
        (
            "one token short",
            "Your answers are one token shorter than max_new_tokens allows.",
            [("in range(max_new_tokens)", "in range(max_new_tokens - 1)")],
        ),
        (
            "settings not handed on",
            "temperature, top_k and top_p do not reach the sampling.",
            [
                (
                    "sample_token(logits, temperature, top_k, top_p, generator)",
                    "sample_token(logits, generator=generator)",
                )
            ],
        ),
        (
            "top_p not handed on",
            "`top_p` does not reach the sampling.",
            [("top_k, top_p, generator)", "top_k, 1.0, generator)")],
        ),
        (
            "top_k not handed on",
            "`top_k` does not reach the sampling.",
            [("top_k, top_p, generator)", "0, top_p, generator)")],
        ),
        (
            "generator not handed on",
            "The generator does not reach the sampling: a seed does not repeat its answers.",
            [("top_k, top_p, generator)", "top_k, top_p)")],
        ),
        (
            "works on in vain",
            "You go on until max_new_tokens although every row has finished.",
            [
                ("if not running:", "if False:"),
                ("if len(running) <= len(alive) // 2:", "if 0 < len(running) <= len(alive) // 2:"),
            ],
        ),
        (
            "all prompts in every batch",
            "You answer `prompts` in every batch. A batch has only the prompts in `part`.",
            [
                (
                    "read = batch.prompts()",
                    "responses[:] = [[] for _ in prompts]\n"
                    "            logprobs[:] = [[] for _ in prompts]\n"
                    "            finished[:] = [False] * len(prompts)\n"
                    "            read = batch.prompts()",
                )
            ],
        ),
    ),
]
