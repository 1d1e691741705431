"""What a config says of partners: as objects, names and dictionaries."""

from __future__ import annotations

import json

import pytest
from partner_cases import CONFIG
from peft import PeftConfig

from recast_peft import AdaptFormerConfig, CLRConfig, PiggybackConfig, RecastConfig, RecastConfigError


class TestTheConfig:
    def test_takes_objects_names_and_dictionaries(self):
        config = RecastConfig(partners=[CLRConfig(kernel_size=5), "piggyback", {"method": "adaptformer", "bottleneck": 8}])
        assert config.partners == [CLRConfig(kernel_size=5), PiggybackConfig(), AdaptFormerConfig(bottleneck=8)]
        assert RecastConfig(partners=[]).partners is None
        assert AdaptFormerConfig(target_modules={"b", "a"}).target_modules == ("a", "b")

    def test_is_stored_with_the_task_and_given_back_as_objects(self, tmp_path):
        partners = [AdaptFormerConfig(bottleneck=8, target_modules=["mlp"]), PiggybackConfig(threshold=0.0)]
        RecastConfig(partners=partners, train_coefficients=False).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / CONFIG).read_text())
        assert stored["partners"][0]["method"] == "adaptformer"
        assert stored["partners"][0]["bottleneck"] == 8
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert loaded.partners == partners
        assert loaded.train_coefficients is False

    @pytest.mark.parametrize(
        ("partners", "message"),
        [
            ("adaptformer", "expected a list of partners"),
            (["adaptfromer"], "did you mean 'adaptformer'"),
            ([3], "partners=3: expected a name"),
            ([{"bottleneck": 3}], "with a 'method'"),
            ([{"method": "clr", "size": 3}], "partners clr has no option 'size'; its options: target_modules, kernel_size"),
            (["clr", CLRConfig()], "names 'clr' twice"),
        ],
    )
    def test_refuses_what_is_no_partner(self, partners, message):
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(partners=partners)

    @pytest.mark.parametrize(
        ("partner", "option", "value"),
        [
            (AdaptFormerConfig, "bottleneck", 0),
            (AdaptFormerConfig, "bottleneck", True),
            (AdaptFormerConfig, "scale", float("nan")),
            (AdaptFormerConfig, "dropout", 1.0),
            (AdaptFormerConfig, "layer_norm", "in"),
            (AdaptFormerConfig, "target_modules", []),
            (AdaptFormerConfig, "target_modules", ""),
            (AdaptFormerConfig, "target_modules", [3]),
            (CLRConfig, "kernel_size", 2),
            (CLRConfig, "kernel_size", None),
            (CLRConfig, "pointwise_kernel_size", 4),
            (PiggybackConfig, "initial_score", 0.001),
            (PiggybackConfig, "threshold", "low"),
        ],
    )
    def test_refuses_values_that_cannot_be_used(self, partner, option, value):
        with pytest.raises(RecastConfigError, match=rf"{partner.__name__}\({option}="):
            partner(**{option: value})

    def test_refuses_another_kind_of_switch(self):
        with pytest.raises(RecastConfigError, match="train_coefficients"):
            RecastConfig(train_coefficients="no")
