"""The mistake of which `verify_greedy` has to warn: vLLM's own way of reloading weights, on a CPU
on which it packs them for oneDNN. Everything arrives but the head that is tied to the embedding."""

import vllm._custom_ops

from rlhf_course.distributed.vllm_worker import WeightReceiver

vllm._custom_ops._supports_onednn = True


class PackedReceiver(WeightReceiver):
    """Gathers the weights and has them reloaded layer by layer."""

    def begin_weights(self) -> None:
        self.gathered = []

    def load_in_place(self, weights) -> None:
        self.gathered += weights

    def finish_weights(self) -> None:
        self.model_runner.reload_weights(
            weights_iterator=iter(self.gathered), is_checkpoint_format=True
        )
