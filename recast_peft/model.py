"""RecastModel: the PEFT tuner that plans, mimics, wraps and saves.

A conversion happens wholly or not at all: everything is planned, checked and prepared before the first module is replaced,
and what fails after that is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .banks.template_bank import move_in_place
from .composition.merging import refresh
from .config import RecastConfig, check_again
from .errors import RecastConfigError
from .holders import holders
from .layer import RecastLayer
from .names import COEFFICIENTS, MODEL_PREFIX, PREFIX, check_adapter_name, modules_of, plain_name, unwrapped
from .options.record import BEFORE_LOADING
from .parts.base import Place
from .parts.base_biases import train_biases
from .parts.head import TaskHead, labels_of
from .parts.saved import TaskNorm, freeze_running_statistics, saved_by_task_type
from .parts.stacking import TaskConfigs
from .parts.wrapper import ScaledModule
from .planning.groups import coefficient_owners
from .tasks.backbone import describe_backbone
from .tasks.calls import waits_for_calls
from .tasks.conversion import install_banks, share_coefficients
from .tasks.files import load_into
from .tasks.preparation import PreparedTask, prepare_task
from .tasks.record import planned_record, record_of_task
from .tasks.state import check_base_weights, gathered, keep_numbers, keep_trained
from .tasks.transformers_loading import hand_back_loading, take_over_loading
from .tasks.tuner_verbs import TaskVerbs
from .tasks.undo import Snapshot, undone_on_failure
from .tasks.verbs import merged_tasks

ADDED_LATE = ("TOKEN_CLS", "QUESTION_ANS")  # to the first task's modules_to_save by PEFT, when its layers are in


class RecastModel(TaskVerbs):
    """The tuner that puts RECAST tasks on a model (RECAST, ICLR 2025, section 3): ``model.base_model`` of a ``PeftModel``.

    It is made by :func:`get_recast_model` or PEFT's own functions. Whatever is wrong is said as a ``RecastError`` before the
    model is changed.
    """

    prefix: str = PREFIX
    tuner_layer_cls = RecastLayer
    target_module_mapping: dict[str, list[str]] = {}
    _prepared: PreparedTask | None = None  # while a task is put in
    _unfilled: Mapping[str, Snapshot] = {}  # tasks of files whose tensors are not put in yet, and the model before them

    # ---------------------------------------------------------------- conversion

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the model's adapters by name; those that other methods add are looked at as they come in."""
        held = vars(self).get("_task_configs")
        if held is None:  # PEFT asks before it has set any, and finds those of an adapter that the model has already
            raise AttributeError("peft_config")
        return held

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        self._task_configs = configs if isinstance(configs, TaskConfigs) else TaskConfigs(configs)

    @waits_for_calls
    @torch.inference_mode(False)  # what is made inside inference_mode could never be trained
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add a task: plan, check, prepare, then replace modules; see the class for what is raised."""
        try:
            self._inject(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except BaseException:  # PEFT takes the config out itself, but not where the user interrupts
            if not holders(model, adapter_name):
                self.peft_config.pop(adapter_name, None)
            raise

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        check_adapter_name(adapter_name)
        check_not_wrapped(model, bool(modules_of(model, RecastModel)))
        config: RecastConfig = self.peft_config[adapter_name]
        check_again(config)
        before = config.record
        # PEFT's models for a task_type add classifiers to what a file names, and want to find some of the first task
        if before is not None and before.origin is not None and (before.saved or len(self.peft_config) > 1):
            config.modules_to_save = list(before.saved) or None
        is_first, is_guarded = not modules_of(model, BaseTunerLayer), bool(modules_of(model, RecastLayer))
        chosen = _chosen_for_task(config, is_first, state_dict)
        prepared = prepare_task(model, chosen, adapter_name)
        record = planned_record(chosen, prepared, describe_backbone(model, config.revision))
        try:
            with undone_on_failure(model) as snapshot:
                self._install(model, adapter_name, prepared, autocast_adapter_dtype, low_cpu_mem_usage)
            config.record = record
            if not is_guarded:
                self.guard(check_base_weights)
            prepared.rename(config)
        except BaseException:
            config.record = before
            raise
        finally:
            self._prepared = None
        if record.is_stored and not any(not bank.is_anchored for bank in prepared.banks):
            self._unfilled = {**self._unfilled, adapter_name: snapshot}
        if record.is_stored:
            take_over_loading(model, config, adapter_name, self.forget_unfilled)

    def _install(
        self, model: nn.Module, adapter_name: str, prepared: PreparedTask, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool
    ) -> None:
        """Put what was prepared into the model: layers, banks, coefficients, parts; the caller undoes what fails."""
        config: RecastConfig = self.peft_config[adapter_name]
        is_first = not modules_of(model, BaseTunerLayer)
        # PEFT keeps what was trained before, but looks for the new task's name in the names of parameters
        others = [] if is_first else [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._put_layers(model, adapter_name, prepared, autocast_adapter_dtype, low_cpu_mem_usage)
        install_banks(model, prepared.banks, config.keep_base_weights)
        owners = coefficient_owners(prepared.plan.groups, prepared.plan.coefficient_sharing)
        share_coefficients(model, adapter_name, owners)
        active = adapter_name in self.active_adapters
        prepared.install_parts(Place(self, adapter_name, active, config.inference_mode, low_cpu_mem_usage))
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # the parts too
        for parameter, requires_grad in others:
            parameter.requires_grad_(requires_grad)
        if active and not is_first:  # beside tasks of a tuner that is no longer around the model
            self.set_adapter(self.active_adapters, config.inference_mode)
        train_biases(model, adapter_name, config.bias, config.inference_mode or not active)

    def _put_layers(
        self, model: nn.Module, adapter_name: str, prepared: PreparedTask, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool
    ) -> None:
        """PEFT's own loop over the modules, on a copy of the config: it condenses names, and saves modules whole by itself."""
        config: RecastConfig = self.peft_config[adapter_name]
        own = {"modules_to_save": None, "target_modules": list(prepared.plan.targets), "target_parameters": None}
        working = config.as_chosen(**own, exclude_modules=None)
        self._prepared, self._keeps_active = prepared, bool(modules_of(model, BaseTunerLayer))
        self.peft_config[adapter_name] = working
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
            )
        finally:
            self.peft_config[adapter_name], self._keeps_active = config, False

    def _check_target_module_exists(self, peft_config: RecastConfig, key: str) -> bool:  # type: ignore[override]
        if self._prepared is None:  # asked by PEFT's helpers after the conversion
            return plain_name(key) in {m for members in (peft_config.groups or {}).values() for m in members}
        return key in self._prepared.visible

    def _create_and_replace(
        self,
        peft_config: RecastConfig,  # type: ignore[override]
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert self._prepared is not None
        for layer in self._prepared.visible[current_key]:
            layer.put_in(adapter_name, peft_config, self._prepared.plan.num_coefficient_sets, list(self.active_adapters))

    def _prepare_adapter_config(self, peft_config: RecastConfig, model_config: dict) -> RecastConfig:  # type: ignore
        return peft_config  # targets were found by the plan

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # coefficients are created in float32, so the only cast is to the dtype of the weights, for those who ask for it
        if autocast_adapter_dtype:
            layers: list[Any] = modules_of(self.model, BaseTunerLayer)
            for layer in layers:
                if not isinstance(layer, ScaledModule):  # what a task has of whole modules has its dtype
                    cast_adapter_dtype(layer, adapter_name)
            return
        for layer in modules_of(self.model, RecastLayer):
            if adapter_name in layer.recast_coefficients:
                values = layer.recast_coefficients[adapter_name]
                values.data = values.data.to(layer.weight_dtype)
        for module in modules_of(self.model, TaskHead, TaskNorm):
            if module.has_task(adapter_name):
                module.modules_to_save[adapter_name].to(module.dtype_of_model)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT asks every module with this verb when a task was loaded by assignment, which puts it where the file was read
        # to: the machine's accelerator, wherever the model is. Its own containers have no such verb.
        for wrapper in modules_of(self.model, ModulesToSaveWrapper):
            if adapter_name in wrapper.modules_to_save:
                around = getattr(wrapper, "hosts", ()) or (wrapper.original_module,)
                there = device or next((p.device for m in around for p in m.parameters() if not p.is_meta), None)
                if there is not None:
                    own = wrapper.modules_to_save[adapter_name]
                    move_in_place((*own.parameters(), *own.buffers()), there)

    def train(self, mode: bool = True) -> RecastModel:
        """Set training mode, but for the running statistics of the pretrained model, which no task may move."""
        super().train(mode)
        keep_trained(self.model)
        if mode:
            freeze_running_statistics(self.model)
        return self

    @waits_for_calls
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecastModel:
        if fn(torch.empty(0, device="cpu")).is_meta:
            check_loses_nothing(self.model, self.task_pool)
        super()._apply(fn, recurse)
        for layer in modules_of(self.model, RecastLayer):
            if layer.is_stale:  # merged, and rounded
                refresh(layer)
        for pool in self.task_pool:  # no module of the model, but it follows the model's device and dtype
            pool.follow(fn)
        return self

    # ---------------------------------------------------------------- files

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, *args: Any) -> None:
        for pool in self.task_pool:  # what its task is in the slot is for the pool to say, which is in no state dict
            keep_numbers(self, pool.slot, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def forget_unfilled(self, adapter_name: str, undo: bool) -> None:
        """Say that a task's file was put in, or that it could not be: then the model is as it was before the task."""
        hand_back_loading(self.model)
        snapshot = self._unfilled.get(adapter_name)
        self._unfilled = {name: held for name, held in self._unfilled.items() if name != adapter_name}
        if snapshot is not None and undo:
            snapshot.restore()
            del self.peft_config[adapter_name]

    # PEFT's hooks for files: classmethods, since they are asked of models with tasks that have no tuner around them.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: RecastConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        config.record = record_of_task(config, model, adapter_name)
        config.id2label = labels_of(model, adapter_name).id2label or config.id2label
        tensors = gathered(model, adapter_name, config, state_dict)
        if isinstance(unwrapped(model), PeftModel):
            return tensors
        # as PEFT has it: keys are those of the model given, and transformers puts the beginning before them; it saves nothing
        # where tensors share their memory
        owners = {tensor.data_ptr(): key for key, tensor in reversed(tensors.items())}
        return {
            key.removeprefix(MODEL_PREFIX): tensor if owners[tensor.data_ptr()] == key else tensor.clone()
            for key, tensor in tensors.items()
        }

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # it holds no task's name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: RecastConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        for hook in BEFORE_LOADING:
            hook(model)
        return load_into(model, config, adapter_name, state_dict)


def _chosen_for_task(config: RecastConfig, is_first: bool, state_dict: Mapping[str, Tensor] | None) -> RecastConfig:
    """What a config chooses for a new task; what an earlier use of the object decided is not for this one."""
    chosen = config.as_chosen()
    if state_dict is not None and chosen.groups is None:
        names = {plain_name(key).removeprefix(MODEL_PREFIX) for key in state_dict if COEFFICIENTS in key}
        chosen.target_modules = sorted(name.partition(f".{PREFIX}")[0] for name in names)
        held = {part for key in state_dict for part in key.split(".")}  # the classifier too, if the task has one
        saved = [name for name in saved_by_task_type(config) or () if name in held or name in (config.modules_to_save or ())]
        chosen.modules_to_save = saved or None
    elif is_first and not config.is_stored_task and config.task_type in ADDED_LATE:
        chosen.modules_to_save = saved_by_task_type(config)
    return chosen


def check_not_wrapped(model: nn.Module, is_converted: bool) -> None:
    """Refuse to convert what is converted, or a model of PEFT in place of the model inside (``RecastConfigError``)."""
    if isinstance(model, PeftModel) and not modules_of(model, RecastLayer):
        others = ", ".join(name for name, config in model.peft_config.items() if not isinstance(config, RecastConfig))
        raise RecastConfigError(
            f"the model is a {type(model).__name__} with other methods' adapters ({others}): put RECAST around the model "
            "inside, get_recast_model(model.base_model.model, config), or merge first, merge_and_unload()"
        )
    if isinstance(model, (PeftModel, PeftMixedModel)) or is_converted:
        raise RecastConfigError(
            "the model is converted already: add a task with model.add_adapter(name, config) or "
            "model.load_adapter(path, name), or get the plain model back with model.unload()"
        )


def check_loses_nothing(model: nn.Module, pools: Sequence[Any]) -> None:
    """Refuse the meta device (``RecastConfigError``) for what no state dict would bring back."""
    merged = merged_tasks(model)
    if merged:
        raise RecastConfigError(
            f"tasks are merged ({', '.join(merged)}), and the pretrained weights that are kept beside them would be lost on "
            "the meta device: call unmerge_adapter() first"
        )
    if pools:
        raise RecastConfigError(
            "the tasks of the model's pool are in no state dict, and would be lost on the meta device: write them to a file, "
            f"pool.save(path), and delete the pool's slot first, delete_adapter({pools[0].slot!r})"
        )
