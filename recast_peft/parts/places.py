"""Where a partner stands in a model: at the modules that its options name, or where its paper puts it."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from peft.tuners.tuners_utils import check_target_module_exists

from ..errors import RecastTargetError
from ..names import lies_in, outermost
from ..options.partner import PartnerConfig
from ..planning.candidates import Candidate
from ..planning.roles import SHORTHANDS


def places_of(
    partner: PartnerConfig, candidates: list[Candidate], heads: set[str], targets: Collection[str]
) -> list[Candidate]:
    """The modules that a partner takes: without a choice by name those of its paper or a shorthand, outside of the heads.

    Raises:
        RecastTargetError: if it cannot stand at one that was named, or there is none.
    """
    wanted = partner.target_modules
    outside = (c for c in candidates if (not lies_in(c.name, heads) or c.name in targets) and partner.refusal(c) is None)
    if wanted is None:
        possible = {c.name: c for c in outside if partner.is_default_place(c, targets)}
        chosen = [possible[name] for name in outermost(possible)]
    elif isinstance(wanted, str) and wanted in SHORTHANDS:
        chosen = [c for c in outside if SHORTHANDS[wanted](c) and c.weight_name is not None]
    else:
        chosen = [c for c in candidates if any(check_target_module_exists(partner, name) for name in c.names)]
        refused = {c.name: reason for c in chosen if (reason := partner.refusal(c)) is not None}
        if refused:
            shown = "\n".join(f"  {name}: {reason}" for name, reason in list(refused.items())[:8])
            raise RecastTargetError(
                f"partner {partner.method} cannot stand at {len(refused)} of the modules that target_modules names:\n{shown}"
            )
    if not chosen:
        raise _no_place(partner, candidates)
    return chosen


def _no_place(partner: PartnerConfig, candidates: list[Candidate]) -> RecastTargetError:
    possible = [c.name for c in candidates if partner.refusal(c) is None]
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in possible))
    wanted = partner.target_modules
    named = [wanted] if isinstance(wanted, str) else list(wanted or ())
    near = sorted({hit for name in named for hit in difflib.get_close_matches(name, [*leaves, *possible], n=2)})
    hint = f" Near: {', '.join(near)}." if near else ""
    where = f"target_modules={wanted!r} names no module of this model" if wanted else "it finds no place by itself"
    if leaves:
        named_so = f"{type(partner).__name__}(target_modules=[{leaves[0]!r}, ...])"
        can = f"It can stand at modules called {', '.join(leaves[:20])}: name them with its target_modules, {named_so}."
    else:
        can = "The model has no module at which it could stand (an MLP that is split over several modules, as BERT's, is none)."
    return RecastTargetError(f"partner {partner.method}: {where}.{hint}\n{can}")
