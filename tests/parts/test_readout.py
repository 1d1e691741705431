"""A readout before a task's classifier: what it computes, beside other tasks, saved, merged, and in a mixed batch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import move, run_at_once, small_transformer
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from recast_peft import (
    BiasConfig,
    ReadoutConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastTargetError,
    StoredBank,
    get_recast_model,
    readout_bank,
)
from recast_peft.parts.readout import fitted, pooled, readout_holders

X = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(2))


def vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=0, **options).eval()


@pytest.fixture(scope="module")
def bank() -> StoredBank:
    data = torch.randn(20, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    return readout_bank(vit(), data, progress=False)


def config(bank: StoredBank, seed: int = 0, **fields: Any) -> RecastConfig:
    usual = {"num_classes": 3, "init_weights": False}
    return RecastConfig(seed=seed, partners=[ReadoutConfig(bank=bank)], **{**usual, **fields})


def by_hand(model: PeftModel, bank: StoredBank, name: str, x: Tensor = X) -> Tensor:
    """A task's logits: its weights by the layers, its features by the bank's tensors, its classifier by a product."""
    group = bank.groups["readout"]
    without = copy.deepcopy(model)
    without.set_adapter(name)
    plain = without.base_model.model
    del plain._modules["recast_partners"]
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    seen: dict[str, Tensor] = {}
    for block in group.members[:-1]:

        def note(m: nn.Module, a: tuple, y: Tensor, n: str = block) -> None:
            squares = a[0].square().mean(1)
            seen[n] = (squares + squares.mean(1, keepdim=True) / 1000) ** 0.25

        plain.get_submodule(block).register_forward_hook(note)
    head = plain.get_submodule("head").modules_to_save[name]  # type: ignore[union-attr]
    kept = []
    head.register_forward_pre_hook(lambda m, args: kept.append(args[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        plain(x)
        assert group.grown is not None
        read = torch.cat([*(seen[block] for block in group.members[:-1]), kept[0]], dim=1)
        features = kept[0].new_zeros(kept[0].shape)
        features[:, : len(group.offset)] = read @ group.grown.tensors[0].float().T + group.offset
        return nn.functional.linear(features, head.weight, head.bias)  # type: ignore


def of_texts() -> tuple[PeftModel, Tensor, Tensor]:
    """A model of texts with a readout, token numbers, and a mask that leaves out the last two positions."""
    ids = torch.randint(3, 20, (20, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    text = readout_bank(small_transformer("bert", num_labels=2), {"input_ids": ids, "attention_mask": mask}, progress=False)
    return get_recast_model(small_transformer("bert", num_labels=2), config(text)).eval(), ids, mask


class TestComputing:
    def test_the_classifier_reads_the_mixed_outputs(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        with torch.no_grad():
            torch.testing.assert_close(model(X), by_hand(model, bank, "task"), atol=1e-5, rtol=1e-5)

    def test_a_task_trains_no_number_for_it(self, bank: StoredBank) -> None:
        plain = get_recast_model(vit(), RecastConfig(num_classes=3))
        assert get_recast_model(vit(), config(bank)).get_nb_trainable_parameters()[0] == plain.get_nb_trainable_parameters()[0]

    def test_a_budget_is_spent_beside_it(self, bank: StoredBank) -> None:
        def size(**fields: Any) -> int:
            return get_recast_model(vit(), RecastConfig(max_coefficients=3_000, **fields)).get_nb_trainable_parameters()[0]

        assert size(partners=[ReadoutConfig(bank=bank)]) == size() > 1_000

    def test_gradients_flow_through_all_blocks(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task")
        by_blocks = {}
        for last_alone in (False, True):
            copied = copy.deepcopy(model)
            readout = next(m for m in copied.modules() if type(m).__name__ == "Readout")
            if last_alone:
                readout.templates[:, : -readout.widths[-1]] = 0
            copied(X).square().sum().backward()
            first = next(p for n, p in copied.named_parameters() if "blocks.0.mlp.fc1" in n and p.requires_grad)
            by_blocks[last_alone] = first.grad
        assert not torch.allclose(by_blocks[False], by_blocks[True], rtol=0.1)

    def test_checkpointing_changes_no_gradient(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").train()
        grads = []
        for checkpointed in (False, True):
            model.base_model.model.set_grad_checkpointing(checkpointed)
            model.zero_grad()
            model(X).square().sum().backward()
            assert not any(holder.seen for holder in readout_holders(model))  # nothing of the backward pass is kept
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        for first, second in zip(*grads, strict=True):
            torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)

    def test_blocks_that_record_no_gradient_are_refused(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").train()
        blocks = model.base_model.model.blocks
        forward = blocks.forward
        blocks.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=True)
        with pytest.raises(RecastBankError, match="use_reentrant=False"):
            model(X.clone().requires_grad_())

    def test_switched_off_it_is_the_pretrained_model(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(X), vit()(X))

    def test_it_stays_with_its_classifier_whatever_the_strength(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        fresh = get_recast_model(vit(), config(bank, init_weights=True), "task").eval()
        fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".head." in k}, strict=False)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_scale("task", 0.0)
        with torch.no_grad():
            torch.testing.assert_close(model(X), fresh(X), atol=1e-6, rtol=1e-5)

    def test_padding_changes_nothing(self) -> None:
        model, ids, mask = of_texts()
        with torch.no_grad():
            padded = model(input_ids=ids[:3], attention_mask=mask[:3]).logits
            torch.testing.assert_close(padded, model(input_ids=ids[:3, :6]).logits, atol=1e-6, rtol=1e-5)

    def test_the_mask_of_a_call_that_never_came_to_the_classifier_is_forgotten(self) -> None:
        model, ids, mask = of_texts()
        with torch.no_grad():
            wanted = model(input_ids=ids[:3]).logits
            model.base_model.model.bert(input_ids=ids[:3], attention_mask=mask[:3])
            assert torch.equal(model(input_ids=ids[:3]).logits, wanted)

    def test_compiled_in_one_graph(self) -> None:
        bank = readout_bank(vit(depth=2), torch.cat([X, -X]), progress=False)
        model = get_recast_model(vit(depth=2), config(bank), "task").eval()
        with torch.no_grad():
            compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(X), model(X))

    def test_threads_do_not_read_each_others_blocks(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        with torch.no_grad():
            wanted = [model(X[i : i + 1]) for i in range(4)]
        found: list[list[Tensor]] = [[] for _ in range(4)]

        def call(i: int) -> None:
            with torch.no_grad():
                found[i].extend(model(X[i : i + 1]) for _ in range(5))

        run_at_once([lambda i=i: call(i) for i in range(4)])  # type: ignore[misc]
        assert all(torch.equal(y, wanted[i]) for i in range(4) for y in found[i])

    def test_a_classifier_that_the_task_owns_by_modules_to_save(self, bank: StoredBank, tmp_path: Path) -> None:
        def backbone() -> nn.Module:
            torch.manual_seed(0)
            model = timm.create_model("test_vit", num_classes=10).eval()
            model.load_state_dict(vit().state_dict(), strict=False)
            return model

        given = config(bank, num_classes=None, modules_to_save=["head"])
        model = get_recast_model(backbone(), given, "task").eval()
        with torch.no_grad():
            wanted = by_hand(model, bank, "task")
            torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)
            model.base_model.save_bank(tmp_path / "bank", of="readout")
            model.save_pretrained(tmp_path)
            loaded = PeftModel.from_pretrained(backbone(), tmp_path / "task", "task").eval()
            assert torch.equal(loaded(X), model(X))
            model.add_adapter("plain", RecastConfig(target_modules=["qkv"]))
            model.set_adapter("plain")
            assert torch.equal(model(X), backbone()(X))


class TestPooling:
    def test_squares_do_not_leave_the_range_of_half_precision(self) -> None:
        given = torch.full((1, 3, 2), 1000.0, dtype=torch.float16)
        torch.testing.assert_close(pooled(given), torch.full((1, 2), 1_001_000**0.25))

    def test_positions_that_do_not_count_are_left_out(self) -> None:
        given = torch.tensor([[[3.0], [-4.0], [100.0]]])
        torch.testing.assert_close(pooled(given, torch.tensor([[1, 1, 0]])), torch.tensor([[(12.5 * 1.001) ** 0.25]]))

    @pytest.mark.parametrize("size", [0.0, 1e-30])
    def test_a_neuron_that_is_silent_everywhere_has_a_gradient(self, size: float) -> None:
        given = torch.full((1, 3, 2), size)
        given[0, 0, 1] = 1.0
        pooled(given.requires_grad_()).sum().backward()
        assert given.grad is not None
        assert given.grad.abs().max() < 1

    def test_where_nothing_was_read_yet_there_is_a_gradient_too(self) -> None:
        given = torch.zeros(1, 3, 2, requires_grad=True)
        pooled(given).sum().backward()
        assert given.grad is not None
        assert torch.isfinite(given.grad).all()

    def test_where_the_classifier_reads_each_position_the_layer_is_read_there(self) -> None:
        given = torch.randn(2, 3, 4)
        assert torch.equal(fitted(given, torch.zeros(2, 3, 5), 4), given)
        assert torch.equal(fitted(given, torch.zeros(2, 1, 5), 4), given[:, -1:])  # the last words of a text
        with pytest.raises(RecastTargetError, match=r"reads \(2, 3, 4\) where the classifier reads \(2, 5\)"):
            fitted(given, torch.zeros(2, 5), 4)

    def test_positions_are_not_kept_where_no_gradient_needs_them(self) -> None:
        model, ids, mask = of_texts()
        kept: list[Tensor] = []
        (holder,) = readout_holders(model)
        model.base_model.model.bert.register_forward_hook(lambda *_: kept.extend(holder.seen.take().values()))
        with torch.no_grad(), pytest.raises(RecastTargetError, match="was not called before the classifier"):
            model(input_ids=ids[:3], attention_mask=mask[:3])
        assert sorted(set(tensor.ndim for tensor in kept if tensor.is_floating_point())) == [2]

    def test_pooled_at_once_or_at_the_classifier(self) -> None:
        model, ids, mask = of_texts()
        with torch.no_grad():
            at_once = model(input_ids=ids[:3], attention_mask=mask[:3]).logits
        assert torch.equal(model(input_ids=ids[:3], attention_mask=mask[:3]).logits, at_once)


class TestTasks:
    def test_beside_a_task_that_owns_what_is_read(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        with torch.no_grad():
            wanted = model(X)
            own = RecastConfig(target_modules=["qkv"], modules_to_save=["blocks.1.mlp", "head"], exclude_modules=["blocks.1.*"])
            model.add_adapter("owner", own)
            assert torch.equal(model(X), wanted)
            model.set_adapter("owner")
            assert torch.equal(model.base_model.model.blocks[1].mlp(X[:, 0, :5, :64]), vit().blocks[1].mlp(X[:, 0, :5, :64]))
            model.set_adapter("task")
            assert torch.equal(model(X), wanted)

    def test_on_layers_that_a_compressed_bank_stands_for(self, bank: StoredBank) -> None:
        compressed = {"target_modules": ["fc1", "fc2"], "num_templates": 1}
        model = get_recast_model(vit(), config(bank, **compressed)).eval()
        model.add_adapter("second", config(bank, seed=1, **compressed))
        model.set_adapter("second")
        torch.testing.assert_close(model(X), by_hand(model, bank, "second"))
        other = get_recast_model(vit(1), RecastConfig(**compressed)).eval()
        with pytest.raises(RecastBankError, match="fingerprint"):
            other.add_adapter("second", config(bank, **compressed))

    def test_each_sample_reads_as_its_task_does(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "a")
        model.add_adapter("plain", RecastConfig(init_weights=False, num_classes=5, seed=1))
        model.add_adapter("b", config(bank, seed=2, num_classes=4))
        model.eval()
        with torch.no_grad():
            mixed = model(X, adapter_names=["a", "plain", "b", "__base__"])
            for row, (name, classes) in enumerate((("a", 3), ("plain", 5), ("b", 4))):
                model.set_adapter(name)
                torch.testing.assert_close(mixed[row, :classes], model(X[row : row + 1])[0], atol=1e-5, rtol=1e-4)
                if name != "plain":
                    torch.testing.assert_close(
                        mixed[row, :classes], by_hand(model, bank, name, X[row : row + 1])[0], atol=1e-5, rtol=1e-4
                    )

    def test_tasks_on_one_bank_share_its_templates(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "a")
        model.add_adapter("b", config(bank, seed=2))
        assert sum(type(module).__name__ == "Readout" for module in model.modules()) == 1
        model.delete_adapter("a")
        assert sum(type(module).__name__ == "Readout" for module in model.modules()) == 1

    def test_saved_and_loaded(self, bank: StoredBank, tmp_path: Path) -> None:
        stored = bank.save(tmp_path / "bank")
        model = get_recast_model(vit(), config(stored), "task").eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(vit(), tmp_path / "task", "task").eval()
        with torch.no_grad():
            assert torch.equal(loaded(X), model(X))
        alone = PeftModel.from_pretrained(
            vit(), tmp_path / "task", "task", config=RecastConfig.from_pretrained(tmp_path / "task"), low_cpu_mem_usage=True
        ).eval()
        with torch.no_grad():
            assert torch.equal(alone(X), model(X))

    def test_a_bank_in_memory_is_stored_by_the_model(self, bank: StoredBank, tmp_path: Path) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        model.base_model.save_bank(tmp_path / "bank", of="readout")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(vit(), tmp_path / "task", "task").eval()
        with torch.no_grad():
            assert torch.equal(loaded(X), model(X))

    def test_copied_and_pickled_after_an_unfinished_call(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        model.base_model.model.forward_features(X)  # never reaches the classifier
        with torch.no_grad():
            wanted = model(X)
            assert torch.equal(copy.deepcopy(model)(X), wanted)
            assert torch.equal(pickle.loads(pickle.dumps(model))(X), wanted)

    def test_merged_beside_the_weights_and_never_without_tasks(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "task").eval()
        with torch.no_grad():
            wanted = model(X)
            with pytest.raises(RecastBankError, match=r"merge_adapter\(\) keeps it"):
                model.merge_and_unload()
            model.merge_adapter()
            torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)
            model.unmerge_adapter()
            assert torch.equal(model(X), wanted)
            assert torch.equal(model.unload()(X), vit()(X))

    def test_tasks_that_read_alike_are_added(self, bank: StoredBank) -> None:
        model = get_recast_model(vit(), config(bank), "a")
        model.add_adapter("b", config(bank, seed=2))
        model.add_adapter("plain", RecastConfig(num_classes=3))
        model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum", heads="linear")
        model.eval().set_adapter("sum")
        with torch.no_grad():
            torch.testing.assert_close(model(X), by_hand(model, bank, "sum"), atol=1e-5, rtol=1e-5)
        with pytest.raises(RecastBankError, match="the readout"):
            model.add_weighted_adapter(["a", "plain"], [1, 1], "other", heads="linear")


class TestRefusals:
    def test_a_bank_is_needed_and_one_of_readouts(self, bank: StoredBank) -> None:
        for partner in (ReadoutConfig(), "readout"):
            with pytest.raises(RecastBankError, match="ReadoutConfig needs a bank"):
                get_recast_model(vit(), RecastConfig(num_classes=3, partners=[partner]))
        with pytest.raises(RecastBankError, match=r"give it as RecastConfig\(partners=\[ReadoutConfig"):
            get_recast_model(vit(), RecastConfig(num_classes=3, partners=[BiasConfig(bank=bank)]))

    def test_target_modules_are_the_banks(self) -> None:
        with pytest.raises(RecastConfigError, match="the bank says which modules are read"):
            ReadoutConfig(target_modules=["blocks.0"])

    def test_a_classifier_that_was_trained_on_other_features(self, bank: StoredBank) -> None:
        with pytest.raises(RecastConfigError, match="a classifier of its own"):
            get_recast_model(timm.create_model("test_vit", num_classes=10), config(bank, num_classes=None))

    def test_a_classifier_of_another_task_is_none_of_its_own(self, bank: StoredBank) -> None:
        torch.manual_seed(0)
        plain = timm.create_model("test_vit", num_classes=10)
        plain.load_state_dict(vit().state_dict(), strict=False)
        model = get_recast_model(plain, config(bank), "first")
        with pytest.raises(RecastConfigError, match="a classifier of its own"):
            model.add_adapter("second", config(bank, num_classes=None))
        assert list(model.peft_config) == ["first"]

    def test_a_classifier_that_starts_as_one_of_other_features(self, bank: StoredBank) -> None:
        with pytest.raises(RecastConfigError, match="use head_init='fresh'"):
            get_recast_model(timm.create_model("test_vit", num_classes=3), config(bank, head_init="copy"))

    def test_a_task_that_would_copy_what_lies_around_its_classifier(self) -> None:
        torch.manual_seed(0)
        model, x = timm.create_model("test_convnext", num_classes=10).eval(), torch.randn(4, 3, 64, 64)
        bank = readout_bank(model, x, progress=False)
        assert bank.groups["readout"].members[-1] == "head.fc"
        with pytest.raises(RecastConfigError, match="would copy head, where partners"):
            get_recast_model(model, config(bank, modules_to_save=["head"]))

    def test_a_task_that_would_copy_what_is_read(self, bank: StoredBank) -> None:
        with pytest.raises(RecastConfigError, match=r"would copy blocks\.2\.mlp\.fc2"):
            get_recast_model(vit(), config(bank, target_modules=["qkv"], modules_to_save=["blocks.2"]))

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda: vit(1), RecastBankError, "was made for other pretrained weights; blocks.0.mlp.fc2 differs"),
            (lambda: vit(depth=3), RecastTargetError, "reads blocks.3.mlp.fc2, which this model does not have"),
        ],
        ids=["other weights", "other model"],
    )
    def test_another_model(self, bank: StoredBank, build: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            get_recast_model(build(), config(bank))


class ByKeyword(nn.Module):
    """Layers and a classifier that are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(input=x))
        return self.head(input=x)


def test_a_classifier_that_is_called_by_keyword() -> None:
    torch.manual_seed(0)
    plain = ByKeyword()
    data = torch.randn(20, 8)
    known = readout_bank(plain, data, progress=False)
    group = known.groups["readout"]
    model = get_recast_model(copy.deepcopy(plain), config(known, target_modules=["0"], init_weights=True)).eval()
    with torch.no_grad():
        given = [data]
        for block in plain.blocks:
            given.append(torch.tanh(block(given[-1])))
        read = torch.cat([*given[: len(group.members) - 1], given[-1]], dim=1)
        assert group.grown is not None
        features = nn.functional.pad(read @ group.grown.tensors[0].float().T + group.offset, (0, 8 - len(group.offset)))
        head = model.get_base_model().head.modules_to_save["default"]
        torch.testing.assert_close(model(data), head(features))


def test_the_classifier_that_a_task_type_brings(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return small_transformer("bert", num_labels=2)

    ids = torch.randint(3, 20, (20, 8), generator=torch.Generator().manual_seed(0))
    readout_bank(build(), {"input_ids": ids}, progress=False).save(tmp_path / "bank")
    given = RecastConfig(task_type="SEQ_CLS", partners=[ReadoutConfig(bank=str(tmp_path / "bank"))])
    model = get_recast_model(build(), given, "first").eval()
    model.add_adapter("second", given)
    model.eval()
    alone = {}
    with torch.no_grad():
        for seed, name in enumerate(("first", "second")):
            model.set_adapter(name)
            move(model, seed=seed)
            alone[name] = model(input_ids=ids[:2]).logits
        assert not torch.allclose(alone["first"], alone["second"], atol=1e-3)
        mixed = model(input_ids=ids[:2], adapter_names=["second", "first"]).logits
        torch.testing.assert_close(mixed, torch.stack([alone["second"][0], alone["first"][1]]))
        model.save_pretrained(tmp_path)
        for name, logits in alone.items():
            loaded = PeftModel.from_pretrained(build(), tmp_path / name, name).eval()
            torch.testing.assert_close(loaded(input_ids=ids[:2]).logits, logits)
