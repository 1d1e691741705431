"""RecastConfig: what a RECAST task is, as PEFT stores it."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME

from .banks.files import StoredBank, check_reference
from .composition.coefficient_gradients import AUTO, BFLOAT16, EXACT, is_coefficient_gradient
from .errors import RecastBankError, RecastConfigError
from .mimicry import Fidelity, MimicryMethod, resolve_method
from .options.lora import checked_lora_config, stored_lora_config
from .parts import BiasConfig, PartnerConfig, resolve_partners
from .registration import peft_type

DEFAULT_GROUP_SIZE = 2
BIAS_CHOICES = ("none", "all", "recast_only")
SHARING_CHOICES = ("roles", "blocks", "all")
TARGET_SHORTHANDS = ("all-linear", "all-attention", "all-mlp", "all-conv")


# The settings of the paper by name; on the paper's backbones they give exactly its counts (48, 96, 144 and 168 numbers).
PAPER_SETTINGS: dict[str, dict[str, Any]] = {
    "vit-att": {"target_modules": ["attn.qkv"], "group_size": 2},
    "vit-mlp": {"target_modules": ["mlp.fc1", "mlp.fc2"], "group_size": 2},
    "vit-att+mlp": {"target_modules": ["attn.qkv", "mlp.fc1", "mlp.fc2"], "group_size": 2},
    # one group a stage without its first block, as many templates as the group has blocks
    "resnet": {"target_modules": r"(.*\.)?layer\d+\.[1-9]\d*\.conv[12]", "num_groups": 1},
}
# what write_fields records; forget_written_fields puts back what was given
_WRITTEN = ("groups", "recipes", "base_fingerprint", "bank", "num_coefficient_sets", "coefficient_sharing", "lora_config")


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
            parametric scaling).
        coefficient_sharing: ``"roles"``: the layers of the same place in depth share their offsets across roles (query,
            key, value, ...); ``"blocks"``: the members of a bank share them; ``"all"``: both. None: every layer has its own.
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
            layers in float32 on a processor where it is faster, else the exact one; or a share of the tokens from which it is
            estimated without bias, such as 0.25. It concerns layers with two templates and more, and nothing but training.
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
    num_coefficient_sets: int = field(default=1, metadata={"help": "Coefficient sets that are trained and averaged."})
    mimicry: str | dict[str, Any] | MimicryMethod = field(
        default="closed_form",
        metadata={"help": "How templates and base coefficients are found: a name, or a dictionary with 'method' and options."},
    )
    lora_config: LoraConfig | dict[str, Any] | None = field(
        default=None, metadata={"help": "A low-rank part of the same task: a LoraConfig, or a dictionary of its fields."}
    )
    max_coefficients: int | None = field(
        default=None, metadata={"help": "A budget of coefficients per task that the plan keeps by choosing the sizes."}
    )
    coefficient_sharing: str | None = field(
        default=None, metadata={"help": "Which layers share their offsets: 'roles', 'blocks' or 'all'; None for none."}
    )
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
    coefficient_gradient: str | float = field(
        default=AUTO, metadata={"help": "'auto', 'exact', 'bfloat16', or a share of the tokens to estimate the gradient from."}
    )
    seed: int = field(default=0, metadata={"help": "Seeds whatever is random about the task's start."})
    groups: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Members of every bank by name; written when a task is created."}
    )
    recipes: dict[str, dict[str, list[list[float]]]] | None = field(
        default=None, metadata={"help": "How compressed banks are rebuilt; written when a task is created."}
    )
    base_fingerprint: dict[str, str] | None = field(
        default=None, metadata={"help": "Fingerprint of each target's pretrained weight; written on creation."}
    )
    backbone: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the backbone is found again; written when a task is created."}
    )
    fidelity: dict[str, float] | None = field(
        default=None, metadata={"help": "How well compressed banks reproduce the pretrained weights; written on saving."}
    )
    results: dict[str, Any] | None = field(
        default=None, metadata={"help": "What was measured of the task, by name; shown in its model card."}
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bank":
            value = self._noted_bank(value)
        if name == "partners":
            value = self._with_own_bias_bank(value)
        super().__setattr__(name, value)

    def _with_own_bias_bank(self, value: Any) -> Any:
        """A stored task keeps the bank of biases that it was learned on; a later version of the bank holds that one."""
        old = next((p.bank for p in self.__dict__.get("partners") or () if isinstance(p, BiasConfig)), None)
        wanted = old["fingerprint"] if isinstance(old, dict) and self.__dict__.get("base_fingerprint") is not None else None
        if wanted is None or not isinstance(value, list):
            return value
        partners: list[Any] = []
        for partner in value:
            bank = partner.bank_in_memory if isinstance(partner, BiasConfig) else None
            if bank is not None and bank.at(wanted) is None:
                raise RecastBankError(
                    f"the task was made on another bank of biases\n  bank of the task: {wanted}\n"
                    f"  bank given:       {bank.fingerprint} ({bank.name or 'in memory'})"
                )
            partners.append(partner if bank is None else BiasConfig(bank=bank.at(wanted)))
        return partners

    def _noted_bank(self, value: Any) -> Any:
        """A bank in memory is kept beside the fields: they hold only what is stored with a task."""
        if isinstance(value, StoredBank):
            is_stored_task = self.__dict__.get("base_fingerprint") is not None
            wanted = (self.__dict__.get("bank") or {}).get("fingerprint") if is_stored_task else None
            if wanted not in (None, value.fingerprint):
                raise RecastBankError(
                    f"the task was made on another template bank\n  bank of the task: {wanted}\n"
                    f"  bank given:       {value.fingerprint} ({value.name or 'in memory'})"
                )
            self.__dict__["_bank"] = value
            return value.reference
        value = {"name": value, "fingerprint": None} if isinstance(value, str) else value
        held = self.__dict__.get("_bank")
        if held is not None and (not isinstance(value, dict) or value.get("fingerprint") != held.fingerprint):
            del self.__dict__["_bank"]
        return value

    @property
    def bank_in_memory(self) -> StoredBank | None:
        """The bank that was given as an object."""
        return self.__dict__.get("_bank")

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
        super().__post_init__()
        self.peft_type = peft_type()
        self._check_targets()
        self._check_sizes()
        self._check_choices()
        self._check_lora_config()
        self._check_head()
        self._check_written_fields()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> RecastConfig:
        """Read the config of a saved task from a folder or a repository on the Hub.

        The returned config remembers where it came from, so that the file of coefficients beside it is checked before a
        model is touched.
        """
        config: RecastConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, RecastConfig):
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            if subfolder is not None:
                hub_kwargs["subfolder"] = subfolder
            config.__dict__["_origin"] = (str(pretrained_model_name_or_path), hub_kwargs)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read ``adapter_config.json``; a file that is not a JSON object raises a RecastConfigError."""
        try:
            content = super().from_json_file(path_json_file, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecastConfigError(f"{path_json_file} is not valid JSON: {error}") from error
        except TypeError as error:  # PEFT looks for a key in what may be a bare number
            raise RecastConfigError(f"{path_json_file} holds no JSON object: {error}") from error
        if not isinstance(content, dict):
            raise RecastConfigError(f"{path_json_file} holds a {type(content).__name__}; a JSON object is expected")
        return content

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; of a LoRA part what ``LoraConfig`` needs to give it back."""
        lora, self.__dict__["lora_config"] = self.lora_config, None
        try:
            fields = super().to_dict()
        finally:
            self.__dict__["lora_config"] = lora
        return {**fields, "lora_config": stored_lora_config(lora) if isinstance(lora, LoraConfig) else lora}

    def layout(self, **fields: Any) -> RecastConfig:
        """A config with the same targets, banks and coefficients, for a task without a head; ``fields`` are set in it."""
        same = ("target_modules", "groups", "recipes", "bank", "keep_base_weights", "head_module", "base_fingerprint")
        biases = [copy.deepcopy(p) for p in self.partners or () if isinstance(p, BiasConfig)]
        return RecastConfig(**{**{name: copy.deepcopy(getattr(self, name)) for name in same}, "partners": biases, **fields})

    @property
    def effective_group_size(self) -> int | None:
        """The group size in force: None if ``num_groups`` decides instead."""
        return None if self.num_groups is not None else (self.group_size or DEFAULT_GROUP_SIZE)

    def write_fields(
        self,
        groups: dict[str, list[str]],
        recipes: dict[str, dict[str, list[list[float]]]],
        fingerprint: dict[str, str],
        bank: dict[str, str | None] | None = None,
        num_coefficient_sets: int | None = None,
        coefficient_sharing: str | None = None,
        lora_config: LoraConfig | None = None,
    ) -> None:
        """Record what a conversion decided, so that it is stored with the task."""
        if "_given" not in self.__dict__:
            self.__dict__["_given"] = {name: getattr(self, name) for name in _WRITTEN}
        self.groups, self.recipes, self.base_fingerprint = groups, recipes or None, fingerprint
        self.bank = None if bank is None else dict(bank)
        self.num_coefficient_sets = num_coefficient_sets or self.num_coefficient_sets
        self.coefficient_sharing = coefficient_sharing
        self.lora_config = lora_config

    def write_backbone(self, description: dict[str, Any] | None) -> None:
        """Record how the backbone is found again, unless that was given or read from a file."""
        if self.backbone is None or self.__dict__.get("_backbone_written"):
            self.backbone, self._backbone_written = description, True

    def write_fidelity(self, measured: Iterable[Fidelity]) -> None:
        """Record how well compressed banks reproduce their members, where that was measured."""
        each = list(measured)
        if each:
            cosines = [fidelity.cosine for fidelity in each]
            self.fidelity = {
                "mean_cosine": sum(cosines) / len(cosines),
                "worst_cosine": min(cosines),
                "mean_relative_error": sum(fidelity.relative_error for fidelity in each) / len(each),
            }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and, where the task's numbers lie beside it, the model card.

        PEFT calls this last when it saves a model, so that every way of saving a task writes its card.
        """
        from .hub.backbone import hub_repository  # these stand above config
        from .hub.cards import write_model_card
        from .hub.task_files import has_task_numbers

        if self.base_model_name_or_path is None:
            self.base_model_name_or_path = hub_repository(self.backbone)
        super().save_pretrained(save_directory, **kwargs)
        self._leave_out_unset(os.path.join(save_directory, CONFIG_NAME))
        if has_task_numbers(save_directory):
            write_model_card(save_directory)

    def _leave_out_unset(self, path: str) -> None:
        """Take fields of ours that are None out of a written config: names without a value would outweigh a task's numbers."""
        own = set(RecastConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        kept = {name: value for name, value in content.items() if value is not None or name not in own}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=2, sort_keys=True)

    def forget_written_fields(self) -> None:
        """Drop what an earlier conversion recorded: a config object that is used again describes a new task.

        What was given to the constructor, or read from a file, stays.
        """
        for name, value in self.__dict__.pop("_given", {}).items():
            self.__dict__[name] = value
        if self.__dict__.pop("_backbone_written", False):
            self.backbone = self.fidelity = None

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            self._check_names(name)
        if self.target_modules is not None and not self.target_modules:
            raise self._bad("target_modules", "at least one name; None chooses by itself")
        for name in ("target_modules", "exclude_modules"):
            try:
                re.compile(pattern if isinstance(pattern := getattr(self, name), str) else "")
            except re.error as error:
                raise self._bad(name, f"names in a list, or a regular expression, which this is not: {error}") from error
        indices = self.layers_to_transform
        if indices is not None:
            listed: Any = [indices] if _is_int(indices) else indices
            if not isinstance(listed, (list, tuple, range)) or not all(_is_int(i) and i >= 0 for i in listed):
                raise self._bad("layers_to_transform", "a layer index, or a list of them, counted from 0")
            self.layers_to_transform = indices if isinstance(indices, int) else list(listed)
        elif self.layers_pattern is not None:
            raise self._bad("layers_pattern", "None, since layers_to_transform is None")

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str) and value and name != "modules_to_save":
            return
        if value is None:
            return
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) for v in value):
            what = "a list of names or None" if name == "modules_to_save" else "a string, a list of strings or None"
            raise self._bad(name, what)
        # an order that comes from a set would differ from run to run
        setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))

    def _check_sizes(self) -> None:
        for name in ("group_size", "num_groups", "num_templates", "max_coefficients"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise self._bad(name, "a whole number of at least 1, or None")
        if not _is_int(self.num_coefficient_sets) or self.num_coefficient_sets < 1:
            raise self._bad("num_coefficient_sets", "a whole number of at least 1")
        if not _is_int(self.seed):
            raise self._bad("seed", "a whole number")
        if self.group_size is not None and self.num_groups is not None:
            raise RecastConfigError(
                f"group_size={self.group_size} and num_groups={self.num_groups} were both given; give one of them"
            )
        size = self.effective_group_size
        if self.num_templates is not None and size is not None and self.num_templates > size and self.groups is None:
            raise RecastConfigError(
                f"num_templates={self.num_templates} is above the group's size\n  group_size: {size}\n"
                "More templates than layers describe nothing that the layers' own weights do not: "
                "give a larger group_size or fewer num_templates."
            )

    def _check_choices(self) -> None:
        if self.bias not in BIAS_CHOICES:
            raise self._bad("bias", f"one of {', '.join(BIAS_CHOICES)}")
        for name in ("init_weights", "keep_base_weights", "inference_mode", "train_coefficients"):
            if not isinstance(getattr(self, name), bool):
                raise self._bad(name, "True or False")
        if not is_coefficient_gradient(self.coefficient_gradient):
            raise self._bad("coefficient_gradient", f"{AUTO!r}, {EXACT!r}, {BFLOAT16!r}, or a share above 0 and below 1")
        if self.partners is not None:
            self.partners = resolve_partners(self.partners) or None  # type: ignore[assignment]
        method = resolve_method(self.mimicry)
        if not isinstance(self.mimicry, str):
            self.mimicry = method.to_dict()
        if self.coefficient_sharing is not None and self.coefficient_sharing not in SHARING_CHOICES:
            raise self._bad("coefficient_sharing", f"None, or one of {', '.join(SHARING_CHOICES)}")
        wrong = None if self.bank is None else check_reference(self.bank)
        if wrong is not None:
            raise self._bad("bank", wrong)

    def _check_lora_config(self) -> None:
        if self.lora_config is None:
            return
        try:
            self.lora_config = checked_lora_config(self.lora_config, self.task_type)
        except ValueError as error:
            raise RecastConfigError(f"RecastConfig(lora_config=...): expected {error}") from error

    def _check_head(self) -> None:
        if self.id2label is not None:
            self.id2label = self._checked_labels()
            if self.num_classes is None:
                self.num_classes = len(self.id2label)
        if self.num_classes is not None:
            if not _is_int(self.num_classes) or self.num_classes < 1:
                raise self._bad("num_classes", "a whole number of at least 1, or None")
            if self.id2label is not None and set(self.id2label) != set(range(self.num_classes)):
                raise RecastConfigError(
                    f"id2label must name every class once\n  num_classes: {self.num_classes}\n"
                    f"  numbers in id2label: {sorted(self.id2label)[:10]}"
                )
        for name, choices in (
            ("head_init", ("fresh", "copy")),
            ("head_type", ("linear", "prototypes")),
            ("head_dtype", (None, "float16", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise self._bad(name, f"one of {', '.join(map(repr, choices))}")
        if self.head_module is not None and not isinstance(self.head_module, str):
            raise self._bad("head_module", "the name of a module, or None")
        if not isinstance(self.train_norms, bool):
            raise self._bad("train_norms", "True or False")

    def _checked_labels(self) -> dict[int, str]:
        labels: Any = self.id2label
        # JSON turns the numbers into strings
        if not isinstance(labels, dict) or not all(_is_int(key) or str(key).isdecimal() for key in labels):
            raise self._bad("id2label", "a dictionary from class numbers to names")
        return {int(key): str(value) for key, value in labels.items()}

    def _check_written_fields(self) -> None:
        if self.groups is not None:
            if not isinstance(self.groups, dict) or not self.groups:
                raise self._bad("groups", "a dictionary from bank names to lists of module names")
            seen: set[str] = set()
            for bank, members in self.groups.items():
                if not isinstance(members, (list, tuple)) or not members or not all(isinstance(m, str) for m in members):
                    raise RecastConfigError(f"groups[{bank!r}]={members!r}: a list of module names is expected")
                double = seen.intersection(members)
                if double or len(set(members)) < len(members):
                    raise RecastConfigError(f"groups[{bank!r}] names a module twice: {sorted(double) or members}")
                seen.update(members)
            self.groups = {str(bank): list(members) for bank, members in self.groups.items()}
        if self.recipes is not None:
            if not isinstance(self.recipes, dict):
                raise self._bad("recipes", "a dictionary from bank names to recipes")
            for bank, recipe in self.recipes.items():
                self._check_recipe(bank, recipe)
        if self.base_fingerprint is not None and (
            not isinstance(self.base_fingerprint, dict) or not all(isinstance(v, str) for v in self.base_fingerprint.values())
        ):
            raise self._bad("base_fingerprint", "a dictionary from module names to fingerprints")
        self._check_descriptions()

    def _check_descriptions(self) -> None:
        if self.backbone is not None and not (
            isinstance(self.backbone, dict) and isinstance(self.backbone.get("library"), str)
        ):
            raise self._bad("backbone", "a dictionary with the name of the 'library' and what it builds the model from")
        if self.fidelity is not None and not (isinstance(self.fidelity, dict) and all(map(_is_number, self.fidelity.values()))):
            raise self._bad("fidelity", "a dictionary from names to finite numbers")
        if self.results is not None and not isinstance(self.results, dict):
            raise self._bad("results", "a dictionary from names to values")

    def _check_recipe(self, bank: str, recipe: Any) -> None:
        members = (self.groups or {}).get(bank)
        if members is None:
            raise RecastConfigError(f"recipes[{bank!r}]: there is no such bank in groups")
        if not isinstance(recipe, dict) or set(recipe) != {"mix", "base"}:
            raise RecastConfigError(f"recipes[{bank!r}]={recipe!r}: a dictionary with 'mix' and 'base' is expected")
        layers, templates = len(members), len(recipe["mix"]) if isinstance(recipe["mix"], list) else 0
        for key, rows, columns in (("mix", templates, layers), ("base", layers, templates)):
            matrix = recipe[key]
            if not (
                isinstance(matrix, list)
                and len(matrix) == rows >= 1
                and all(isinstance(row, list) and len(row) == columns and all(map(_is_number, row)) for row in matrix)
            ):
                raise RecastConfigError(
                    f"recipes[{bank!r}][{key!r}]: {rows} rows of {columns} finite numbers are expected, got {matrix!r}"
                )

    def _bad(self, name: str, expected: str) -> RecastConfigError:
        return RecastConfigError(f"RecastConfig({name}={getattr(self, name)!r}): expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
