"""PEFT's model classes with what tasks need beside: cards, checkpoints of the Trainer, a task for each sample.

``get_recast_model``, ``TaskPool`` and whatever loads a task (``PeftModel.from_pretrained``, ``load_adapter``) give a
``PeftModel`` a class from here, which stands for its own and is a subclass of it.
"""

from __future__ import annotations

import copy
import filecmp
import functools
import inspect
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import RecastConfig
from ..errors import RecastConfigError
from ..holders import trained_kinds
from ..names import check_adapter_name
from ..options.record import modules_called
from ..storage.cards import CARD_NAME
from ..storage.pairs import staged_pairs
from ..tasks.state import keep_trained
from ..validation import a_path, check_arguments, check_is_device, checked_names, did_you_mean, shown, text
from .cards import write_model_card, write_repository_card
from .hotswap import check_replacement, take_over
from .task_files import has_task_numbers
from .transfer import fetch_config, local_task, push_tasks_to_hub, task_names

OTHER = "others"  # norms, biases and whole modules
_SHOWN_AS = {
    "coefficients": "coefficients",
    "biases": "coefficients of biases",
    "classifier": "classifier",
    "lora": "LoRA part",
    "partners": "partners",
    OTHER: "others",
}
# of load_adapter's keywords, those that PEFT looks for but does not name: how a model is spread again
_UNNAMED = ("ignore_mismatched_sizes", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index")
DEFAULT = "default"  # the adapter that PEFT keeps in the root of a folder


if TYPE_CHECKING:
    _Beside = PeftModel  # each class of PEFT's that ``TaskModel`` is put in front of is one
else:
    _Beside = object


@contextmanager
def any_name() -> Iterator[None]:
    """A block without PEFT's warning of task names that are a part of ``recast_``: no key of ours holds a task's name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter name .* should not be contained in the prefix")
        yield


class TaskModel(_Beside):
    """What the classes of this module add to PEFT's (see :func:`with_task_verbs`)."""

    base_model: Any

    @property
    def active_peft_config(self) -> PeftConfig:
        """As in PEFT; once every task was deleted, the config of one that changes nothing, so that the model is the base."""
        return self.peft_config.get(self.active_adapter) or RecastConfig()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """As in PEFT, but for the adapter that a pool writes into, which is saved only if it is selected.

        The files are written beside their places and moved there at the end: what fails, or a kill, leaves the folder as it
        was, and processes that save to one folder do not disturb each other. A folder with several tasks gets a card that lists
        them. In a checkpoint of the Trainer (a folder named ``checkpoint-<step>``) the active task's files are also put in the
        root, where the Trainer looks for the best model.
        """
        check_arguments(a_path, save_directory=save_directory)
        if save_embedding_layers == "auto" and not hasattr(self, "get_input_embeddings"):
            save_embedding_layers = False  # PEFT would ask the Hub for a vocabulary that the model does not have
        if isinstance(selected_adapters, str):
            raise TypeError(f"selected_adapters should be a list of names, got {selected_adapters!r}.")
        given = task_names(self) if selected_adapters is None else selected_adapters
        names = list(dict.fromkeys(checked_names("selected_adapters", given)))
        if not names:
            raise RecastConfigError("the model has no task to save: add one with add_adapter(name, config) or load_adapter")
        is_unknown = not set(names) <= set(self.peft_config)
        if not is_main_process or os.path.isfile(save_directory) or is_unknown:  # PEFT says what is wrong with the latter two
            super().save_pretrained(save_directory, safe_serialization, names, save_embedding_layers, is_main_process, **kwargs)
            return
        with staged_pairs(save_directory, {SAFETENSORS_WEIGHTS_NAME: CONFIG_NAME}) as folder:
            _make_folders(folder, Path(save_directory), names)
            _copy_cards(Path(save_directory), folder, names)
            super().save_pretrained(str(folder), safe_serialization, names, save_embedding_layers, is_main_process, **kwargs)
            inside = [name for name in names if name != DEFAULT and has_task_numbers(folder / name)]
            if inside:
                lies = None if is_checkpoint(save_directory) else lambda file: Path(save_directory, file).is_file()
                write_repository_card(folder, inside, lies=lies)
            if is_checkpoint(save_directory) and DEFAULT not in names:
                for active in self.active_adapters[:1]:
                    _copy_task(folder / active, folder)
            outdated = _in_other_formats(folder)
        for file in outdated:
            Path(save_directory, file).unlink(missing_ok=True)

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT, but a task of the model is read from its own folder in a checkpoint of the Trainer.

        The Trainer asks for every task in the checkpoint's root: for the active one to get the best model, for ``"default"``
        to resume. If the root holds a copy of a task and the model has no ``"default"``, that task is loaded, under its name.

        A ``key_mapping`` changes the names of the task's modules before they are looked for in the model.

        Raises:
            RecastConfigError: for a keyword that PEFT would swallow.
        """
        check_adapter_name(adapter_name)
        _check_keywords(self._split_kwargs(kwargs)[1])
        check_is_device(kwargs.get("torch_device"))
        check_arguments(a_path, model_id=model_id)
        if is_checkpoint(model_id) and "subfolder" not in kwargs:
            model_id, adapter_name = self._in_checkpoint(Path(model_id), adapter_name)
        elif os.path.isdir(model_id):
            model_id = str(local_task(model_id, kwargs.pop("subfolder", None)))
        hub_kwargs = {**self._split_kwargs(kwargs)[0]}
        file, subfolder = fetch_config(str(model_id), hub_kwargs.pop("subfolder", None), hub_kwargs)
        kwargs |= {} if subfolder is None else {"subfolder": subfolder}
        RecastConfig.from_json_file(file)  # says what is wrong with it before PEFT looks for keys in it
        own = self.peft_config.get(adapter_name)
        with modules_called(kwargs.pop("key_mapping", None)):
            if not isinstance(own, RecastConfig):
                try:
                    return super().load_adapter(model_id, adapter_name, *args, key_mapping={}, **kwargs)  # type: ignore[misc]
                except BaseException:  # between its modules and its numbers
                    self.base_model.forget_unfilled(adapter_name, undo=True)
                    raise
            # PEFT would read the numbers alone, whatever the file's config says of them
            backbone, hub_kwargs = self.get_base_model(), self._split_kwargs(kwargs)[0]
            config, _ = check_replacement(backbone, str(model_id), adapter_name, own, **hub_kwargs)
            loaded = super().load_adapter(model_id, adapter_name, *args, key_mapping={}, **kwargs)  # type: ignore[misc]
            take_over(backbone, config, adapter_name, own)
            return loaded

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig | None = None, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; a task may have any name, and in a model whose tasks were all deleted it is active, as a first one is.

        The model keeps a copy of a ``RecastConfig``, so that the object can be changed and used for the next task.

        Raises:
            RecastConfigError: if the config is none, such as a dictionary or the folder of a task.
        """
        config = copy.deepcopy(peft_config) if isinstance(peft_config, RecastConfig) else peft_config
        if not isinstance(config, PeftConfig):
            raise RecastConfigError(
                f"add_adapter({shown(adapter_name)}, {shown(config)}): expected a name and a RecastConfig; a saved task is "
                "loaded by load_adapter(folder, name)"
            )
        if isinstance(config, RecastConfig):
            check_adapter_name(adapter_name)
        is_first = not self.peft_config
        with any_name():
            super().add_adapter(adapter_name, config, *args, **kwargs)
        if is_first:
            self.set_adapter(adapter_name, config.inference_mode)

    def set_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; what is interrupted before it began leaves the task active that was."""
        check_arguments(text, adapter_name=adapter_name)
        active = self.active_adapter
        try:
            super().set_adapter(adapter_name, *args, **kwargs)
        except BaseException:
            if self.active_adapters != [adapter_name]:
                self.active_adapter = active
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; what is interrupted once it began is finished before."""
        check_arguments(text, adapter_name=adapter_name)
        try:
            super().delete_adapter(adapter_name)
        except KeyboardInterrupt:
            if adapter_name not in self.peft_config:
                self.active_adapter = next(iter(self.active_adapters), [])  # type: ignore[assignment]
            raise

    def _in_checkpoint(self, folder: Path, adapter_name: str) -> tuple[str, str]:
        """The folder in a checkpoint and the name that are meant."""
        root = folder / SAFETENSORS_WEIGHTS_NAME
        files = {name: folder / name / SAFETENSORS_WEIGHTS_NAME for name in self.peft_config}
        saved = {name: file for name, file in files.items() if file.is_file()}
        if adapter_name in saved:
            return str(folder / adapter_name), adapter_name
        if adapter_name == DEFAULT and DEFAULT not in files and root.is_file():
            for name, file in saved.items():
                if filecmp.cmp(file, root, shallow=False):
                    return str(folder / name), name
        return str(folder), adapter_name

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT's own leaves a call alone while another thread is in disable_adapter()
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As in PEFT; the mixed batches of other threads keep their tasks."""
        switched_off = super().disable_adapter() if self.peft_config else nullcontext()
        with self.base_model.calls.switched_off(), switched_off:
            yield

    def print_trainable_parameters(self) -> None:
        """As in PEFT, and a second line: how many of them are coefficients, the classifier, and other parts of the task."""
        super().print_trainable_parameters()
        kinds = trained_kinds(self)
        counts = dict.fromkeys(_SHOWN_AS.values(), 0)
        for parameter in self.parameters():
            counts[_SHOWN_AS[kinds.get(id(parameter), OTHER)]] += parameter.numel() * parameter.requires_grad
        print("of these: " + (" || ".join(f"{name}: {count:,}" for name, count in counts.items() if count) or "none"))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """As in PEFT; where a task lies already, our card is written (the Trainer asks for it after saving)."""
        if (Path(output_dir) / CONFIG_NAME).is_file() and has_task_numbers(output_dir):
            write_model_card(output_dir)
        elif not Path(output_dir, CARD_NAME).is_file():  # else our part is put into it when a task is saved
            super().create_or_update_model_card(output_dir)

    def push_to_hub(self, repo_id: str, *, tags: list[str] | None = None, **kwargs: Any) -> CommitInfo:
        """Push all tasks of the model in one commit; see :func:`push_tasks_to_hub` for the arguments."""
        del tags  # the card has its own
        kwargs.pop("max_shard_size", None)
        return push_tasks_to_hub(self, repo_id, **kwargs)


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is one of those that the Trainer makes while it trains."""
    return Path(folder).is_dir() and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name) is not None


def _check_keywords(given: Mapping[str, Any]) -> None:
    known = (*inspect.signature(PeftModel.load_adapter).parameters, *_UNNAMED)
    for name in given.keys() - set(known):
        raise RecastConfigError(
            f"load_adapter(..., {name}={shown(given[name])}): there is no such argument{did_you_mean(name, known)}"
        )


def _make_folders(folder: Path, target: Path, names: list[str]) -> None:
    """A folder for every task; a file system may take two names for one, as "Cat" and "cat", and a link may lead to another."""
    present = os.listdir(target)
    taken = {os.path.realpath(target): DEFAULT}
    for name in (name for name in names if name != DEFAULT):  # that one lies in the folder itself
        place = target / name
        other = taken.setdefault(os.path.realpath(place), name)
        if other != name:
            raise RecastConfigError(
                f"task {name!r} cannot be saved to {place}: a link leads from there to the folder of task {other!r}. Take it "
                "away, or save the task to a folder of its own."
            )
        if os.path.lexists(place) and not (place.is_dir() and name in present):
            raise RecastConfigError(
                f"task {name!r} cannot be saved to {place}: a file lies there, or the folder of another task, whose name this "
                "file system does not tell from it. Save it to a folder of its own."
            )
        try:
            (folder / name).mkdir()
        except FileExistsError as error:
            raise RecastConfigError(
                f"task {name!r} would lie in the folder of another one, whose name this file system does not tell from it: "
                "save them to folders of their own with selected_adapters="
            ) from error


def _copy_cards(source: Path, target: Path, names: list[str]) -> None:
    """Lay the cards that are there already beside what is about to be saved, so that what their owner wrote stays."""
    for place in ("", *names):
        if (source / place / CARD_NAME).is_file():
            (target / place).mkdir(exist_ok=True)
            shutil.copyfile(source / place / CARD_NAME, target / place / CARD_NAME)


def _in_other_formats(folder: Path) -> list[Path]:
    """The files of numbers that an earlier save in another format may have left; a reader would take them for the new ones."""
    formats = {SAFETENSORS_WEIGHTS_NAME: WEIGHTS_NAME, WEIGHTS_NAME: SAFETENSORS_WEIGHTS_NAME}
    written = [file.relative_to(folder) for name in formats for file in folder.rglob(name)]
    return [other for file in written if (other := file.with_name(formats[file.name])) not in written]


def _copy_task(source: Path, target: Path) -> None:
    if (source / SAFETENSORS_WEIGHTS_NAME).is_file():
        for file in source.iterdir():
            if file.is_file() and file.name != CARD_NAME:  # the root has a card that lists all tasks
                shutil.copyfile(file, target / file.name)


def _takes_token_ids(model: Any) -> bool:
    """Whether a model takes ``input_ids``, which PEFT's classes for a ``task_type`` give it; those of sounds do not."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids" or _has_token_ids(type(model).forward)


@functools.cache
def _has_token_ids(forward: Any) -> bool:
    return "input_ids" in inspect.signature(forward).parameters


def _with_verbs(peft_class: Any) -> type[PeftModel]:
    @functools.wraps(peft_class.forward)  # the Trainer reads the arguments off it
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # classes for a task_type have an argument of this name, which would swallow it
        task_ids = kwargs.pop("task_ids", None)
        if "_hf_hook" in vars(self):  # the model is offloaded with what is around it
            keep_trained(self.get_base_model())
        own_class = peft_class if _takes_token_ids(self.get_base_model()) else PeftModel
        if task_ids is None:
            return own_class.forward(self, *args, **kwargs)
        self.base_model.pool_in_use()
        with self._enable_peft_forward_hooks(task_ids=task_ids, adapter_names=kwargs.get("adapter_names")):
            return own_class.forward(self, *args, **kwargs)

    @functools.wraps(peft_class.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        own_class = peft_class if _takes_token_ids(self.get_base_model()) else PeftModel
        return own_class.generate(self, *args, **self.base_model.with_own_repeats(kwargs))

    verbs = {"forward": forward, "generate": generate}
    name = f"Recast{peft_class.__name__}"
    # it is called what it stands for: transformers' pipelines look for PEFT's classes by name, pickle by the qualified one
    about = {"__module__": __name__, "__qualname__": name, "__doc__": peft_class.__doc__}
    return type(peft_class.__name__, (TaskModel, peft_class), {**about, **verbs})


# one for each class of PEFT, by names in this module, so that pickle finds them
_WITH_VERBS = {cls: _with_verbs(cls) for cls in (PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())}
globals().update({cls.__qualname__: cls for cls in _WITH_VERBS.values()})


def with_task_verbs(model: PeftModel) -> PeftModel:
    """Give a ``PeftModel`` of RECAST tasks the class of this module that stands for its own; it stays an instance of that.

    PEFT's own ``push_to_hub`` comes from transformers and puts an empty template in the place of any card. A class that is
    not one of PEFT's own is left alone.
    """
    own = _WITH_VERBS.get(type(model))
    if own is not None:
        model.__class__ = own
    return model
