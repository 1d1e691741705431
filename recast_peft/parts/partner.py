"""Partners: what a task may train beside its coefficients, as the paper combines RECAST with other methods (section 4).

A partner is its options (``PartnerConfig``) and the module that a task trains at each place. What acts on an output hangs on
the module of its place by a forward hook; its parameters lie in one container beside the modules of the model, so that no
module of the model gets another name. What acts on a weight belongs to the ``RecastLayer`` of the module.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..composition.mixed_batch import MixedBatch, current_batch
from ..composition.recomputation import state_of_call, strengths_of_call
from ..composition.strength import at_strength
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastTargetError
from ..holders import container_key, put_at
from ..layer import RecastLayer, recast_layers
from ..names import MODEL_PREFIX, PARTNER_CONTAINER, modules_of, place_key
from ..options.partner import PARTNERS, PartnerConfig
from ..planning.candidates import Candidate, composed_layer, find_candidates
from ..planning.heads import head_names
from .base import Piece, Place, Request, TaskPart
from .places import places_of
from .stacking import layer_around
from .wrapper import ScaledModule, was_replaced


@dataclass
class PreparedPartner(Piece):
    """A task's partner at one place, ready to be put in."""

    config: PartnerConfig
    candidate: Candidate  # the place
    module: nn.Module  # what the task trains there

    @property
    def place(self) -> str:  # type: ignore[override]
        """The module of the plain model that it stands at."""
        return self.candidate.name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        is_mask = self.config.acts_on == "weight"
        prefix = f"{self.place}.{RecastLayer.MASKS}" if is_mask else entry_prefix(self.place, self.config.method)
        return {f"{prefix}.{key}": shape for key, shape in self.config.stored_shapes(self.module).items()}


def entry_prefix(place: str, method: str) -> str:
    """What stands before the names of a partner's entries in a task's file."""
    return f"{PARTNER_CONTAINER}.{place_key(place)}.{method}"


class SideContainer(nn.ModuleDict):
    """What tasks share or own beside a model's modules; a model that is an ``nn.Sequential`` calls all of its children."""

    def forward(self, x: Any) -> Any:
        """The input, as it is."""
        return x


class PartnerPart(TaskPart):
    """One kind of partner, by its options' class."""

    stands_before_copies = False  # whether it acts before its place, whichever copy of the module a task owns there

    def __init__(self, config_class: type[PartnerConfig], holder_class: type[TaskPartners] | None = None) -> None:
        self.holder_class = holder_class or TaskPartners
        self.name = config_class.method

    def prepare(self, request: Request) -> list[PreparedPartner]:
        partner = request.config.partner(self.name)
        if partner is None:
            return []
        candidates = find_candidates(request.model)
        prepared = self._prepared(request, partner, candidates)
        places = [piece.place for piece in prepared]
        if self.stands_before_copies:  # of its place itself, and not of a module around it
            places = [place.rpartition(".")[0] for place in places]
        check_not_copied(request.config, places)
        return prepared

    def _prepared(self, request: Request, partner: PartnerConfig, candidates: list[Candidate]) -> list[PreparedPartner]:
        prepared = []
        for candidate in places_of(partner, candidates, head_names(request.model), request.targets):
            shape, _ = candidate.weight_like or (None, None)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{request.config.seed} {candidate.name}".encode()))
            module = partner.build(candidate.module, shape, generator, **request.like(candidate.module))
            module.train(candidate.module.training)
            prepared.append(PreparedPartner(partner, candidate, module))
        return prepared

    def install(self, place: Place, pieces: list[PreparedPartner]) -> None:
        for piece in pieces:
            if piece.config.acts_on == "weight":
                self._mask(place, piece)
            else:
                self._holder(place.model, piece).add(place.adapter_name, piece.module, place.active, place.inference_mode)

    def _mask(self, place: Place, piece: PreparedPartner) -> None:
        layer = recast_layers(place.model).get(piece.place)
        if layer is None:  # no target of the task: a layer without coefficients
            layer = layer_around(piece.candidate, piece.candidate.fingerprint)
            layer._active_adapter = list(place.tuner.active_adapters)
            put_at(place.model, piece.place, layer)
        layer.recast_masks[place.adapter_name] = piece.module
        piece.module.requires_grad_(place.active and not place.inference_mode)

    def _holder(self, model: nn.Module, piece: PreparedPartner) -> TaskPartners:
        if PARTNER_CONTAINER not in model._modules:
            # place -> method -> TaskPartners; a compiled model would pass an assignment on to what it holds
            model.add_module(PARTNER_CONTAINER, SideContainer())
        container: Any = model._modules[PARTNER_CONTAINER]
        # PEFT's classes for a task_type take whatever ends with the name of a classifier for one
        key = container_key(piece.place) + ("%before" if self.stands_before_copies else "")
        if key not in container:
            container[key] = nn.ModuleDict()
        if not isinstance(container[key]._modules.get(self.name), TaskPartners):
            container[key][self.name] = self.holder_class(piece.place, self.name)
            container[key][self.name].home = (container[key],)
        return container[key][self.name]

    def bank_reference(self, pieces: list[PreparedPartner]) -> Any:
        return next((piece.config.bank_reference for piece in pieces), None)

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return None if config.partner(self.name) is None else f"the partner {self.name}"


class TaskPartners(ScaledModule):
    """The partners of one kind that stand at one place, by task; the active task's acts."""

    trained_kind: str | None = "partners"

    def __init__(self, place: str, method: str) -> None:
        super().__init__(nn.Identity(), entry_prefix(place, method))
        self.place, self.method = place, method
        self.what = f"the partner {method}"
        self.hosts: tuple[nn.Module, ...] = ()  # the module at the place; in a tuple, since it is no child
        self.home: tuple[nn.ModuleDict, ...] = ()  # where it lies in the model; whoever takes it out of there ends its work

    def refusal_to_merge(self, adapter_name: str) -> str | None:
        return f"the partner {self.method}, which cannot be merged into a weight" if self.has_task(adapter_name) else None

    def refusal_to_pool(self, adapter_name: str) -> str | None:
        return None  # what a pool cannot hold is known by the config

    def merge(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Note the tasks that are merged.

        Raises:
            RecastBankError: if one of them has something here that cannot be, and a loop over the layers did not look before.
        """
        for name in self._active_adapter if adapter_names is None else adapter_names:
            refusal = self.refusal_to_merge(name)
            if refusal is not None:
                raise RecastBankError(
                    f"task {name!r} has {refusal}. Take back what was merged before (unfuse_lora), and leave the task unmerged."
                )
        super().merge(adapter_names, safe_merge)

    def attach_in(self, model: nn.Module, places: dict[str, Candidate]) -> None:
        """Hang on what belongs to the place in a model; ``places`` are its modules by name."""
        known = (candidate for candidate in places.values() if any(candidate.module is host for host in self.hosts))
        place = next(known, None) or places.get(self.place)  # a wrapper that came later gives it another name
        if place is None:
            raise was_replaced(f"{self.place}, where tasks have {self.what},")
        self.attach(place.module, composed_layer(place.visible) or place.module)

    def attach(self, place: nn.Module, visible: nn.Module) -> None:
        """Hang on the module of the place, or on our layer around it."""
        self.hosts = (place,)
        visible.register_forward_hook(PartnerHook(self), with_kwargs=True)

    def acts_in(self, batch: MixedBatch | None) -> bool:
        """Whether a call that comes by here has to do with tasks."""
        if self.home and self.home[0]._modules.get(self.method) is not self:
            return False
        return self.shown_task is not None if batch is None else not (self._disable_adapters and batch.is_off)

    def adapt(self, x: Any, y: Any) -> Any:
        """The output of the place with the partner of the active task, or of each sample's own task."""
        batch = current_batch()
        if not self.acts_in(batch):
            return y
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise RecastTargetError(
                f"{self.place} takes a {type(x).__name__} and gives a {type(y).__name__}; a partner can stand only where both "
                "are tensors: name other modules with its target_modules"
            )
        if batch is None:
            return self._scaled(cast(str, self.shown_task), x, y)
        samples = batch.samples_in(x, self)
        if batch.pool is not None:
            return self._adapted_from_pool(batch, y)
        return self._by_sample(batch, samples, y, lambda name, rows: self._scaled(name, x[rows], y[rows]))

    def _by_sample(self, batch: MixedBatch, samples: int, y: Tensor, adapted: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The output with the samples of each task that is held here as ``adapted(task, rows)`` gives them."""
        for key, indices in batch.rows(samples).items():
            if isinstance(key, str) and key in self._adapters:
                rows = batch.index(indices, y.device)
                y = y.index_copy(0, rows, adapted(key, rows))
        return y

    def _scaled(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        return at_strength(y, self._adapted(adapter_name, x, y), strengths_of_call(self).get(adapter_name, 1.0))

    def _adapted(self, adapter_name: str, x: Any, y: Tensor) -> Tensor:
        return self.modules_to_save[adapter_name](x, y)

    def _adapted_from_pool(self, batch: MixedBatch, y: Tensor) -> Tensor:
        return y  # a pool holds none of them


class PartnerHook:
    """Stands behind a module and lets the partners of its place change its output; or before it, and changes its input."""

    def __init__(self, partners: TaskPartners, before: bool = False) -> None:
        self.partners = partners
        self.before = before

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if self.before:
            adapted = self.partners.adapt(x, x)
            return ((adapted, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs), ""): adapted})
        state_of_call(self.partners)
        return self.partners.adapt(x, output)


def attach_partners(model: nn.Module) -> None:
    """Hang every partner on the module of its place: on our layer if there is one, else on the plain module.

    A task may have put a layer around a module since, and that layer may call the module several times for one batch.
    """
    detach_partners(model)
    holders = modules_of(model, TaskPartners)
    places = {candidate.name: candidate for candidate in find_candidates(model)} if holders else {}
    for holder in holders:
        holder.attach_in(model, places)


def detach_partners(model: nn.Module) -> None:
    """Take the hooks of partners off all modules."""
    for module in modules_of(model, nn.Module):
        for hooks, with_kwargs in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, PartnerHook)]:
                del hooks[key]
                with_kwargs.pop(key, None)


def check_not_copied(config: RecastConfig, places: list[str]) -> None:
    """Refuse ``modules_to_save`` that would copy a module at which partners of a task stand."""
    saved = tuple(config.modules_to_save or ())
    copied = [place for place in places if saved and _is_under(place, saved)]
    if copied:
        raise RecastConfigError(
            f"modules_to_save={config.modules_to_save!r} would copy {copied[0]}, where partners of a task stand: give the "
            "partner other target_modules, or leave the module out of modules_to_save"
        )


def _is_under(place: str, saved: tuple[str, ...]) -> bool:
    """Whether ``modules_to_save``, which names the ends of module names, copies the module at a place."""
    parts = place.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))


def partner_of_entry(key: str, numbers: int) -> tuple[str, int] | None:
    """The partner that an entry of a task's file belongs to, and its numbers (of a mask: bits); None if it is no partner's."""
    name = key.removeprefix(MODEL_PREFIX)
    if name.startswith(f"{PARTNER_CONTAINER}."):
        return name.split(".")[2], numbers  # container, place, kind
    if name.split(".")[-2:-1] == [RecastLayer.MASKS]:
        return next((method, 8 * numbers) for method, config in PARTNERS.items() if config.acts_on == "weight")
    return None
