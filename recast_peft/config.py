"""RecastConfig: what a user chooses for a RECAST task, and the record of what a conversion decided, as PEFT stores them."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .banks.files import StoredBank
from .composition.coefficient_gradients import AUTO
from .errors import RecastConfigError
from .mimicry import MimicryMethod, resolve_method
from .options.checks import check_config
from .options.config_file import read_fields, writable, write_fields
from .options.lora import stored_lora_config
from .options.partner import PartnerConfig, partners_of
from .options.record import AFTER_SAVING, Reference, TaskRecord, decided, from_fields, hub_repository, reference_of, to_fields
from .registration import peft_type
from .validation import a_path, check_arguments, check_is_device, did_you_mean, shown

DEFAULT_GROUP_SIZE = 2

# The settings of the paper by name; on the paper's backbones they give exactly its counts (48, 96, 144 and 168 numbers).
PAPER_SETTINGS: dict[str, dict[str, Any]] = {
    "vit-att": {"target_modules": ["attn.qkv"], "group_size": 2},
    "vit-mlp": {"target_modules": ["mlp.fc1", "mlp.fc2"], "group_size": 2},
    "vit-att+mlp": {"target_modules": ["attn.qkv", "mlp.fc1", "mlp.fc2"], "group_size": 2},
    # one group a stage without its first block, as many templates as the group has blocks
    "resnet": {"target_modules": r"(.*\.)?layer\d+\.[1-9]\d*\.conv[12]", "num_groups": 1},
}


@dataclass
class RecastConfig(PeftConfig):
    """Configuration of one RECAST task: what its user chooses, and the record of what a conversion decided.

    Args:
        target_modules: modules that are composed from templates: a list of names, a regular expression that matches whole
            names, or one of ``"all-linear"``, ``"all-attention"``, ``"all-mlp"``, ``"all-conv"``. None takes the feed-forward
            layers of a transformer (its attention projections where it has none), else the convolutions, else the linear
            layers. Neither None nor a shorthand picks a classifier head.
        target_parameters: parameters without a module of their own that are composed, by their names or endings: the fused
            experts of a mixture (``["experts.down_proj"]``), one of a module. Without ``target_modules`` the only targets.
        exclude_modules: modules to leave out: a list of names, or a regular expression.
        layers_to_transform: layer indices, counted from 0; only modules in these layers are targets.
        layers_pattern: name of the module list that ``layers_to_transform`` counts in.
        modules_to_save: names of further modules that are trained and stored whole with the task.
        bias: which of the model's own biases, which all tasks share, are trained: ``"none"``, ``"all"`` or ``"recast_only"``.
        init_weights: True starts at the pretrained weights (all offsets zero). False, for tests, starts at random offsets of
            size 0.1 to 0.2, by ``seed`` and the task's name, and at a random LoRA part.
        group_size: number of consecutive layers of one role and shape that share a template bank. A remainder makes a smaller
            group; a lone layer has one template. None is what fits the budget, 2 or 1 by default.
        num_groups: number of groups into which the layers of each role and shape are divided, instead of ``group_size``.
        num_templates: number of templates in a bank. None takes as many as the group has layers, so that the pretrained weights
            themselves are the templates and nothing is approximated. Fewer compress the model.
        num_directions: r, instead of groups: the templates of a layer are the r * r of rank one between the r main directions
            of its own weight on either side, as far as it has so many (``banks/directions_bank.py``).
        num_coefficient_sets: number of coefficient sets that are trained and averaged (K of the paper, section 3.1).
        mimicry: method that finds templates and base coefficients (paper, section 3.2): a name, ``{"method": name, option:
            value, ...}``, or the options object itself (``Gradient(steps=500)``).
        lora_config: low-rank part of the same task: a ``LoraConfig``, or a dictionary of its fields. Its ``target_modules`` may
            differ from RECAST's; None takes the same. ``bias``, ``modules_to_save``, ``task_type`` and ``inference_mode`` are
            given to the RecastConfig, for both parts.
        max_coefficients: what a task may cost: the largest number of parameters that it trains beside its classifier. The plan
            keeps it by choosing ``num_directions``; below 48, or beside a size or a sharing, what of ``group_size``,
            ``num_coefficient_sets`` and ``coefficient_sharing`` is not given. LoRA, partners, biases, norms and
            ``modules_to_save`` are not counted. None means 48 where neither a size nor a sharing is given, else no limit.
        coefficient_sharing: layers that share their offsets: ``"roles"``: those of the same place in depth across roles (query,
            key, value, ...); ``"blocks"``: the members of a bank; ``"all"``: both; a number: that many consecutive banks of a
            role. None: every layer has its own.
        bank: stored template bank that the task is on: a ``StoredBank``, the name of a bank file (a folder or a repository), or
            ``{"name": ..., "fingerprint": ...}``, as a task stores it. Its groups are used as they are. The config of a stored
            task is handed its bank here where the bank lies elsewhere than the task says.
        keep_base_weights: True keeps the pretrained weights beside a compressed bank, so that disabling or unloading the task
            gives the pretrained model instead of its compressed form.
        num_classes: number of classes of a classifier that the task owns; None leaves the model's own alone.
        id2label: names of the task's classes by class number; also gives ``num_classes``.
        problem_type: kind of loss of the task's classifier in transformers models: ``"regression"``,
            ``"single_label_classification"`` or ``"multi_label_classification"``. None takes the model's own where that has
            as many outputs, else what transformers guesses from the first labels.
        head_module: name of the classifier, where timm's and transformers' conventions do not tell.
        head_init: start of the classifier: ``"fresh"``, or ``"copy"`` of the model's own classifier of the same size.
        head_type: kind of classifier: ``"linear"`` (trained), or ``"prototypes"`` (nearest class mean, see ``fit_prototypes``).
        head_dtype: precision in which the classifier is stored: ``"float16"`` or ``"bfloat16"``; None is that of training.
        train_norms: True gives the task all normalisation layers, with parameters and running statistics. Otherwise they stay
            the pretrained model's, and running statistics do not move while a task is trained.
        partners: what the task trains beside its coefficients: a list of ``AdaptFormerConfig``, ``BiasConfig``, ``CLRConfig``,
            ``PiggybackConfig`` and ``ReadoutConfig``, or their names or dictionaries.
        train_coefficients: False leaves the coefficients at zero and trains partners, head and norms alone.
        coefficient_gradient: way in which training forms the gradient of the coefficients: ``"exact"``; ``"bfloat16"``: the
            product that only they need is formed in bfloat16, which is faster where the hardware has such products; ``"auto"``:
            that for layers in float32 on a processor where it is faster, else the exact one. It concerns only training.
        seed: random seed for whatever of the task's start is random, such as a fresh classifier.
        groups: module names of every template bank, by the bank's name; used as given, else the conversion decides them.
        recipes: ``{"mix": (templates, layers), "base": (layers, templates)}`` of every compressed bank, from which it is
            rebuilt out of the pretrained weights; decided by the conversion.
        base_fingerprint: fingerprint of the pretrained weight of each target module; decided by the conversion.
        surroundings_fingerprint: that of all else of the model but its classifier; decided by the conversion.
        backbone: how the timm or transformers model is found again, for ``AutoRecastModel``; found unless it is given.
        fidelity: how well compressed banks reproduce the pretrained weights; measured by the conversion.
        results: what was measured of the task, such as ``{"accuracy": 0.93}``: stored with it and shown in its model card.

    Attributes:
        record: what a conversion decided or a file holds; None for a config that no model has used. The fields that it decides
            read as it has them. A config that is used for another model describes a new task and gets a new record; the record
            of a stored task is followed.

    Raises:
        RecastConfigError: naming the field and its value, if a value cannot be used.
    """

    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters without a module of their own, such as the fused experts of a mixture."}
    )
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    group_size: int | None = None
    num_groups: int | None = None
    num_templates: int | None = None
    num_directions: int | None = decided()
    num_coefficient_sets: int = decided(1)
    mimicry: str | dict[str, Any] | MimicryMethod = "closed_form"
    lora_config: LoraConfig | dict[str, Any] | None = decided()
    max_coefficients: int | None = None
    coefficient_sharing: str | int | None = decided()
    bank: dict[str, str | None] | str | StoredBank | None = None
    keep_base_weights: bool = False
    num_classes: int | None = None
    id2label: dict[int, str] | None = None
    problem_type: str | None = decided()
    head_module: str | None = None
    head_init: str = "fresh"
    head_type: str = "linear"
    head_dtype: str | None = None
    train_norms: bool = False
    partners: list[PartnerConfig | dict[str, Any] | str] | None = None
    train_coefficients: bool = True
    coefficient_gradient: str = AUTO
    seed: int = 0
    groups: dict[str, list[str]] | None = decided()
    recipes: dict[str, dict[str, list[list[float]]]] | None = decided()
    base_fingerprint: dict[str, str] | None = decided()
    surroundings_fingerprint: str | None = decided()
    backbone: dict[str, Any] | None = decided()
    fidelity: dict[str, float] | None = decided()
    results: dict[str, Any] | None = None
    record: TaskRecord | None = field(default=None, init=False, repr=False, compare=False)
    is_layout: ClassVar[bool] = False  # of a pool's slot or a sum, whose classifier comes later

    @property
    def method(self) -> MimicryMethod:
        """The mimicry method with its options."""
        return resolve_method(self.mimicry)

    @classmethod
    def paper(cls, name: str, **fields: Any) -> RecastConfig:
        """The settings of the paper: two coefficient sets; exact banks in groups of two blocks, or one group a stage.

        Args:
            name: ``"vit-att"``, ``"vit-mlp"``, ``"vit-att+mlp"`` (timm's names) or ``"resnet"`` (timm's and torchvision's).
            fields: further fields, which go before those of the paper. ``mimicry=Gradient.paper()`` also finds the
                templates as the paper does.

        Raises:
            RecastConfigError: if the paper has no such settings.
        """
        if name not in PAPER_SETTINGS:
            raise RecastConfigError(f"RecastConfig.paper({name!r}): expected one of {', '.join(PAPER_SETTINGS)}")
        return cls(**{**PAPER_SETTINGS[name], "num_coefficient_sets": 2, **fields})

    def __post_init__(self) -> None:
        check_config(self)
        super().__post_init__()
        self.peft_type = peft_type()
        self.record = from_fields({f.name: getattr(self, f.name) for f in fields(self)}, self.partner_banks)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> RecastConfig:
        """Read the config of a saved task from a folder or a repository on the Hub; its record says where it came from."""
        hub_kwargs, _, others = cls._split_kwargs(kwargs)
        _check_keywords(others)
        try:
            config: RecastConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, KeyError, AttributeError) as error:  # PEFT looks for its own keys first
            raise RecastConfigError(
                f"the config of the task at {pretrained_model_name_or_path!r} cannot be used: {error}. Fetch it again."
            ) from error
        if isinstance(config, RecastConfig) and config.record is None:
            numbers = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
            if numbers.is_file():
                what = "does not say what the task's conversion decided (groups, base_fingerprint): it is damaged"
                raise RecastConfigError(f"the config beside {numbers} {what}. Fetch it again.")
        elif isinstance(config, RecastConfig):
            hub_kwargs |= {} if subfolder is None else {"subfolder": subfolder}
            saved = tuple(config.modules_to_save or ())
            config.record = replace(config.record, origin=(str(pretrained_model_name_or_path), hub_kwargs), saved=saved)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read ``adapter_config.json`` (``RecastConfigError`` if it holds none, is too large or nested too deeply)."""
        return read_fields(path_json_file)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as ``adapter_config.json`` holds them: a task's record lies among what was chosen.

        Raises:
            RecastConfigError: naming a field that was set to what JSON does not hold.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "record"}
        values["bank"] = reference_of(self.bank)
        # PEFT's models for a task_type add to them each time that a task is loaded
        values["modules_to_save"] = self.modules_to_save and list(dict.fromkeys(self.modules_to_save))
        values |= {} if self.record is None else to_fields(self.record)
        if self.partners is not None:
            banks = {method: {"bank": reference} for method, reference in self.partner_banks.items()}
            values["partners"] = [{**p.to_dict(), **banks.get(p.method, {})} for p in partners_of(self)]
        if isinstance(values["lora_config"], LoraConfig):
            values["lora_config"] = stored_lora_config(values["lora_config"])
        if self.base_model_name_or_path is None:
            values["base_model_name_or_path"] = hub_repository(self.backbone)
        return writable(values)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` without the fields of RECAST that are None, then call ``AFTER_SAVING``."""
        check_arguments(a_path, save_directory=save_directory)
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        with TemporaryDirectory() as folder:
            super().save_pretrained(folder, **kwargs)
            write_fields(save_directory, _readable(folder))
        for hook in AFTER_SAVING:
            hook(save_directory)

    @property
    def is_stored_task(self) -> bool:
        """Whether the config is of a task that was read from a file, whose record a conversion follows."""
        return self.record is not None and self.record.is_stored

    @property
    def effective_group_size(self) -> int | None:
        """The group size that is used: None if ``num_groups`` decides instead."""
        return None if self.num_groups is not None else 1 if self.num_directions else self.group_size or DEFAULT_GROUP_SIZE

    @property
    def bank_reference(self) -> Reference | None:
        """The stored bank of the coefficients, as the record names it, without a record as it was given."""
        return reference_of(self.bank) if self.record is None else self.record.bank

    def partner(self, method: str) -> Any:
        """The options of one of the task's partners; None if it has none of this kind."""
        return next((p for p in partners_of(self) if p.method == method), None)

    @property
    def partner_banks(self) -> dict[str, Reference]:
        """The stored banks of partners by their methods, as the record names them, without a record as they were given."""
        if self.record is not None:
            return self.record.partner_banks
        return {p.method: p.bank_reference for p in partners_of(self) if p.bank_reference is not None}

    def partner_bank(self, method: str) -> Reference | None:
        """The stored bank of one partner; None if it has none."""
        return self.partner_banks.get(method)

    def as_chosen(self, **fields: Any) -> RecastConfig:
        """A shallow copy without what a conversion decided, for a new task; that of a stored task keeps its record.

        Args:
            fields: other values in the copy, unchecked.
        """
        chosen = copy.copy(self)
        chosen.record = self.record if self.is_stored_task else None
        for name, value in fields.items():
            setattr(chosen, name, value)
        return chosen


def _readable(folder: str) -> dict[str, Any]:
    """The fields that a config was written with, which can be read again: some may have been set since the task was made.

    Raises:
        RecastConfigError: naming the field.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were said when it was made
            RecastConfig.from_pretrained(folder)
    except RecastConfigError as error:
        raise RecastConfigError(
            f"{error}\nThe task's config was changed since it was made (model.peft_config[name]) and could not be read again. "
            "Nothing of it was written: put back what it was."
        ) from error
    return json.loads(Path(folder, CONFIG_NAME).read_text())


def _check_keywords(given: Mapping[str, Any]) -> None:
    """Refuse what is nearly a keyword of ``PeftModel.from_pretrained``, which passes on those that it does not know.

    And a device that is not here, which PEFT asks for when the model is converted already.
    """
    check_is_device(given.get("torch_device"))
    known = signature(PeftModel.from_pretrained).parameters
    for name in given.keys() - known.keys():
        hint = did_you_mean(name, known)
        if hint:
            raise RecastConfigError(f"from_pretrained(..., {name}={shown(given[name])}): there is no such argument{hint}")


def check_again(config: RecastConfig) -> None:
    """Check the fields of a config that is about to be used: they may have been set since it was made.

    Raises:
        RecastConfigError: naming the field and its value.
    """
    if config.is_stored_task:
        return
    record, config.record = config.record, None  # of an earlier use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were said when it was made
            check_config(config)
    finally:
        config.record = record


def checked_config(config: Any) -> RecastConfig:
    """The config that a verb was given; None is ``RecastConfig()``, and what is none is refused (``RecastConfigError``)."""
    if config is not None and not isinstance(config, RecastConfig):
        raise RecastConfigError(f"config is a {type(config).__name__}; a RecastConfig is expected")
    return RecastConfig() if config is None else config


def tasks_among(configs: dict[str, Any]) -> dict[str, RecastConfig]:
    """The RECAST tasks among a model's adapters, by name."""
    return {name: config for name, config in configs.items() if isinstance(config, RecastConfig)}


def layout_of(config: RecastConfig, **fields: Any) -> RecastConfig:
    """A config with the same targets, banks and coefficients, for a task without a head; ``fields`` are set in it."""
    targets = ("target_modules", "target_parameters", "head_module", "num_directions")
    same = (*targets, "groups", "recipes", "keep_base_weights", "base_fingerprint")
    shared = [copy.deepcopy(p) for p in partners_of(config) if p.acts_on == "bias" or not p.is_trained]
    own = {name: copy.deepcopy(getattr(config, name)) for name in same}
    layout = RecastConfig(**{**own, "bank": config.bank_reference, "partners": shared, **fields})
    layout.is_layout = True  # type: ignore[misc]
    if layout.record is not None and config.record is not None:
        layout.record = replace(layout.record, partner_banks=dict(config.record.partner_banks))
    return layout
