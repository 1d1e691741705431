"""RecastModel: the PEFT tuner that plans, mimics, wraps and saves.

A conversion happens wholly or not at all: everything is planned, checked and prepared before the first module is replaced,
and what fails after that is put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from .bank import TemplateBank
from .config import RecastConfig
from .errors import RecastBankError, RecastBaseMismatchError, RecastConfigError
from .fingerprint import same_weight, weight_fingerprint
from .layer import BASE_ADAPTER, RecastLayer
from .mimicry import Recipe, mimic
from .plan import PlannedGroup, RecastPlan, plan_recast
from .registration import PREFIX
from .targets import Candidate, find_targets
from .task_files import check_state_dict, check_task_file, plain_name

BANKS = "recast_banks"  # the module of the backbone that owns the compressed banks


@dataclass
class _Prepared:
    """A layer that is ready to be put in its place.

    Attributes:
        layer: new, or the one that is there already.
        parent: the plain module that holds the target.
        child_name: the target's name in it.
        original: what stands there before.
        visible_key: the module name at which PEFT's loop comes by.
        bank: of the new task.
    """

    layer: RecastLayer
    parent: nn.Module
    child_name: str
    original: nn.Module
    visible_key: str
    bank: TemplateBank | None = None


class RecastModel(BaseTuner):
    """Puts RECAST tasks on a model (RECAST, ICLR 2025, section 3).

    Args:
        model: any ``nn.Module``.
        config: the task's config, or configs by task name.
        adapter_name: the task's name.
        low_cpu_mem_usage: create the coefficients on the meta device, to be loaded afterwards.

    Raises:
        RecastError: whatever is wrong is said before the model is changed.
    """

    prefix: str = PREFIX
    tuner_layer_cls = RecastLayer
    target_module_mapping: dict[str, list[str]] = {}

    # ---------------------------------------------------------------- conversion

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add a task: plan, check, prepare, then replace modules; see the class for what is raised."""
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        given = dict(config.__dict__)
        try:
            config.forget_written_fields()
            if state_dict is not None and config.groups is None:
                config.target_modules = sorted({plain_name(key).partition(f".{PREFIX}")[0] for key in state_dict})
            plan = plan_recast(model, config)
            targets, _ = find_targets(model, config)
            _check_new_name(targets, adapter_name)
            fingerprints = _fingerprints(targets)
            entries = check_task_file(model, config, plan)
            _check_fingerprints(config, fingerprints, entries)
            self._prepared = _prepare(targets, fingerprints)
            new_banks = _prepare_banks(plan, config, self._prepared)
            _write_plan(config, plan, self._prepared, fingerprints)
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except BaseException:
            self._roll_back(adapter_name)
            config.__dict__.clear()
            config.__dict__.update(given)
            raise
        _install_banks(model, new_banks, config.keep_base_weights)
        # PEFT may have condensed the names to a set, whose order differs from run to run
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        del self._prepared

    def _check_target_module_exists(self, peft_config: RecastConfig, key: str) -> bool:  # type: ignore[override]
        prepared = getattr(self, "_prepared", None)
        if prepared is None:  # asked by PEFT's helpers after the conversion
            return plain_name(key) in {m for members in (peft_config.groups or {}).values() for m in members}
        return any(p.visible_key == key for p in prepared.values())

    def _create_and_replace(
        self,
        peft_config: RecastConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        for prepared in self._prepared.values():
            if prepared.visible_key != current_key:
                continue
            layer = prepared.layer
            assert prepared.bank is not None
            if not layer.active_adapters:
                layer._active_adapter = list(self.active_adapters)
            layer.update_layer(
                adapter_name,
                prepared.bank,
                peft_config.num_coefficient_sets,
                init_weights=peft_config.init_weights,
                seed=peft_config.seed,
                inference_mode=peft_config.inference_mode,
            )
            setattr(prepared.parent, prepared.child_name, layer)

    def _prepare_adapter_config(self, peft_config: RecastConfig, model_config: dict) -> RecastConfig:  # type: ignore
        return peft_config  # targets were found by the plan

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # coefficients are created in float32, so the only cast is to the dtype of the weights, for those who ask for it
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in recast_layers(self.model).values():
            if adapter_name in layer.recast_coefficients:
                layer.recast_coefficients[adapter_name].data = layer.recast_coefficients[adapter_name].data.to(
                    layer.weight_dtype
                )

    def _roll_back(self, adapter_name: str) -> None:
        if not hasattr(self, "_prepared"):
            return
        for prepared in self._prepared.values():
            if prepared.original is prepared.layer:
                for attribute in (prepared.layer.recast_coefficients, prepared.layer.recast_bank):
                    if adapter_name in attribute:
                        del attribute[adapter_name]
            else:
                setattr(prepared.parent, prepared.child_name, prepared.original)
        del self._prepared

    # ---------------------------------------------------------------- unloading

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if hasattr(self.model, BANKS):
            delattr(self.model, BANKS)
        return model  # type: ignore[return-value]

    # ---------------------------------------------------------------- a task for each sample

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_mixed_batch(adapter_names)
        beams = kwargs.get("num_beams")
        repeated = list(adapter_names)
        if isinstance(beams, int) and beams > 1:
            repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = getattr(self.model, "get_encoder", lambda: None)() if repeated != list(adapter_names) else None
        inside_encoder = {id(m) for m in encoder.modules()} if isinstance(encoder, nn.Module) else set()
        handles = []
        layers = [m for m in self.modules() if isinstance(m, RecastLayer)]
        try:
            for module in self.modules():
                if isinstance(module, (RecastLayer, AuxiliaryTrainingWrapper)):
                    # beam search repeats what the decoder sees, not what the encoder sees
                    names = list(adapter_names) if id(module) in inside_encoder else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for layer in layers:
                layer._mixed_batch = True
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                layer._mixed_batch = False

    def _check_mixed_batch(self, adapter_names: Any) -> None:
        if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
            raise TypeError(f"adapter_names should be a list with a name for each sample, got {adapter_names!r}.")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {BASE_ADAPTER})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)} "
                f"(the model has {', '.join(self.peft_config)})"
            )

    # ---------------------------------------------------------------- files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: RecastConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT keeps the config object that it was given, and its user may since have put it on another model
        _describe_task(config, model, adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _get_learnable_bias_state_dict(cls, model: nn.Module, state_dict: dict[str, Tensor], config: RecastConfig):  # type: ignore
        entries = super()._get_learnable_bias_state_dict(model, state_dict, config)
        # a module that is saved whole brings its bias itself
        return {key: value for key, value in entries.items() if ".modules_to_save." not in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        # names of the plain model, whatever tuner layers stand around the target now
        return plain_name(key) if f".{PREFIX}" in key else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: RecastConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],  # type: ignore
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, adapter_name, remapped)
        return remapped


def check_adapter_name(name: str) -> None:
    """Refuse a task name that PEFT cannot store.

    Raises:
        RecastConfigError: if the name is empty, holds a dot, is PEFT's name for no adapter, or would be confused with the
            names of parameters.
    """
    if not isinstance(name, str) or not name:
        raise RecastConfigError(f"adapter_name={name!r}: expected a name that is not empty")
    if "." in name:
        raise RecastConfigError(f"adapter_name={name!r}: a name must hold no dot, which separates the parts of keys")
    if name == BASE_ADAPTER:
        raise RecastConfigError(f"adapter_name={name!r}: this is the name of the model without any task")
    if name in PREFIX or hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict, name):
        raise RecastConfigError(
            f"adapter_name={name!r}: PEFT cannot tell this name from names of its own (the prefix {PREFIX!r}, or an "
            "attribute of the containers that hold the coefficients); choose another one"
        )


def recast_layers(model: nn.Module) -> dict[str, RecastLayer]:
    """The RECAST layers of a model by the names of their modules in the plain model."""
    return {m.module_name: m for m in model.modules() if isinstance(m, RecastLayer)}


def recast_banks(model: nn.Module) -> dict[str, TemplateBank]:
    """The template banks of a model by name, in the order of their first member."""
    banks: dict[str, TemplateBank] = {}
    for layer in recast_layers(model).values():
        for bank in (*layer.compressed_bank, *layer.recast_bank.values()):
            banks.setdefault(bank.name, bank)
    return banks


def _existing(target: Candidate) -> RecastLayer | None:
    layer: nn.Module = target.visible
    while isinstance(layer, BaseTunerLayer) and not isinstance(layer, RecastLayer):
        layer = layer.base_layer  # type: ignore[attr-defined]
    return layer if isinstance(layer, RecastLayer) else None


def _check_new_name(targets: list[Candidate], adapter_name: str) -> None:
    taken = [t.name for t in targets if (layer := _existing(t)) is not None and adapter_name in layer.recast_coefficients]
    if taken:
        raise RecastConfigError(
            f"the model is converted already and has a task {adapter_name!r} (on {taken[0]} and {len(taken) - 1} other "
            "modules): choose another adapter_name, or delete_adapter first"
        )


def _fingerprints(targets: list[Candidate]) -> dict[str, str]:
    result = {}
    for target in targets:
        layer = _existing(target)
        result[target.name] = layer.fingerprint if layer is not None else weight_fingerprint(target.weight)
    return result


def _check_fingerprints(config: RecastConfig, actual: dict[str, str], entries: dict[str, Tensor] | None) -> None:
    recorded = config.base_fingerprint or {}
    differ = [name for name in actual if name in recorded and not same_weight(recorded[name], actual[name])]
    if not differ:
        return
    if entries is not None and not any(value.any() for key, value in entries.items() if f".{PREFIX}" in key):
        warnings.warn(
            "The task was made for other pretrained weights, but it has not learned anything yet (all of its coefficients "
            "are zero): it is taken as a fresh task on these weights.",
            stacklevel=2,
        )
        return
    which = "all of them" if len(differ) == len(actual) else f"{len(differ)} of {len(actual)}"
    raise RecastBaseMismatchError(
        f"the task was learned on other pretrained weights: {which} differ, the first is {differ[0]}\n"
        f"  fingerprint in the task:  {recorded[differ[0]]}\n  fingerprint of the model: {actual[differ[0]]}\n"
        f"differing: {', '.join(differ[:6])}{', ...' if len(differ) > 6 else ''}\n"
        f"Load the weights that the task was learned on (base model of the task: {config.base_model_name_or_path!r})."
    )


def _prepare(targets: list[Candidate], fingerprints: dict[str, str]) -> dict[str, _Prepared]:
    prepared = {}
    for target in targets:
        layer = _existing(target)
        parent = target.path[-1][1]
        child_name = target.name.rpartition(".")[2]
        original = target.visible
        new = layer is None
        if layer is None:
            assert target.weight_name is not None
            layer = RecastLayer(target.visible, target.name, target.weight_name, fingerprints[target.name])
            layer.train(target.visible.training)
        prepared[target.name] = _Prepared(layer, parent, child_name, original if new else layer, _visible_key(target), None)
        if not new:
            prepared[target.name].child_name = _holder(parent, child_name, layer)[1]
            prepared[target.name].parent = _holder(parent, child_name, layer)[0]
    return prepared


def _holder(parent: nn.Module, child_name: str, layer: RecastLayer) -> tuple[nn.Module, str]:
    """The module that holds an existing layer directly (another tuner's layer may stand around it)."""
    holder, name = parent, child_name
    while getattr(holder, name) is not layer:
        holder, name = getattr(holder, name), "base_layer"
    return holder, name


def _visible_key(target: Candidate) -> str:
    """The name at which PEFT's loop over the modules comes by: it passes over what lies inside a tuner's layer."""
    parts = target.name.split(".")
    for depth, (_, module) in enumerate(target.path[1:], start=1):
        holder = target.path[depth - 1][1]
        if isinstance(getattr(holder, parts[depth - 1], None), BaseTunerLayer) and module is not None:
            return ".".join(parts[:depth])
    return target.name


def _prepare_banks(plan: RecastPlan, config: RecastConfig, prepared: dict[str, _Prepared]) -> list[TemplateBank]:
    """Give every prepared layer its bank; the compressed banks that are new are returned."""
    new = []
    for group in plan.groups:
        layers = [prepared[name].layer for name in group.members]
        bank = _bank_in_use(group, config, layers)
        if bank is None:
            recipe = None if group.is_exact else _recipe(group, config, layers)
            weights = None if recipe is None else [layer.pretrained_weight for layer in layers]
            bank = TemplateBank(group.name, group.members, layers, recipe, weights)
            if recipe is not None:
                new.append(bank)
        for name in group.members:
            prepared[name].bank = bank
    return new


def _bank_in_use(group: PlannedGroup, config: RecastConfig, layers: list[RecastLayer]) -> TemplateBank | None:
    """The bank of an earlier task that this group shares, or None for a new one.

    Raises:
        RecastBankError: if the group cannot stand beside the banks that exist.
    """
    compressed = {id(layer.compressed_bank[0]): layer.compressed_bank[0] for layer in layers if layer.is_compressed}
    if not compressed:
        if not group.is_exact and any(layer.recast_bank for layer in layers):
            names = sorted({name for layer in layers for name in layer.recast_bank})
            raise RecastBankError(
                f"group {group.name} cannot be compressed to {group.num_templates} templates: the pretrained weights of its "
                f"members are the templates of {names}. Compress with the first task, or unload those tasks."
            )
        for bank in {id(b): b for layer in layers for b in layer.recast_bank.values()}.values():
            if bank.members == group.members and bank.is_exact:
                return bank
        return None
    bank = next(iter(compressed.values()))
    stored = (config.recipes or {}).get(group.name)
    same = len(compressed) == 1 and bank.members == group.members and bank.num_templates == group.num_templates
    if same and stored is not None:
        same = bank.same_recipe(_stored_recipe(stored))
    if not same:
        raise RecastBankError(
            f"module {group.members[0]} belongs to a compressed bank that the task does not share\n"
            f"  bank of the model: {bank.num_templates} templates for {', '.join(bank.members)}\n"
            f"  bank of the task:  {group.num_templates} templates for {', '.join(group.members)}"
            f"{', mixed otherwise' if bank.members == group.members else ''}\n"
            "Give the task the same targets, group_size and num_templates, or convert a fresh copy of the pretrained model."
        )
    return bank


def _recipe(group: PlannedGroup, config: RecastConfig, layers: list[RecastLayer]) -> Recipe:
    stored = (config.recipes or {}).get(group.name)
    if stored is not None:
        return _stored_recipe(stored)
    return mimic([layer.pretrained_weight for layer in layers], group.num_templates, config.mimicry)


def _stored_recipe(stored: dict[str, list[list[float]]]) -> Recipe:
    return Recipe(torch.tensor(stored["mix"], dtype=torch.float64), torch.tensor(stored["base"], dtype=torch.float64))


def _write_plan(config: RecastConfig, plan: RecastPlan, prepared: dict[str, _Prepared], fingerprints: dict[str, str]) -> None:
    banks = {}
    for group in plan.groups:
        bank = prepared[group.members[0]].bank
        assert bank is not None
        banks[group.name] = bank
    config.write_fields({group.name: list(group.members) for group in plan.groups}, _recipes_of(banks), fingerprints)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = list(plan.targets)  # PEFT would put its own list here, with other heads left out


def _describe_task(config: RecastConfig, model: nn.Module, adapter_name: str) -> None:
    """Write into a config what the model says of a task."""
    layers = {n: layer for n, layer in recast_layers(model).items() if adapter_name in layer.recast_bank}
    banks = {bank.name: bank for layer in layers.values() for bank in [layer.recast_bank[adapter_name]]}
    groups = {name: list(bank.members) for name, bank in banks.items()}
    config.write_fields(groups, _recipes_of(banks), {name: layer.fingerprint for name, layer in layers.items()})


def _recipes_of(banks: dict[str, TemplateBank]) -> dict[str, dict[str, list[list[float]]]]:
    return {
        name: {"mix": bank.recipe.mix.tolist(), "base": bank.recipe.base.tolist()}
        for name, bank in banks.items()
        if bank.recipe is not None
    }


def _install_banks(model: nn.Module, banks: list[TemplateBank], keep_base_weights: bool) -> None:
    """Make new compressed banks part of the model and release what they stand for."""
    if not banks:
        return
    if not hasattr(model, BANKS):
        setattr(model, BANKS, nn.ModuleDict())
    container = getattr(model, BANKS)
    for bank in banks:
        container[bank.name.replace(".", "/")] = bank
        for layer in bank.layers:
            layer.compressed_bank = (bank,)
            if not keep_base_weights:
                layer.release_pretrained_weight()


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
