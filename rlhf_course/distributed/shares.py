"""What a rank holds of a model under DeepSpeed ZeRO: gathered, put back, measured, moved.

Tested by `pytest tests/test_zero.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn
from torch import distributed as dist

from rlhf_course.distributed.weight_sync import gather_zero3_parameters
from rlhf_course.errors import CheckpointError

SLOTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each number


class Shares:
    """The half of `zero.ZeroModel` that handles weights instead of computing with them.

    All but `partition_bytes`, `offload` and `reload` is collective. `group` are the ranks that
    share the model out, `device` is where this one computes.
    """

    def __init__(self, model: nn.Module, stage: int, optimizer: torch.optim.Optimizer | None):
        order = [id(p) for g in (optimizer.param_groups if optimizer else ()) for p in g["params"]]
        self._numbers = {k: order.index(id(p)) for k, p in model.named_parameters() if order}
        self._shapes = {name: tensor.shape for name, tensor in _state(model)}
        self.model, self.stage = model, stage
        self._gradient_bytes, self._away = 0, []

    def start(self, engine) -> None:
        """From now on the model is shared out, by this engine."""
        self.engine, self.zero = engine, engine.optimizer  # DeepSpeed's, around ours
        self.group, self.device = engine.data_parallel_group, engine.device

    # ---- whole tensors ---------------------------------------------------------------------------

    def parameters_whole(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """For each parameter its name in our model, and a function that all ranks call together to
        gather it, in the dtype that computes."""
        for name, parameter in self.model.named_parameters():
            yield name, partial(self._whole, parameter)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return _joined(parameter, parameter.detach())
        shard = parameter.ds_tensor.to(self.device)
        whole = gather_zero3_parameters(shard, tuple(parameter.ds_shape), self.group)
        return _joined(parameter, whole)

    def master(self, name: str) -> Tensor:
        """A parameter whole and in fp32, as the optimizer knows it."""
        return self._master(dict(self.model.named_parameters())[name], None)

    def _master(self, parameter: nn.Parameter, slot: str | None) -> Tensor:
        """Its master weight, or AdamW's slot for it."""
        args = (parameter, slot) if self.stage == 3 else (slot,)
        owner = self.zero if self.stage == 3 else parameter
        return _joined(parameter, owner.get_full_hp_param(*args))

    def set_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Give these parameters other values, whole and the same on every rank."""
        parameters = dict(self.model.named_parameters())
        self.engine.empty_partition_cache()  # what is gathered now would hide what is set
        for name, whole in tensors.items():
            self._set(parameters[name], whole.to(self.device), None)
        if self.stage < 3:
            self.zero.update_lp_params()

    def _keys(self, name: str, adam: bool) -> Iterator[tuple[str, str, Tensor, str | None]]:
        """(key in a checkpoint, name, parameter or buffer, slot of AdamW) of all the state."""
        for key, tensor in _state(self.model):
            yield f"module/{name}/{key}", key, tensor, None
            for slot in SLOTS if adam and key in self._numbers else ():
                yield f"optimizer/{name}/{self._numbers[key]}/{slot}", key, tensor, slot

    def state_tensors(self, name: str) -> dict[str, Tensor]:
        """Master weights, buffers and AdamW's state, in fp32 on rank 0's CPU; {} elsewhere. All is
        whole, so that a run may go on with other ranks or stages."""
        adam, out = next(iter(self.zero.optimizer.state.values()), None), {}  # None: no step yet
        if adam:
            self._link()
        for key, _, tensor, slot in self._keys(name, bool(adam)):
            whole = self._master(tensor, slot) if isinstance(tensor, nn.Parameter) else tensor
            if dist.get_rank() == 0:
                out[key] = whole.to("cpu", copy=True)
        for number in self._numbers.values() if out and adam else ():
            out[f"optimizer/{name}/{number}/step"] = adam["step"].to("cpu", copy=True)
        return out

    def load_state(self, name: str, tensors: Mapping[str, Tensor] | None) -> None:
        """Put back what `state_tensors` gave: rank 0 has it, the others have None.

        Raises CheckpointError on every rank where a tensor is missing or of another shape.
        """
        step, wrong = None, []
        if tensors is not None:
            step = tensors.get(f"optimizer/{name}/0/step")
            step = None if step is None else float(step)
            shapes = ((k, self._shapes[n]) for k, n, _, _ in self._keys(name, step is not None))
            wrong = [k for k, s in shapes if k not in tensors or tensors[k].shape != s]
        said = [(step, wrong)]
        dist.broadcast_object_list(said, src=0)
        step, wrong = said[0]
        if wrong:
            raise CheckpointError(
                f"the checkpoint's tensors are not those of this run's models: {wrong[0]} "
                f"({len(wrong)} in all). Start anew with --overwrite, or choose another --out."
            )
        self.engine.empty_partition_cache()
        if step is not None:
            self._make_adam(step)
        for key, shape_of, tensor, slot in self._keys(name, step is not None):
            whole = torch.empty(self._shapes[shape_of], device=self.device)
            if tensors is not None:
                whole.copy_(tensors[key])
            dist.broadcast(whole, src=0)
            self._set(tensor, whole, slot)
        if self.stage < 3:
            self.zero.update_lp_params()

    @torch.no_grad()
    def _set(self, tensor: Tensor, whole: Tensor, slot: str | None) -> None:
        """This rank's part of a whole tensor, into the master weights or a slot of AdamW."""
        if not isinstance(tensor, nn.Parameter):
            tensor.copy_(whole)
            return
        if _is_cut(tensor):
            box = [whole.clone()]
            tensor._tp_partition(box)
            whole = box[0]
        if self.stage < 3:
            tensor.set_full_hp_param(whole, slot)
            return
        size = tensor.ds_tensor.numel()
        padded = F.pad(whole.flatten(), (0, size * self.group.size() - whole.numel()))
        part = padded[size * self.group.rank() :][:size]
        self.zero.set_local_hp_param(part, tensor, slot)
        if slot is None:
            tensor.ds_tensor.copy_(part)  # what computes

    def _make_adam(self, step: float) -> None:
        """Give AdamW the state which it makes at its first step."""
        for flat in self._masters():
            state = self.zero.optimizer.state[flat]
            for slot in SLOTS:
                state.setdefault(slot, torch.zeros_like(flat, requires_grad=False))
            state["step"] = torch.tensor(step, device=flat.device)
        self._link()

    def _link(self) -> None:
        """Let each parameter find its part of AdamW's state. (DeepSpeed does so once, behind the
        first group's first step, when the second group's state is not made yet.)"""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    # ---- memory ----------------------------------------------------------------------------------

    def _masters(self) -> list[Tensor]:
        """This rank's master weights, flat: what AdamW believes to be its parameters."""
        names = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"
        return next((getattr(self.zero, name) for name in names if hasattr(self.zero, name)), [])

    def _gradients(self) -> Iterator[Tensor | None]:
        for parameter in (*self.model.parameters(), *self._masters()):
            yield parameter.grad
        for name in ("averaged_gradients", "all_grad_tensors"):
            for some in getattr(self.zero, name, {}).values():
                yield from some or ()
        yield getattr(self.zero, "grad_partitions_flat_buffer", None)

    def _held(self) -> tuple[dict[int, UntypedStorage], dict[int, UntypedStorage]]:
        """The memory of this rank's parameters, and of its master weights and AdamW's state."""
        parameters = _storages(getattr(p, "ds_tensor", p) for p in self.model.parameters())
        masters = self._masters()
        states = self.zero.optimizer.state.values() if masters else ()
        adam = _storages([*masters, *(slot for state in states for slot in state.values())])
        return parameters, {key: adam[key] for key in adam.keys() - parameters.keys()}

    def note_gradients(self) -> None:
        """Remember how much memory the gradients take now, if it is the most so far."""
        self._gradient_bytes = max(self._gradient_bytes, _bytes(_storages(self._gradients())))

    def partition_bytes(self) -> dict[str, int]:
        """Bytes of this rank's share, padding included; of the gradients, the most there were
        behind a backward pass."""
        parameters, optimizer = map(_bytes, self._held())
        held = {"parameters": parameters, "gradients": self._gradient_bytes}
        return {**held, "optimizer": optimizer}

    def offload(self) -> None:
        """Move this rank's share from its GPU to the host until `reload`, so that an engine has the
        room. (DeepSpeed's own way knows its fused Adam alone.)"""
        self.engine.empty_partition_cache()
        for storage in (storage for held in self._held() for storage in held.values()):
            if storage.is_cuda:
                self._away.append((storage, _to_host(storage)))
        if self._away:
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Bring back what `offload` moved."""
        for storage, host in self._away:
            storage.resize_(host.nbytes())
            storage.copy_(host)
        self._away = []


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether AutoTP left each rank a piece of it, before ZeRO shared the piece out."""
    return getattr(parameter, "ds_is_replaced_module", False)


def _joined(parameter: nn.Parameter, piece: Tensor) -> Tensor:
    if not _is_cut(parameter):
        return piece
    box = [piece.clone()]
    parameter.gather_params(box)
    return box[0]


def _storages(tensors: Iterable[Tensor | None]) -> dict[int, UntypedStorage]:
    """The memory behind them, each piece once."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage for storage in found}


def _bytes(storages: dict[int, UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _to_host(storage: UntypedStorage) -> UntypedStorage:
    """Its content in the host's memory; it becomes empty, and whatever looks at it stays."""
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda)
    host.untyped_storage().copy_(storage)
    storage.resize_(0)
    return host.untyped_storage()
