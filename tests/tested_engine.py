"""The engine of tests/test_engine.py; in a module that the engine's process can import."""

from rlhf_course.distributed import engine


class TestedEngine(engine.RolloutEngine):
    """With a look into the cache, and another way to receive weights if wanted."""

    __test__ = False

    def __init__(self, *args, worker: str = engine.WORKER, **settings):
        engine.WORKER = worker
        super().__init__(*args, **settings)

    def cached_tokens(self, prompt: list[int]) -> int:
        """How many of the prompt's tokens vLLM finds in its cache. Reads the prompt into it."""
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        out = self.llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
        return out[0].num_cached_tokens
