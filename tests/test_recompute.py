"""Gradient checkpointing: the same loss, the same gradient, fewer bytes kept."""

import pytest
import tiny_families
import torch
from tiny_families import FAMILIES
from tiny_models import tiny

from rlhf_course.adapters import LoRA
from rlhf_course.gpt import GPT, GPTConfig, next_token_loss
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.recompute import checkpoint_blocks
from rlhf_course.reward_model import ScalarModel
from rlhf_course.sampling import generate

TOKENS = torch.randint(6, 60, (4, 40), generator=torch.Generator().manual_seed(2))


def loss_of(model) -> torch.Tensor:
    if isinstance(model, ScalarModel):
        return model.token_scores(TOKENS).square().mean()
    return next_token_loss(model(TOKENS), TOKENS)


def measured(model) -> tuple[torch.Tensor, dict, int]:
    """(loss, gradients, bytes that the forward pass keeps for the backward pass, without those of
    the weights)."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model)
    loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, sum(kept.values())


def models():
    """Name -> a model of four blocks in training mode."""
    torch.manual_seed(0)
    made = {"gpt": GPT(GPTConfig(61, 48, layers=4, heads=2, width=32))}
    for name in ("gpt2", "pythia", "qwen3", "gemma3"):
        family = FAMILIES[name]
        depth = {"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}
        kinds = (
            {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3" else {}
        )
        family = family._replace(config=family.config | depth | kinds)
        torch.manual_seed(0)
        model = HuggingFaceLM(tiny_families.model_of(family, 61))
        made[name] = model
    made["adapter"] = HuggingFaceLM(tiny_families.model_of(family, 61))
    made["adapter"].adapt(LoRA(2))
    made["critic"] = ScalarModel.from_language_model(made["qwen3"])
    return {name: model.train() for name, model in made.items()}


NAMES = ("gpt", "gpt2", "pythia", "qwen3", "gemma3", "adapter", "critic")


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_stay_and_memory_falls(name):
    model = models()[name]
    loss, grads, before = measured(model)
    checkpoint_blocks(model)
    again, recomputed, after = measured(model)
    assert torch.equal(again, loss)
    assert grads.keys() == recomputed.keys() and len(grads) > 4
    for key, grad in grads.items():
        torch.testing.assert_close(recomputed[key], grad, atol=1e-7, rtol=1e-5)
    assert sum(g.abs().sum() for g in grads.values()) > 0.01
    assert after < before / 2, f"{before} bytes before, {after} after"


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_sampling_in_the_midst_of_training_is_what_it_was(kind):
    model, prompts = tiny(kind).train(), [[7, 8, 9], [10, 11]]
    wanted = generate(model, prompts, 8, -1, temperature=0)
    checkpoint_blocks(model)
    said = generate(model, prompts, 8, -1, temperature=0)
    assert said.responses == wanted.responses
    assert model.training


@pytest.mark.parametrize("name", NAMES)
def test_a_model_as_it_was_loaded_saves_memory_too(name):
    """transformers loads models in evaluation mode, in which its blocks keep everything."""
    model = models()[name].eval()
    loss, _, before = measured(model)
    checkpoint_blocks(model)
    again, _, after = measured(model)
    assert torch.equal(again, loss)
    assert after < before / 2, f"{before} bytes before, {after} after"


def test_what_is_frozen_stays_in_evaluation_mode():
    model = tiny("llama").eval().requires_grad_(False)
    checkpoint_blocks(model)
    assert not model.training and not model.model.training
