"""RecastModel: the PEFT tuner that plans, mimics, wraps and saves.

A conversion happens wholly or not at all: everything is planned, checked and prepared before the first module is replaced,
and what fails after that is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .banks.files import StoredBank
from .banks.template_bank import move_in_place
from .composition.merging import refresh
from .config import RecastConfig
from .errors import RecastConfigError
from .layer import RecastLayer, recast_layers
from .names import COEFFICIENTS, MODEL_PREFIX, PREFIX, check_adapter_name, plain_name
from .parts.base import Place
from .parts.lora import switched_off
from .parts.saved import freeze_running_statistics
from .parts.stacking import Adding, TaskConfigs
from .parts.wrapper import check_one_owner
from .planning.groups import coefficient_owners
from .tasks import verbs
from .tasks.arithmetic import add_combined
from .tasks.backbone import describe_backbone
from .tasks.banks import remember_stored_bank, stored_bank
from .tasks.calls import TaskCalls, waits_for_calls
from .tasks.conversion import install_banks, share_coefficients
from .tasks.files import load_into
from .tasks.preparation import PreparedTask, prepare_task
from .tasks.record import planned_record, record_of_task
from .tasks.state import gathered
from .tasks.undo import Snapshot, undone_on_failure


class RecastModel(TaskCalls, BaseTuner):
    """The tuner that puts RECAST tasks on a model (RECAST, ICLR 2025, section 3): ``model.base_model`` of a ``PeftModel``.

    It is made by :func:`get_recast_model` or PEFT's own functions. Whatever is wrong is said as a ``RecastError`` before the
    model is changed.
    """

    prefix: str = PREFIX
    tuner_layer_cls = RecastLayer
    target_module_mapping: dict[str, list[str]] = {}
    _prepared: PreparedTask | None = None  # while a task is put in
    _keeps_active = False  # while a task is put in beside others
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
        config = cast(RecastConfig, self.peft_config[adapter_name])
        chosen = config.as_chosen()  # what an earlier use of the object decided is not for this task
        if state_dict is not None and chosen.groups is None:
            names = {plain_name(key).removeprefix(MODEL_PREFIX) for key in state_dict if COEFFICIENTS in key}
            chosen = config.as_chosen(target_modules=sorted(name.partition(f".{PREFIX}")[0] for name in names))
        prepared = prepare_task(model, chosen, adapter_name)
        record = planned_record(chosen, prepared, describe_backbone(model, config.revision))
        before = config.record
        try:
            with undone_on_failure(model) as snapshot:
                self._put_layers(model, adapter_name, prepared, autocast_adapter_dtype, low_cpu_mem_usage)
                install_banks(model, prepared.banks, config.keep_base_weights)
                owners = coefficient_owners(prepared.plan.groups, prepared.plan.coefficient_sharing)
                share_coefficients(model, adapter_name, owners)
                active = adapter_name in self.active_adapters
                prepared.install_parts(Place(self, adapter_name, active, config.inference_mode, low_cpu_mem_usage))
            config.record = record
            self.guard_calls()
        except BaseException:
            config.record = before
            raise
        finally:
            self._prepared = None
        if record.is_stored and not any(not bank.is_anchored for bank in prepared.banks):
            self._unfilled = {**self._unfilled, adapter_name: snapshot}

    def _put_layers(
        self, model: nn.Module, adapter_name: str, prepared: PreparedTask, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool
    ) -> None:
        """PEFT's own loop over the modules, on a copy of the config: it condenses names, and saves modules whole by itself."""
        config = cast(RecastConfig, self.peft_config[adapter_name])
        # PEFT keeps what was trained before, but looks for the new task's name in the names of parameters
        is_first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        trained = [] if is_first else [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        own = {"modules_to_save": None, "target_modules": list(prepared.plan.targets), "target_parameters": None}
        working = config.as_chosen(**own, exclude_modules=None)
        self._prepared, self._keeps_active = prepared, not is_first
        self.peft_config[adapter_name] = working
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
            )
        finally:
            self.peft_config[adapter_name], self._keeps_active = config, False
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    def _check_target_module_exists(self, peft_config: RecastConfig, key: str) -> bool:  # type: ignore[override]
        if self._prepared is None:  # asked by PEFT's helpers after the conversion
            return plain_name(key) in {m for members in (peft_config.groups or {}).values() for m in members}
        return key in self._prepared.visible_keys

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
        for layer in self._prepared.layers.values():
            if layer.visible_key == current_key:
                sets = self._prepared.plan.num_coefficient_sets
                layer.put_in(adapter_name, peft_config, sets, list(self.active_adapters))

    def _prepare_adapter_config(self, peft_config: RecastConfig, model_config: dict) -> RecastConfig:  # type: ignore
        return peft_config  # targets were found by the plan

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # coefficients are created in float32, so the only cast is to the dtype of the weights, for those who ask for it
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in recast_layers(self.model).values():
            if adapter_name in layer.recast_coefficients:
                values = layer.recast_coefficients[adapter_name]
                values.data = values.data.to(layer.weight_dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT asks every module with this verb when a task was loaded by assignment, which puts it where the file was read
        # to: the machine's accelerator, wherever the model is. Its own containers have no such verb.
        for wrapper in (m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)):
            if adapter_name in wrapper.modules_to_save:
                around = getattr(wrapper, "hosts", ()) or (wrapper.original_module,)
                there = device or next((p.device for m in around for p in m.parameters() if not p.is_meta), None)
                if there is not None:
                    own = wrapper.modules_to_save[adapter_name]
                    move_in_place((*own.parameters(), *own.buffers()), there)

    def train(self, mode: bool = True) -> RecastModel:
        """Set training mode, but for the running statistics of the pretrained model, which no task may move."""
        super().train(mode)
        if mode:
            freeze_running_statistics(self.model)
        return self

    @waits_for_calls
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecastModel:
        super()._apply(fn, recurse)
        for layer in recast_layers(self.model).values():
            if layer.is_stale:  # merged, and rounded
                refresh(layer)
        for pool in self.task_pool:  # no module of the model, but it follows the model's device and dtype
            pool.follow(fn)
        return self

    # ---------------------------------------------------------------- activating and merging

    @waits_for_calls
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make tasks active, with all of their parts; several that own the same module are refused before anything changes.

        Args:
            adapter_name: name of the task, or names of several.
            inference_mode: freeze them instead of making them trainable.

        Raises:
            RecastConfigError: naming the tasks and the module.
        """
        if self._keeps_active:  # PEFT sets the active tasks again whenever one is added, which would unmerge them
            return
        Adding.end()
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        check_one_owner(self.model, names)
        super().set_adapter(adapter_name, inference_mode)
        verbs.activate(self.model, names, inference_mode)

    @waits_for_calls
    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a task, with all of its parts. If it was active, the other active tasks stay so, or else the first task is.

        Args:
            adapter_name: name of the task.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        active = [name for name in self.active_adapters if name != adapter_name]
        inference_mode = verbs.is_frozen(self.model, self.active_adapters)
        verbs.delete(self.model, adapter_name)
        del self.peft_config[adapter_name]
        if not active:
            active = [name for name, config in self.peft_config.items() if isinstance(config, RecastConfig)][:1]
        self.active_adapter = active
        self.set_adapter(active, inference_mode)

    @waits_for_calls
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge tasks, with all of their parts; what fails leaves nothing merged that was not merged before.

        Args:
            adapter_names: the tasks; None means the active ones. Until they are unmerged, the model computes what it would
                compute with these tasks active, classifier and norms included.
            safe_merge: refuse weights and biases that are not finite.

        Raises:
            RecastConfigError: if a task is unknown, or several own the same module.
            RecastBankError: if a task has a part that no weight can hold; nothing is changed then.
        """
        self._check_merge_allowed()
        verbs.merge(self.model, self._tasks_to_merge(adapter_names), safe_merge, adapter_names)

    @waits_for_calls
    def unmerge_adapter(self) -> None:
        """Put the pretrained weights back, to the last bit."""
        verbs.unmerge(self.model)

    def _tasks_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise RecastConfigError(f"the model has no task {unknown[0]!r}; its tasks: {', '.join(self.peft_config)}")
        check_one_owner(self.model, list(dict.fromkeys([*verbs.merged_tasks(self.model), *names])), merging=True)
        verbs.check_mergeable(self.model, names)
        return names

    @contextmanager
    def disable_part(self, part: str) -> Iterator[None]:
        """Compute without one of the two parts of the tasks until the block ends; the other stays as it is.

        Args:
            part: ``"recast"`` switches the coefficients off, ``"lora"`` the LoRA part.

        Raises:
            RecastConfigError: if there is no such part, or tasks are merged.
        """
        with switched_off(self.model, part):
            yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @waits_for_calls
    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = self._tasks_to_merge(adapter_names) if merge else None
        with verbs.taken_apart(self, names, safe_merge):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self.remove_guards()
        return model

    # ---------------------------------------------------------------- arithmetic on tasks

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
        heads: str | None = None,
    ) -> None:
        """Add a task that is a weighted combination of others; it is not made active.

        Args:
            adapters: tasks on the same banks.
            weights: one for each, of any sign: ``[1, 1]`` adds tasks, ``[-1]`` forgets one, ``[1 - t, t]`` interpolates,
                ``[1/3, 1/3, 1/3]`` averages seeds.
            adapter_name: the new task's name.
            combination_type: ``"linear"`` (exact: the weights' differences to the base are summed), ``"ties"`` or
                ``"magnitude_prune"``; see ``arithmetic.combine_rows``.
            density: the share of each task's numbers that ``"ties"`` and ``"magnitude_prune"`` keep.
            majority_sign_method: for ``"ties"``: ``"total"`` or ``"frequency"``.
            heads: the new task's classifier where tasks have their own: ``"first"``, ``"linear"`` or ``"none"``.

        Raises:
            RecastConfigError: if an argument cannot be used, a task is unknown or owns parts that cannot be combined.
            RecastBankError: if the tasks are on different banks.
        """
        chosen = (combination_type, density, majority_sign_method, heads)
        add_combined(self, adapters, weights, adapter_name, *chosen)

    # ---------------------------------------------------------------- files

    def save_bank(self, path: str | Path, adapter_name: str | None = None, *, of: str = "weights") -> StoredBank:
        """Write the template banks of a task into a folder, once for all tasks on them; ``load_bank`` reads it.

        Args:
            path: the folder; tasks that are saved from now on name their bank by it.
            adapter_name: the task; None means the active one.
            of: ``"weights"``, or ``"biases"`` for the bank of the task's ``BiasConfig``.

        Returns:
            the stored bank.

        Raises:
            RecastBankError: if the banks follow from the pretrained weights and need no file, or there is no bank of biases.
            RecastConfigError: if ``of`` is something else.
        """
        return remember_stored_bank(self, stored_bank(self, adapter_name, of).save(path))

    def push_bank_to_hub(
        self, repo_id: str, adapter_name: str | None = None, *, of: str = "weights", **kwargs: Any
    ) -> StoredBank:
        """Upload the template banks of a task to a repository on the Hub; tasks that are saved afterwards name it.

        Args:
            repo_id: the repository, made if it does not exist.
            adapter_name: name of the task; None means the active one.
            of: ``"weights"``, or ``"biases"`` for the bank of the task's ``BiasConfig``.
            kwargs: further arguments of :func:`recast_peft.push_bank_to_hub`, such as ``private`` and ``token``.

        Returns:
            the stored bank, under the repository's name.
        """
        return remember_stored_bank(self, stored_bank(self, adapter_name, of).push_to_hub(repo_id, **kwargs))

    def forget_unfilled(self, adapter_name: str, undo: bool) -> None:
        """Say that a task's file was put in, or that it could not be: then the model is as it was before the task."""
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
        return gathered(model, adapter_name, config, state_dict)

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
        return load_into(model, config, adapter_name, state_dict)
