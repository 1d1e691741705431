"""RECAST is a member of PEFT, and a PEFT that has changed is named instead of failing somewhere."""

from __future__ import annotations

import enum
from typing import Any

import peft
import peft.mapping
import pytest
from peft import PeftType

from recast_peft import RecastCompatibilityError, RecastConfig, RecastError, RecastModel, registration


class TestRegistration:
    def test_adds_a_full_member_to_the_enumeration(self) -> None:
        member = PeftType.RECAST
        assert isinstance(member, PeftType)
        assert member == "RECAST"
        assert PeftType("RECAST") is member
        assert PeftType["RECAST"] is member
        assert member in list(PeftType)
        assert member.name == member.value == "RECAST"
        assert list(PeftType).count(member) == 1

    def test_is_known_to_the_mappings_of_PEFT(self) -> None:
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RECAST] is RecastConfig
        assert peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RECAST] is RecastModel
        assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RECAST] == "recast_"

    def test_can_be_repeated(self) -> None:
        before = list(PeftType)
        registration.register(RecastConfig, RecastModel)
        assert registration.peft_type() is PeftType.RECAST
        assert list(PeftType) == before

    def test_leaves_the_other_methods_as_they_are(self) -> None:
        assert PeftType("LORA") is PeftType.LORA
        assert peft.LoraConfig().peft_type == PeftType.LORA

    def test_survives_pickling(self) -> None:
        import pickle

        assert pickle.loads(pickle.dumps(PeftType.RECAST)) is PeftType.RECAST


class TestAChangedPeft:
    def test_whose_enumeration_is_no_enumeration_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Plain:
            __members__: dict[str, Any] = {}

        monkeypatch.setattr(registration, "PeftType", Plain)
        with pytest.raises(RecastCompatibilityError, match=rf"(?s)PEFT {peft.__version__}.*PeftType could not be extended"):
            registration.peft_type()

    def test_whose_enumeration_forgets_the_member_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Forgetful(str, enum.Enum):
            LORA = "LORA"

            @classmethod
            def _missing_(cls, value: object) -> Forgetful:
                return cls.LORA

        monkeypatch.setattr(registration, "PeftType", Forgetful)
        monkeypatch.setattr(Forgetful, "_value2member_map_", _Forgetting(Forgetful._value2member_map_))
        with pytest.raises(RecastCompatibilityError, match="does not give back the member"):
            registration.peft_type()

    @pytest.mark.parametrize(
        "error", [TypeError("no argument 'prefix'"), KeyError("recast"), ValueError("closed"), AttributeError("x")]
    )
    def test_that_refuses_the_method_is_named(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def refuse(**kwargs: Any) -> None:
            raise error

        monkeypatch.setattr("peft.utils.register_peft_method", refuse)
        with pytest.raises(RecastCompatibilityError, match="could not be registered") as caught:
            registration.register(type("OtherConfig", (), {}), RecastModel)
        assert caught.value.__cause__ is error

    def test_that_has_moved_its_mappings_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr("peft.utils.register_peft_method")
        with pytest.raises(RecastCompatibilityError, match=r"could not be registered(?s:.*)pip install"):
            registration.register(type("OtherConfig", (), {}), RecastModel)

    def test_raises_an_error_that_is_one_of_imports_too(self) -> None:
        assert issubclass(RecastCompatibilityError, ImportError)
        assert issubclass(RecastCompatibilityError, RecastError)


class _Forgetting(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def test_every_public_name_is_there() -> None:
    import recast_peft

    assert all(hasattr(recast_peft, name) for name in recast_peft.__all__)
    assert len(set(recast_peft.__all__)) == len(recast_peft.__all__)
