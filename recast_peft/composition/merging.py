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
from .calling import marked_as_pretrained
from .compose import weighted_sum, without_autocast
from .composed import STANDS_FOR, ComposedModule
from .kinds import is_lazily_readable
from .known import know
from .lazy_weight import LazyWeight, is_read_by_the_model
from .mixed_batch import current_batch
from .outputs import is_out_of_reach
from .quantised import packed_since, quantised_by

# Attributes by which accelerate marks the module that it hooked; they belong to the wrapped module alone.
_NOT_FORWARDED = frozenset({"_hf_hook", "_old_forward"})


def put_weight(layer: ComposedModule, weight: Tensor) -> None:
    """Put a composed weight into a wrapped module that is writable, and keep the pretrained one beside it."""
    pretrained = layer.weight_parameter
    # a tensor of its own, also where the composed weight is the pretrained one itself
    merged = nn.Parameter(weight.detach().clone() if weight is pretrained else weight, requires_grad=False)
    setattr(merged, STANDS_FOR, pretrained)
    layer.kept_weight = (pretrained,)
    layer.set_weight_parameter(merged)


def check_writable(layer: ComposedModule) -> None:
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


def take_weight(layer: ComposedModule) -> None:
    """Put the pretrained parameter back, or take the merged one out where that was released.

    Raises:
        RecastBankError: if the module computes with another one since.
    """
    if layer.weight_name not in layer.get_base_layer()._parameters:
        raise packed_since(layer.get_base_layer())
    layer.set_weight_parameter(layer.pretrained)
    layer.kept_weight = None


def follow(layer: ComposedModule, fn: Any) -> None:
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


def refresh(layer: ComposedModule) -> None:
    """Compose what is merged once more, after pretrained weights were rounded."""
    layer.is_stale = False
    if layer.merged and layer.held is None:
        with torch.no_grad(), without_autocast():
            layer.weight_parameter.data = layer.compose(layer.merged_adapters)


def layers_on_top(layer: ComposedModule) -> list[Any]:
    """The layers of other methods that are merged into the weight; those that were switched off are unmerged first."""
    merged = [other for other in layer.other_layers if other.merged]
    for other in [other for other in merged if other.disable_adapters]:
        other.unmerge()
    return [other for other in merged if other.merged]


def with_parts_inside(layer: ComposedModule, weight: Any) -> Any:
    """A weight with what the LoRA parts add to it that were there before the layer: whoever is called inside it adds them."""
    for other in layer.layers_inside:
        if hasattr(other, "with_part"):
            weight = other.with_part(weight)
    return weight


def check_held(layer: ComposedModule, wanted: Sequence[str] | None = None) -> None:
    """Refuse (``RecastBankError``) a weight into which others were merged on top of other tasks than the wanted ones."""
    layers_on_top(layer)
    wanted = layer.tasks_in_force() if wanted is None else wanted
    if layer.held is not None and set(layer.held) != set(wanted):
        raise held_error(layer, wanted)


def held_error(layer: ComposedModule, wanted: Sequence[str]) -> RecastBankError:
    """Says that adapters of another method are merged on top of other tasks than the wanted ones."""
    merged = sorted({name for other in layer.other_layers for name in other.merged_adapters})
    return RecastBankError(
        f"adapters of another method ({', '.join(merged)}) are merged into {layer.module_name} on top of other tasks\n"
        f"  tasks merged below:  {', '.join(layer.held or ()) or 'none'}\n"
        f"  tasks wanted now:    {', '.join(wanted) or 'none'}\n"
        "Unmerge them first (unmerge_adapter of the model that they belong to), change the tasks, and merge again."
    )


class Merging(ComposedModule):
    """A composed module into whose weight tasks can be merged.

    Whoever reads its ``weight`` (or, of a multi-head attention, ``in_proj_weight``) gets the weight that a call would use,
    differentiable; any other attribute that it lacks is the wrapped module's.
    """

    @property
    def weight(self) -> Tensor:
        """The weight that a call would use now: composed, differentiable."""
        if self.weight_name != "weight":
            raise AttributeError(f"{type(self.base_layer).__name__} has no attribute 'weight'")
        lazy = None if self.held is not None else self._lazy_weight()
        return self.effective_weight() if lazy is None else lazy

    def _lazy_weight(self) -> Tensor | None:
        """The composed weight of a plain layer for a reader who may want no more than its dtype; None for all others."""
        if not is_read_by_the_model() or not is_lazily_readable(self.base_layer):
            return None
        known = (self.weight_shape, self.weight_dtype, self.weight_device)
        if current_batch() is not None:
            return LazyWeight(self.effective_weight, *known)  # raises if it is used
        tasks = self.tasks_in_force()
        if torch.is_grad_enabled() or self.merged_adapters or self.is_masked(tasks):
            return None
        # as they are now
        values = {name: self.recast_coefficients[name].detach().clone() for name in self.with_coefficients(tasks)}
        if not values:
            return None

        def compose() -> Tensor:
            with torch.no_grad():
                return marked_as_pretrained(self, self.compose(tasks, values=values))

        return LazyWeight(compose, *known)

    def effective_weight(self) -> Tensor:
        """The weight that a call would use now; in a mixed batch there is none for all samples (``RecastBankError``)."""
        if current_batch() is not None:
            raise RecastBankError(
                f"the model reads the weight of {self.module_name} instead of calling the module, so it cannot have "
                "another task for each sample: pass one task at a time instead of adapter_names"
            )
        if self.held is not None:
            check_held(self)
        if self.is_stale:
            refresh(self)
        if self.held is not None or (self.merged and not self.disable_adapters):
            return with_parts_inside(self, self.weight_parameter)
        weight = marked_as_pretrained(self, self.compose([] if self.disable_adapters else self.acting_adapters))
        return with_parts_inside(self, weight)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name in _NOT_FORWARDED or name.startswith("__"):
                raise
            if name == "pretrained_weight":
                raise self._released_error() from None
            if name == self.__dict__.get("weight_name") and name != "weight":
                return self.effective_weight()
            return getattr(base, name)

    # ---------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
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

    def merge_in_place(self, adapter_names: list[str], factors: Sequence[Tensor] = ()) -> None:
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

    def unmerge(self) -> None:
        """Put the pretrained weight back: the very parameter that was there before."""
        if not self.merged:
            return
        if self.held is None:
            take_weight(self)
        self.merged_adapters = []  # where others are merged on top the weight goes back when those are unmerged

    def rescaled(self) -> None:
        """Let what is merged follow the tasks' strengths: at its next use, or now where adapters of other layers lie on top."""
        self.is_stale = self.is_stale or bool(self.merged)
        on_top = [(other, other.merged_tasks) for other in self.other_layers if other.merged]
        for other, _ in reversed(on_top):
            other.unmerge()
        for other, tasks in on_top:
            other.merge(adapter_names=tasks)

    @contextmanager
    def written_by_others(self) -> Iterator[None]:
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

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Give back the wrapped module as an ordinary one, with the tasks merged into it or not.

        A weight that was released for a compressed bank comes back as the bank composes it.
        """
        inside = self.layers_inside
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
            if (unload := getattr(child, "unload_and_optionally_merge_module", None)) is not None:
                setattr(base, name, unload(merge, safe_merge, adapter_names))
        if hasattr(self.weight_parameter, STANDS_FOR):  # from now on it is an ordinary parameter
            delattr(self.weight_parameter, STANDS_FOR)
        return base
