"""A readout: what the classifier reads is mixed from what layers of several blocks read, by templates that all tasks share.

A pretrained model's last features have lost some of what its earlier blocks know. The templates of a readout are the principal
directions of the inputs of layers in several blocks together (``readout_bank``), as many as the classifier reads features, so
that the classifier keeps its size. A task has no number of its own here. That classifiers gain by reading all blocks is
Head2Toe's (Evci et al., ICML 2022, arXiv 2201.03529), which chooses among their features task by task; here they are projected,
once for all tasks, without labels. Over positions the mean square is taken, which shows a neuron that answers strongly in one
place, where a mean hides it (generalised means as in Radenovic et al., TPAMI 2019, arXiv 1711.02512, at a power of two), and of
that the fourth root, so that few strong neurons do not drown the others (power normalisation: Perronnin et al., ECCV 2010).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..banks.files import StoredBank
from ..composition.kinds import family_of
from ..composition.mixed_batch import NO_TASK, MixedBatch, current_batch
from ..composition.quantised import quantised_by
from ..composition.recomputation import is_recomputing
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastTargetError
from ..holders import holders, plain_modules, unwrapped_module
from ..names import lies_in
from ..options.partner import PartnerCandidate, PartnerConfig
from ..planning.candidates import Candidate
from .banked import BankedPartnerConfig, OfBank, bank_of_partner
from .base import Request
from .partner import PartnerHook, PartnerPart, PreparedPartner, TaskPartners, check_not_copied


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig(BankedPartnerConfig, method="readout"):
    """What the classifier reads comes from several blocks, by the templates of a bank; a task trains no number for it.

    Args:
        target_modules: is left None: the bank says which modules are read.
        bank: that ``readout_bank`` made: the bank, or the name of a folder or repository where it lies. Stored configs hold
            ``{"name": ..., "fingerprint": ...}``.

    Raises:
        RecastConfigError: for anything else.
    """

    is_trained = False
    bank_maker = "readout_bank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is not None:
            raise RecastConfigError(
                f"ReadoutConfig(target_modules={self.target_modules!r}): expected None: the bank says which modules are read"
            )

    def is_default_place(self, candidate: PartnerCandidate, targets: Collection[str]) -> bool:
        return False

    def refusal(self, candidate: PartnerCandidate) -> str | None:
        return "its bank says where it stands"

    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        assert isinstance(self.bank, StoredBank)
        return Readout(self.bank, like["device"])


class Readout(OfBank):
    """The templates of a readout; one module for all tasks on one bank.

    Shapes:
        ``templates`` ``(directions, widths of all members)``, ``offset`` ``(directions,)``; at most as many as features.
    """

    templates: Tensor
    offset: Tensor

    def __init__(self, bank: StoredBank, device: torch.device) -> None:
        (group,) = bank.groups.values()
        assert group.grown is not None
        assert group.offset is not None
        assert group.widths is not None
        super().__init__(bank, device, templates=group.grown.tensors[0].float(), offset=group.offset.float())
        self.members, self.widths, self.pools = group.members, list(group.widths), bool(group.pools)

    def forward(self, inputs: dict[str, Tensor], x: Tensor) -> Tensor:
        """The features for the classifier.

        Args:
            inputs: what the members but for the last read, by name, with their features last; pooled or not.
            x: what the classifier reads in the pretrained model, ``(samples, features)`` or ``(samples, positions, features)``;
                the last member.

        Returns:
            shaped like ``x``, in its dtype; zero behind the directions.

        Raises:
            RecastTargetError: if a member was not called, or reads what does not fit.
        """
        missing = [name for name in self.members[:-1] if name not in inputs]
        if missing:
            raise RecastTargetError(
                f"the readout needs what {missing[0]} reads, which was not called before the classifier: call the model as "
                "a whole"
            )
        reads = (inputs[name] for name in self.members[:-1])
        if self.pools:
            reads = (pooled(read, inputs.get(MASK)) for read in reads)
        given = [fitted(read, x, width) for read, width in zip(reads, self.widths, strict=False)]
        read = torch.cat([part.to(self.templates) for part in (*given, x)], dim=-1)  # blocks may lie on several devices
        features = F.linear(read, self.templates, self.offset).to(x)
        return F.pad(features, (0, x.shape[-1] - features.shape[-1]))


# among the inputs by name, but no names of modules:
MASK = ".mask"  # which positions of a text count, ``(samples, positions)``
UNRECORDED = ".unrecorded"  # an input for which no gradient was recorded
SMALLEST_SQUARE = 1e-3  # that a neuron's mean square is moved from zero, in units of the mean over the layer's neurons


def given_to(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """What a layer, or a wrapper around it, is called with, its features last; None if that is no tensor of real numbers."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    kind = family_of(unwrapped_module(layer))
    return x.movedim(kind.channels, -1) if kind is not None and x.ndim > 2 else x


def pooled(given: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a layer reads, without its positions: the fourth root of the mean square over them.

    Args:
        given: ``(samples, positions, features)``, with any number of dimensions of positions; without any it is given back.
        mask: ``(samples, positions)``; positions of zero are left out of the mean.

    Returns:
        ``(samples, features)``, in float32 at least.
    """
    if given.ndim < 3:
        return given
    rows = given.flatten(1, -2).to(torch.promote_types(given.dtype, torch.float32))  # squares leave half precision's range
    squares = rows * rows  # torch's own norm over this dimension takes ten times as long on CPUs
    if mask is None or mask.shape != given.shape[:2] or given.ndim > 3:
        mean = squares.mean(1)
    else:
        weights = mask[:, None].to(rows)
        mean = torch.bmm(weights, squares)[:, 0] / weights.sum(2).clamp_min(1)
    # near zero the gradient of a root has no bound
    least = SMALLEST_SQUARE * mean.mean(1, keepdim=True) + torch.finfo(mean.dtype).tiny
    return (mean + least).sqrt().sqrt()


def fitted(given: Tensor, x: Tensor, width: int) -> Tensor:
    """What a layer reads where the classifier reads ``x``, ``(*x.shape[:-1], width)``.

    Raises:
        RecastTargetError: if it does not fit.
    """
    if x.ndim == 3 and given.ndim == 3 and given.shape[1] > x.shape[1]:  # texts that are generated: the last words alone
        given = given[:, -x.shape[1] :]
    if given.shape != (*x.shape[:-1], width):
        raise RecastTargetError(
            f"a layer reads {tuple(given.shape)} where the classifier reads {tuple(x.shape)}: a readout needs {width} "
            "features of it for each vector that the classifier reads"
        )
    return given


def modules_around(model: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """The model, and the modules that the named ones lie in, from the outside in."""
    return [model, *(module for name, module in plain_modules(model).items() if any(lies_in(n, {name}) for n in names))]


def mask_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The ``attention_mask`` ``(samples, positions)`` of a call; None if it has none of this form."""
    mask = kwargs.get("attention_mask")
    if mask is None and args:
        names = list(inspect.signature(module.forward).parameters)[: len(args)]
        mask = args[names.index("attention_mask")] if "attention_mask" in names else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


class _Seen(dict):
    """What layers read in a call that is on its way, by thread; no part of a copy."""

    def __reduce__(self) -> tuple:
        return _Seen, ()

    def note(self, name: str, tensor: Tensor) -> None:
        """Note a tensor of this thread's call."""
        self.setdefault(_thread(), {})[name] = tensor

    @property
    def mask(self) -> Tensor | None:
        """Of this thread's call, as far as it has come."""
        return self.get(_thread(), {}).get(MASK)

    def take(self) -> dict[str, Tensor]:
        """What was noted in this thread since it was last asked."""
        return self.pop(_thread(), {})


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()


class TaskReadouts(TaskPartners):
    """The readouts before one classifier, by task."""

    def __init__(self, place: str, method: str) -> None:
        super().__init__(place, method)
        self.seen = _Seen()

    def add(self, adapter_name: str, module: nn.Module, active: bool, inference_mode: bool) -> None:
        """Give a task its readout; tasks on one bank share it."""
        same = [m for m in self.readouts if m.bank.fingerprint == cast(Readout, module).bank.fingerprint]
        super().add(adapter_name, same[0] if same else module, active, inference_mode)

    @property
    def readouts(self) -> list[Readout]:
        """Of all tasks."""
        return [cast(Readout, module) for module in self.modules_to_save.values()]

    def attach_in(self, model: nn.Module, places: dict[str, Candidate]) -> None:
        """Hang on the classifier, whosever it is, and on every module that is read."""
        visible = plain_modules(model)
        visible[self.place].register_forward_pre_hook(PartnerHook(self, before=True), with_kwargs=True)
        read = list(dict.fromkeys(name for readout in self.readouts for name in readout.members[:-1]))
        for name in read:
            visible[name].register_forward_pre_hook(_NoteHook(self, name), with_kwargs=True)
        for module in modules_around(model, read):
            module.register_forward_pre_hook(_NoteHook(self, MASK, is_first=module is model), with_kwargs=True)

    def bank_of(self, adapter_name: str) -> Any:
        return self.modules_to_save[adapter_name] if self.has_task(adapter_name) else None

    def stay(self, model: nn.Module, adapter_name: str) -> None:
        """Hang on a copy of the model that has no place for tasks, with the readout of one of them."""
        self.home, self.idle_slot = (), None
        self.set_adapter([adapter_name], inference_mode=True)
        self.attach_in(model, {})
        model.add_module(ReadoutConfig.method, self.modules_to_save[adapter_name])

    def refusal_to_merge(self, adapter_name: str) -> str | None:
        return None  # it acts beside merged weights

    def refusal_to_unload(self, adapter_name: str) -> str | None:
        return "a readout, which a model without tasks has no place for (merge_adapter() keeps it)"

    def note(self, name: str, tensor: Tensor | None) -> None:
        """Note what a layer reads, where somebody will read it too; where no gradient needs it, it is pooled at once."""
        is_read = self.shown_task is not None or current_batch() is not None
        if tensor is not None and is_read and not is_recomputing():
            pools = next((readout.pools for readout in self.readouts), False)  # one as all
            if pools and name != MASK and not tensor.requires_grad:
                tensor = pooled(tensor, self.seen.mask)
            self.seen.note(name, tensor)
            if not torch.is_grad_enabled():
                self.seen.note(UNRECORDED, tensor)

    def adapt(self, x: Any, y: Any) -> Any:
        """The features that the classifier reads, of the active task or of each sample's own."""
        inputs, batch = self.seen.take(), current_batch()
        if not self.acts_in(batch):
            return y
        if inputs.pop(UNRECORDED, None) is not None and y.requires_grad:
            raise RecastBankError(
                "layers that a readout reads recorded no gradient while the rest of the model did, so that their part of the "
                "gradient would be lost: gradient checkpointing works with use_reentrant=False alone"
            )
        if batch is None:
            return self._adapted(cast(str, self.shown_task), inputs, y)
        if batch.pool is not None:
            return self._read_from_pool(batch, inputs, y)
        return self._by_sample(batch, len(y), y, lambda name, rows: self._adapted(name, inputs, y)[rows])

    def _read_from_pool(self, batch: MixedBatch, inputs: dict[str, Tensor], y: Tensor) -> Tensor:
        """The features of samples with tasks of a pool, all of which have the readout of its slot."""
        assert batch.task_ids is not None
        if not self.has_task(batch.slot):
            return y
        has_task = (batch.task_ids > NO_TASK).repeat_interleave(batch.repeats(len(y))).view(-1, *[1] * (y.ndim - 1))
        return torch.where(has_task.to(y.device), self._adapted(batch.slot, inputs, y), y)


class _NoteHook(PartnerHook):
    """Stands before a layer whose input is read, or a module around it, which may be told the positions that count."""

    partners: TaskReadouts

    def __init__(self, partners: TaskReadouts, name: str, is_first: bool = False) -> None:
        super().__init__(partners)
        self.name, self.is_first = name, is_first

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
        if self.is_first:  # a call before this one may never have come to the classifier
            self.partners.seen.take()
        read = mask_of if self.name == MASK else given_to
        self.partners.note(self.name, read(module, args, kwargs))


class ReadoutPart(PartnerPart):
    """A readout before the classifier."""

    stands_before_copies = True

    def __init__(self) -> None:
        super().__init__(ReadoutConfig, TaskReadouts)

    def _prepared(self, request: Request, partner: PartnerConfig, candidates: list[Candidate]) -> list[PreparedPartner]:
        assert isinstance(partner, ReadoutConfig)
        bank = bank_of_partner(request, partner, [r.bank for holder in readout_holders(request.model) for r in holder.readouts])
        (group,) = bank.groups.values()
        _check_classifier(request, group.members[-1])
        places = {candidate.name: candidate for candidate in candidates}
        missing = [name for name in group.members if name not in places]
        if missing:
            raise RecastTargetError(
                f"the bank {bank.name or 'in memory'} reads {missing[0]}, which this model does not have: load the model that "
                "the bank was made for, or make one for this model with readout_bank"
            )
        check_not_copied(request.config, list(group.members[:-1]))
        if not request.counting:
            for name, fingerprint in fingerprints_at_hand(group.members[:-1], candidates).items():
                bank.check_base(name, fingerprint)
        partner, place = replace(partner, bank=bank), places[group.members[-1]]
        module = partner.build(place.module, None, torch.Generator(), **request.like(place.module))
        return [PreparedPartner(partner, place, module.train(place.module.training))]

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return None  # tasks on the same readout can be combined


def _check_classifier(request: Request, name: str) -> None:
    """Refuse new features for a classifier that was trained on the old ones, or starts as one that was."""
    config, module = request.config, plain_modules(request.model).get(name)
    if config.num_classes is not None and config.head_init == "copy":
        raise RecastConfigError(f"a readout changes what {name} reads, so the task cannot start at it: use head_init='fresh'")
    saved = tuple(config.modules_to_save or ())
    is_own = config.num_classes is not None or (bool(saved) and name.endswith(saved)) or config.is_layout
    if not (module is None or is_own or isinstance(unwrapped_module(module), nn.Identity)):
        raise RecastConfigError(
            f"a readout changes what {name} reads, which was trained on other features: give the task a classifier of its own, "
            f"RecastConfig(num_classes=...), or name it in modules_to_save"
        )


def fingerprints_at_hand(members: Collection[str], candidates: list[Candidate]) -> dict[str, str]:
    """Of the members' weights, without those that are not at hand as they were."""
    plain = (c for c in candidates if c.name in members and quantised_by(c.module) is None)
    at_hand = (c for c in plain if c.weight is None or not c.weight.is_meta)  # None: a compressed bank stands for it
    return {candidate.name: candidate.fingerprint for candidate in at_hand}


def readout_holders(model: nn.Module, adapter_name: str | None = None) -> list[TaskReadouts]:
    """What holds the readouts of a model; of one task, or of all."""
    return holders(model, adapter_name, TaskReadouts)
