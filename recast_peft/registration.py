"""The one place that reaches into PEFT: RECAST becomes a member of ``PeftType`` and a registered method.

PEFT keeps its methods in an enumeration that is closed to other packages, and refuses to register a name that is not in
it. So a member is added here first, then PEFT's own ``register_peft_method`` does the rest.
"""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftType

from .errors import RecastCompatibilityError
from .names import METHOD_NAME, PREFIX


def peft_type() -> Any:
    """Return ``PeftType.RECAST``, adding it to PEFT's enumeration on the first call.

    Raises:
        RecastCompatibilityError: if ``PeftType`` is no longer the enumeration that this was written for.
    """
    name = METHOD_NAME.upper()
    member = PeftType.__members__.get(name)
    if member is None:
        try:
            member = str.__new__(PeftType, name)
            member._name_, member._value_ = name, name
            type.__setattr__(PeftType, name, member)
            PeftType._member_names_.append(name)
            PeftType._member_map_[name] = member
            PeftType._value2member_map_[name] = member
        except (AttributeError, TypeError) as error:
            raise _changed(f"PeftType could not be extended: {error}") from error
    if PeftType(name) is not member or getattr(PeftType, name, None) is not member:
        raise _changed("PeftType does not give back the member that was added")
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register RECAST with PEFT; calling it again with the same classes changes nothing.

    Raises:
        RecastCompatibilityError: if PEFT does not accept the method.
    """
    member = peft_type()
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import register_peft_method

        if PEFT_TYPE_TO_CONFIG_MAPPING.get(member) is config_cls:
            return
        register_peft_method(name=METHOD_NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    except (ImportError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise _changed(f"the method could not be registered: {error}") from error


def _changed(what: str) -> RecastCompatibilityError:
    return RecastCompatibilityError(
        f"recast_peft cannot join the installed PEFT {peft.__version__}: {what}. "
        "Install a PEFT in the range that recast_peft declares (pip install --upgrade recast_peft)."
    )
