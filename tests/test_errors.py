"""The exceptions of this library: one family, with the kinds that Python has for them."""

from __future__ import annotations

import pytest
from models import TinyVit

import recast_peft
from recast_peft import RecastConfig, RecastError, errors, plan_recast

KINDS = {  # what a caller who knows Python alone would catch
    "RecastConfigError": ValueError,
    "RecastTargetError": ValueError,
    "RecastBankError": ValueError,
    "RecastLoadError": ValueError,
    "RecastBaseMismatchError": errors.RecastLoadError,
    "RecastHubError": OSError,
    "RecastSequenceError": ValueError,
    "RecastCompatibilityError": ImportError,
}


def test_every_kind_is_public_and_caught_with_the_family_and_with_pythons_own() -> None:
    found = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and kind is not RecastError}
    assert found.keys() == KINDS.keys()
    for name, kind in found.items():
        assert issubclass(kind, RecastError), name
        assert issubclass(kind, KINDS[name]), name
        assert getattr(recast_peft, name) is kind


def test_every_error_of_planning_is_of_one_family() -> None:
    with pytest.raises(RecastError):
        plan_recast(TinyVit(), RecastConfig(target_modules=["nothing"]))


@pytest.mark.parametrize("kind", [RecastError, *map(errors.__dict__.get, KINDS)])
def test_no_message_is_very_long(kind: type[RecastError]) -> None:
    usual = "this was given\n" + "  a\n" * 100
    assert str(kind(usual)) == usual
    text = str(kind("the value is " + "x" * 100_000 + "; expected y\nFetch it again." + "\nz" * 100_000))
    assert text.startswith("the value is xxx")
    assert "xxx; expected y\nFetch it again.\nz" in text
    assert len(text) < 3_000
