"""Which modules a config means."""

from __future__ import annotations

import difflib
import re
import warnings

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..config import RecastConfig
from ..errors import RecastTargetError
from ..names import ends_in, lies_in
from ..validation import did_you_mean, listed
from .candidates import Candidate, find_candidates
from .heads import head_names, named_head
from .roles import SHORTHANDS, default_shorthands, in_shape, is_convolution, is_linear, is_minor_convolution


def find_targets(model: nn.Module, config: RecastConfig) -> tuple[list[Candidate], dict[str, str]]:
    """The modules that a config means: its ``groups`` by name if given, else ``target_modules`` and what restricts it.

    Returns:
        the targets in the order of their definition, and for each module that matched but was left out the reason; where the
        config names no targets, for each linear layer and convolution that is none.

    Raises:
        RecastTargetError: if nothing matches, or a module that was asked for by name is not there or cannot be a target.
    """
    candidates = find_candidates(model, config.target_parameters or ())
    if config.groups is not None:
        return _by_name(candidates, [m for members in config.groups.values() for m in members]), {}
    head = named_head(model, config.head_module)
    _warn_of_exclusions(candidates, config.exclude_modules)
    heads = head_names(model, head)
    if config.target_parameters is not None:
        targets, skipped = _with_parameters(candidates, config, heads)
    else:
        targets, skipped = _by_module(candidates, config, heads)
    if not targets:
        raise _nothing_matches(candidates, config, skipped)
    return targets, skipped


def _warn_of_exclusions(candidates: list[Candidate], excluded: list[str] | str | None) -> None:
    """Say so where a name in ``exclude_modules`` leaves nothing out."""
    names = [name for c in candidates if c.weight_name is not None or c.reason is not None for name in c.names]
    idle = [excluded] if isinstance(excluded, str) and not any(re.fullmatch(excluded, name) for name in names) else []
    if not isinstance(excluded, str):
        idle = [one for one in excluded or () if not any(ends_in(name, [one]) for name in names)]
    if idle:
        warnings.warn(
            f"exclude_modules: nothing is left out by {', '.join(map(repr, idle))}{did_you_mean(idle[0], names)}\nA name in a "
            "list means the modules that are called so, not what lies in them; a regular expression means whole names.",
            stacklevel=2,
        )


def _by_module(candidates: list[Candidate], config: RecastConfig, heads: set[str]) -> tuple[list[Candidate], dict[str, str]]:
    if config.target_modules is None or (isinstance(config.target_modules, str) and config.target_modules in SHORTHANDS):
        return _by_shorthand(candidates, config, heads)
    return _by_pattern(candidates, config)


def _with_parameters(
    candidates: list[Candidate], config: RecastConfig, heads: set[str]
) -> tuple[list[Candidate], dict[str, str]]:
    """The modules whose parameters were named, and those that ``target_modules`` names beside them."""
    wanted = config.target_parameters or []
    names = {f"{name}.{key}": c for c in candidates for name in c.names for key in c.module._parameters}
    unknown = [name for name in wanted if not any(ends_in(known, [name]) for known in names)]
    if unknown:
        near = sorted({hit for name in unknown for hit in difflib.get_close_matches(name, names, n=3, cutoff=0.3)})
        raise RecastTargetError(
            f"the model has no parameter called {' or '.join(map(repr, unknown))}\n  target_parameters: {wanted}\n"
            f"  near: {', '.join(near) or 'none'}"
        )
    named = [c for known, c in names.items() if ends_in(known, wanted)]
    chosen = {c.name for c in named if _is_kept(config, c)}
    if refused := {c.name: c.reason for c in named if c.name in chosen and c.reason is not None}:
        raise _cannot_be_targets(refused)
    skipped: dict[str, str] = {}
    if config.target_modules is not None:
        others, skipped = _by_module(candidates, config, heads)
        chosen.update(c.name for c in others)
    return [c for c in candidates if c.name in chosen], skipped


def _by_name(candidates: list[Candidate], names: list[str]) -> list[Candidate]:
    known = {c.name: c for c in candidates}
    missing = [name for name in names if name not in known]
    if missing:
        near = {m: difflib.get_close_matches(m, known, n=2) for m in missing[:3]}
        hints = "; ".join(f"{m!r}: near {n}" if n else f"{m!r}: nothing near" for m, n in near.items())
        raise RecastTargetError(
            f"the task names {len(missing)} of {len(names)} target modules that this model does not have ({hints}). "
            "Load the task on the architecture that it was made for. If its modules have other names here, say which: "
            "AutoRecastModel.from_pretrained(task, backbone=model, key_mapping={old: new})."
        )
    refused = {name: known[name].reason or "it has no weight of its own" for name in names if not _usable(known[name])}
    if refused:
        raise _cannot_be_targets(refused)
    wanted = set(names)
    return [c for c in candidates if c.name in wanted]


def _by_pattern(candidates: list[Candidate], config: RecastConfig) -> tuple[list[Candidate], dict[str, str]]:
    _check_every_name(candidates, config)
    matched = [c for c in candidates if any(_is_meant(config, name) for name in c.names) and not _left_out(config, *c.names)]
    # a multi-head attention module stands for both of its projections
    projections = {f"{c.name}.out_proj" for c in matched if isinstance(c.module, nn.MultiheadAttention)}
    further = projections.difference(c.name for c in matched)
    matched += [c for c in candidates if c.name in further and not _left_out(config, c.name)]
    skipped, refused = {}, {}
    for candidate in matched:
        if any(lies_in(name, [config.head_module or name + "."]) for name in candidate.names):
            skipped[candidate.name] = f"it belongs to the classifier, head_module={config.head_module!r}"
        elif candidate.weight_name is None:
            skipped[candidate.name] = candidate.reason or f"{type(candidate.module).__name__} has no weight of its own"
        elif candidate.reason is not None:
            refused[candidate.name] = candidate.reason
    if refused:
        raise _cannot_be_targets(refused)
    chosen = {c.name for c in matched} - skipped.keys()
    return [c for c in candidates if c.name in chosen and _usable(c)], skipped


def _check_every_name(candidates: list[Candidate], config: RecastConfig) -> None:
    """Refuse a list with a name that no module has, beside others that are right."""
    wanted = config.target_modules
    if not isinstance(wanted, list):
        return
    unknown = [name for name in wanted if not any(ends_in(one, [name]) for c in candidates for one in c.names)]
    if unknown and len(unknown) < len(wanted):
        known = sorted({known for c in candidates if _usable(c) for known in (c.name, c.name.rpartition(".")[2])})
        near = [hit for name in unknown for hit in difflib.get_close_matches(name, known, n=3)]
        hint = f"\n  near: {', '.join(near)}" if near else ""
        raise RecastTargetError(
            f"the model has no module called {' or '.join(map(repr, unknown))}\n  target_modules: {wanted}{hint}\n"
            f"Correct the name, or leave it out. {_about_shorthands()}"
        )


def _by_shorthand(candidates: list[Candidate], config: RecastConfig, heads: set[str]) -> tuple[list[Candidate], dict[str, str]]:
    skipped: dict[str, str] = {}
    for shorthand in [str(config.target_modules)] if config.target_modules else default_shorthands(candidates):
        matched = [c for c in candidates if in_shape(c) and SHORTHANDS[shorthand](c)]
        if config.target_modules is None and shorthand == "all-conv" and all(map(is_minor_convolution, matched)):
            continue  # a patch embedding, or the short filters of a state space model, make no convolutional network
        reasons = {c.name: _why_left_out(c, config, heads) for c in matched}
        skipped.update({name: reason for name, reason in reasons.items() if reason is not None})
        targets = [c for c in matched if reasons[c.name] is None]
        if targets:
            rest = [c for c in candidates if c.name not in reasons and c.name not in skipped]
            skipped.update({c.name: c.reason for c in rest if c.weight_name is None and c.reason is not None})
            if config.target_modules is None:
                other = f"of another kind than the default targets of this model, {shorthand!r}"
                skipped.update({c.name: other for c in rest if in_shape(c) and (is_linear(c) or is_convolution(c))})
            return targets, skipped
    return [], skipped


def _why_left_out(candidate: Candidate, config: RecastConfig, heads: set[str]) -> str | None:
    """Why a module that was chosen by its kind is no target all the same; None if it is one."""
    head = next((name for name in sorted(heads) if lies_in(candidate.name, [name])), None)
    if head is not None:
        return f"it belongs to the head {head!r}"
    if not _is_kept(config, candidate):
        return "the config leaves it out (exclude_modules, layers_to_transform)"
    return candidate.reason


def _is_meant(config: RecastConfig, name: str) -> bool:
    """PEFT's rule; but it sees no layer index in a list that lies in no other module, such as ``blocks.0.attn.qkv``, and none
    for a regular expression.
    """
    first = re.match(r"([^.]+)\.\d+\.", name)
    if first and config.layers_to_transform is not None and not config.layers_pattern:
        config = config.as_chosen(layers_pattern=[first.group(1)])
    return _matches(config, name) and not (isinstance(config.target_modules, str) and not _is_in_layers(config, name))


def _is_kept(config: RecastConfig, candidate: Candidate) -> bool:
    """Whether a module that was chosen by its kind stays, for all that the config leaves out."""
    return any(_is_in_layers(config, name) for name in candidate.names) and not _left_out(config, *candidate.names)


def _is_in_layers(config: RecastConfig, name: str) -> bool:
    if "." not in name:
        return config.layers_to_transform is None
    # the last part alone: for a whole name PEFT would not look at the layer's index
    return _is_meant(config.as_chosen(target_modules=[name.rpartition(".")[2]]), name)


def _left_out(config: RecastConfig, *names: str) -> bool:
    """Whether the config leaves a module out, by one of its names."""
    return not all(_matches(config.as_chosen(target_modules=[name]), name) for name in names)


def _matches(config: RecastConfig, name: str) -> bool:
    """PEFT's rule, which takes names of modules that are saved whole for regular expressions."""
    saved = [re.escape(module) for module in config.modules_to_save or ()]
    return bool(check_target_module_exists(config.as_chosen(modules_to_save=saved), name))


def _usable(candidate: Candidate) -> bool:
    return candidate.weight_name is not None and candidate.reason is None


def _cannot_be_targets(refused: dict[str, str]) -> RecastTargetError:
    shown = "\n".join(f"  {name}: {reason}" for name, reason in list(refused.items())[:8])
    more = f"\n  ... and {len(refused) - 8} more" if len(refused) > 8 else ""
    return RecastTargetError(
        f"{len(refused)} of the modules that target_modules names cannot be composed from templates:\n{shown}{more}\n"
        "Leave them out with exclude_modules, or name the modules that are meant."
    )


def _about_shorthands() -> str:
    known = ", ".join(SHORTHANDS)
    return f"Shorthands ({known}) are given alone, not in a list; any other string is a regular expression for whole names."


def _nothing_matches(candidates: list[Candidate], config: RecastConfig, skipped: dict[str, str]) -> RecastTargetError:
    supported = [c for c in candidates if _usable(c)]
    leaves = sorted({c.name.rpartition(".")[2] for c in supported})
    wanted = config.target_modules
    names = [wanted] if isinstance(wanted, str) else list(wanted or [])
    known = [*leaves, *SHORTHANDS, *(c.name for c in supported)]
    near = sorted({hit for n in names for hit in difflib.get_close_matches(n, known, n=3)} - set(names))
    message = f"Target modules {wanted!r} not found in the base model, or all of them were left out."
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        if getattr(config, name):
            message += f" Note: {name}={getattr(config, name)!r}."
    if skipped:
        message += "\nMatched but not usable: " + "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:5])
    if near:
        message += f"\nNear: {', '.join(near)}"
    if isinstance(wanted, str) and wanted in SHORTHANDS:
        others = [name for name, fits in SHORTHANDS.items() if any(in_shape(c) and fits(c) for c in supported)]
        message += f"\nShorthands that fit layers of this model: {', '.join(others) or 'none'}"
    elif wanted is not None:
        message += f"\n{_about_shorthands()}"
    return RecastTargetError(f"{message}\nThe model has these modules that can be targets: {listed(leaves, 40) or 'none'}")
