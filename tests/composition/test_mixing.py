"""A layer's call in which every sample has its own task: the two ways to compute it, and which of them costs less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import WIDTH, converted, layers_of, randomise, tiny_vit, vit_input
from torch import Tensor, nn

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, TaskPool, get_recast_model
from recast_peft.composition import mixing
from recast_peft.composition.mixed_batch import MixedBatch, mixed_batch
from recast_peft.composition.mixing import PRODUCT_LIMIT, call_mixed, products_are_cheaper

NAMES = ("b", "__base__", "a", "b")
QKV = "blocks.1.attn.qkv"


def two_tasks(**config: Any) -> Any:
    model = converted("a", group_size=2, **config)
    model.add_adapter("b", RecastConfig(target_modules=["qkv"], group_size=2, **config))
    randomise(model, "a", 1)
    randomise(model, "b", 2)
    return model


def by_hand(model: Any, x: Tensor) -> Tensor:
    """Each sample's product with the weight of its own task: W_l + sum_i d_i W_i, over the first two blocks."""
    plain, layer = tiny_vit(), layers_of(model)[QKV]
    own = plain.get_submodule(QKV)
    rows = []
    for sample, name in zip(x, NAMES, strict=True):
        weight = own.weight
        if name != "__base__":
            for block, d in enumerate(layer.recast_coefficients[name][0]):
                weight = weight + d * plain.get_submodule(f"blocks.{block}.attn.qkv").weight
        rows.append(F.linear(sample, weight, own.bias))
    return torch.stack(rows)


@pytest.mark.parametrize("grad", [False, True])
def test_tasks_by_name_are_composed_one_by_one(grad: bool) -> None:
    model, x = two_tasks(), vit_input(4)
    with torch.set_grad_enabled(grad):
        found = call_mixed(layers_of(model)[QKV], MixedBatch(NAMES), (x,), {})
    torch.testing.assert_close(found, by_hand(model, x), rtol=1e-4, atol=1e-5)
    assert found.requires_grad == grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, WIDTH), (4, 3, WIDTH), (4, 2, 3, WIDTH)])
def test_results_are_written_where_they_belong(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, written = mixing.kind_of, []

    def noted(module: nn.Module) -> Any:
        kind: Any = kinds(module)

        def call_into(module: Any, weight: Tensor, x: Tensor, out: Tensor) -> None:
            written.append(len(x))
            kind.call_into(module, weight, x, out)

        return replace(kind, call_into=call_into)

    monkeypatch.setattr(mixing, "kind_of", noted)
    model, x = two_tasks(), torch.randn(shape)
    layer = layers_of(model)[QKV]
    if not bias:
        layer.base_layer.bias = None
    alone = torch.cat([call_mixed(layer, MixedBatch((name,)), (x[i : i + 1],), {}) for i, name in enumerate(NAMES)])
    with torch.no_grad():
        found = call_mixed(layer, MixedBatch(NAMES), (x,), {})
    torch.testing.assert_close(found, alone)
    assert written == [1, 1]  # the first task gives the shape, and its samples lie apart


@pytest.mark.parametrize("how", ["autocast", "torch.func"])
def test_results_that_are_not_written_in_place(how: str) -> None:
    model, x = two_tasks(), vit_input(4)
    layer, batch = layers_of(model)[QKV], MixedBatch(NAMES)
    expected = by_hand(model, x).detach()
    with torch.no_grad():
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found = call_mixed(layer, batch, (x,), {})
            assert found.dtype == torch.bfloat16
        else:
            found = torch.func.vmap(lambda one: call_mixed(layer, batch, (one,), {}))(x[None])[0]
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("products", [False, True])
def test_tasks_of_a_pool_are_the_same_both_ways(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two_tasks(), vit_input(4)
    pool = TaskPool(model)
    for name in "ab":
        pool.add(name, name)
    monkeypatch.setattr(mixing, "products_are_cheaper", lambda *args: products)
    with pool.batch([None if name == "__base__" else name for name in NAMES]), torch.no_grad():
        found = layers_of(model)[QKV](x)
    torch.testing.assert_close(found, by_hand(model, x), rtol=1e-4, atol=1e-5)


def test_what_has_no_coefficients_here_shares_the_rows_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two_tasks(), vit_input(4)
    layer = layers_of(model)[QKV]
    composed = []
    compose = layer.compose
    monkeypatch.setattr(layer, "compose", lambda names: composed.append(names) or compose(names))
    with mixed_batch(MixedBatch(("elsewhere", "__base__", "a", "other"))), torch.no_grad():
        layer(x)
    assert composed == [["__base__"], ["a"]]


@pytest.mark.parametrize(
    ("templates", "positions"),
    # n products do (n - 1) multiplications more with every position, composing touches n weights: p (n - 1) < 64 n
    [(2, 2 * PRODUCT_LIMIT), (3, 3 * PRODUCT_LIMIT // 2), (1, None)],
)
def test_products_are_cheaper_for_few_positions_a_task(templates: int, positions: int | None) -> None:
    module = nn.Linear(WIDTH, WIDTH)

    def are_cheaper(tokens: int, names: tuple[str, ...]) -> bool:
        return products_are_cheaper(module, torch.empty(len(names), tokens, WIDTH), templates, MixedBatch(names))

    if positions is None:  # a lone product is never more than composing
        assert are_cheaper(100_000, ("a",))
        return
    assert are_cheaper(positions - 1, ("a",))
    assert not are_cheaper(positions, ("a",))
    assert are_cheaper(positions - 1, ("a", "b"))  # each task has its own positions
    assert not are_cheaper(positions // 2, ("a", "a"))


def test_what_cannot_be_called_sample_by_sample_is_refused() -> None:
    layer = layers_of(two_tasks())[QKV]
    for args, kwargs in (((), {"input": vit_input(4)}), (([1.0],), {})):
        with pytest.raises(RecastBankError, match=rf"{QKV} \(Linear\) cannot have another task for each sample"):
            call_mixed(layer, MixedBatch(NAMES), args, kwargs)


def test_as_many_samples_as_positions_are_refused_where_positions_may_come_first() -> None:
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=False), 2, enable_nested_tensor=False)
    model = get_recast_model(plain, RecastConfig(target_modules=["linear1"]), "a").eval()
    pool = TaskPool(model)
    pool.add("b")
    x = torch.randn(2, 2, WIDTH)  # (positions, samples, features)
    for tasks in ({"adapter_names": ["a", "__base__"]}, {"task_ids": ["b", None]}):
        with pytest.raises(
            RecastConfigError, match=r"layers.0.self_attn may take positions before samples .* this batch has as many"
        ):
            model(x, **tasks)
        for other in (x[:, :1], x[:1]):  # by their number
            with pytest.raises(RecastConfigError, match="should be the same as the number of inputs"):
                model(other, **{name: given[: other.shape[1]] for name, given in tasks.items()})
    assert model(x).shape == x.shape


class Exchanging(nn.Module):
    """A model whose layers get ``(positions, samples, features)``, as XLNet's and FSMT's do, without a mark of it."""

    def __init__(self, is_around: bool) -> None:
        super().__init__()
        self.is_around = is_around
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_around:  # it exchanges what has been through its layers
            return self.second(self.first(x)).transpose(0, 1).transpose(0, 1)
        x = x.transpose(0, 1).contiguous()
        return self.second(self.first(x)).transpose(0, 1)


@pytest.mark.parametrize("fields", [{}, {"partners": ["bias"]}, {"lora_config": {"r": 2, "target_modules": ["second"]}}])
def test_a_forward_that_exchanges_dimensions_is_not_trusted_with_as_many_samples_as_positions(fields) -> None:
    names = ["a", "__base__", "a"]
    targets = {"target_modules": ["first"], "train_coefficients": not fields, **fields}
    for is_around in (True, False):
        model = get_recast_model(Exchanging(is_around), RecastConfig(**targets), "a").eval()
        with pytest.raises(RecastConfigError, match="Exchanging may take positions before samples"):
            model(vit_input(3)[:, :3], adapter_names=names)
        if is_around:
            with pytest.raises(RecastConfigError, match="should be the same as the number of inputs"):
                model(vit_input(3), adapter_names=names)
            continue
        randomise(model, "a")
        model(vit_input(3), adapter_names=names)  # it shows that samples come first
        x = vit_input(3)[:, :3]
        mixed, own = model(x, adapter_names=names), model(x)
        with model.disable_adapter():
            torch.testing.assert_close(mixed, torch.stack([own[0], model(x)[1], own[2]]))
        assert not torch.allclose(own[1], mixed[1], atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["head"]}])
def test_nested_tensors_are_refused(fields) -> None:
    model = get_recast_model(
        nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, 2)}),
        RecastConfig(target_modules=["first"], **fields),
        "a",
    ).eval()
    called = model.base_model.model["head" if fields else "first"]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)], layout=layout)
        with mixed_batch(MixedBatch(("a", "__base__"))), pytest.raises(RecastConfigError, match="a nested tensor cannot have"):
            called(x)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("grad", [True, False])
def test_a_nested_tensor_of_one_task_computes_as_its_parts(layout, grad) -> None:
    model = get_recast_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), RecastConfig(target_modules=["0"], group_size=1), "a")
    randomise(model, "a")
    parts = [torch.randn(3, WIDTH), torch.randn(5, WIDTH)]
    with torch.set_grad_enabled(grad):
        nested = model(torch.nested.nested_tensor(parts, layout=layout))
        for own, part in zip(nested.unbind(), parts, strict=True):
            torch.testing.assert_close(own, model(part))
