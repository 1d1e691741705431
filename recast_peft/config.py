"""RecastConfig: what a user chooses for a RECAST task, and the record of what a conversion decided, as PEFT stores them."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .banks.files import StoredBank
from .composition.coefficient_gradients import AUTO
from .errors import RecastConfigError
from .mimicry import MimicryMethod, resolve_method
from .options.checks import check_config
from .options.lora import stored_lora_config
from .options.partner import PartnerConfig
from .options.record import AFTER_SAVING, Reference, TaskRecord, decided, from_fields, hub_repository, reference_of, to_fields
from .registration import peft_type
from .storage.atomic import write_json
from .storage.json_reader import parse_json
from .storage.pairs import read_companion

DEFAULT_GROUP_SIZE = 2
TARGET_SHORTHANDS = ("all-linear", "all-attention", "all-mlp", "all-conv")

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
    """Configuration of one RECAST task.

    Args:
        target_modules: which modules are composed from templates: a list of names, a regular expression that matches whole
            names, or one of ``"all-linear"``, ``"all-attention"``, ``"all-mlp"``, ``"all-conv"``. None takes of
            a transformer the layers of its feed-forward blocks (its attention projections where it has none), else the
            convolutions, else the linear layers. Neither None nor a shorthand picks a classifier head.
        exclude_modules: names, or a regular expression, of modules to leave out.
        layers_to_transform: restrict the targets to these layer indices.
        layers_pattern: the name of the module list that ``layers_to_transform`` counts in.
        modules_to_save: further modules that are trained and stored whole with the task, such as a classifier.
        bias: ``"none"``, ``"all"`` or ``"recast_only"``: which biases are trained and stored with the task.
        init_weights: True starts at the pretrained weights (all offsets zero); False at random
            offsets of size 0.1 to 0.2, drawn by a generator that ``seed`` and the task's name seed, and a LoRA part at
            random too (meant for tests).
        group_size: how many consecutive layers of one role and shape share a bank (2 unless ``num_groups`` is given). A
            remainder makes a smaller group; a lone layer has a bank of its own with one template.
        num_groups: instead of ``group_size``: into how many groups the layers of each role and shape are divided.
        num_templates: templates in a bank. None takes as many as the group has layers: the pretrained weights themselves
            are the templates and nothing is approximated. Fewer compress the model.
        num_coefficient_sets: how many coefficient sets are trained and averaged (K of the paper, section 3.1).
        mimicry: the method that finds templates and base coefficients (paper, section 3.2): a name, ``{"method": name,
            option: value, ...}``, or the options object itself (``Gradient(steps=500)``), which is stored as a dictionary.
        lora_config: a low-rank part of the same task: a ``LoraConfig``, or a dictionary of its fields. Its ``target_modules``
            may differ from RECAST's; None takes the same. ``bias``, ``modules_to_save``, ``task_type`` and
            ``inference_mode`` are given here, for both parts.
        max_coefficients: a budget of coefficients per task (heads, biases and a LoRA part aside), which the plan keeps by
            choosing what of ``group_size``, ``num_coefficient_sets`` and ``coefficient_sharing`` is not given (the paper's
            parametric scaling). None keeps to 48 where none of these, ``num_groups`` and ``num_templates`` is given: on large
            models by groups of one layer, and offsets that consecutive layers share.
        coefficient_sharing: ``"roles"``: the layers of the same place in depth share their offsets across roles (query,
            key, value, ...); ``"blocks"``: the members of a bank share them; ``"all"``: both; a number: so many
            consecutive banks of a role share them. None: every layer has its own.
        bank: a stored template bank to use: a ``StoredBank``, the name of a bank file (a folder or a repository), or
            ``{"name": ..., "fingerprint": ...}``, which is what a task stores. Its groups are used as they are.
        keep_base_weights: keep the pretrained weights beside a compressed bank, so that disabling or unloading the task
            gives the pretrained model instead of its compressed form.
        num_classes: gives the task a classifier of its own with this many classes; None leaves the model's alone.
        id2label: names of the classes by number; stands for ``num_classes`` too.
        head_module: the name of the classifier, where timm's and transformers' conventions do not tell.
        head_init: ``"fresh"``, or ``"copy"`` to start at the model's own classifier of the same size.
        head_type: ``"linear"`` (trained), or ``"prototypes"``: nearest class mean, filled by ``fit_prototypes``.
        head_dtype: store the classifier in ``"float16"`` or ``"bfloat16"``; None stores it as it is trained.
        train_norms: the task owns all normalisation layers, parameters and running statistics. Otherwise they stay the
            pretrained model's, and running statistics do not move while a task is trained.
        partners: what the task trains beside its coefficients: ``AdaptFormerConfig``, ``CLRConfig``, ``PiggybackConfig``, each
            as an object, a name or a dictionary.
        train_coefficients: False leaves the coefficients at zero, so that the task trains its partners, head and norms alone.
        coefficient_gradient: how training forms the gradient of the coefficients: ``"exact"``; ``"bfloat16"``: the product that
            only they need is formed in bfloat16, which is faster where the hardware has such products; ``"auto"``: that for
            layers in float32 on a processor where it is faster, else the exact one. It concerns layers with two templates and
            more, and nothing but training.
        seed: seeds whatever is random about the task's start.
        groups: written when a task is created: the members of every bank by name. Given, they are used as they are.
        recipes: written when a task is created: for every compressed bank ``{"mix": (templates, layers), "base": (layers,
            templates)}``, from which the bank is rebuilt out of the pretrained weights.
        base_fingerprint: written when a task is created: a fingerprint of the pretrained weight of each target module.
        backbone: written when a task is created: how its timm or transformers model is found again (library, name,
            revision, class, input size, number of classes, ...); see ``AutoRecastModel``.
        fidelity: written when a task on compressed banks is saved: how well they reproduce the pretrained weights.
        results: what was measured of the task, by name, such as ``{"accuracy": 0.93}``: stored with it and shown in its
            model card.

    Raises:
        RecastConfigError: naming the field and its value, if a value cannot be used.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, a regular expression, or 'all-linear', 'all-attention', 'all-mlp', 'all-conv'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Restrict the targets to these layer indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and stored whole with the task."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases are trained: 'none', 'all' or 'recast_only'."})
    init_weights: bool = field(
        default=True, metadata={"help": "True starts at the pretrained weights; False at random offsets (for tests)."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Consecutive layers that share a bank (2 unless num_groups is given)."}
    )
    num_groups: int | None = field(
        default=None, metadata={"help": "Instead of group_size: groups for the layers of each role and shape."}
    )
    num_templates: int | None = field(
        default=None, metadata={"help": "Templates in a bank; None is as many as the group has layers, which is exact."}
    )
    num_coefficient_sets: int = decided(1)
    mimicry: str | dict[str, Any] | MimicryMethod = field(
        default="closed_form",
        metadata={"help": "How templates and base coefficients are found: a name, or a dictionary with 'method' and options."},
    )
    lora_config: LoraConfig | dict[str, Any] | None = decided()
    max_coefficients: int | None = field(
        default=None, metadata={"help": "A budget of coefficients per task that the plan keeps by choosing the sizes."}
    )
    coefficient_sharing: str | int | None = decided()
    bank: dict[str, str | None] | str | StoredBank | None = field(
        default=None, metadata={"help": "A stored template bank: its name, or {'name': ..., 'fingerprint': ...}."}
    )
    keep_base_weights: bool = field(default=False, metadata={"help": "Keep the pretrained weights beside a compressed bank."})
    num_classes: int | None = field(default=None, metadata={"help": "Classes of the task's own classifier."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Names of the task's classes by number."})
    head_module: str | None = field(default=None, metadata={"help": "Name of the classifier, if it is not found."})
    head_init: str = field(default="fresh", metadata={"help": "'fresh', or 'copy' of the model's own classifier."})
    head_type: str = field(default="linear", metadata={"help": "'linear', or 'prototypes' (nearest class mean)."})
    head_dtype: str | None = field(default=None, metadata={"help": "Store the classifier in 'float16' or 'bfloat16'."})
    train_norms: bool = field(default=False, metadata={"help": "The task owns all normalisation layers."})
    partners: list[PartnerConfig | dict[str, Any] | str] | None = field(
        default=None, metadata={"help": "What the task trains beside its coefficients, such as [AdaptFormerConfig()]."}
    )
    train_coefficients: bool = field(default=True, metadata={"help": "False leaves the coefficients at zero."})
    coefficient_gradient: str = field(
        default=AUTO, metadata={"help": "How gradients of coefficients are formed: 'auto', 'exact' or 'bfloat16'."}
    )
    seed: int = field(default=0, metadata={"help": "Seeds whatever is random about the task's start."})
    groups: dict[str, list[str]] | None = decided()
    recipes: dict[str, dict[str, list[list[float]]]] | None = decided()
    base_fingerprint: dict[str, str] | None = decided()
    backbone: dict[str, Any] | None = decided()
    fidelity: dict[str, float] | None = decided()
    results: dict[str, Any] | None = field(
        default=None, metadata={"help": "What was measured of the task, by name; shown in its model card."}
    )

    record: TaskRecord | None = field(default=None, init=False, repr=False, compare=False)

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
        try:
            super().__post_init__()
        except RecastConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise RecastConfigError(f"RecastConfig(task_type={self.task_type!r:.200}): {error}") from error
        self.peft_type = peft_type()
        check_config(self)
        self.record = from_fields(
            {f.name: getattr(self, f.name) for f in fields(self)},
            {p.method: p.bank_reference for p in self.partners or () if p.bank_reference is not None},  # type: ignore
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> RecastConfig:
        """Read the config of a saved task from a folder or a repository on the Hub.

        The record of the returned config says where it came from, so that the file of coefficients beside it is checked before
        a model is touched.
        """
        config: RecastConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, RecastConfig) and config.record is not None:
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            if subfolder is not None:
                hub_kwargs["subfolder"] = subfolder
            config.record = replace(config.record, origin=(str(pretrained_model_name_or_path), hub_kwargs))
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read ``adapter_config.json``; a file that is not a JSON object raises a RecastConfigError."""
        path = Path(path_json_file)
        try:
            content = read_companion(path.with_name(SAFETENSORS_WEIGHTS_NAME), path)
        except OSError as error:
            raise RecastConfigError(f"{path} cannot be read: {error.strerror or error}") from error
        values = dict(parse_json(content, str(path), error=RecastConfigError))
        values.pop("runtime_config", None)  # as in PEFT
        return values

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as ``adapter_config.json`` holds them: a task's record lies among what was chosen."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "record"}
        values["bank"] = reference_of(self.bank)
        banks: dict[str, Reference] = {}
        if self.record is not None:
            values.update(to_fields(self.record))
            banks = self.record.partner_banks
        if self.partners is not None:
            stored = [partner.to_dict() for partner in self.partners]  # type: ignore[union-attr]
            values["partners"] = [{**p, **({"bank": banks[p["method"]]} if p["method"] in banks else {})} for p in stored]
        if isinstance(values["lora_config"], LoraConfig):
            values["lora_config"] = stored_lora_config(values["lora_config"])
        if self.base_model_name_or_path is None:
            values["base_model_name_or_path"] = hub_repository(self.backbone)
        return copy.deepcopy(values)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; fields of RECAST that are None are left out of it.

        PEFT calls this last when it saves a model. ``options.record.AFTER_SAVING`` is called with the folder then, which writes
        the model card where a task's numbers lie beside the config.
        """
        with TemporaryDirectory() as folder:
            super().save_pretrained(folder, **kwargs)
            content = json.loads(Path(folder, CONFIG_NAME).read_text())
        own = {f.name for f in fields(RecastConfig)} - {f.name for f in fields(PeftConfig)}
        # names without a value would outweigh a task's numbers
        kept = {name: value for name, value in content.items() if value is not None or name not in own}
        write_json(Path(save_directory, CONFIG_NAME), kept, sort_keys=True)
        for hook in AFTER_SAVING:
            hook(save_directory)

    @property
    def is_stored_task(self) -> bool:
        """Whether the config is of a task that was read from a file, whose record a conversion follows."""
        return self.record is not None and self.record.is_stored

    @property
    def effective_group_size(self) -> int | None:
        """The group size that is used: None if ``num_groups`` decides instead."""
        return None if self.num_groups is not None else (self.group_size or DEFAULT_GROUP_SIZE)

    @property
    def bank_reference(self) -> Reference | None:
        """The stored bank of the coefficients, as the record names it, without a record as it was given."""
        return reference_of(self.bank) if self.record is None else self.record.bank

    def partner_bank(self, method: str) -> Reference | None:
        """The stored bank of a partner, as the record names it, without a record as it was given."""
        given = next((p.bank_reference for p in self.partners or () if p.method == method), None)  # type: ignore[union-attr]
        return given if self.record is None else self.record.partner_banks.get(method)

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

    def layout(self, **fields: Any) -> RecastConfig:
        """A config with the same targets, banks and coefficients, for a task without a head; ``fields`` are set in it."""
        same = ("target_modules", "groups", "recipes", "keep_base_weights", "head_module", "base_fingerprint")
        biases = [copy.deepcopy(p) for p in self.partners or () if isinstance(p, PartnerConfig) and p.acts_on == "bias"]
        own = {name: copy.deepcopy(getattr(self, name)) for name in same}
        config = RecastConfig(**{**own, "bank": self.bank_reference, "partners": biases, **fields})
        if config.record is not None and self.record is not None:
            config.record = replace(config.record, partner_banks=dict(self.record.partner_banks))
        return config
