"""Rollout engines: real vLLM processes, and real broadcasts into them."""

import contextlib
import importlib.util
import math
import os
import signal
import time
from datetime import timedelta
from unittest import mock

import pytest
import tiny_models
import torch
import torch.distributed as dist
from tested_engine import TestedEngine
from torch import multiprocessing

from rlhf_course import mdp
from rlhf_course.distributed import channels
from rlhf_course.distributed.channels import StaleWeights, SyncError, make_channel
from rlhf_course.distributed.engine import verify_greedy
from rlhf_course.distributed.engine_processes import start_engines
from rlhf_course.distributed.weight_sync import sync_weights
from rlhf_course.errors import ConfigError, ModelError, TrainingError
from rlhf_course.gpt import GPT
from rlhf_course.gpt2_format import huggingface_tensor
from rlhf_course.padding import pad_rows
from rlhf_course.rollout import action_logprobs
from rlhf_course.sampling import generate

pytestmark = [pytest.mark.xdist_group("engines")]

EOS, NEW, CONTEXT = 5, 20, 320
PROMPTS = [[7 + i % 40, 9, 11 + i][: 1 + i % 3] for i in range(24)]
LONG = [i % 50 for i in range(200)]  # vLLM caches blocks of 128 tokens on a CPU


def model_of(kind, seed=0):
    """vLLM's attention on a CPU wants heads of 32 dimensions or more."""
    with mock.patch.multiple(tiny_models, WIDTH=64, CONTEXT=CONTEXT):
        return tiny_models.tiny(kind, seed).eval()


def weights_of(model):
    """(Hugging Face's name, function that gives the tensor), as a trainer sends them."""
    if isinstance(model, GPT):
        named = [huggingface_tensor(*named) for named in model.named_parameters()]
    else:
        named = model.model.named_parameters()
    return [(name, lambda tensor=tensor: tensor) for name, tensor in named]


def lent(model):
    """The same from tensors that are gone when the next one is made, as ZeRO-3's are."""
    for name, gather in weights_of(model):
        tensor = gather().detach().clone()
        yield name, lambda tensor=tensor: tensor
        tensor.fill_(torch.nan)


def greedy_of(model, prompts=PROMPTS):
    return generate(model, prompts, NEW, eos_id=-1, temperature=0.0).responses


def side_by_side(prompts, responses):
    """(tokens, mask), as a trainer scores them."""
    lengths = [torch.tensor([len(row) for row in rows]) for rows in (prompts, responses)]
    tokens = pad_rows([p + r for p, r in zip(prompts, responses, strict=True)])
    return tokens, mdp.action_mask(*lengths, tokens.shape[1])


def verify(model, responses, prompts=PROMPTS):
    tokens, mask = side_by_side(prompts, responses)
    with torch.no_grad():
        verify_greedy(model(tokens), tokens, mask)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Name -> EngineProcess, with the answers it gave before any sync. "packed" is a second engine
    of the GPT that takes weights in a way that does not work."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: `rlhf-course doctor` says how to get it")
    settings = {}
    for number, name in enumerate((*tiny_models.KINDS, "packed")):
        folder = tmp_path_factory.mktemp(name)
        model_of("gpt" if name == "packed" else name).save_pretrained(folder)
        settings[name] = {"model_dir": folder, "max_model_len": CONTEXT, "seed": number}
    settings["packed"]["worker"] = "packed_receiver.PackedReceiver"
    started = start_engines(settings, TestedEngine)
    try:
        for engine in started.values():
            engine.sampled = engine.ask("generate", PROMPTS, NEW, 0.7, EOS, 3, 0)
            engine.limit_s = 60.0  # it has started
            engine.greedy = engine.ask("greedy", PROMPTS, NEW)
        yield started
    finally:
        for engine in started.values():
            engine.pipe.close()


def connect(*engines, timeout_s=30.0):
    return make_channel("gloo", [engine.call for engine in engines], timeout_s=timeout_s)


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_an_engine_answers_as_our_model_does(engines, kind):
    model, out = model_of(kind), engines[kind].sampled
    assert engines[kind].greedy == greedy_of(model)
    tokens, mask = side_by_side(PROMPTS, out["responses"])
    with torch.no_grad():
        logprobs, _ = action_logprobs(model, tokens, mask, temperature=0.7)
    said = torch.tensor([x for row in out["logprobs"] for x in row])
    torch.testing.assert_close(said, logprobs[mask], atol=1e-4, rtol=0)
    assert out["version"] == 0
    assert 0 < out["seconds"] < 60


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_an_answer_ends_with_the_eos_or_at_its_length(engines, kind):
    out = engines[kind].sampled
    assert {True, False} == set(out["finished"])
    for response, finished in zip(out["responses"], out["finished"], strict=True):
        assert response.count(EOS) == int(finished)
        assert response[-1] == EOS if finished else len(response) == NEW


def test_answers_follow_from_the_seed_of_the_call_and_of_the_engine(engines):
    engine, rest = engines["llama"], (NEW, 1.0, EOS)
    # So many that vLLM reads them in several steps; in fewer, if some were in its cache already.
    prompts = [[i, *LONG] for i in range(60)]
    first = engine.ask("generate", prompts, *rest, 3)
    again = engine.ask("generate", prompts, *rest, 3)
    assert again["responses"] == first["responses"]
    assert again["logprobs"] == first["logprobs"]
    assert engine.ask("generate", prompts, *rest, 4)["responses"] != first["responses"]
    assert engines["packed"].sampled["responses"] != engines["gpt"].sampled["responses"]


def test_answers_are_drawn_from_the_distribution_they_claim(engines):
    count, prompt = 4000, [7, 9, 11]
    out = engines["qwen2"].ask("generate", [prompt] * count, 1, 0.7, EOS, 0)
    with torch.no_grad():
        logits = model_of("qwen2")(torch.tensor([prompt]))[0, -1] / 0.7
    if out["version"]:
        pytest.skip("the engine has other weights by now")
    wanted = count * logits.softmax(-1)
    seen = torch.bincount(torch.tensor(out["responses"])[:, 0], minlength=len(wanted))
    often = wanted > 5
    assert often.sum() > 10
    chi_square = ((seen - wanted).square() / wanted)[often].sum()
    assert chi_square < often.sum() + 5 * (2 * often.sum()).sqrt()  # mean and 5 deviations


def test_what_does_not_fit_is_refused(engines):
    with pytest.raises(ModelError, match="exceed the context"):
        engines["gpt"].ask("generate", [LONG], CONTEXT - 199, 1.0, EOS, 0)
    with pytest.raises(ModelError, match="empty prompt"):
        engines["gpt"].ask("greedy", [[]], 1)
    assert len(engines["gpt"].ask("greedy", [LONG], CONTEXT - 200)[0]) == CONTEXT - 200


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_after_each_sync_an_engine_answers_as_the_new_model(engines, kind):
    engine, before = engines[kind], engines[kind].greedy
    buckets = []

    def call(method, *args):
        if method == "receive":
            buckets.append(args[0])
        return engine.call(method, *args)

    channel = make_channel("gloo", [call], timeout_s=30.0)
    for version in (1, 2, 3):
        model = model_of(kind, seed=version)
        names = [name for name, _ in weights_of(model)]
        buckets.clear()
        # The embedding alone is larger than a bucket; the rest fills several.
        with mock.patch.object(channels, "BUCKET", 15000):
            assert sync_weights(lent(model), version, channel) == len(names)
        assert [name for bucket in buckets for name, *_ in bucket] == names
        sizes = [[4 * math.prod(shape) for _, _, shape, _ in bucket] for bucket in buckets]
        assert all(len(bucket) == 1 or sum(bucket) <= 15000 for bucket in sizes)
        assert max(map(len, buckets)) > 1
        after = engine.ask("greedy", PROMPTS, NEW, version)
        assert after == greedy_of(model) != before
        verify(model, after)
        assert engine.ask("generate", PROMPTS[:2], 4, 1.0, EOS, 0)["version"] == version
        before = after


def test_a_sync_empties_the_cache_of_the_old_weights(engines):
    engine = engines["llama"]
    channel = connect(engine)
    sync_weights(weights_of(model_of("llama", 4)), 4, channel)
    assert [engine.ask("cached_tokens", LONG) for _ in range(2)] == [0, 128]
    model = model_of("llama", 5)
    sync_weights(weights_of(model), 5, channel)
    assert engine.ask("cached_tokens", LONG) == 0
    assert engine.ask("greedy", [LONG], NEW) == greedy_of(model, [LONG])


def test_the_greedy_check_sees_a_head_that_kept_its_old_weights(engines):
    good, packed = engines["gpt"], engines["packed"]
    verify(model_of("gpt"), packed.greedy)  # what it read from its directory is right
    channel, model = connect(good, packed), model_of("gpt", seed=6)
    sync_weights(weights_of(model), 6, channel)
    verify(model, good.ask("greedy", PROMPTS, NEW, 6))
    said = packed.ask("greedy", PROMPTS, NEW, 6)  # no complaint, and new answers
    assert said != packed.greedy
    with pytest.raises(StaleWeights, match="computes with other weights"):
        verify(model, said)


def test_without_complete_weights_or_with_others_an_engine_refuses(engines):
    engine, model = engines["gpt"], model_of("gpt", seed=7)
    channel = connect(engine)
    sync_weights(weights_of(model), 7, channel)
    with pytest.raises(StaleWeights, match="holds weights 7"):
        engine.ask("generate", PROMPTS, NEW, 1.0, EOS, 0, 6)
    with pytest.raises(StaleWeights, match="wanted were 8"):
        engine.ask("greedy", PROMPTS, NEW, 8)
    *most, last = weights_of(model)
    channel.begin(8)
    for version in (None, 7, 8):
        with pytest.raises(StaleWeights, match="incomplete"):
            engine.ask("greedy", PROMPTS, NEW, version)
    for name, gather in most:
        channel.send(name, gather())
    with pytest.raises(SyncError, match=r"engine 0: .*1 parameters did not come: .*ln_f\.bias"):
        channel.finish(8)
    with pytest.raises(StaleWeights, match="incomplete"):
        engine.ask("generate", PROMPTS, NEW, 1.0, EOS, 0)
    channel.send(most[0][0], most[0][1]())  # what came before the begin does not count
    channel.begin(8)
    channel.send(last[0], last[1]())
    with pytest.raises(SyncError, match="27 parameters did not come"):
        channel.finish(8)
    sync_weights(weights_of(model), 8, channel)
    assert engine.ask("greedy", PROMPTS, NEW, 8) == greedy_of(model)


def test_an_unknown_tensor_is_told_to_the_trainer(engines):
    channel = connect(engines["gpt"])
    with pytest.raises(SyncError, match=r"engine 0: .*no_such_layer"):
        sync_weights([("transformer.no_such_layer.weight", lambda: torch.ones(3))], 9, channel)


def test_weights_that_make_nan_are_not_trained_on(engines):
    engine = engines["qwen2"]
    bad = model_of("qwen2", seed=8)
    bad.model.model.norm.weight.data.fill_(torch.nan)
    channel = connect(engine)
    sync_weights(weights_of(bad), 8, channel)
    with pytest.raises(TrainingError, match="NaN or infinite"):
        engine.ask("generate", PROMPTS, NEW, 1.0, EOS, 0)
    model = model_of("qwen2", seed=9)
    sync_weights(weights_of(model), 9, channel)
    assert engine.ask("greedy", PROMPTS, NEW, 9) == greedy_of(model)


# ---- processes that die --------------------------------------------------------------------------


def _half_a_sender(pipe, timeout_s):
    """Offers a group, sends one tensor, and then nothing."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", 0, 2, True, limit, wait_for_workers=False)
    pipe.send(store.port)
    group = channels.Group("gloo", store, 0, 2, timeout_s)
    group.broadcast(torch.ones(64))
    pipe.send("sent")
    time.sleep(60)


@pytest.mark.parametrize(
    ("sign", "timeout_s", "within"), [(signal.SIGKILL, 30, 5), (signal.SIGSTOP, 3, 8)]
)
def test_a_trainer_that_dies_or_falls_silent_does_not_hang_an_engine(
    engines, sign, timeout_s, within
):
    engine, context = engines["gpt"], multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    sender = context.Process(target=_half_a_sender, args=(theirs, timeout_s))
    sender.start()
    try:
        where = ("gloo", "127.0.0.1", pipe.recv(), 1, 2, timeout_s)
        engine.ask("connect", *where)
        engine.ask("begin", 10)
        names = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
        wait = engine.call("receive", [(name, "float32", (64,), None) for name in names])
        assert pipe.recv() == "sent"
        os.kill(sender.pid, sign)
        started = time.perf_counter()
        with pytest.raises(RuntimeError, match=r"(?i)closed|timed out|reset"):
            wait()
        assert time.perf_counter() - started < within
    finally:
        sender.kill()
    with pytest.raises(StaleWeights):
        engine.ask("greedy", PROMPTS, NEW)
    model = model_of("gpt", seed=10)  # and it takes weights from the next trainer
    sync_weights(weights_of(model), 11, connect(engine))
    assert engine.ask("greedy", PROMPTS, NEW, 11) == greedy_of(model)


def test_an_engine_that_dies_is_told_and_the_others_refuse(engines):
    engine, victim, model = engines["gpt"], engines["packed"], model_of("gpt", seed=11)
    channel = connect(engine, victim)
    channel.begin(12)
    os.kill(victim.ask("info")["pid"], signal.SIGKILL)
    started = time.perf_counter()
    with pytest.raises(SyncError, match="engine 1: "):
        for name, gather in weights_of(model):
            channel.send(name, gather())
        channel.finish(12)
    assert time.perf_counter() - started < 10
    with pytest.raises(StaleWeights):
        engine.ask("greedy", PROMPTS, NEW)
    sync_weights(weights_of(model), 12, connect(engine))
    assert engine.ask("greedy", PROMPTS, NEW, 12) == greedy_of(model)


# ---- without engines -----------------------------------------------------------------------------


def test_an_engine_that_never_comes_is_told_in_time():
    def call(method, *args):
        def wait():
            raise TimeoutError(f"{method} was not answered")

        return wait

    started = time.perf_counter()
    with pytest.raises(SyncError, match="engine 0: TimeoutError: connect was not answered"):
        make_channel("gloo", [call], timeout_s=1.0)
    assert time.perf_counter() - started < 10


def test_an_unknown_channel():
    with pytest.raises(ConfigError, match="Choose gloo, nccl or ipc"):
        make_channel("pigeon", [])


@pytest.mark.parametrize(
    ("change", "fine"), [(0.0, True), (5e-4, True), (2e-3, False), (torch.nan, False)]
)
def test_greedy_tokens_are_the_likeliest_up_to_a_tie(change, fine):
    tokens = torch.tensor([[3, 1, 2, 0]])
    mask = torch.tensor([[False, True, True]])
    logits = torch.zeros(1, 4, 5)
    logits[0, 0, 4] = 9.0  # token 1 is no action, so it may be anything
    logits[0, 1, 2] = logits[0, 2, 0] = 1.0
    logits[0, 2, 3] = 1.0 + change
    logits[0, 3, 1] = 9.0  # what would come after the end
    with contextlib.nullcontext() if fine else pytest.raises(StaleWeights, match="1 of 2 greedy"):
        verify_greedy(logits, tokens, mask)
