"""What vLLM's worker processes learn from us: to take weights from the trainer, and to be seeded.

vLLM mixes `WeightReceiver` into its own worker class (`worker_extension_cls`); `collective_rpc`
calls its methods on every tensor parallel rank. Only an engine's processes import this module.

On a CPU, vLLM packs the matrices of linear layers for oneDNN when it loads a model, and computes
with the packed copies from then on. New weights do not reach them: loading in place fails, and
after vLLM's layer-wise reloading a head that is tied to the embedding silently keeps its old copy.
Importing this module, which happens before a model is loaded, switches the packing off. On a GPU
the matrices of a dense model stay where they were loaded (vLLM 0.32, `UnquantizedLinearMethod`);
those of a mixture of experts may not, and are not served.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import TCPStore
from vllm.platforms import current_platform

from rlhf_course.distributed.channels import Group, Meta

if current_platform.is_cpu():
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False


class WeightReceiver:
    """Methods for `LLM.collective_rpc`; `self` is vLLM's Worker too."""

    def reseed(self, seed: int) -> None:
        """Seed what sampling draws from; every tensor parallel rank draws the same."""
        torch.manual_seed(seed)

    def join_trainer(
        self, kind: str, host: str, port: int, first: int, world: int, timeout_s: float
    ) -> None:
        """Enter the trainer's group, as its rank `first` + mine; leave the one entered before."""
        self.trainer_group = None
        store = TCPStore(host, port, world, False, timedelta(seconds=timeout_s))
        self.trainer_group = Group(kind, store, first + self.rank, world, timeout_s)

    def begin_weights(self) -> None:
        """A whole set of new weights is coming."""
        self.loaded_names: set[str] = set()

    def receive_weights(self, metas: list[Meta]) -> None:
        """Take one bucket of tensors from the trainer, and load them.

        Raises RuntimeError when the trainer dies or falls silent; for a name that the model does
        not have, what vLLM's loader raises.
        """
        weights = []
        for name, dtype, shape, handles in metas:
            if handles is None:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                self.trainer_group.broadcast(tensor)
            else:
                tensor = self.open_handle(handles)
            weights.append((name, tensor))
        self.load_in_place(weights)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # all is copied; the trainer may free what was read

    def open_handle(self, handles: dict[str, tuple]) -> Tensor:
        """The trainer's tensor on my GPU, by CUDA IPC. NOT RUN ON A GPU."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        args = list(handles[str(torch.cuda.get_device_properties(self.device).uuid)])
        args[6] = self.device.index  # the trainer may know this GPU by another number
        return rebuild_cuda_tensor(*args)

    def load_in_place(self, weights: list[tuple[str, Tensor]]) -> None:
        """vLLM's loader fuses q, k and v, takes this rank's share, pads the vocabulary, casts."""
        self.loaded_names |= self.model_runner.get_model().load_weights(weights)

    def finish_weights(self) -> None:
        """Raises RuntimeError where a parameter of the model has got nothing since the begin."""
        names = {name for name, _ in self.model_runner.get_model().named_parameters()}
        if missing := sorted(names - self.loaded_names):
            raise RuntimeError(f"{len(missing)} parameters did not come: {', '.join(missing[:4])}")
