"""RecastModel: the PEFT tuner that plans, mimics, wraps and saves.

A conversion happens wholly or not at all: everything is planned, checked and prepared before the first module is replaced,
and what fails after that is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .banks.files import StoredBank
from .banks.template_bank import move_in_place
from .composition.cached_weights import cached_weights
from .composition.lazy_weight import model_reads
from .composition.mixed_batch import MixedBatch, current_batch, mixed_batch
from .config import RecastConfig
from .errors import RecastBankError, RecastConfigError
from .hub.backbone import describe_backbone
from .layer import RecastLayer, recast_layers
from .names import BANK_CONTAINER, BASE_ADAPTER, COEFFICIENTS, PREFIX, check_adapter_name, plain_name
from .parts.head import PreparedHead, TaskHead, check_one_owner, install_head, prepare_head, task_head
from .parts.holders import TaskBiases, TaskPartners, bias_bank_of, merge_partners, unmerge_partners
from .parts.lora import PartLayer, check_lora_part, install_lora_part, part_keys, part_layers, switched_off
from .parts.lora_plan import file_key
from .parts.norms import find_norms, freeze_running_statistics, install_norms, own_shapes
from .parts.places import (
    check_mergeable,
    install_partners,
    pack_masks,
    partner_banks,
    partner_shapes,
    prepare_partners,
    put_back_partners,
    take_out_partners,
    unpack_masks,
)
from .planning.groups import coefficient_owners
from .planning.plan import RecastPlan
from .tasks.arithmetic import (
    check_combinable,
    check_combination,
    combine_heads,
    combine_rows,
    head_of_adapter,
    task_row,
    write_row,
)
from .tasks.conversion import (
    PreparedLayer,
    base_fingerprints,
    check_fingerprints,
    check_name_is_free,
    check_other_tasks,
    install_banks,
    planned_record,
    prepare_banks,
    prepare_layers,
    record_of_task,
    remember_bank_name,
    share_coefficients,
    stored_bank_of,
)
from .tasks.files import check_state_dict, check_task_file
from .tasks.plan import plan_recast


class RecastModel(BaseTuner):
    """The tuner that puts RECAST tasks on a model (RECAST, ICLR 2025, section 3): ``model.base_model`` of a ``PeftModel``.

    It is made by :func:`get_recast_model` or PEFT's own functions. Whatever is wrong is said as a ``RecastError`` before the
    model is changed.
    """

    prefix: str = PREFIX
    tuner_layer_cls = RecastLayer
    target_module_mapping: dict[str, list[str]] = {}
    task_pool: tuple[Any, ...] = ()  # the TaskPools of this model, the latest first: task_ids refer to that one

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
        config = cast(RecastConfig, self.peft_config[adapter_name])
        before = config.record
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            config.record = config.as_chosen().record  # what an earlier use of the object decided is not for this task
            chosen = config
            if state_dict is not None and config.groups is None:
                names = (plain_name(key) for key in state_dict if COEFFICIENTS in key)
                chosen = config.as_chosen(target_modules=sorted({name.partition(f".{PREFIX}")[0] for name in names}))
            plan = plan_recast(model, chosen)
            targets = list(plan.candidates)
            check_name_is_free(targets, adapter_name)
            fingerprints = base_fingerprints(targets)
            head = prepare_head(model, config)
            norms = find_norms(model) if config.train_norms else []
            partners = prepare_partners(model, config, plan.targets)
            own = {**own_shapes(model, head, norms), **_lora_shapes(plan), **partner_shapes(partners)}
            entries = check_task_file(model, config, plan, own)
            backbone = config.backbone if check_fingerprints(config, fingerprints, entries) else None
            self._prepared = prepare_layers(targets, fingerprints)
            self._visible_keys = {p.visible_key for p in self._prepared.values()}
            new_banks = prepare_banks(plan, config, self._prepared)
            check_lora_part(model, plan.lora, _owned_names(config, head), _compressed_members(self._prepared))
            check_other_tasks(model, new_banks, config)
            config.record = planned_record(
                config,
                plan,
                self._prepared,
                fingerprints,
                partner_banks(partners),
                backbone or describe_backbone(model, config.revision),
            )
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            install_lora_part(
                model, adapter_name, plan.lora, self.peft_config, self.active_adapters, config.inference_mode, low_cpu_mem_usage
            )
        except BaseException:
            self._roll_back(adapter_name)
            config.record = before
            for parameter, requires_grad in trainable:
                if parameter.requires_grad != requires_grad:  # a lazy parameter cannot be asked to
                    parameter.requires_grad_(requires_grad)
            raise
        del trainable  # else it would hold every weight that is about to be released
        install_banks(model, new_banks, config.keep_base_weights)
        share_coefficients(self, adapter_name, coefficient_owners(plan.groups, plan.coefficient_sharing))
        active = adapter_name in self.active_adapters
        if head is not None:
            install_head(model, adapter_name, head, active, config.inference_mode)
        install_norms(model, adapter_name, norms, active, config.inference_mode)
        install_partners(self, adapter_name, partners, config.inference_mode)
        del self._prepared

    def _check_target_module_exists(self, peft_config: RecastConfig, key: str) -> bool:  # type: ignore[override]
        prepared = getattr(self, "_prepared", None)
        if prepared is None:  # asked by PEFT's helpers after the conversion
            return plain_name(key) in {m for members in (peft_config.groups or {}).values() for m in members}
        return key in self._visible_keys

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
                train_coefficients=peft_config.train_coefficients,
                coefficient_gradient=peft_config.coefficient_gradient,
            )
            setattr(prepared.parent, prepared.child_name, layer)

    def _prepare_adapter_config(self, peft_config: RecastConfig, model_config: dict) -> RecastConfig:  # type: ignore
        # targets were found by the plan; PEFT writes into what it gets here, and the config is its user's
        return peft_config.as_chosen(record=peft_config.record, target_modules=None)

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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT asks every module with this verb when a task was loaded by assignment, which puts it where the file was read
        # to: the machine's accelerator, wherever the model is. Its own containers have no such verb.
        for wrapper in (m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)):
            if adapter_name in wrapper.modules_to_save:
                around = wrapper.hosts if isinstance(wrapper, TaskPartners) else (wrapper.original_module,)
                there = device or next((p.device for m in around for p in m.parameters() if not p.is_meta), None)
                if there is not None:
                    own = wrapper.modules_to_save[adapter_name]
                    move_in_place((*own.parameters(), *own.buffers()), there)

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

    def train(self, mode: bool = True) -> RecastModel:
        """Set training mode, but for the running statistics of the pretrained model, which no task may move."""
        super().train(mode)
        if mode:
            freeze_running_statistics(self.model)
        return self

    @contextmanager
    def cached_weights(self) -> Iterator[None]:
        """A block in which every target composes its weight once, not once a call, where no gradient is recorded.

        Costs the memory of one weight for each target until the block ends. A weight is composed again as soon as coefficients,
        templates or the tasks in force are others. On an accelerator every call waits for the comparison of coefficients:
        merge there. A pretrained weight that is written through ``.data`` inside the block goes unnoticed, since torch does not
        count such writes; coefficients may be written in any way.
        """
        with cached_weights(list(recast_layers(self.model).values())):
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecastModel:
        super()._apply(fn, recurse)
        for pool in self.task_pool:  # no module of the model, but it follows the model's device and dtype
            pool.follow(fn)
        return self

    # ---------------------------------------------------------------- activating and merging

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make tasks active, with both of their parts; several that own the same module are refused before anything changes.

        Raises:
            RecastConfigError: naming the tasks and the module.
        """
        check_one_owner(self.model, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)
        for layer in part_layers(self.model):
            layer.unmerge()
            layer.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a task, with both of its parts."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        for layer in part_layers(self.model):
            layer.delete_adapter(adapter_name)
            layer._active_adapter = list(self.active_adapters)
            layer._parts.configs.pop(adapter_name, None)
        # PEFT finds the next task on the first layer alone, which may have none
        if was_active and self.peft_config and not self.active_adapters:
            self.set_adapter(min(self.peft_config))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge tasks, with both of their parts; what fails leaves nothing merged that was not merged before.

        Raises:
            RecastBankError: if a task has a partner that no weight can hold; nothing is changed then.
        """
        check_mergeable(self.model, adapter_names or (), self.active_adapters)
        self._merge_layers(adapter_names, safe_merge)
        merge_partners(self.model, adapter_names)

    def _merge_layers(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        parts = part_layers(self.model)
        if not parts:
            super().merge_adapter(adapter_names, safe_merge)
            return
        self._check_all_switched_on()
        self._check_merge_allowed()
        layers = [*recast_layers(self.model).values(), *parts]
        before = [list(layer.merged_adapters) for layer in layers]
        # a LoRA part is merged on top of its task's coefficients, whatever was merged before
        for part in parts:
            part.unmerge()
        try:
            for layer, merged in zip(layers, before, strict=True):
                wanted = list(layer.active_adapters if adapter_names is None else adapter_names)
                again = [name for name in merged if name not in (*wanted, *layer.merged_adapters)]
                layer.merge(safe_merge=safe_merge, adapter_names=[*again, *wanted])
            for other in _layers_of_others(self.model):
                other.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except BaseException:
            self.unmerge_adapter()
            for layer, merged in zip(layers, before, strict=True):
                layer.merge(adapter_names=merged)
            raise

    def unmerge_adapter(self) -> None:
        """Put the pretrained weights back, to the last bit."""
        unmerge_partners(self.model)
        parts = part_layers(self.model)
        if not parts:
            super().unmerge_adapter()
        for layer in (*parts, *_layers_of_others(self.model), *recast_layers(self.model).values()):
            if layer.merged:
                layer.unmerge()

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

    def _check_all_switched_on(self) -> None:
        layers = (*part_layers(self.model), *recast_layers(self.model).values())
        if any(layer.__dict__.get("_switched_off") for layer in layers):
            raise RecastConfigError("tasks are merged whole: leave the block of disable_part() first")

    # ---------------------------------------------------------------- unloading

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            check_mergeable(self.model, adapter_names or (), self.active_adapters)
        if part_layers(self.model):
            self._check_all_switched_on()
            tasks = [name for name in adapter_names or () if isinstance(self.peft_config.get(name), RecastConfig)]
            if merge and tasks:  # a LoRA part is merged on top of the coefficients of the tasks in force
                self.unmerge_adapter()
                self.set_adapter(tasks, inference_mode=True)
        partners = take_out_partners(self.model)
        try:
            with _renamed_children(self.model, "base_layer"):
                model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        except BaseException:
            put_back_partners(self.model, partners)
            raise
        if partners is not None and merge:
            merge_partners(partners, adapter_names)
        elif partners is not None:
            unmerge_partners(partners)
        if hasattr(self.model, BANK_CONTAINER):
            delattr(self.model, BANK_CONTAINER)
        return model  # type: ignore[return-value]

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
            majority_sign_method: of ``"ties"``: ``"total"`` or ``"frequency"``.
            heads: the new task's classifier where tasks have their own: ``"first"``, ``"linear"`` or ``"none"``.

        Raises:
            RecastConfigError: if an argument cannot be used, a task is unknown or owns parts that cannot be combined.
            RecastBankError: if the tasks are on different banks.
        """
        check_combination(adapters, weights, combination_type, density, majority_sign_method, heads)
        known = {name: config for name, config in self.peft_config.items() if isinstance(config, RecastConfig)}
        unknown = [name for name in adapters if name not in known]
        if unknown or adapter_name in self.peft_config:
            what = f"has no RECAST task {unknown[0]!r}" if unknown else f"has a task {adapter_name!r} already"
            raise RecastConfigError(f"the model {what}; its tasks: {', '.join(self.peft_config)}")
        configs = {name: known[name] for name in adapters}
        check_combinable(self.model, configs)
        head = combine_heads({name: head_of_adapter(self.model, name) for name in adapters}, weights, heads)
        row = combine_rows(
            [task_row(self.model, name) for name in adapters], weights, combination_type, density, majority_sign_method
        )
        sharing = {config.coefficient_sharing for config in configs.values()}
        labels = {} if head is None else {"num_classes": head.labels.num_classes, "id2label": head.labels.id2label}
        dtype = next((config.head_dtype for config in configs.values() if head is not None), None)
        config = configs[adapters[0]].layout(
            coefficient_sharing=sharing.pop() if len(sharing) == 1 else None,
            task_type=configs[adapters[0]].task_type,
            base_model_name_or_path=configs[adapters[0]].base_model_name_or_path,
            head_type=configs[adapters[0]].head_type if head is not None else "linear",
            head_dtype=dtype,
            **labels,
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        write_row(self.model, adapter_name, row)
        if head is not None:
            target = task_head(self.model, head.name).modules_to_save[adapter_name]
            target.load_state_dict(head.module.state_dict())  # type: ignore[union-attr]

    # ---------------------------------------------------------------- a task for each sample

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names, task_ids = kwargs.get("adapter_names"), kwargs.get("task_ids")
        if adapter_names is None and task_ids is None:
            with model_reads():
                yield
            return
        with self.samples_with_tasks(self._mixed_batch(adapter_names, task_ids, kwargs.get("num_beams"))):
            yield

    @contextmanager
    def samples_with_tasks(self, batch: MixedBatch) -> Iterator[None]:
        """Give every sample its own task until the block ends, also in modules that PEFT saves whole.

        Raises:
            RecastBankError: if the tasks are a pool's, and an ordinary task has modules of its own in force.
        """
        handles = []
        try:
            for module in self.modules():
                # modules that PEFT saves whole are told by PEFT's own argument; our layers and heads ask current_batch
                if not isinstance(module, AuxiliaryTrainingWrapper) or isinstance(module, (TaskHead, TaskBiases)):
                    continue
                if batch.pool is None:
                    handles.append(module.register_forward_pre_hook(_pass_adapter_names, with_kwargs=True))
                elif not module.disable_adapters and set(module.active_adapters) - {batch.pool.slot}:
                    raise RecastBankError(
                        f"the task {module.active_adapters[0]!r} has modules of its own in force (train_norms, "
                        "modules_to_save or partners), which a pool's tasks do not share: call pool.deactivate() first"
                    )
            with mixed_batch(batch), model_reads():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _mixed_batch(self, adapter_names: Any, task_ids: Any, num_beams: Any) -> MixedBatch:
        beams = num_beams if isinstance(num_beams, int) else 1
        if task_ids is None:
            self._check_mixed_batch(adapter_names)
            return MixedBatch(names=tuple(adapter_names), beams=beams)
        if adapter_names is not None:
            raise ValueError("adapter_names and task_ids were both given; give one of them")
        return self.pool_in_use().mixed_batch_of(task_ids, beams)

    def pool_in_use(self) -> Any:
        """The TaskPool that ``task_ids`` refer to.

        Raises:
            RecastConfigError: if the model has none.
        """
        if not self.task_pool:
            raise RecastConfigError("task_ids was given, but the model has no pool of tasks: make one with TaskPool(model)")
        return self.task_pool[0]

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
        stored = self._stored_bank(adapter_name, of).save(path)
        self._remember_bank(stored)
        return stored

    def push_bank_to_hub(
        self, repo_id: str, adapter_name: str | None = None, *, of: str = "weights", **kwargs: Any
    ) -> StoredBank:
        """Upload the template banks of a task to a repository on the Hub; see ``save_bank`` and ``StoredBank.push_to_hub``."""
        stored = self._stored_bank(adapter_name, of).push_to_hub(repo_id, **kwargs)
        self._remember_bank(stored)
        return stored

    def _remember_bank(self, stored: StoredBank) -> None:
        """Note where a bank was stored, for the tasks that are saved from now on."""
        if not stored.is_of_biases:
            remember_bank_name(self.model, stored)
            return
        for config in self.peft_config.values():
            record = getattr(config, "record", None)
            for partner, reference in () if record is None else record.partner_banks.items():
                if stored.at(reference["fingerprint"]) is not None:
                    banks = {**record.partner_banks, partner: {**reference, "name": stored.name}}
                    config.record = replace(record, partner_banks=banks)  # type: ignore[attr-defined]

    def _stored_bank(self, adapter_name: str | None, of: str) -> StoredBank:
        name = adapter_name or self.active_adapters[0]
        if of == "biases":
            bank = bias_bank_of(self.model, name)
            if bank is None:
                raise RecastBankError(f"task {name!r} is on no bank of biases: there is nothing to store")
            return bank
        if of != "weights":
            raise RecastConfigError(f"of={of!r}: expected 'weights' or 'biases'")
        return stored_bank_of(self.model, name, cast(RecastConfig, self.peft_config[name]).method.to_dict())

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
        base = getattr(model, "get_base_model", lambda: model)()
        backbone = config.as_chosen().backbone or describe_backbone(base, config.revision)
        config.record = record_of_task(config, model, adapter_name, backbone)
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return pack_masks(model, adapter_name, entries)

    @classmethod
    def _get_learnable_bias_state_dict(cls, model: nn.Module, state_dict: dict[str, Tensor], config: RecastConfig):  # type: ignore
        entries = super()._get_learnable_bias_state_dict(model, state_dict, config)
        # a module that is saved whole brings its bias itself
        return {key: value for key, value in entries.items() if ".modules_to_save." not in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # names of the plain model, whatever tuner layers stand around the target now
        if f".{LoraModel.prefix}" in key:
            return file_key(key, adapter_name)
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        return plain_name(key) if f".{PREFIX}" in key else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: RecastConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        state_dict = unpack_masks(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, adapter_name, remapped, part_keys(model, adapter_name))
        return remapped


def _layers_of_others(model: nn.Module) -> list[Any]:
    """The tuner layers of other methods."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, (RecastLayer, PartLayer))]


def _lora_shapes(plan: RecastPlan) -> dict[str, tuple[int, ...]]:
    return {} if plan.lora is None else plan.lora.shapes


def _owned_names(config: RecastConfig, head: PreparedHead | None) -> set[str]:
    return {*(config.modules_to_save or ()), *([] if head is None else [head.name])}


def _compressed_members(prepared: dict[str, PreparedLayer]) -> set[str]:
    return {name for name, p in prepared.items() if p.bank is not None and not p.bank.is_anchored}


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    batch = current_batch()
    if batch is not None and batch.pool is None and args:  # another thread's call may be a pool's
        repeats = batch.repeats(len(args[0]))
        known: set[str] = module._adapters  # type: ignore[assignment]
        names = [name if name in known else BASE_ADAPTER for name in batch.names]
        kwargs["adapter_names"] = [name for name in names for _ in range(repeats)]
    return args, kwargs


@contextmanager
def _renamed_children(model: nn.Module, name: str) -> Iterator[None]:
    """Give the model's own modules of a name another one for a while, in the same place.

    PEFT takes whatever has a ``base_layer`` for a layer of its own, and timm's DLA is a model that has one.
    """
    other = f"{name}_of_the_model"
    parents = [m for m in model.modules() if name in m._modules and not isinstance(m, BaseTunerLayer)]
    try:
        for parent in parents:
            parent._modules = {other if key == name else key: child for key, child in parent._modules.items()}
        yield
    finally:
        for parent in parents:
            parent._modules = {name if key == other else key: child for key, child in parent._modules.items()}
