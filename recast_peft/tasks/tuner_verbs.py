"""What is done to the tasks of a ``RecastModel``: activating, merging, deleting, combining, storing their banks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from ..banks.files import StoredBank
from ..config import RecastConfig, tasks_among
from ..errors import RecastBankError, RecastConfigError
from ..holders import exchange, put_child
from ..layer import RecastLayer
from ..names import modules_of
from ..parts.base_biases import switch_biases
from ..parts.lora_strength import switched_off
from ..parts.stacking import Adding
from ..parts.wrapper import ScaledModule, TaskModule, check_one_owner
from ..placement.offloaded import end_offloading, is_offloaded
from ..validation import check_arguments, check_is_task, checked_names, text
from . import verbs
from .arithmetic import add_combined
from .banks import remember_stored_bank, stored_bank
from .calls import TaskCalls, waits_for_calls


class TaskVerbs(TaskCalls):
    """The verbs of ``RecastModel`` that concern all parts of tasks; a base class of it."""

    _keeps_active = False  # while a task is put in beside others

    # ---------------------------------------------------------------- activating and merging

    @waits_for_calls
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make tasks active, with all of their parts; several that own the same module are refused before anything changes.

        Args:
            adapter_name: name of the task, or names of several.
            inference_mode: freeze them instead of making them trainable.

        Raises:
            RecastConfigError: if a task is unknown or named twice, or naming the tasks and the module.
        """
        if self._keeps_active:  # PEFT sets the active tasks again whenever one is added, which would unmerge them
            return
        Adding.end()
        names = self._known("adapter_name", adapter_name)
        check_one_owner(self.model, names)
        try:
            super().set_adapter(adapter_name if isinstance(adapter_name, str) else names, inference_mode)
            verbs.activate(self.model, names, inference_mode)
            switch_biases(self.model, tasks_among(self.peft_config), names, not inference_mode)
        except KeyboardInterrupt:  # noting what was before would take far longer than going on
            self.set_adapter(adapter_name, inference_mode)
            raise

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make tasks trainable or frozen, active or not.

        Args:
            adapter_names: name of the task, or names of several.
            requires_grad: False freezes them.

        Raises:
            RecastConfigError: if a task is unknown.
        """
        super().set_requires_grad(self._known("adapter_names", adapter_names, once=False), requires_grad)

    @waits_for_calls
    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a task, with all of its parts. If it was active, the other active tasks stay so, or else the first task is.

        Args:
            adapter_name: name of the task.

        Raises:
            ValueError: if there is no such task.
            RecastConfigError: if it is merged; nothing is changed then.
        """
        check_arguments(text, adapter_name=adapter_name)
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if adapter_name in verbs.merged_tasks(self.model):
            said = (
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."  # PEFT's words
            )
            raise RecastConfigError(f"{said} (Call unmerge_adapter().)")
        was_active = adapter_name in self.active_adapters
        active = [name for name in self.active_adapters if name != adapter_name]
        inference_mode = verbs.is_frozen(self.model, self.active_adapters)
        others = [name for name in self.peft_config if name != adapter_name]
        if was_active and not active:
            active = [name for name in others if isinstance(self.peft_config[name], RecastConfig)][:1]
            if active:
                said = f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}."
                warnings.warn(said, stacklevel=4)  # PEFT's words
        switch_biases(self.model, tasks_among({adapter_name: self.peft_config[adapter_name]}), others, False)
        try:
            self._delete(adapter_name, active if was_active else None, inference_mode)
        except KeyboardInterrupt:
            self._delete(adapter_name, active if was_active else None, inference_mode)
            raise

    def _delete(self, adapter_name: str, active: list[str] | None, inference_mode: bool) -> None:
        """Delete what is left of a task and activate others; None leaves the active ones, and what is merged, as they are."""
        verbs.delete(self.model, adapter_name)
        self.peft_config.pop(adapter_name, None)
        self.task_pool = tuple(pool for pool in self.task_pool if pool.slot != adapter_name)  # that name may be a task's now
        if active is not None:
            self.active_adapter = active
            self.set_adapter(active, inference_mode)

    @waits_for_calls
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge tasks, with all of their parts; what fails leaves nothing merged that was not merged before.

        Args:
            adapter_names: the tasks; None means the active ones, an empty list does nothing. Until they are unmerged, the model
                computes what it would compute with these tasks active, classifier and norms included.
            safe_merge: refuse weights and biases that are not finite.

        Raises:
            RecastConfigError: if a task is unknown or named twice, or several own the same module.
            RecastBankError: if a task has a part that no weight can hold; nothing is changed then.
        """
        self._check_merge_allowed()
        names = self._tasks_to_merge(adapter_names)
        verbs.merge(self.model, names, safe_merge, None if adapter_names is None else names)

    @waits_for_calls
    def unmerge_adapter(self) -> None:
        """Put the pretrained weights back, to the last bit."""
        verbs.unmerge(self.model)

    def _tasks_to_merge(self, adapter_names: list[str] | None, unload: bool = False) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")  # PEFT's words
        given = verbs.active_tasks(self.model, self.active_adapters) if adapter_names is None else adapter_names
        names = self._known("adapter_names", given)
        check_one_owner(self.model, list(dict.fromkeys([*verbs.merged_tasks(self.model), *names])), merging=True)
        verbs.check_mergeable(self.model, names, unload)
        return names

    def _known(self, argument: str, given: Any, once: bool = True) -> list[str]:
        """The names of tasks that a verb was given; refuses others than the model's."""
        names = checked_names(argument, given, once)
        for name in names:
            check_is_task(name, self.peft_config)
        return names

    def disable_part(self, part: str) -> AbstractContextManager[None]:
        """A block that computes without one of the two parts of the tasks; the other stays as it is.

        Args:
            part: ``"recast"`` switches the coefficients off, ``"lora"`` the LoRA part.

        Raises:
            RecastConfigError: if there is no such part, or tasks are merged.
        """
        return switched_off(self.model, part)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, TaskModule):  # a module that a model shares can be a task's own, but no target
            exchange(self.model, child, new_module)
        else:
            put_child(parent, child_name, new_module)

    @waits_for_calls
    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = self._tasks_to_merge(adapter_names, unload=True) if merge else None
        adapter_names = None if adapter_names is None else names
        for layer in modules_of(self.model, RecastLayer):
            if layer.is_released and is_offloaded(layer.get_base_layer()):  # PEFT would send away what was never there
                raise RecastBankError(
                    f"a compressed bank stands for the weight of {layer.module_name}, which is offloaded: take the "
                    "offloading off first, accelerate.hooks.remove_hook_from_module(model, recurse=True)"
                )
        for place in modules_of(self.model, ScaledModule):
            end_offloading(place.original_module)  # PEFT sends it away by two names, and finds no numbers the second time
        with verbs.taken_apart(self, names, safe_merge):
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
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
            combination_type: ``"linear"`` (exact: the weights' differences to the base are summed; the rank of a LoRA part is
                the sum of the tasks'), ``"svd"`` (the same, with the nearest LoRA part of the largest of the tasks' ranks),
                ``"ties"`` or ``"magnitude_prune"``; see ``arithmetic.combine_rows``.
            density: the share of each task's numbers that ``"ties"`` and ``"magnitude_prune"`` keep.
            majority_sign_method: for ``"ties"``: ``"total"`` or ``"frequency"``.
            heads: the new task's classifier where tasks have their own: ``"first"``, ``"linear"`` or ``"none"``.

        Raises:
            RecastConfigError: if an argument cannot be used, a task is unknown or owns parts that cannot be combined.
            RecastBankError: if the tasks are on different banks.
        """
        options = {"density": density, "majority_sign_method": majority_sign_method}
        add_combined(self, adapters, weights, adapter_name, combination_type, heads, **options)

    # ---------------------------------------------------------------- files

    def save_bank(self, path: str | Path, adapter_name: str | None = None, *, of: str = "weights") -> StoredBank:
        """Write the template banks of a task into a folder, once for all tasks on them; ``load_bank`` reads it.

        Args:
            path: the folder; tasks that are saved from now on name their bank by it.
            adapter_name: the task; None means the active one.
            of: ``"weights"``, or the bank of a partner: ``"biases"`` (``BiasConfig``) or ``"readout"`` (``ReadoutConfig``).

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
            of: as for ``save_bank``.
            kwargs: further arguments of :func:`recast_peft.push_bank_to_hub`, such as ``private`` and ``token``.

        Returns:
            the stored bank, under the repository's name.
        """
        return remember_stored_bank(self, stored_bank(self, adapter_name, of).push_to_hub(repo_id, **kwargs))
