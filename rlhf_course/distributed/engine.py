"""A vLLM engine for rollouts: token ids in, token ids and log-probs out, of weights with a number.

An engine holds a version of the weights: 0 is what it read from its directory, then comes what the
trainer sends. From `begin` until `finish` it holds none and refuses to answer: half of the new
weights is no model at all. The class is plain: in a cluster an actor holds one, in a notebook any
process whose environment has `engine_environment`. vLLM is imported when an engine is made.
"""

from __future__ import annotations

import math
import os
import socket
import time

from torch import Tensor

from rlhf_course.distributed.channels import Meta, StaleWeights
from rlhf_course.errors import TrainingError
from rlhf_course.sampling import require_room
from rlhf_course.training import derive_seed

PARTS = {"weights", "kv_cache"}
"""What an engine has on its GPU."""
WORKER = "rlhf_course.distributed.vllm_worker.WeightReceiver"
CPU_CACHE = 1 << 28
"""Bytes of keys and values on a CPU; VLLM_CPU_KVCACHE_SPACE (GiB, environment) overrules it."""


def engine_environment(device: str) -> dict[str, str]:
    """Environment of an engine's process, "cpu" or "cuda"; before torch and vLLM are imported."""
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, not in a child
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device != "cpu":
        return common
    return common | {
        "OMP_NUM_THREADS": "1",  # more of them fight with the other processes: 10 to 100 x slower
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines would be bound to the same core
        "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes seconds and saves nothing here
    }


class RolloutEngine:
    """One vLLM engine on `tensor_parallel` GPUs (without GPUs: processes).

    model_dir: a Hugging Face checkpoint; its tokenizer is not read. dtype: of weights and cache.
    max_model_len: longest prompt and answer together. seed: another one for each engine.
    gpu_memory_utilization: share of its GPU. sleep: whether it can give that back, see `sleep`.
    max_num_seqs: answers that are written at the same time.
    """

    def __init__(
        self, model_dir: str | os.PathLike, *, dtype: str = "float32", max_model_len: int,
        seed: int, tensor_parallel: int = 1, gpu_memory_utilization: float = 0.9,
        sleep: bool = False, max_num_seqs: int = 64,
    ):  # fmt: skip
        started = time.perf_counter()
        from vllm import LLM
        from vllm.platforms import current_platform

        self.seed, self.context = seed, max_model_len
        self.asleep: set[str] = set()  # what of it has left the GPU
        self.version: int | None = 0
        self.on_cpu = current_platform.is_cpu()
        apart = "mp" if self.on_cpu else "ray"  # processes of its own, or placed by Ray
        self.llm = LLM(
            model=str(model_dir), skip_tokenizer_init=True, generation_config="vllm",
            dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, seed=seed % 2**32,
            logprobs_mode="processed_logprobs",  # of the tempered distribution
            worker_extension_cls=WORKER, tensor_parallel_size=tensor_parallel,
            distributed_executor_backend=apart if tensor_parallel > 1 else None,
            enforce_eager=self.on_cpu, kv_cache_memory_bytes=CPU_CACHE if self.on_cpu else None,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_sleep_mode=sleep and not self.on_cpu, use_tqdm_on_load=False,
        )  # fmt: skip
        self.start_seconds = time.perf_counter() - started

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float, eos_token_id: int,
        seed: int, version: int | None = None,
    ) -> dict:  # fmt: skip
        """One answer to each prompt, by continuous batching.

        Returns responses, logprobs and finished as sampling.Generation has them, version, seconds.
        The same weights, prompts and seed give the same answers. version: of the weights wanted;
        None: any. Raises StaleWeights when the engine holds others or incomplete ones, ModelError
        when a prompt and its answer do not fit, TrainingError when the weights make NaN.
        """
        started = time.perf_counter()
        # One seed a call: a generator of its own for every request would be 4 to 8 times slower.
        self.llm.collective_rpc("reseed", args=(derive_seed(self.seed, "engine", seed),))
        outputs = self._run(
            prompts, max_new_tokens, version, temperature=temperature,
            stop_token_ids=[eos_token_id], logprobs=0,  # of the token drawn, and of no others
        )  # fmt: skip
        logprobs = [
            [said[token].logprob for said, token in zip(out.logprobs, out.token_ids, strict=True)]
            for out in outputs
        ]
        if not all(math.isfinite(x) for row in logprobs for x in row):
            raise TrainingError(
                f"the rollout's log-probs are NaN or infinite (weights {self.version}). The last "
                "checkpoint stands: lower the learning rate (--lr), and look at the metrics before."
            )
        return {
            "responses": [list(out.token_ids) for out in outputs], "logprobs": logprobs,
            "finished": [out.finish_reason == "stop" for out in outputs],
            "version": self.version, "seconds": time.perf_counter() - started,
        }  # fmt: skip

    def greedy(
        self, prompts: list[list[int]], max_new_tokens: int, version: int | None = None
    ) -> list[list[int]]:
        """The likeliest token, max_new_tokens times, whether or not it is an EOS."""
        outs = self._run(prompts, max_new_tokens, version, temperature=0.0)
        return [list(out.token_ids) for out in outs]

    def _run(
        self, prompts: list[list[int]], max_new_tokens: int, version: int | None, **settings
    ) -> list:
        from vllm import SamplingParams

        if self.version is None or version not in (None, self.version):
            raise StaleWeights(
                f"the rollout engine holds weights {self.version} (None: incomplete ones), wanted "
                f"were {version} (None: any). Sync again; if that fails, start the engine anew."
            )
        require_room(self, prompts, max_new_tokens)
        self._forget()  # else earlier calls would decide who is computed, and draws, together
        # ignore_eos: what config.json calls so; the caller's is a stop token.
        how = SamplingParams(
            max_tokens=max_new_tokens, ignore_eos=True, detokenize=False, **settings
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [out.outputs[0] for out in self.llm.generate(requests, how, use_tqdm=False)]

    def _forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache cannot be emptied: a request has not ended")

    def connect(self, *where) -> None:
        """Enter the trainer's group; a channel calls this, for WeightReceiver.join_trainer."""
        self.llm.collective_rpc("join_trainer", args=where)

    def begin(self, version: int) -> None:
        """New weights are coming, and those held are given up."""
        self.version = None
        self.llm.collective_rpc("begin_weights")

    def receive(self, metas: list[Meta]) -> None:
        """Take one bucket of tensors; they are loaded when this returns."""
        self.llm.collective_rpc("receive_weights", args=(metas,))

    def finish(self, version: int) -> None:
        """All weights have come: forget what the old ones computed, and answer again."""
        self.llm.collective_rpc("finish_weights")
        self._forget()
        self.version = version

    def sleep(self) -> None:
        """Give GPU memory back: weights go to the host, the cache is dropped. Does nothing on a
        CPU, or when asleep. NOT RUN ON A GPU."""
        if not self.on_cpu and self.asleep != PARTS:
            self.wake()  # vLLM puts all to sleep at once, and what sleeps already is not there
            self.llm.sleep(level=1)
            self.asleep = set(PARTS)

    def wake(self, *parts: str) -> None:
        """Undo `sleep`: "weights" before a sync, all when the trainer is off the GPU."""
        if tags := sorted(self.asleep & set(parts or PARTS)):
            self.llm.wake_up(tags=tags)
            self.asleep -= set(tags)

    def info(self) -> dict:
        """Where it runs and what it holds; a process that answers lives and is not busy."""
        where = {"host": socket.gethostname(), "pid": os.getpid(), "cpu": self.on_cpu}
        return where | {"version": self.version, "start_seconds": self.start_seconds}


def verify_greedy(logits: Tensor, tokens: Tensor, mask: Tensor, tolerance: float = 1e-3) -> None:
    """Raise StaleWeights unless every action is the trainer's likeliest token, or ties with it.

    logits (B, T, V): the trainer's for tokens (B, T) long, prompts with an engine's greedy answers;
    mask (B, T-1) bool: the answers. tolerance: nats, since sums in another order differ.
    """
    before = logits[:, :-1]  # (B, T-1, V): position t says token t + 1
    gap = (before.amax(-1) - before.gather(-1, tokens[:, 1:, None])[..., 0])[mask]  # (N,)
    if wrong := int((~(gap <= tolerance)).sum()):  # NaN agrees with nothing
        raise StaleWeights(
            f"{wrong} of {len(gap)} greedy tokens of the rollout engine are not the trainer's, by "
            f"up to {float(gap.max()):.3g} nats: it computes with other weights. Start it anew."
        )
