"""Tensors of which every process holds a shard: their shapes, the whole of them, and how values are written into them.

FSDP2 and tensor parallelism hold ``DTensor``s, which gather themselves. FSDP1 (``use_orig_params=True``) leaves a flat piece of
a parameter, or nothing, where it was; its handle knows what the piece is of. What is read of torch's private parts for that is
in this file.
"""

from __future__ import annotations

import gc
import math
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastConfigError
from ..names import modules_of

SHARD = "recast_shard"  # attribute of a gathered tensor: the shard that it was gathered from, to gather it once more
_PIECE = "recast_piece"  # attribute of a parameter in FSDP1: its handle, and its number there
_FROZEN = "recast_frozen"  # attribute of a view in FSDP1's forward pass: the same numbers without a gradient


def check_may_be_added_to(model: nn.Module, for_inference: bool) -> None:
    """Refuse to put further trainable parameters into a model that FSDP has sharded: no process would average their gradients.

    Args:
        model: the backbone.
        for_inference: whether nothing that is put in will be trained; FSDP1 takes nothing at all.

    Raises:
        RecastConfigError: saying what to do.
    """
    is_flat = any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters())
    is_fsdp2 = any(c.__name__ == "FSDPModule" for kind in {*map(type, modules_of(model, nn.Module))} for c in kind.__mro__)
    known = _fsdp2_parameters()  # the model around may be the one that is sharded
    is_fsdp2 = is_fsdp2 or (bool(known) and any(id(parameter) in known for parameter in model.parameters()))
    if is_flat or (is_fsdp2 and not for_inference):
        raise RecastConfigError(
            f"the model was sharded by {'FSDP1' if is_flat else 'FSDP2'}, which knows nothing of parameters that come later: "
            "their gradients would differ from process to process. Convert the model and add or load tasks first, then shard it"
            + ("" if is_flat else "; a task that is not trained (is_trainable=False) can still be loaded")
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether nobody has sharded a parameter: the answer for almost all, at the cost of one look."""
    return type(tensor) is nn.Parameter and not hasattr(tensor, "ds_id") and not getattr(tensor, "_fsdp_flattened", False)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds a tensor, and gathers it for the calls of its module."""
    return hasattr(tensor, "ds_id")


def is_spread_in_calls(tensor: Tensor) -> bool:
    """Whether a tensor is whole during the calls of its module alone (ZeRO-3), or never (tensor parallelism)."""
    return is_partitioned(tensor) or hasattr(tensor, "full_tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes, also while it is gathered for a call."""
    return is_spread_in_calls(tensor) or _piece_of(tensor) is not None or id(tensor) in _fsdp2_parameters()


def holds_parts(module: nn.Module) -> bool:
    """Whether a process has a part of a module's own parameters alone; those of FSDP2 that are whole for a call are whole."""
    in_front = (held for held in vars(module).values() if isinstance(held, Tensor))  # where FSDP1 puts what it gathered
    tensors = (tensor for tensor in (*module._parameters.values(), *module._buffers.values(), *in_front) if tensor is not None)
    return any(is_spread_in_calls(tensor) or _piece_of(tensor) is not None for tensor in tensors)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole of a tensor; no process waits for another one."""
    if is_partitioned(tensor):
        return tuple(tensor.ds_shape)  # type: ignore[attr-defined]
    piece = _piece_of(tensor)
    return tuple(tensor.shape if piece is None else piece.shape)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor: itself, or gathered, which all processes have to ask for.

    A parameter that is frozen needs no gradient, also where FSDP1 has put it into one tensor with others that do.
    """
    if is_plain(tensor):
        return tensor
    if is_partitioned(tensor):
        with _gathered_by_deepspeed(tensor):
            return tensor.detach().clone()
    if hasattr(tensor, "full_tensor"):
        return _marked(tensor.full_tensor(), tensor)
    piece = _piece_of(tensor)
    if piece is not None:
        if piece.is_sharded:
            return _marked(piece.gathered(tensor), tensor)
        return piece.present()
    return tensor


def whole_trained(tensor: Tensor) -> Tensor:
    """The whole of a parameter that is used outside of the module in which it is sharded, differentiable.

    Raises:
        RecastConfigError: for a parameter that FSDP1 has sharded in another module: it would lose its gradient.
    """
    if is_plain(tensor) or is_partitioned(tensor):  # which DeepSpeed has gathered as it was asked for
        return tensor
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import Partial

        return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)  # type: ignore[attr-defined]
    piece = _piece_of(tensor)
    if piece is not None and piece.is_sharded and tensor.requires_grad and torch.is_grad_enabled():
        raise RecastConfigError(
            "coefficients are shared by modules that FSDP1 shards apart, and would lose their gradient: use FSDP2 "
            "(fully_shard; accelerate's fsdp_version 2), wrap the model as one, or convert it with coefficient_sharing='roles' "
            "and max_coefficients"
        )
    return whole(tensor)


def write(tensor: Tensor, values: Tensor) -> None:
    """Write the values of the whole of a tensor into what this process holds of it."""
    piece = _piece_of(tensor)
    with torch.no_grad():
        if is_partitioned(tensor):
            with _gathered_by_deepspeed(tensor, modifier_rank=0):
                tensor.copy_(values)
        elif hasattr(tensor, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            values = values.to(tensor.device, tensor.dtype)
            tensor.copy_(distribute_tensor(values, tensor.device_mesh, tensor.placements))  # type: ignore[attr-defined]
        elif piece is not None:
            piece.write(values)
        else:
            tensor.copy_(values)
            gathered = _fsdp2_parameters().get(id(tensor))
            if gathered is not None:  # until the next call, which reads the shard
                write(gathered.sharded_param, values)


def _marked(gathered: Tensor, shard: Tensor) -> Tensor:
    setattr(gathered, SHARD, shard)
    return gathered


def _gathered_by_deepspeed(tensor: Tensor, **options: Any) -> Any:
    """A block in which a partitioned tensor is whole in all processes."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], **options)


# ---------------------------------------------------------------- FSDP2


def _fsdp2_parameters() -> dict[int, Any]:
    """What FSDP2 knows of its parameters, by the identity of the shard and of the whole.

    The whole stands in the shard's place during the calls of its module, and after them in the module that is sharded last.
    """
    registry = sys.modules.get("torch.distributed._composable_state")
    states = [] if registry is None else [reference() for reference in registry._module_state_mapping.values()]
    known: dict[int, Any] = {}
    for state in states:
        single = [getattr(state, "_fsdp_param_group", None)]  # before torch 2.10
        for group in getattr(state, "_fsdp_param_groups", single):
            for found in () if group is None else group.fsdp_params:
                known |= {id(found.sharded_param): found, id(getattr(found, "_unsharded_param", found)): found}
    return known


# ---------------------------------------------------------------- FSDP1


@dataclass(frozen=True)
class _Piece:
    """What a parameter of FSDP1 is now: its part of one flat tensor, of which every process holds a stretch."""

    handle: Any
    number: int

    @property
    def is_sharded(self) -> bool:
        """Whether it is a piece now: FSDP gathers the parameters of a module for its calls."""
        return self.handle.is_sharded(self.handle.flat_param)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.flat_param._shapes[self.number])

    def present(self) -> Tensor:
        """The whole while it is gathered, the very object each time, without a gradient if the parameter is frozen."""
        name, module, _ = self.handle.flat_param._param_infos[self.number]
        view = getattr(module, name)  # stands in the parameter's place
        if type(view) is nn.Parameter or self.handle.flat_param._params[self.number].requires_grad:
            return view
        if not hasattr(view, _FROZEN):
            setattr(view, _FROZEN, view.detach())
        return getattr(view, _FROZEN)

    def gathered(self, held: Tensor) -> Tensor:
        """The whole; every process that holds a stretch of it sends that to the others."""
        flat, numbers = self.handle.flat_param, math.prod(self.shape)
        start, stretch = self._start(), math.prod(flat._sharded_size)
        values = torch.empty(numbers, dtype=held.dtype, device=held.device)
        with torch.no_grad():
            for rank in range(start // stretch, (start + numbers - 1) // stretch + 1):
                part = values[max(0, rank * stretch - start) : (rank + 1) * stretch - start]
                if rank == self.handle.rank:
                    part.copy_(held)
                torch.distributed.broadcast(part, group=self.handle.process_group, group_src=rank)
        return values.as_strided(self.shape, flat._strides[self.number])

    def write(self, values: Tensor) -> None:
        """Write values into the shard of this process, and into the whole, which FSDP may keep from one call to the next."""
        flat = self.handle.flat_param
        whole = getattr(flat, "_full_param_padded", None)
        if whole is not None and whole.untyped_storage().size():
            whole[self._start() :][: values.numel()].copy_(values.reshape(-1))
        info = flat._shard_param_infos[self.number]
        if info.in_shard:
            own = values.reshape(-1)[info.intra_param_start_idx : info.intra_param_end_idx + 1]
            flat._local_shard[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard].copy_(own)

    def _start(self) -> int:
        """Where the parameter begins in the flat tensor."""
        offsets = zip(self.handle._get_flat_param_offsets(), self.handle.flat_param._is_padding_mask, strict=True)
        return [start for (start, _), is_padding in offsets if not is_padding][self.number]


def _piece_of(tensor: Tensor) -> _Piece | None:
    """What a parameter is the piece of, if FSDP1 has it."""
    if type(tensor) is not nn.Parameter:  # while it is gathered, a view stands in its place
        flat: Any = tensor._base
        if not (hasattr(flat, "_params") and hasattr(flat, "_tensors")):
            return None
        own = [p for p, view in zip(flat._params or (), flat._tensors or (), strict=True) if view is tensor]
        return _piece_of(own[0]) if own else None
    if not getattr(tensor, "_fsdp_flattened", False):
        return None
    if _known(tensor) is None:
        _note_handles()
    piece = _known(tensor)
    if piece is None:
        raise RecastConfigError("FSDP has flattened a parameter without use_orig_params=True: wrap the model with that option")
    return piece


def _known(parameter: Tensor) -> _Piece | None:
    reference, number = getattr(parameter, _PIECE, (None, 0))
    handle = None if reference is None else reference()
    return None if handle is None else _Piece(handle, number)


def _note_handles() -> None:
    """Tell every parameter in FSDP1 its handle: nothing leads from the one to the other."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    for found in gc.get_objects():
        if type(found) is FlatParamHandle:
            for number, parameter in enumerate(found.flat_param._params or ()):
                setattr(parameter, _PIECE, (weakref.ref(found), number))
