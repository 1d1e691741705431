"""A composed weight in place of the pretrained one, and back.

A merged weight is a parameter of its own, put where the pretrained one was. The pretrained parameter is never written to: it is
kept beside, and comes back as the very object that it was. The merged one knows which parameter it stands for, so that whoever
finds it, in any thread and at any moment, finds the pretrained weight as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..errors import RecastBankError
from ..placement.sharded import is_sharded
from .calling import STANDS_FOR
from .compose import weighted_sum, without_autocast
from .known import know
from .outputs import is_out_of_reach
from .quantised import dequantised, packed_since, quantised_by

_NONE = object()


def pretrained_parameter(layer: Any) -> nn.Parameter | None:
    """The pretrained weight of a layer, whatever is merged; None if it was released for a compressed bank."""
    base = layer.get_base_layer()
    found = base._parameters.get(layer.weight_name)
    if type(found) is not nn.Parameter and not layer.compressed_bank and quantised_by(base) is not None:
        return dequantised(base)  # type: ignore[return-value]
    mark = getattr(found, STANDS_FOR, _NONE)
    if mark is not _NONE:
        return mark  # type: ignore[return-value]
    kept = layer.kept_weight  # a copy of a parameter has no mark
    return found if kept is None else kept[0]


def put_weight(layer: Any, weight: Tensor) -> None:
    """Put a composed weight into a wrapped module that is writable, and keep the pretrained one beside it."""
    pretrained = layer.weight_parameter
    # a tensor of its own, also where the composed weight is the pretrained one itself
    merged = nn.Parameter(weight.detach().clone() if weight is pretrained else weight, requires_grad=False)
    setattr(merged, STANDS_FOR, pretrained)
    layer.kept_weight = (pretrained,)
    layer.set_weight_parameter(merged)


def check_writable(layer: Any) -> None:
    """Refuse to merge where no weight can be put (``RecastBankError``)."""
    library = quantised_by(layer.get_base_layer())
    held = layer.compressed_bank[0].templates if layer.is_released else layer.weight_parameter
    is_shard = held is not None and is_sharded(held)
    if is_shard or is_out_of_reach(layer):
        what = "offloaded, and is on a device during its calls alone" if library is None else f"quantised by {library}"
        what = "spread over processes" if is_shard else what
        raise RecastBankError(
            f"nothing can be merged into {layer.module_name}: its weight is {what}. The task computes unmerged as well; "
            "for a merged model load the task on the base in float32, bfloat16 or float16"
        )


def take_weight(layer: Any) -> None:
    """Put the pretrained parameter back, or take the merged one out where that was released.

    Raises:
        RecastBankError: if the module computes with another one since.
    """
    if layer.weight_name not in layer.get_base_layer()._parameters:
        raise packed_since(layer.get_base_layer())
    layer.set_weight_parameter(pretrained_parameter(layer))
    layer.kept_weight = None


def follow(layer: Any, fn: Any) -> None:
    """Let the pretrained weight that is kept follow a ``Module.to`` or its kin.

    What is merged is composed again at its first use, if numbers were rounded: the pretrained weights of neighbours, of which
    it is composed, follow one after the other.
    """
    kept = layer.kept_weight
    if kept is None or kept[0] is None:
        layer.is_stale = layer.is_stale or kept is not None
        return
    before = kept[0].dtype
    kept[0].data = fn(kept[0].data)
    layer.is_stale = layer.is_stale or kept[0].dtype != before


def refresh(layer: Any) -> None:
    """Compose what is merged once more, after pretrained weights were rounded."""
    layer.is_stale = False
    if layer.merged and layer.held is None:
        with torch.no_grad(), without_autocast():
            layer.weight_parameter.data = layer.compose(layer.merged_adapters)


def layers_on_top(layer: Any) -> list[Any]:
    """The layers of other methods that are merged into the weight; those that were switched off are unmerged first."""
    merged = [other for other in layer.other_layers if other.merged]
    for other in [other for other in merged if other.disable_adapters]:
        other.unmerge()
    return [other for other in merged if other.merged]


def with_parts_inside(layer: Any, weight: Any) -> Any:
    """A weight with what the LoRA parts add to it that were there before the layer: whoever is called inside it adds them."""
    for other in layer.other_layers:
        if hasattr(other, "with_part") and other in layer.modules():
            weight = other.with_part(weight)
    return weight


def check_held(layer: Any, wanted: Sequence[str] | None = None) -> None:
    """Refuse (``RecastBankError``) a weight into which others were merged on top of other tasks than the wanted ones."""
    layers_on_top(layer)
    wanted = layer.tasks_in_force() if wanted is None else wanted
    if layer.held is not None and set(layer.held) != set(wanted):
        raise held_error(layer, wanted)


def held_error(layer: Any, wanted: Sequence[str]) -> RecastBankError:
    """Says that adapters of another method are merged on top of other tasks than the wanted ones."""
    merged = sorted({name for other in layer.other_layers for name in other.merged_adapters})
    return RecastBankError(
        f"adapters of another method ({', '.join(merged)}) are merged into {layer.module_name} on top of other tasks\n"
        f"  tasks merged below:  {', '.join(layer.held or ()) or 'none'}\n"
        f"  tasks wanted now:    {', '.join(wanted) or 'none'}\n"
        "Unmerge them first (unmerge_adapter of the model that they belong to), change the tasks, and merge again."
    )


class Merging:
    """The verbs of a layer by which tasks are merged into its weight; a mixin of layers."""

    held: tuple[str, ...] | None  # tasks in the weight that other methods are merged into; None: none is merged

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the composed weight into the wrapped module; the pretrained weight is kept beside it.

        Args:
            safe_merge: refuse a weight that is not finite, before anything is changed.
            adapter_names: the tasks to merge; None means the active ones.

        Raises:
            ValueError: for ``safe_merge``, if the composed weight is not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        new = list(dict.fromkeys(self.present(adapter_names)))  # PEFT's check leaves what is named twice
        if not new:
            return
        merged = [*self.merged_adapters, *new]
        if self.held is not None:
            check_held(self, merged)
            self.merged_adapters = merged
            return
        check_writable(self)
        with torch.inference_mode(False), torch.no_grad():  # it may be trained with later
            weight = self.compose(merged)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {new[-1]} seems to be broken")
        if self.merged:
            self.weight_parameter.data = weight
        else:
            put_weight(self, weight)
        if self.is_stale:
            self.is_stale = False
        self.merged_adapters = merged

    def merge_in_place(self: Any, adapter_names: list[str], factors: Sequence[Tensor] = ()) -> None:
        """Merge tasks in place of those that are merged now, into the same storage.

        The first call makes the storage; from then on no tensor is made or exchanged, only numbers are written.

        Args:
            adapter_names: the tasks.
            factors: the one task's coefficients, each ``(1,)`` in float32, where they are at hand and no gradient is recorded.
        """
        known = self.known
        if factors and known is not None and not self.is_stale and known.is_merged(self, adapter_names):
            weighted_sum(known.weight, known.templates, factors, self.weight_parameter.data)
            return
        present = self.present(adapter_names)
        if self.held is not None:
            raise held_error(self, present)
        if not self.merged:
            self.merge(adapter_names=present)
            return
        with torch.no_grad():
            self.compose(present, out=self.weight_parameter.data)
        if self.is_stale or self.merged_adapters != present:  # torch looks long at what is assigned
            self.is_stale, self.merged_adapters = False, present
        know(self, in_call=False)

    def unmerge(self: Any) -> None:
        """Put the pretrained weight back: the very parameter that was there before."""
        if not self.merged:
            return
        if self.held is None:
            take_weight(self)
        self.merged_adapters = []  # where others are merged on top the weight goes back when those are unmerged

    def rescaled(self: Any) -> None:
        """Let what is merged follow the tasks' strengths: at its next use, or now where adapters of other layers lie on top."""
        self.is_stale = self.is_stale or bool(self.merged)
        on_top = [(other, other.merged_tasks) for other in self.other_layers if other.merged]
        for other, _ in reversed(on_top):
            other.unmerge()
        for other, tasks in on_top:
            other.merge(adapter_names=tasks)

    @contextmanager
    def written_by_others(self: Any) -> Iterator[None]:
        """A block in which a layer of another method writes into the innermost weight: it gets a tensor of its own.

        The tensor holds the weight of the active tasks, so that what is merged on it is right for any method. It stays for as
        long as something of another method is merged.
        """
        if self.held is None:
            held = tuple(self.merged_adapters or self.tasks_in_force())
            if not self.merged:
                check_writable(self)
                with torch.inference_mode(False), torch.no_grad():  # it may be trained with later
                    put_weight(self, self.compose(held))
            self.held = held
        try:
            yield
        finally:
            if not any(other.merged for other in self.other_layers):
                if self.merged:
                    with torch.no_grad():
                        self.weight_parameter.data = self.compose(self.merged_adapters)
                else:
                    take_weight(self)
                self.held = None

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give back the wrapped module as an ordinary one, with the tasks merged into it or not.

        A weight that was released for a compressed bank comes back as the bank composes it.
        """
        inside = [other for other in self.other_layers if other in self.modules()]
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            if self.is_stale:
                refresh(self)
            for other in inside:
                other.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            for other in (other for other in inside if other.merged):
                other.unmerge()
            self.unmerge()
        base = self.get_base_layer()
        if self.weight_parameter is None:
            with torch.no_grad():
                self.set_weight_parameter(nn.Parameter(self.compose([]), requires_grad=False))
        for name, child in base.named_children():  # tasks may have something at the output projection of an attention
            if hasattr(child, "unload_and_optionally_merge_module"):
                setattr(base, name, child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names))
        if hasattr(self.weight_parameter, STANDS_FOR):  # from now on it is an ordinary parameter
            delattr(self.weight_parameter, STANDS_FOR)
        return base
