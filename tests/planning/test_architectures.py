"""A part of the sweep over architectures (``tests/sweep``): one model of each kind, and what the sweep itself must notice.

The whole sweep is a script: ``python tests/sweep/sweep_architectures.py``.
"""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import EncoderNet, outputs, seeded, vit_input
from peft import PeftModel
from sweep import sweep_architectures, timm_cases
from sweep.checks import Case, check_case, chosen_by, fresh_model, outputs_of, same, set_coefficients
from sweep.timm_cases import timm_case
from sweep.transformers_cases import transformers_cases
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastLayer, get_recast_model, plan_recast
from recast_peft.planning.targets import find_targets

timm = pytest.importorskip("timm")

TINY_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM = {
    "test_vit": {},
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_mambaout": {},
    "test_nfnet": {},
    "beit": ("beit_base_patch16_224", TINY_VIT),
    "dla": ("dla46x_c", {}),
    "edgenext": ("edgenext_xx_small", {}),
    # These do not call some of their modules: they read the weight, or other attributes, or bear a target's name.
    "eva": ("eva02_tiny_patch14_224", TINY_VIT),
    "swin v2": ("swinv2_tiny_window8_256", {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)}),
    "davit": ("davit_tiny", {"depths": (1, 2), "embed_dims": (16, 32), "num_heads": (2, 4)}),
    "sknet": ("skresnet18", {}),
}
WEIGHT_READERS = ("eva", "swin v2", "davit", "sknet")
TRANSFORMERS = (
    *("bert", "distilbert", "albert", "deberta-v2", "modernbert", "squeezebert", "ibert", "longformer", "canine"),
    *("gpt2", "gpt_neox", "llama", "qwen2", "gemma3_text", "bloom", "mixtral", "deepseek_v3", "mamba", "rwkv"),
    *("bart", "t5", "whisper", "vit", "siglip", "swinv2", "mobilevit", "segformer", "resnet", "convnext", "bit"),
    *("clip", "wavlm", "data2vec-audio", "patchtst"),
)
# Modules whose result the model does not use for its output, by what the model's own code says.
UNUSED = {
    # made for labels of single characters
    "canine": {f"canine.final_char_encoder.layer.0.{part}.dense" for part in ("intermediate", "output")},
}
# Modules whose weight is standardised: alone in its bank it is scaled in vain, with a gradient of zero or of a rounding error.
SCALED_IN_VAIN = {"bit": re.compile(r"\.conv\d?$")}


def timm_row(name: str) -> Case:
    entry = TIMM[name]
    return timm_case(entry[0], **entry[1]) if entry else timm_case(name)


@pytest.mark.parametrize("name", TIMM)
def test_timm_architecture(name: str) -> None:
    result = check_case(timm_row(name))
    assert not result.failures
    assert not result.unused
    assert result.targets >= 2


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_architecture(name: str) -> None:
    result = check_case(transformers_cases()[name])
    assert not result.failures
    in_vain = SCALED_IN_VAIN.get(name)
    assert {module for module in result.unused if not (in_vain and in_vain.search(module))} == UNUSED.get(name, set())
    assert result.targets >= 2


@pytest.mark.parametrize("name", WEIGHT_READERS)
def test_models_that_read_the_weight_learn(name: str) -> None:
    case = timm_row(name)
    model = get_recast_model(fresh_model(case), RecastConfig())
    layers = {layer.module_name: layer for layer in model.modules() if isinstance(layer, RecastLayer)}
    coefficients = [layer.recast_coefficients["default"] for layer in layers.values()]
    (start,) = outputs_of(case, model)
    set_coefficients(layers)
    (target,) = outputs_of(case, model)  # so that there are coefficients that give it
    with torch.no_grad():
        for parameter in coefficients:
            parameter.zero_()
    optimizer = torch.optim.Adam(coefficients, lr=0.02)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(case.run(model), target) / F.mse_loss(start, target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------- which modules


def leaves(model: nn.Module, shorthand: str | None) -> set[str]:
    return {name.rpartition(".")[2] for name in chosen_by(model, shorthand)}


@pytest.mark.parametrize(
    ("name", "shorthand", "expected"),
    [
        ("bert", None, {"dense"}),
        ("bert", "all-attention", {"query", "key", "value", "dense"}),
        ("bert", "all-mlp", {"dense"}),
        ("squeezebert", "all-attention", {"query", "key", "value", "conv1d"}),  # "Squeeze" is no squeeze-and-excitation here
        ("ibert", "all-attention", {"query", "key", "value", "dense"}),  # a linear layer of its own
        ("gpt2", "all-mlp", {"c_fc", "c_proj"}),
        ("t5", None, {"wi", "wo"}),
        ("t5", "all-attention", {"q", "k", "v", "o"}),
        ("t5", "all-mlp", {"wi", "wo"}),
        ("mamba", None, {"in_proj", "x_proj", "dt_proj", "out_proj"}),  # not the short filters in time
        ("regnet", "all-attention", set()),  # squeeze-and-excitation has an "attention" inside
        ("resnet", None, {"convolution"}),
        ("resnet", "all-linear", set()),  # the classifier is its only linear layer
        ("albert", None, {"ffn", "ffn_output"}),
        ("swinv2", None, {"dense"}),  # not the MLP of relative positions, which reads no samples
        ("swiftformer", "all-linear", {"to_query", "to_key", "proj", "final"}),  # without the second of its two heads
    ],
)
def test_shorthands_on_transformers(name: str, shorthand: str | None, expected: set[str]) -> None:
    model = transformers_cases()[name].build()
    assert leaves(model, shorthand) == expected


def test_mlp_of_bert_is_not_its_attention() -> None:
    model = transformers_cases()["bert"].build()
    attention, mlp = set(chosen_by(model, "all-attention")), set(chosen_by(model, "all-mlp"))
    assert "bert.encoder.layer.0.attention.output.dense" in attention
    assert mlp == {f"bert.encoder.layer.{i}.{part}.dense" for i in range(3) for part in ("intermediate", "output")}
    assert not attention & mlp
    assert set(chosen_by(model, None)) == mlp


@pytest.mark.parametrize(
    ("name", "shorthand", "expected"),
    [
        ("gcvit_xxtiny", "all-attention", {"qkv", "proj"}),  # its blocks are called after a kind of channel attention
        ("halonet_h1", None, {"q", "kv"}),  # its blocks hold an attention and ordinary convolutions
        ("test_vit", "all-mlp", {"fc1", "fc2"}),
        ("test_vit_relpos", "all-mlp", {"fc1", "fc2"}),
        ("swinv2_cr_tiny_224", None, {"fc1", "fc2"}),
        ("sequencer2d_s", None, {"fc", "fc1", "fc2"}),  # its convolutions only make patches and join them
    ],
)
def test_shorthands_on_timm(name: str, shorthand: str | None, expected: set[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    targets = _targets(model, shorthand)
    assert {name.rpartition(".")[2] for name in targets} == expected
    assert not any(part in name for name in targets for part in ("rel_pos", "meta_mlp"))


def _targets(model: nn.Module, shorthand: str | None) -> list[str]:
    return [target.name for target in find_targets(model, RecastConfig(target_modules=shorthand))[0]]


def test_modules_below_a_shared_module_are_stored_once_and_come_back(tmp_path: Path) -> None:
    case = Case("shared", _Shared, _call, lambda model: set())
    model = get_recast_model(fresh_model(case), RecastConfig(target_modules=["fc"]))
    layers = {layer.module_name: layer for layer in model.modules() if isinstance(layer, RecastLayer)}
    assert list(layers) == ["first.fc"]
    fresh = outputs_of(case, model)
    set_coefficients(layers)
    live = outputs_of(case, model)
    assert not same(fresh, live)
    model.save_pretrained(tmp_path)
    assert same(live, outputs_of(case, PeftModel.from_pretrained(fresh_model(case), tmp_path).eval()))


def test_shared_and_tied_modules_are_left_out_with_the_reason() -> None:
    model = _Shared()
    model.alias = model.other
    model.tied.weight = model.head_of_it.weight
    plan = plan_recast(model, RecastConfig(target_modules="all-linear"))
    assert plan.targets == ("first.fc",)
    assert "shared" in plan.skipped["other"]
    assert "tied" in plan.skipped["tied"]


# ---------------------------------------------------------------- what the sweep must notice


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class _Shared(nn.Module):
    """One block under two names, as timm's CoaT has its MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Block()
        self.second = self.first
        self.other = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.head_of_it = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head_of_it(self.tied(self.other(self.second(self.first(x).tanh()))))


class _Odd(nn.Module):
    """Two layers, of which the second is used in a way that gives trouble."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.calls = 0
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x).tanh()
        if self.kind == "detached":
            return x + F.linear(x, self.second.weight.detach())
        if self.kind == "frozen copy":
            self.copy = getattr(self, "copy", self.second.weight.detach().clone())
            return x + F.linear(x, self.copy)
        if self.kind == "unused":
            self.second(x)
            return x
        if self.kind == "scale":
            return x + F.linear(x, F.normalize(self.second.weight.flatten(), dim=0).view(8, 8))
        return x + self.calls * self.second(x)


def _call(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))


def _odd_case(kind: str) -> Case:
    return Case(kind, partial(_Odd, kind), _call, lambda model: set())


def test_sweep_notices_a_weight_without_a_gradient() -> None:
    result = check_case(_odd_case("detached"))
    assert result.failures == ["no gradient, though the output depends on the weight: second"]


def test_sweep_notices_a_model_that_differs_from_call_to_call() -> None:
    assert "from call to call" in check_case(_odd_case("counting")).failures[0]


def test_sweep_explains_a_module_without_effect() -> None:
    result = check_case(_odd_case("unused"))
    assert (result.failures, result.unused) == ([], ["second"])


def test_sweep_notices_a_head_among_the_targets() -> None:
    case = Case("head", partial(_Odd, "unused"), _call, lambda model: {"second"})
    assert check_case(case).failures == [
        "None picks a head: second",
        "all-linear picks a head: second",
    ]


def test_sweep_notices_an_error_and_goes_on() -> None:
    result = check_case(Case("broken", nn.Module, _call, lambda model: set()))
    assert result.failures[0].startswith("NotImplementedError")


def test_sweep_counts_the_smallest_variant_of_a_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timm_cases, "VARIANTS", tmp_path / "variants.json")
    with monkeypatch.context() as only_two:
        only_two.setattr(timm, "list_modules", lambda: ["starnet", "vgg"])
        timm_cases.record_variants()
    smallest = min(timm.list_models(module="starnet", exclude_filters="test_*"), key=_size)
    assert timm_cases.timm_cases()["starnet"].name == smallest
    assert "vgg" not in timm_cases.timm_cases()  # the smallest has 133 M parameters
    assert "resnet" in timm_cases.unrecorded_families()
    assert not {"starnet", "vgg"} & set(timm_cases.unrecorded_families())


def _size(name: str) -> int:
    return sum(p.numel() for p in timm.create_model(name).parameters())


def test_script_prints_a_table_and_fails_on_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cases = {"good": transformers_cases()["gpt2"], "bad": _odd_case("detached")}
    monkeypatch.setattr(sweep_architectures, "find_cases", lambda library: cases)
    assert sweep_architectures.main(["--library", "transformers", "--only", "good"]) == 0
    assert sweep_architectures.main(["--library", "transformers"]) == 1
    shown = capsys.readouterr().out
    assert "GPT2LMHeadModel" in shown
    assert "1 of 2 architectures passed\n  failed: bad (detached)" in shown
    with pytest.raises(SystemExit) as error:
        sweep_architectures.main(["--only", "nothing"])
    assert error.value.code == 2


@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["out_proj"], ["linear1", "linear2", "out_proj"]])
def test_torchs_encoder_with_linear_targets_equals_one_with_the_rest_frozen(targets: list[str]) -> None:
    plain = seeded(EncoderNet)
    model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=targets)).eval()
    assert torch.equal(outputs(model, vit_input()), outputs(plain, vit_input()))
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(any(f"{target}.weight" in name for target in targets))
    assert torch.equal(model(vit_input()), plain(vit_input()))
    plain.requires_grad_(True)
    torch.testing.assert_close(model(vit_input()), plain(vit_input()), rtol=0, atol=1e-6)
