"""Runs on the answer's side what cannot cross to it: modules, models and generators from seeds."""

import torch
from torch import nn

from rlhf_course.gpt import GPT, GPTConfig

VOCABULARY, CONTEXT = 11, 24


# ------------------------------------------------------------------------------- causal_attention


def attention_with_dropout(namespace, seed, keys, share):
    """One query, `keys` keys that all get the same weight and hold the value 1: (8, 4)."""
    torch.manual_seed(seed)
    q, k, v = torch.zeros(8, 4, 1, 2), torch.zeros(8, 4, keys, 2), torch.ones(8, 4, keys, 2)
    return namespace.causal_attention(q, k, v, dropout=share)[:, :, 0, 0]


# ------------------------------------------------------------------------------------------ Block


class Mixing(nn.Module):
    """In place of attention: every position gets the mean of those it may see, times a matrix."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.heard = weight, []

    def forward(self, x, attend=None, cache=None, layer=0):
        self.heard.append((attend, cache, layer))
        return mean_of_the_past(x) @ self.weight


class Bending(nn.Module):
    """In place of the MLP: tanh of a matrix product."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return 1.0 * torch.tanh(x @ self.weight)  # tanh's own result must not be written to


class Saying(nn.Module):
    """In place of a sub-layer: the same number everywhere, whatever it hears."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x, *args, **kwargs):
        return torch.full_like(x, self.number)


def mean_of_the_past(x):
    """(B, T, D) -> (B, T, D): at t the mean over 0 … t."""
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return x.cumsum(1) / count[:, None]


def block_of(namespace, weights):
    """The answer's block with these norms, and with `mixing` and `bending` for its sub-layers."""
    block = namespace.Block(GPTConfig(VOCABULARY, layers=1, heads=1, width=len(weights["mixing"])))
    for name in ("norm_1", "norm_2"):
        norm = getattr(block, name)
        norm.weight.data, norm.bias.data = weights[name]
    block.attention, block.mlp = Mixing(weights["mixing"]), Bending(weights["bending"])
    return block


def through_block(namespace, weights, x, cotangent):
    """(whether the block wrote into x, its result, its gradient by x along the cotangent)."""
    block, own = block_of(namespace, weights), x.clone()
    with torch.no_grad():
        out = block(own)
    if own._version:  # counts the writes; there is no gradient by what was overwritten
        return True, out, None
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((block(start) * cotangent).sum(), start)
    return False, out, gradient


def what_attention_hears(namespace, weights, attend, layer):
    """Calls of the attention, whether the mask and the cache were those handed in, the layer."""
    block, cache = block_of(namespace, weights), object()
    block(torch.zeros(1, 2, len(weights["mixing"])), attend, cache, layer)
    heard = block.attention.heard
    mask, kept, told = heard[-1]
    return len(heard), mask is not None and torch.equal(mask, attend), kept is cache, told


def dropped(namespace, seed):
    """What a block with dropout 0.5 adds to a stream, where attention says 1 and the MLP 10."""
    torch.manual_seed(seed)
    block = namespace.Block(GPTConfig(VOCABULARY, layers=1, heads=1, width=8, dropout=0.5))
    block.attention, block.mlp = Saying(1.0), Saying(10.0)
    return block.train()(torch.full((8, 8, 8), 0.25)) - 0.25


# ----------------------------------------------------------------------------------- sample_token


def draw(namespace, logits, seed, temperature=1.0, top_k=0, top_p=1.0):
    """(tokens, log-probs, the logits as they were left, whether torch's own generator was used)."""
    own, before = logits.clone(), torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(seed)
    tokens, logprobs = namespace.sample_token(own, temperature, top_k, top_p, generator)
    elsewhere = not torch.equal(before, torch.random.get_rng_state())
    return tokens, logprobs, own, elsewhere


# --------------------------------------------------------------------------------------- generate


def small_model(seed):
    """A random GPT whose context and positions matter: two layers, two heads, width 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(VOCABULARY, CONTEXT, layers=2, heads=2, width=16))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5)
    return model.eval()


def answers(namespace, seed, prompts, limit, eos, how, batch_size=None, draw_seed=0):
    """(responses, log-probs, finished, the shapes of all tokens that the model was given)."""
    model, read = small_model(seed), []
    hidden_states = model.hidden_states

    def listening(tokens, *args, **kwargs):
        read.append(list(tokens.shape))
        return hidden_states(tokens, *args, **kwargs)

    model.hidden_states = listening
    generator = torch.Generator().manual_seed(draw_seed)
    out = namespace.generate(
        model, prompts, limit, eos, generator=generator, batch_size=batch_size, **how
    )
    return out.responses, out.logprobs, out.finished, read
