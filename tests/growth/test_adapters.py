"""compress_adapters: what is kept of LoRAs is what dense arithmetic says, and the tasks compute as the adapters did."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import AttentionNet, layers_of, move, outputs, seeded, tiny_vit, vit_input
from peft import IA3Config, KasaConfig, LoraConfig, PeftModel, VeloraConfig, get_peft_model
from torch import Tensor, nn

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, compress_adapters, get_recast_model, load_bank

X = vit_input()


def lora(seed: int, model: nn.Module | None = None, **fields: Any) -> PeftModel:
    fields = {"r": 2, "lora_alpha": 4, "target_modules": ["qkv", "fc1"], **fields}
    model = get_peft_model(tiny_vit() if model is None else model, LoraConfig(**fields))
    move(model, seed=seed, size=0.3)
    return model.eval()


def deltas(model: PeftModel) -> dict[str, Tensor]:
    merged, base = model.merge_and_unload().state_dict(), tiny_vit().state_dict()
    return {name: merged[name].double() - base[name].double() for name in base}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        lora(seed).save_pretrained(tmp_path / f"task{seed}")
    return [tmp_path / f"task{seed}" for seed in range(3)]


class TestWhatIsKept:
    def test_nothing_is_lost_with_a_template_of_full_rank_for_each(self, folders: list[Path]) -> None:
        plain = tiny_vit()
        found = compress_adapters(plain, folders, num_templates=3, rank=6)
        assert max(found.errors.values()) < 1e-5
        model = found.apply_to(plain)
        for seed in range(3):
            model.set_adapter(f"task{seed}")
            torch.testing.assert_close(outputs(model.eval(), X), outputs(lora(seed), X), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("group_size", [1, 2])
    def test_errors_are_those_of_the_weights(self, folders: list[Path], group_size: int) -> None:
        config = RecastConfig(target_modules=["qkv", "fc1"], group_size=group_size)
        found = compress_adapters(tiny_vit(), folders, config, num_templates=2)
        model = found.apply_to(tiny_vit())
        assert min(found.errors.values()) > 0.01
        for seed in range(3):
            wanted, name = deltas(lora(seed)), f"task{seed}"
            change = size = 0.0
            for module, layer in layers_of(model).items():
                move = wanted[f"{module}.weight"]
                change += float((layer.get_delta_weight(name).double() - move).square().sum())
                size += float(move.square().sum())
            assert found.errors[name] == pytest.approx((change / size) ** 0.5, rel=1e-3)

    def test_templates_of_rank_one_module_are_the_truncated_svd(self) -> None:
        found = compress_adapters(tiny_vit(), [lora(0)], num_templates=1, rank=1)
        wanted = deltas(lora(0))
        kept = size = 0.0
        for module in found.coefficients["default"]:
            values = torch.linalg.svdvals(wanted[f"{module}.weight"])
            kept += float(values[0] ** 2)
            size += float(values.square().sum())
        assert found.errors["default"] == pytest.approx((1 - kept / size) ** 0.5, rel=1e-3)

    def test_modules_that_no_target_covers_count_as_lost(self) -> None:
        found = compress_adapters(
            tiny_vit(), {"a": lora(0)}, RecastConfig(target_modules=["qkv"], group_size=1), num_templates=1, rank=2
        )
        moves = deltas(lora(0))
        lost = sum(float(move.square().sum()) for name, move in moves.items() if "fc1" in name)
        assert found.errors["a"] == pytest.approx(
            (lost / sum(float(m.square().sum()) for m in moves.values())) ** 0.5, rel=1e-4
        )

    def test_bytes_are_those_of_the_matrices_and_of_bank_and_tasks(self, folders: list[Path]) -> None:
        found = compress_adapters(tiny_vit(), folders, num_templates=1)
        numbers = sum(p.numel() for name, p in lora(0).named_parameters() if "lora_" in name)
        assert found.bytes_before == 3 * 4 * numbers
        assert found.bytes_after == 4 * numbers + 3 * 4 * 8  # one template as large as an adapter; 8 modules
        assert f"{found.bytes_before:,} bytes of adapters" in str(found)
        assert found.to_dict()["errors"] == found.errors

    def test_convolutions(self) -> None:
        def net() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))

        model = lora(0, net(), target_modules=["0", "2", "4"])
        found = compress_adapters(net(), [model], num_templates=1, rank=8)
        x = torch.randn(2, 4, 8, 8)
        assert not torch.allclose(model(x), net()(x), atol=1e-2)
        torch.testing.assert_close(found.apply_to(net()).eval()(x), model(x), rtol=1e-4, atol=1e-4)

    def test_convolutions_over_one_and_three_dimensions(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.over_time, self.over_space = nn.Conv1d(4, 6, 3), nn.Conv3d(1, 4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.over_space(self.over_time(x).view(-1, 1, 2, 3, 7)).flatten(1)

        def net() -> nn.Module:
            torch.manual_seed(0)
            return Net()

        model, x = lora(0, net(), target_modules=["over_time", "over_space"]), torch.randn(2, 4, 9)
        found = compress_adapters(net(), [model], num_templates=1, rank=8)
        assert found.left_out == {"default": ()}
        torch.testing.assert_close(found.apply_to(net()).eval()(x), model(x), rtol=1e-4, atol=1e-4)

    def test_of_attention_the_projection_of_outputs(self) -> None:
        model = lora(0, seeded(lambda: AttentionNet(True)), target_modules=["attns.0"])
        with pytest.warns(UserWarning, match=r"which is left out: attns\.0$"):
            found = compress_adapters(seeded(lambda: AttentionNet(True)), [model], num_templates=1)
        assert list(found.coefficients["default"]) == ["attns.0.out_proj"]


class TestTasks:
    def test_are_saved_and_loaded_as_any_others(self, folders: list[Path], tmp_path: Path) -> None:
        found = compress_adapters(tiny_vit(), folders, num_templates=2)
        stored = found.bank.save(tmp_path / "bank")
        model = found.apply_to(tiny_vit(), load_bank(tmp_path / "bank")).eval()
        model.save_pretrained(tmp_path / "tasks")
        for name in found.errors:
            model.set_adapter(name)
            again = PeftModel.from_pretrained(tiny_vit(), tmp_path / "tasks" / name).eval()
            assert torch.equal(outputs(again, X), outputs(model, X))
        assert stored.fingerprint == found.bank.fingerprint
        fresh = get_recast_model(tiny_vit(), RecastConfig(bank=stored), "new")
        assert torch.equal(outputs(fresh.eval(), X), outputs(tiny_vit().eval(), X))

    def test_another_bank_and_taken_names_are_refused(self, folders: list[Path]) -> None:
        found = compress_adapters(tiny_vit(), folders, num_templates=2)
        other = compress_adapters(tiny_vit(), folders, num_templates=1)
        with pytest.raises(RecastBankError, match="belong to another bank"):
            found.apply_to(tiny_vit(), other.bank)
        model = found.apply_to(tiny_vit())
        with pytest.raises(RecastConfigError, match="has a task 'task0' already"):
            found.apply_to(model)
        with pytest.raises(RecastConfigError, match="with other methods' adapters"):
            found.apply_to(lora(0))


class TestSources:
    def test_a_model_with_several_adapters(self) -> None:
        model = lora(0)
        model.add_adapter("second", LoraConfig(target_modules=["fc2"], r=3, init_lora_weights=False))
        found = compress_adapters(tiny_vit(), [(model, "default"), (model, "second")], num_templates=2, rank=5)
        assert max(found.errors.values()) < 1e-5
        assert {len(v) for v in found.coefficients.values()} == {12}
        assert not found.coefficients["second"]["blocks.0.attn.qkv"].any()

    def test_what_is_left_out_is_said(self) -> None:
        with pytest.warns(UserWarning, match="'default' has more than low-rank matrices, which is left out: head"):
            found = compress_adapters(tiny_vit(), [lora(0, modules_to_save=["head"])], num_templates=1)
        assert found.left_out == {"default": ("head",)}

    def test_any_name_of_a_task_will_do(self, folders: list[Path]) -> None:
        """Names that PEFT takes for none of its containers: attributes of torch's modules, and parts of names."""
        found = compress_adapters(
            tiny_vit(), dict(zip(["half", "a.b", "weight"], folders, strict=True)), num_templates=3, rank=6
        )
        assert max(found.errors.values()) < 1e-5

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases_that_are_left_out_are_said(self, bias: str, tmp_path: Path) -> None:
        model = lora(0, bias=bias)
        model.save_pretrained(tmp_path / "default")
        for adapter in (model, tmp_path / "default"):
            with pytest.warns(UserWarning, match="which is left out: biases") as caught:
                found = compress_adapters(tiny_vit(), [adapter], num_templates=1)
            assert found.left_out == {"default": (f"biases (bias='{bias}')",)}
            assert caught[0].filename == __file__

    def test_tokens_that_are_left_out_are_said(self) -> None:
        plain = nn.ModuleDict({"table": nn.Embedding(5, 3), "fc1": nn.Linear(3, 3)})
        model = lora(0, copy.deepcopy(plain), target_modules=["fc1"], trainable_token_indices={"table": [1]})
        with pytest.warns(UserWarning, match="which is left out: table"):
            compress_adapters(plain, [model], num_templates=1)

    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_a_lora_that_changes_what_it_adds_to_is_refused(self, start: str, tmp_path: Path) -> None:
        model = lora(0, init_lora_weights=start)
        model.save_pretrained(tmp_path)
        for adapter in (model, tmp_path):
            with pytest.raises(RecastBankError, match=f"'a' is started with init_lora_weights='{start}'.*; grow_bank takes"):
                compress_adapters(tiny_vit(), {"a": adapter}, num_templates=1)

    @pytest.mark.parametrize("variant", [{"use_dora": True}, {"kasa_config": KasaConfig()}], ids=["dora", "kasa"])
    def test_a_lora_that_is_more_than_a_product_is_refused(self, variant: dict[str, Any]) -> None:
        with pytest.raises(RecastBankError, match=f"has {next(iter(variant))}=.*more than a product"):
            compress_adapters(tiny_vit(), [lora(0, **variant)], num_templates=1)

    def test_a_lora_that_is_only_trained_otherwise_is_read(self, tmp_path: Path) -> None:
        model = lora(0, velora_config=VeloraConfig(num_groups=2))
        model.save_pretrained(tmp_path)
        for adapter in (model, tmp_path):
            made = compress_adapters(tiny_vit(), {"a": adapter}, num_templates=1)
            assert made.errors["a"] < 1e-3
            torch.testing.assert_close(made.apply_to(tiny_vit()).eval()(vit_input()), model.eval()(vit_input()))

    def test_what_is_no_lora_is_refused(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny_vit(), IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"]))
        model.save_pretrained(tmp_path)
        for adapter in (model, str(tmp_path)):
            with pytest.raises(RecastBankError, match=r"IA3.*compress_adapters reads LoRAs"):
                compress_adapters(tiny_vit(), {"a": adapter}, num_templates=1)
        with pytest.raises(RecastBankError, match="cannot be read"):
            compress_adapters(tiny_vit(), [str(tmp_path / "nothing")], num_templates=1)

    def test_bad_arguments(self) -> None:
        with pytest.raises(RecastConfigError, match="num_templates=0"):
            compress_adapters(tiny_vit(), [lora(0)], num_templates=0)
        with pytest.raises(RecastConfigError, match="two adapters would be called 'default'"):
            compress_adapters(tiny_vit(), [lora(0), lora(1)], num_templates=1)
        for adapters in (lora(0), None, 3, (one for one in [lora(0)])):
            with pytest.raises(RecastConfigError, match="expected a list of LoRAs"):
                compress_adapters(tiny_vit(), adapters, num_templates=1)  # type: ignore[arg-type]
        for pair in ((lora(0),), ("folder", "name"), (lora(0), 1), ()):
            with pytest.raises(RecastConfigError, match=r"is a tuple: expected .* \(model, name\)"):
                compress_adapters(tiny_vit(), [pair], num_templates=1)  # type: ignore[list-item]
        with pytest.raises(RecastConfigError, match="bank is a str: expected a StoredBank"):
            compress_adapters(tiny_vit(), [lora(0)], num_templates=1).apply_to(tiny_vit(), "bank")  # type: ignore[arg-type]
        with pytest.raises(RecastBankError, match="none of the adapters"):
            fresh = get_peft_model(tiny_vit(), LoraConfig(target_modules=["qkv"]))
            compress_adapters(tiny_vit(), [fresh], num_templates=1)
        with pytest.raises(RecastConfigError, match="the adapter 'a' is a TinyVit: expected a LoRA's folder"):
            compress_adapters(tiny_vit(), {"a": tiny_vit()}, num_templates=1)  # type: ignore[dict-item]
        both = lora(0)
        both.add_adapter("other", LoraConfig(target_modules=["qkv"]))
        both.base_model.set_adapter(["default", "other"])
        for adapters in ([both], {"a": both}):
            with pytest.raises(RecastConfigError, match=r"has 2 active adapters: give \(model, name\)"):
                compress_adapters(tiny_vit(), adapters, num_templates=1)
        with pytest.raises(RecastBankError, match="no adapter 'third'; it has default, other"):
            compress_adapters(tiny_vit(), {"a": (both, "third")}, num_templates=1)
        with pytest.raises(RecastBankError, match="none of the adapters moves a target module of the config"):
            elsewhere = lora(0, target_modules=["qkv"])
            compress_adapters(tiny_vit(), [elsewhere], RecastConfig(target_modules=["fc1"]), num_templates=1)
        diverged = lora(0)
        next(p for n, p in diverged.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
        with pytest.raises(RecastBankError, match="the adapter 'a' holds numbers that are not finite"):
            compress_adapters(tiny_vit(), {"a": diverged, "b": lora(1)}, num_templates=1)

    @pytest.mark.parametrize("position", [0, 1])
    def test_an_adapter_for_another_width_is_refused(self, tmp_path: Path, position: int) -> None:
        folders = []
        for name, width in (("right", 7), ("wrong", 3)):
            model = get_peft_model(nn.ModuleDict({"fc1": nn.Linear(width, 5)}), LoraConfig(target_modules=["fc1"]))
            model.get_base_model()["fc1"].lora_B["default"].weight.data.fill_(1.0)
            model.save_pretrained(tmp_path / name)
            folders.insert(position, tmp_path / name)
        with pytest.raises(RecastBankError, match="wrong.*does not fit the model"):
            compress_adapters(nn.ModuleDict({"fc1": nn.Linear(7, 5)}), folders, num_templates=1)
