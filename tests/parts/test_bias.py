"""A coefficient for each bias: which biases take part, and along which dimension they lie."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from grown_biases import BatchNorms, X, by_hand, config, filled, grown, images, learn_offsets, offsets, on, source
from models import layers_of, outputs, randomise, seeded, tiny_vit
from partner_cases import learn, partner_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from recast_peft import (
    BiasConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    RecastTargetError,
    StoredBank,
    TaskPool,
    convert_to_lora,
    extend_bank,
    get_recast_model,
    grow_bank,
    grow_bias_bank,
    load_bank,
    plan_recast,
)
from recast_peft.banks.files import BANK_CONFIG
from recast_peft.composition.kinds import KINDS
from recast_peft.parts.bias import BiasCoefficient


class TestBiases:
    def test_of_norms_over_channels_are_told_from_those_over_features(self):
        plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
        for parameter in plain.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        config = RecastConfig(target_modules=["3"], partners=[BiasConfig(target_modules=["0", "1", "2"])])
        model = get_recast_model(copy.deepcopy(plain), config).eval()
        learn(model)
        for place, own in partner_tensors(model).items():
            plain[int(place[0])].bias.data *= 1 + own
        plain[3].weight.data = layers_of(model)["3"].weight.detach()
        x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(outputs(model, x), outputs(plain.eval(), x))

    def test_of_layer_norms_lie_along_the_last_dimension(self):
        plain = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
        nn.init.uniform_(plain[1].bias, 0.5, 1.5)
        config = RecastConfig(target_modules=["0"], partners=[BiasConfig(target_modules=["1"])])
        model = get_recast_model(copy.deepcopy(plain), config).eval()
        with torch.no_grad():
            dict(model.named_parameters())["base_model.model.recast_partners.1.bias.modules_to_save.default.offset"].fill_(0.5)
        plain[1].bias.data *= 1.5
        x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))  # as many tokens as features
        torch.testing.assert_close(outputs(model, x), outputs(plain.eval(), x))

    def test_stand_by_themselves_neither_at_the_head_nor_at_the_patches(self):
        backbone = timm.create_model("test_vit", num_classes=5)
        places = plan_recast(backbone, RecastConfig(num_classes=3, partners=["bias"])).parts["bias"]
        names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert places == {f"blocks.{block}.{name}": 1 for block in range(len(backbone.blocks)) for name in names}

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: nn.Linear(4, 4, bias=False), "Linear has no bias"),
            (lambda: nn.MultiheadAttention(4, 2).out_proj, "a multi-head attention reads it"),
            (lambda: nn.Bilinear(4, 4, 4), "not known where the bias of Bilinear lies"),
        ],
    )
    def test_that_are_none_are_refused(self, build, message):
        plain = nn.ModuleDict({"target": nn.Linear(4, 4), "other": build()})
        config = RecastConfig(target_modules=["target"], partners=[BiasConfig(target_modules=["other"])])
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(plain, config)


class TestRefusals:
    def test_another_model(self) -> None:
        with pytest.raises(RecastBankError, match=r"made for other pretrained biases; blocks\.0"):
            get_recast_model(tiny_vit(seed=5), config(grown()))
        wide = seeded(lambda: nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3)])}))
        with pytest.raises(RecastBankError, match=r"does not fit the model at blocks\.0\.norm\n.*8 numbers\n.*no such bias"):
            get_recast_model(wide, config(grown(), target_modules=["0"]))

    def test_a_failed_task_leaves_the_model_as_it_was(self) -> None:
        model = tiny_vit(seed=5)
        names = [n for n, _ in model.named_modules()]
        with pytest.raises(RecastBankError):
            get_recast_model(model, config(grown()))
        assert [n for n, _ in model.named_modules()] == names

    def test_the_wrong_kind_of_bank(self, tmp_path: Path) -> None:
        lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["qkv"], init_lora_weights=False))
        weights = grow_bank(tiny_vit(), [lora], RecastConfig(target_modules=["qkv"], group_size=1))
        with pytest.raises(RecastBankError, match=r"of another kind: give it as RecastConfig\(bank=...\)"):
            get_recast_model(tiny_vit(), config(weights))
        with pytest.raises(RecastBankError, match=r"holds no templates of weights: give it as RecastConfig\(partners="):
            get_recast_model(tiny_vit(), RecastConfig(bank=grown()))

    def test_places_and_a_bank(self) -> None:
        with pytest.raises(RecastConfigError, match="the bank says which modules take part; give one of the two"):
            BiasConfig(bank=grown(), target_modules=["fc1"])
        for wrong in (3, {"name": None, "fingerprint": None}, {"nme": "x"}):
            with pytest.raises(RecastConfigError, match=r"BiasConfig\(bank="):
                BiasConfig(bank=wrong)

    def test_a_bank_that_is_gone(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        model = on(bank)
        model.save_pretrained(tmp_path / "task")
        moved = tmp_path / "elsewhere"
        (tmp_path / "bank").rename(moved)
        with pytest.raises(RecastBankError, match=r"config\.partners = \[BiasConfig\(bank=load_bank"):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"))
        handed = RecastConfig.from_pretrained(str(tmp_path / "task"))
        handed.partners = [BiasConfig(bank=load_bank(moved))]
        again = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"), config=handed).eval()
        assert torch.equal(outputs(again, X), outputs(model, X))
        other = RecastConfig.from_pretrained(str(tmp_path / "task"))
        other.partners = [BiasConfig(bank=grown((7, 8, 9)))]
        with pytest.raises(RecastBankError, match=f"bank of the task: {bank.fingerprint}"):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"), config=other)

    def test_a_damaged_task_file(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        on(bank).save_pretrained(tmp_path / "task")
        grown((0, 1)).save(tmp_path / "bank")  # another bank under the name
        with pytest.raises(RecastBankError, match=bank.fingerprint):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"))

    def test_a_damaged_bank_file(self, tmp_path: Path) -> None:
        grown().save(tmp_path)
        described = json.loads((tmp_path / BANK_CONFIG).read_text().replace('"widths"', '"breadths"'))
        with pytest.raises(RecastLoadError, match="is not what was written"):
            (tmp_path / BANK_CONFIG).write_text(json.dumps(described))
            load_bank(tmp_path)
        described.pop("checksum")
        (tmp_path / BANK_CONFIG).write_text(json.dumps(described))
        with pytest.raises(RecastLoadError, match="has no 'widths'"):
            load_bank(tmp_path)

    def test_what_takes_coefficients_alone(self) -> None:
        model = on(grown(), "one")
        with pytest.raises(RecastConfigError, match="partners bias"):
            convert_to_lora(model, 4, "one")


def of_pool(pool: TaskPool, bank: StoredBank, name: str) -> nn.Module:
    """A plain model of a pool's task, by plain arithmetic on the row."""
    model = get_recast_model(tiny_vit(), config(bank))
    values = pool.coefficients(name)
    with torch.no_grad():
        for place, parameter in offsets(model).items():
            parameter.copy_(values[f"{place}.bias"])
        for module, layer in layers_of(model).items():
            layer.recast_coefficients["default"].copy_(values[module][None])
    return by_hand(bank, model).eval()


class TestPools:
    @pytest.mark.parametrize("merge", [False, True])
    def test_one_task_after_the_other(self, merge: bool) -> None:
        bank = grown()
        pool = filled(bank, "one", "two")
        assert pool.numbers_per_task == 16
        layer = pool.model.get_base_model().blocks[0].mlp.fc1
        bias, pretrained = layer.bias, layer.bias.detach().clone()
        storage = set()
        for name in ("one", "two", "one"):
            pool.activate(name, merge=merge)
            torch.testing.assert_close(outputs(pool.model, X), outputs(of_pool(pool, bank, name), X), rtol=1e-5, atol=1e-5)
            storage.add(layer.bias.data_ptr())
            assert torch.equal(layer.bias, pretrained) == (not merge)
            assert torch.equal(bias, pretrained)
        assert len(storage) == 1  # a task is merged in place of the one before
        pool.deactivate()
        assert torch.equal(bias, pretrained)
        assert torch.equal(outputs(pool.model, X), outputs(tiny_vit().eval(), X))

    @pytest.mark.parametrize("merged", [None, "slot", "ordinary"])
    def test_a_task_for_each_sample(self, merged: str | None) -> None:
        bank = grown()
        pool = filled(bank, "one", "two")
        model = pool.model
        if merged == "slot":
            pool.activate("two", merge=True)
        elif merged == "ordinary":
            learn_offsets(model, "default")
            model.set_adapter("default")
            model.merge_adapter(["default"])
        wanted = [of_pool(pool, bank, "two"), tiny_vit().eval(), of_pool(pool, bank, "one"), of_pool(pool, bank, "two")]
        with torch.no_grad():
            found = model(X, task_ids=pool.ids(["two", None, "one", "two"]))
        for row, plain in enumerate(wanted):
            torch.testing.assert_close(found[row], outputs(plain, X)[row], rtol=1e-4, atol=1e-4)

    def test_images_and_norms_of_convolutional_networks(self) -> None:
        """Where the bias does not lie along the last dimension."""
        plain = seeded(BatchNorms)
        sources = [{n: p for n, p in source(i, lambda: seeded(BatchNorms)).items()} for i in range(2)]
        bank = grow_bias_bank(plain, sources)
        fields = {"target_modules": ["conv"], "group_size": 1, "partners": [BiasConfig(bank=bank)]}
        pool = TaskPool(get_recast_model(seeded(BatchNorms), RecastConfig(**fields)).eval())
        for seed, name in enumerate(("one", "two")):
            row = pool.add(name)
            pool.table.data[row] = torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(seed))
        x = images()
        with torch.no_grad():
            both = pool.model(x, task_ids=pool.ids(["one", "two"]))
            for row, name in enumerate(("one", "two")):
                with pool.use(name):
                    torch.testing.assert_close(pool.model(x)[row], both[row], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(both, outputs(plain.eval(), x), atol=1e-2)

    def test_gradients_of_a_mixed_batch_are_those_of_the_tasks_alone(self) -> None:
        bank = grown()
        pool = filled(bank, "one", "two")
        model = pool.model.double()
        pool.requires_grad_()
        x = X.double()
        model(x, task_ids=pool.ids(["one", "one", "two", "two"])).square().sum().backward()
        for name, rows in (("one", slice(0, 2)), ("two", slice(2, 4))):
            alone = get_recast_model(tiny_vit(), config(bank)).double()
            with torch.no_grad():
                for place, parameter in offsets(alone).items():
                    parameter.copy_(pool.coefficients(name)[f"{place}.bias"])
                for module, layer in layers_of(alone).items():
                    layer.recast_coefficients["default"].copy_(pool.coefficients(name)[module][None])
            alone(x[rows]).square().sum().backward()
            for place, parameter in offsets(alone).items():
                found = pool.table.grad[pool.row(name), pool.part_of(f"{place}.bias")]
                torch.testing.assert_close(found, parameter.grad, rtol=1e-6, atol=1e-8)

    def test_tasks_are_put_in_from_everywhere(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        model = on(bank, "first")
        model.save_pretrained(tmp_path)
        pool = TaskPool(get_recast_model(tiny_vit(), config(bank), "layout").eval())
        pool.add("folder", tmp_path / "first")
        pool.model.load_adapter(str(tmp_path / "first"), "adapter")
        pool.add("adapter")
        pool.remove("adapter")
        pool.add("adapter", "adapter")
        pool.add("entries", load_file(tmp_path / "first" / "adapter_model.safetensors"))
        pool.add("fresh", config(bank))
        plain = RecastConfig(target_modules=["fc1"], group_size=1)
        without = get_recast_model(tiny_vit(), plain, "without")
        randomise(without, "without")
        without.save_pretrained(tmp_path)
        pool.add("without", tmp_path / "without")  # no coefficients of biases: zeros
        for name in ("folder", "adapter", "entries"):
            with pool.use(name):
                assert torch.equal(outputs(pool.model, X), outputs(model, X))
        with pool.use("without"):
            torch.testing.assert_close(outputs(pool.model, X), outputs(without.eval(), X), rtol=1e-5, atol=1e-5)
        pool.save(tmp_path / "pool.safetensors")
        again = TaskPool(get_recast_model(tiny_vit(), config(bank)).eval())
        assert again.load(tmp_path / "pool.safetensors") == pool.names
        assert torch.equal(again.table[:5], pool.table[:5])

    def test_tasks_on_an_earlier_version(self, tmp_path: Path) -> None:
        first = grown().save(tmp_path / "bank")
        model = on(first, "old")
        model.save_pretrained(tmp_path)
        second = extend_bank(first, tiny_vit(), [source(8)]).save(tmp_path / "bank")
        pool = TaskPool(get_recast_model(tiny_vit(), config(second)).eval())
        pool.add("old", tmp_path / "old")
        assert {len(v) for name, v in pool.coefficients("old").items() if name.endswith("bias")} == {4}
        with pool.use("old"):
            torch.testing.assert_close(outputs(pool.model, X), outputs(model, X), rtol=1e-5, atol=1e-5)

    def test_other_biases_are_refused(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        other = on(grown((5, 6)).save(tmp_path / "other"), "other")
        other.save_pretrained(tmp_path)
        pool = TaskPool(get_recast_model(tiny_vit(), config(bank)).eval())
        for given in (tmp_path / "other", config(grown((5, 6))), config(bank, partners=["bias"])):
            with pytest.raises(RecastBankError, match="coefficients of biases that are not the pool's"):
                pool.add("other", given)
        plain = TaskPool(get_recast_model(tiny_vit(), RecastConfig(target_modules=["fc1"], group_size=1)).eval())
        with pytest.raises(RecastBankError, match=r"are not the pool's\n  task: those of the bank .*\n  pool: none"):
            plain.add("other", tmp_path / "other")
        pool.save(tmp_path / "pool.safetensors")
        with pytest.raises(RecastBankError, match="coefficients of biases that are not the pool's"):
            plain.load(tmp_path / "pool.safetensors")
        assert (len(pool), len(plain)) == (0, 0)

    def test_a_coefficient_for_each_bias(self) -> None:
        fields = {"target_modules": ["fc1"], "group_size": 1, "partners": ["bias"]}
        model = get_recast_model(tiny_vit(), RecastConfig(**fields), "first").eval()
        learn_offsets(model, "first")
        pool = TaskPool(model)
        assert pool.numbers_per_task == 4 + 16
        pool.add("copy", "first")
        wanted = outputs(model, X)
        with pool.use("copy", merge=True):
            torch.testing.assert_close(outputs(model, X), wanted, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            mixed = model(X, task_ids=pool.ids(["copy", None, "copy", None]))
        torch.testing.assert_close(mixed[0::2], wanted[0::2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[1::2], outputs(tiny_vit().eval(), X)[1::2], rtol=1e-5, atol=1e-5)

    def test_compiled(self) -> None:
        """Another task, or other tasks in a batch, compile nothing anew."""
        pool = filled(grown(depth=1), "one", "two", depth=1)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(pool.model, backend=counter)
        wanted = {}
        for name in ("one", "two"):
            pool.activate(name)
            with torch.no_grad():
                wanted[name] = compiled(X)
                torch.testing.assert_close(wanted[name], pool.model(X), rtol=1e-5, atol=1e-5)
        once = counter.frame_count
        pool.activate("one")
        with torch.no_grad():
            assert torch.equal(compiled(X), wanted["one"])
        assert counter.frame_count == once == 1


@pytest.mark.parametrize(
    ("name", "channels"), [(name, k.channels) for k in KINDS if "norm" in k.name and not k.reads_sum for name in k.names]
)
def test_norms_of_timm_may_be_named(name: str, channels: int) -> None:
    """The bias of each kind of norm, moved by a coefficient, is that of a plain norm with the moved bias."""
    kind = getattr(timm.layers.norm, name.rpartition(".")[2])
    made = {"GroupNorm": lambda: kind(6, num_groups=2)}.get(kind.__name__, lambda: kind(6))
    build = lambda: nn.Sequential(nn.Conv2d(3, 6, 1), made())  # noqa: E731
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    if channels == -1:
        build = lambda: nn.Sequential(nn.Linear(3, 6), made())  # noqa: E731
        x = x.movedim(1, -1)
    torch.manual_seed(1)
    plain = build().eval()
    nn.init.uniform_(plain[1].bias, 0.5, 1.5)
    fields = {"target_modules": ["0"], "partners": [BiasConfig(target_modules=["1"])]}
    model = get_recast_model(copy.deepcopy(plain), RecastConfig(**fields)).eval()
    with torch.no_grad():
        offsets(model)["1"].fill_(0.5)
        plain[1].bias *= 1.5
        torch.testing.assert_close(model(x), plain(x))


def test_autocast_rounds_no_sample_s_own_coefficient() -> None:
    module = nn.Linear(3, 4)
    coefficient, y, offsets = BiasCoefficient(module), torch.zeros(2, 4), torch.tensor([[0.1], [0.3]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(coefficient(y, module.bias, offsets=offsets), offsets * module.bias)
