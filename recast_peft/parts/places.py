"""Where a task's partners stand, and how they are put in, found and taken out.

What acts on an output or a bias hangs on the module by a forward hook; its parameters lie in one container beside the
modules of the model, in PEFT's container for modules that are saved whole, so that saving, loading, activating, disabling and
deleting a task treat them as PEFT treats any such module, and no module of the model gets another name. What acts on a weight
belongs to the ``RecastLayer`` of the module.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.utils.other import match_target_against_key
from torch import Tensor, nn

from ..banks.files import StoredBank, find_bank
from ..composition.fingerprint import weight_fingerprint
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastLoadError, RecastTargetError
from ..layer import RecastLayer, recast_layers
from ..names import MODEL_PREFIX, PARTNER_CONTAINER, place_key, plain_name
from ..options.record import Reference, TaskRecord, bank_to_use
from ..parts import BiasConfig, PartnerConfig, PiggybackConfig
from ..planning.candidates import Candidate, find_candidates
from ..planning.heads import head_names
from ..planning.roles import SHORTHANDS
from .bias import BiasMix, BiasTemplates, bias_of, channels_of, check_bias
from .holders import PartnerContainer, PartnerHook, TaskBiases, TaskPartners, partner_holders
from .piggyback import WeightMask
from .stacking import inner_layers

MASKS = "recast_masks"
HOW_TO_GIVE = (
    "Hand the bank over with the task's config:\n"
    "  config = RecastConfig.from_pretrained(task)\n"
    "  config.partners = [BiasConfig(bank=load_bank(folder_or_repository))]\n"
    "  model = PeftModel.from_pretrained(backbone, task, config=config)"
)


@dataclass
class PreparedPartner:
    """A task's partner at one place, ready to be put in.

    Attributes:
        config: of the partner.
        candidate: the place.
        module: what the task trains there.
        fingerprint: of the pretrained weight, where the partner acts on one that no layer of ours composes yet.
    """

    config: PartnerConfig
    candidate: Candidate
    module: nn.Module
    fingerprint: str | None = None

    @property
    def prefix(self) -> str:
        """Before the names of its entries in the task's file."""
        if self.config.acts_on == "weight":
            return f"{self.candidate.name}.{MASKS}"
        return f"{PARTNER_CONTAINER}.{place_key(self.candidate.name)}.{self.config.method}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its entries by the names that the task's file has."""
        if isinstance(self.module, WeightMask):
            return {f"{self.prefix}.mask": self.module.packed_shape}
        return {f"{self.prefix}.{key}": tuple(value.shape) for key, value in self.module.state_dict().items()}


# ---------------------------------------------------------------- preparing


def prepare_partners(
    model: nn.Module, config: RecastConfig, targets: Collection[str], device: torch.device | None = None
) -> list[PreparedPartner]:
    """Find the places of a task's partners and build what it trains there; the model is not touched.

    Args:
        model: the backbone, with or without other tasks.
        config: of the task.
        targets: names of the task's target modules.
        device: of what is built; None is that of each place. On the meta device partners are only counted.

    Raises:
        RecastTargetError: if a partner finds no place, or cannot stand at one that was named.
        RecastBankError: if a bank of biases is not found, or is of another model.
        RecastConfigError: if ``modules_to_save`` would copy a place.
    """
    prepared: list[PreparedPartner] = []
    partners = cast(list[PartnerConfig], config.partners or [])
    candidates = find_candidates(model) if partners else []
    heads = head_names(model) if partners else set()
    for partner in partners:
        if isinstance(partner, BiasConfig) and partner.bank is not None:
            prepared += _on_bank(model, partner, _bias_bank(model, partner, config.record), candidates, device)
            continue
        for candidate in places_of(partner, candidates, heads, targets):
            layer = _recast_layer(candidate)
            weight = None if candidate.weight_name is None else candidate.module._parameters.get(candidate.weight_name)
            shape = layer.weight_shape if layer is not None else None if weight is None else tuple(weight.shape)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {candidate.name}".encode()))
            like = _like(candidate, model)
            module = partner.build(candidate.module, shape, generator, **{**like, "device": device or like["device"]})
            module.train(candidate.module.training)
            is_new = partner.acts_on == "weight" and layer is None and candidate.name not in targets
            fingerprint = weight_fingerprint(weight) if is_new and weight is not None and device is None else None
            prepared.append(PreparedPartner(partner, candidate, module, fingerprint))
    places = {p.candidate.name for p in prepared} | {holder.place for holder in partner_holders(model)}
    copied = [(place, name) for place in sorted(places) for name in config.modules_to_save or () if _is_under(place, name)]
    if copied:
        raise RecastConfigError(
            f"modules_to_save={config.modules_to_save!r} would copy {copied[0][0]}, where partners of a task stand: give the "
            "partner other target_modules, or leave the module out of modules_to_save"
        )
    return prepared


def partner_shapes(prepared: Iterable[PreparedPartner]) -> dict[str, tuple[int, ...]]:
    """Shapes of what partners add to a task's file."""
    return {key: shape for partner in prepared for key, shape in partner.shapes().items()}


def _bias_bank(model: nn.Module, partner: BiasConfig, record: TaskRecord | None) -> StoredBank:
    """The bank that a partner names, from memory or from its file.

    Raises:
        RecastBankError: if it is not found, or is a bank of weights.
    """
    named = bank_to_use(partner.bank, record, partner.method)
    assert named is not None
    held = [cast(BiasTemplates, t).bank for h in partner_holders(model) if isinstance(h, TaskBiases) for t in h.banks.values()]
    if isinstance(named, StoredBank):
        bank = named
    else:
        same = [bank for bank in held if bank.fingerprint == named["fingerprint"]]
        bank = next(iter(same), None) or find_bank(named, None if record is None else record.folder, HOW_TO_GIVE)
    if not bank.is_of_biases:
        raise RecastBankError(
            f"the bank {bank.name or 'in memory'} holds templates of weights: give it as RecastConfig(bank=...); "
            "a bank of biases is made by grow_bias_bank"
        )
    return bank


def _on_bank(
    model: nn.Module, partner: BiasConfig, bank: StoredBank, candidates: list[Candidate], device: torch.device | None
) -> list[PreparedPartner]:
    """What a task trains on a bank of biases: the first bias of every group owns the group's coefficients."""
    places = {candidate.name: candidate for candidate in candidates}
    holders = {holder.place: holder for holder in partner_holders(model) if isinstance(holder, TaskBiases)}
    partner = replace(partner, bank=bank)
    prepared: list[PreparedPartner] = []
    for group in bank.groups.values():
        owner: BiasMix | None = None
        for member, templates in group.biases().items():
            bias = bias_of(places, member, templates.shape[1])
            refusal = partner.refusal(places[member])
            if refusal is not None:
                raise RecastTargetError(f"partner bias cannot stand at {member}, which its bank names: {refusal}")
            pretrained = holders[member].pretrained() if member in holders else bias
            if device is None and not pretrained.is_meta:
                check_bias(member, pretrained, bank.base_fingerprint[member])
            like = _like(places[member], model)
            like["device"] = device or like["device"]
            shared = BiasTemplates(bank, templates, like["device"])
            channels = channels_of(places[member].module)
            assert channels is not None
            module = BiasMix(channels, shared, member, owner, **like)
            owner = owner or module
            prepared.append(PreparedPartner(partner, places[member], module.train(places[member].module.training)))
    return prepared


def partner_banks(prepared: Iterable[PreparedPartner]) -> dict[str, Reference]:
    """The stored banks that partners are on, by the partner's name."""
    return {p.config.method: reference for p in prepared if (reference := p.config.bank_reference) is not None}


def places_of(
    partner: PartnerConfig, candidates: list[Candidate], heads: set[str], targets: Collection[str]
) -> list[Candidate]:
    wanted = partner.target_modules
    is_shorthand = isinstance(wanted, str) and wanted in SHORTHANDS
    if wanted is None or is_shorthand:
        outside = [c for c in candidates if not any(_lies_in(c.name, head) for head in heads) or c.name in targets]
        if wanted is None:
            chosen = _outermost([c for c in outside if partner.is_default_place(c, targets)])
        else:
            chosen = [c for c in outside if SHORTHANDS[str(wanted)](c) and c.weight_name is not None]
        chosen = [c for c in chosen if partner.refusal(c) is None]
    else:
        chosen = [c for c in candidates if _is_named(wanted, c.name)]
        refused = {c.name: reason for c in chosen if (reason := partner.refusal(c)) is not None}
        if refused:
            shown = "\n".join(f"  {name}: {reason}" for name, reason in list(refused.items())[:8])
            raise RecastTargetError(
                f"partner {partner.method} cannot stand at {len(refused)} of the modules that target_modules names:\n{shown}"
            )
    if not chosen:
        raise _no_place(partner, candidates)
    return chosen


def _no_place(partner: PartnerConfig, candidates: list[Candidate]) -> RecastTargetError:
    possible = [c.name for c in candidates if partner.refusal(c) is None]
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in possible))
    wanted = partner.target_modules
    named = [wanted] if isinstance(wanted, str) else list(wanted or ())
    near = sorted({hit for name in named for hit in difflib.get_close_matches(name, [*leaves, *possible], n=2)})
    hint = f" Near: {', '.join(near)}." if near else ""
    where = f"target_modules={wanted!r} names no module of this model" if wanted else "it finds no place by itself"
    if leaves:
        can = f"It can stand at modules called {', '.join(leaves[:20])}: name them with its target_modules."
    else:
        can = "The model has no module at which it could stand (an MLP that is split over several modules, as BERT's, is none)."
    return RecastTargetError(f"partner {partner.method}: {where}.{hint}\n{can}")


def _is_named(wanted: Sequence[str] | str, name: str) -> bool:
    """PEFT's rule: a regular expression for the whole name, or names and their endings."""
    if isinstance(wanted, str):
        return bool(match_target_against_key(wanted, name))
    return any(name == target or name.endswith(f".{target}") for target in wanted)


def _outermost(candidates: list[Candidate]) -> list[Candidate]:
    names = {c.name for c in candidates}
    return [c for c in candidates if not any(c.name != name and _lies_in(c.name, name) for name in names)]


def _lies_in(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _is_under(place: str, saved: str) -> bool:
    """Whether ``modules_to_save``, which names the ends of module names, copies the module at a place."""
    parts = place.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))


def _like(candidate: Candidate, model: nn.Module) -> dict[str, Any]:
    """Device of the place; float32 beside weights of half precision, as PEFT's adapters are."""
    parameters = (*candidate.module.parameters(), *model.parameters())
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    return {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}


def _recast_layer(candidate: Candidate) -> RecastLayer | None:
    return next((layer for layer in inner_layers(candidate.visible) if isinstance(layer, RecastLayer)), None)


# ---------------------------------------------------------------- putting in and taking out


def install_partners(tuner: Any, adapter_name: str, prepared: list[PreparedPartner], inference_mode: bool) -> None:
    """Put a task's partners into the model of a tuner, and let all partners stand behind the modules as they are now."""
    active = list(tuner.active_adapters)
    layers = recast_layers(tuner.model) if prepared else {}
    for partner in prepared:
        if partner.config.acts_on == "weight":
            layer = layers.get(partner.candidate.name) or _masked_layer(partner, active)
            layer.recast_masks[adapter_name] = partner.module
            layer.set_adapter(layer.active_adapters, inference_mode=inference_mode)
        else:
            holder = _holder(tuner.model, partner)
            holder.add(adapter_name, partner.module, adapter_name in active, inference_mode)
    methods = tuple(dict.fromkeys(partner.config.method for partner in prepared))
    for layer in recast_layers(tuner.model).values() if methods else ():
        if layer.has_task(adapter_name):
            layer.recast_partners[adapter_name] = methods
    _attach(tuner.model)


def _masked_layer(partner: PreparedPartner, active: list[str]) -> RecastLayer:
    """A layer without coefficients around a module that is no target of the task."""
    place = partner.candidate
    assert place.weight_name is not None
    assert partner.fingerprint is not None
    layer = RecastLayer(place.visible, place.name, place.weight_name, partner.fingerprint)
    layer.train(place.visible.training)
    layer._active_adapter = list(active)
    setattr(place.path[-1][1], place.slot, layer)
    return layer


def _holder(model: nn.Module, partner: PreparedPartner) -> TaskPartners:
    if PARTNER_CONTAINER not in model._modules:
        setattr(model, PARTNER_CONTAINER, PartnerContainer())
    container: Any = model._modules[PARTNER_CONTAINER]
    key = place_key(partner.candidate.name)
    if key not in container:
        container[key] = nn.ModuleDict()
    if partner.config.method not in container[key]:
        kind = TaskBiases if partner.config.acts_on == "bias" else TaskPartners
        container[key][partner.config.method] = kind(partner.candidate.name)
    return container[key][partner.config.method]


def _attach(model: nn.Module) -> None:
    """Hang every partner on the module of its place: on our layer if there is one, else on the plain module.

    A task may have put a layer around a module since, and that layer may call the module several times for one batch.
    """
    if PARTNER_CONTAINER not in model._modules:
        return
    _detach(model)
    places = {c.name: c for c in find_candidates(model)}
    for holder in partner_holders(model):
        place = places[holder.place]
        holder.hosts = (place.module,)
        (_recast_layer(place) or place.module).register_forward_hook(PartnerHook(holder), with_kwargs=True)


def _detach(model: nn.Module) -> None:
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, PartnerHook)]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def take_out_partners(model: nn.Module) -> PartnerContainer | None:
    """Take all partners that do not act on weights out of a model.

    Returns:
        what ``put_back_partners`` puts back; None if there were none.
    """
    _detach(model)
    return model._modules.pop(PARTNER_CONTAINER, None)  # type: ignore[return-value]


def put_back_partners(model: nn.Module, container: PartnerContainer | None) -> None:
    """Undo ``take_out_partners``."""
    if container is not None:
        setattr(model, PARTNER_CONTAINER, container)
        _attach(model)


# ---------------------------------------------------------------- what tasks may do


def check_mergeable(model: nn.Module, adapters: Collection[str], active: Collection[str]) -> None:
    """Refuse to merge tasks while a partner that no weight can hold takes part.

    Args:
        model: the backbone.
        adapters: the tasks to merge.
        active: the tasks in force.

    Raises:
        RecastBankError: naming the task and its partner.
    """
    for method, names in _owners_by_method(model).items():
        blocking = sorted(names & {*adapters, *active})
        if blocking:
            raise RecastBankError(
                f"task {blocking[0]!r} has the partner {method}, which cannot be merged into a weight; nothing was changed. "
                "Leave it unmerged, or activate and merge a task without it."
            )


def _owners_by_method(model: nn.Module) -> dict[str, set[str]]:
    """Tasks that have a partner which cannot be merged, by its name."""
    container: Any = model._modules.get(PARTNER_CONTAINER) or {}
    owners: dict[str, set[str]] = {}
    for holders in container.values():
        for method, holder in holders.items():
            if not holder.is_mergeable:
                owners.setdefault(method, set()).update(holder.modules_to_save.keys())
    return owners


def check_without_partners(config: RecastConfig, what: str, instead: str, allowed: Collection[str] = ()) -> None:
    """Refuse a task with partners where its coefficients alone are understood.

    Args:
        config: of the task.
        what: is not possible, as the beginning of a sentence.
        instead: what to do.
        allowed: partners that are understood too.

    Raises:
        RecastConfigError: naming the partners.
    """
    found = [partner.method for partner in cast(list[PartnerConfig], config.partners or [])]
    found = [method for method in found if method not in allowed]
    if found:
        methods = ", ".join(found)
        raise RecastConfigError(f"{what}: it has the partners {methods} beside its coefficients. {instead}")


# ---------------------------------------------------------------- what lies in files


def partner_of_entry(key: str, numbers: int) -> tuple[str, int] | None:
    """The partner that an entry of a task's file belongs to, and how many numbers (of a mask: bits) it holds.

    Args:
        key: of the entry.
        numbers: in it.

    Returns:
        None if the entry is no partner's.
    """
    if f".{MASKS}." in key:
        return PiggybackConfig().method, 8 * numbers
    _, found, rest = key.partition(f"{PARTNER_CONTAINER}.")
    return (rest.split(".")[1], numbers) if found else None


def masks_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, WeightMask]]:
    """A task's masks by the names of their scores in the model's state dict."""
    for name, layer in model.named_modules():
        if isinstance(layer, RecastLayer) and adapter_name in layer.recast_masks:
            mask = layer.recast_masks[adapter_name]
            if isinstance(mask, WeightMask):
                yield f"{name}.{MASKS}.{adapter_name}.scores", mask


def pack_masks(model: nn.Module, adapter_name: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the scores of a task's masks in what is saved by bits."""
    packed = dict(entries)
    for key, mask in masks_of(model, adapter_name):
        if packed.pop(key, None) is not None:
            packed[f"{key.removesuffix('scores')}mask"] = mask.pack()
    return packed


def unpack_masks(model: nn.Module, adapter_name: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the bits of a stored task, by the names that its file has, by scores; the counterpart of ``pack_masks``."""
    unpacked = dict(entries)
    for key, mask in masks_of(model, adapter_name):
        stored = f"{MODEL_PREFIX}{plain_name(key).removeprefix(MODEL_PREFIX).removesuffix(f'{adapter_name}.scores')}mask"
        if stored not in unpacked:
            raise RecastLoadError(f"task {adapter_name!r}: {stored} is missing; nothing was loaded. Fetch its file again.")
        unpacked[key] = mask.unpack(unpacked.pop(stored))
    return unpacked
