"""What the device holds in which precision, and which path attention takes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rlhf_course import device as device_module
from rlhf_course.device import Device, casts_kept, keep_freed_memory
from rlhf_course.reward_model import ScalarModel
from rlhf_course.sft import segment_mask
from rlhf_course.stages.settings import SFTConfig
from rlhf_course.stages.setup import device_of
from tests.tiny_models import KINDS, VOCABULARY, tiny

CPU = torch.device("cpu")
TOKENS = torch.arange(40).view(2, 20) % VOCABULARY


def test_lowered_models_say_the_same_to_the_last_bit():
    tokens = torch.arange(40).view(2, 20) % VOCABULARY
    for kind in KINDS:
        device = Device(CPU, torch.bfloat16, 1)
        plain = device.place(tiny(kind)).requires_grad_(False).eval()
        low = device.lower(copy.deepcopy(plain))
        assert torch.equal(low(tokens), plain(tokens))
        kinds = {p.dtype for p in low.parameters()}
        assert kinds == {torch.float32, torch.bfloat16}
        reward = ScalarModel.from_language_model(plain).requires_grad_(False)
        scores = reward.token_scores(tokens)
        assert torch.equal(device.lower(reward).token_scores(tokens), scores)
        assert reward.head.weight.dtype == torch.float32
        alone = Device(CPU, None, 1).lower(tiny(kind))
        assert {p.dtype for p in alone.parameters()} == {torch.float32}


def test_casts_live_until_the_outermost_block_ends(monkeypatch):
    """Autocast forgets its copies when the last block is left, and only then."""
    model = Device(CPU, torch.bfloat16, 1).place(tiny("gpt")).eval()
    forgotten = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: forgotten.append(1) or clear())
    with torch.no_grad():
        plain = [model(TOKENS) for _ in range(3)]
        assert len(forgotten) == 3
        with casts_kept(model):
            kept = [model(TOKENS) for _ in range(3)]
            assert len(forgotten) == 3
        assert len(forgotten) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.fixture
def attention(monkeypatch):
    """(mask is None, is_causal) of every call of the attention kernel."""
    calls, kernel = [], F.scaled_dot_product_attention

    def watch(*args, **kwargs):
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        calls.append((mask is None, kwargs.get("is_causal", False)))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_right_padded_rows_need_no_mask_and_may_take_flash_attention(kind, attention):
    """Causal rows with pads on the right: training, scoring, and a step of even prompts."""
    model = tiny(kind)
    model.hidden_states(TOKENS)
    assert attention == [(True, True)] * 2  # two layers
    attention.clear()
    cache = model.new_cache(2, 24)
    with torch.no_grad():
        model.hidden_states(TOKENS, None, None, cache)
        model.hidden_states(TOKENS[:, :1], None, None, cache)
    assert attention == [(True, True)] * 2 + [(True, False)] * 2
    attention.clear()
    model.hidden_states(TOKENS, segment_mask(torch.zeros(2, 20)))
    assert attention == [(False, False)] * 2


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    """M_MMAP_MAX 0 and the largest M_TRIM_THRESHOLD, by their numbers in malloc.h."""
    calls = []

    class CLibrary:
        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(device_module.ctypes, "CDLL", lambda name: CLibrary())
    device_of(SFTConfig(device="cpu"))
    assert calls == [(-4, 0), (-1, 2**31 - 1)]


@pytest.mark.parametrize("missing", [OSError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch, missing):
    def absent(name):
        raise missing(name)

    monkeypatch.setattr(device_module.ctypes, "CDLL", absent)
    keep_freed_memory()
