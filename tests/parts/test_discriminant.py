"""Classifiers in closed form: against scikit-learn's discriminant analysis, densities by hand, and what must be refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn
from torch.distributions import MultivariateNormal
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from recast_peft import AdaptFormerConfig, RecastConfig, TaskPool, fit_discriminant_head, get_recast_model
from recast_peft.errors import RecastConfigError, RecastTargetError
from recast_peft.parts.discriminant import discriminants, ledoit_wolf_shrinkage, linear_head
from recast_peft.parts.prototypes import fit_prototypes

COUNTS = (9, 4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 2)

    def features(self, x):
        for layer in self.body:
            x = self.drop(torch.tanh(layer(x)))
        return x

    def forward(self, x):
        return self.head(self.features(x))


def examples(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes of unequal size around means of their own, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    centres = 3 + torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), 5, generator=generator, dtype=torch.float64), labels


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def task(classes: int = 3, **fields) -> PeftModel:
    model = get_recast_model(net(), RecastConfig(target_modules=["body.0", "body.1"], num_classes=classes, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "recast_coefficients" in name:
                parameter.fill_(0.3)
    return model


class TestDiscriminants:
    @pytest.mark.parametrize("shrinkage", [0.0, 0.2, 0.9, 1, "auto"])
    def test_the_posteriors_are_those_of_scikit_learn(self, shrinkage):
        features, labels = examples()
        weight, bias = discriminants(features, labels, 3, shrinkage)
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, labels)
        others, _ = examples(1)
        mine = (others @ weight.T + bias).softmax(1)
        assert torch.allclose(mine, torch.from_numpy(peer.predict_proba(others)), atol=1e-9)

    def test_the_logits_are_log_densities_with_the_shares_of_the_classes(self):
        features, labels = examples()
        means = torch.stack([features[labels == k].mean(0) for k in range(3)])
        away = features - means[labels]
        within = away.T @ away / len(features)
        covariance = 0.7 * within + 0.3 * torch.eye(5, dtype=torch.float64) * within.trace() / 5
        densities = torch.stack([MultivariateNormal(m, covariance).log_prob(features) for m in means], dim=1)
        expected = (densities + torch.tensor(COUNTS).log()).log_softmax(1)
        weight, bias = discriminants(features, labels, 3, 0.3)
        assert torch.allclose((features @ weight.T + bias).log_softmax(1), expected, atol=1e-9)
        assert torch.allclose(weight.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-9)

    @pytest.mark.parametrize(("count", "size"), [(5, 3), (20, 40), (100, 7), (2, 9), (1, 4), (30, 1)])
    def test_the_shrinkage_is_that_of_scikit_learn(self, count, size):
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(count, size, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, size)
        x = x - x.mean(0)
        assert ledoit_wolf_shrinkage(x) == pytest.approx(ledoit_wolf(x.numpy())[1], abs=1e-9)

    def test_chosen_shrinkage_is_better_than_a_fixed_one_where_features_are_many(self):
        generator = torch.Generator().manual_seed(0)
        size, classes = 200, 5
        mix = torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.05, size)
        centres = 3 * torch.randn(classes, size, generator=generator, dtype=torch.float64)

        def draw(count):
            labels = torch.arange(count) % classes
            return centres[labels] + torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix, labels

        train, (x, y) = draw(40), draw(2000)
        right = {}
        for shrinkage in ("auto", 0.2):
            weight, bias = discriminants(*train, classes, shrinkage)
            right[shrinkage] = float(((x @ weight.T + bias).argmax(1) == y).double().mean())
        assert right["auto"] > right[0.2] + 0.02

    def test_features_that_never_change_do_no_harm(self):
        features, labels = examples()
        constant = torch.full((len(labels), 1), 4.0, dtype=torch.float64)
        wide = torch.cat([features, constant], dim=1)
        weight, bias = discriminants(wide, labels, 3)
        assert not weight[:, 5].any()
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(wide, labels)
        assert torch.allclose((wide @ weight.T + bias).softmax(1), torch.from_numpy(peer.predict_proba(wide)), atol=1e-9)
        weight, bias = discriminants(wide, labels, 3, 0.0)
        alone, alone_bias = discriminants(features, labels, 3, 0.0)
        assert not weight[:, 5].any()
        assert torch.allclose(weight[:, :5], alone)
        assert torch.allclose(bias, alone_bias)
        with pytest.raises(RecastTargetError, match="all features are the same in all examples"):
            discriminants(torch.ones(len(labels), 5), labels, 3)
        with pytest.raises(RecastTargetError, match="1 features are the same in all examples of a class"):
            discriminants(torch.cat([features, labels[:, None].double()], dim=1), labels, 3, 0.0)

    @pytest.mark.parametrize("shrinkage", [0.0, "auto"])
    def test_the_size_of_a_feature_does_not_matter(self, shrinkage):
        features, labels = examples()
        sizes = torch.tensor([1, 1e-9, 1e6, 1, 1e-3], dtype=torch.float64)
        weight, bias = discriminants(features, labels, 3, shrinkage)
        other, other_bias = discriminants(features * sizes, labels, 3, shrinkage)
        assert torch.allclose(other * sizes, weight)
        assert torch.allclose(other_bias, bias)

    def test_too_few_examples_need_shrinkage(self):
        features, labels = examples()
        rows = torch.tensor([0, 1, 9, 10, 13, 14])  # three degrees of freedom for five features
        with pytest.raises(RecastTargetError, match="6 examples of 3 classes with 5 features"):
            discriminants(features[rows], labels[rows], 3, 0.0)
        assert all(part.isfinite().all() for part in discriminants(features[rows], labels[rows], 3, 0.1))

    def test_without_examples_there_is_nothing_to_fit(self):
        with pytest.raises(RecastTargetError, match="batches hold no example"):
            fit_discriminant_head(task(), [])

    @pytest.mark.parametrize("shrinkage", [-0.1, 1.1, "most", None, True, float("nan")])
    def test_a_share_is_expected(self, shrinkage):
        with pytest.raises(RecastConfigError, match="shrinkage="):
            fit_discriminant_head(task(), [], shrinkage=shrinkage)
        with pytest.raises(RecastConfigError, match="shrinkage="):
            discriminants(*examples(), 3, shrinkage)


class TestHeadsOfTasks:
    def test_a_module_that_is_kept_in_evaluation_mode_stays_in_it(self):
        x, labels = examples()
        model = task().train()
        dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
        dropout.eval()
        fit_discriminant_head(model, [(x, labels)])
        assert model.training
        assert not dropout.training

    def test_it_is_the_head_of_the_tasks_own_features_and_is_stored(self, tmp_path):
        x, labels = examples()
        model = task()
        before = model.eval()(x)
        model.train()  # with dropout: features are those of evaluation
        head = fit_discriminant_head(model, [(x[:8], labels[:8]), (x[8:], labels[8:])])
        assert model.training
        features = model.eval().get_base_model().features(x).detach()
        assert not torch.allclose(features, net().eval().features(x).detach())
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels)
        assert torch.allclose(model(x).softmax(1), torch.from_numpy(peer.predict_proba(features)), atol=1e-9)
        assert not torch.allclose(model(x), before)
        assert head.weight.requires_grad
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(net(), tmp_path).eval()
        assert torch.equal(again(x), model(x))

    def test_what_is_worse_on_examples_held_out_is_not_taken(self):
        x, labels = examples()
        good, bad = task(), task()
        trained = fit_discriminant_head(good, [(x, labels)])
        before = trained.weight.clone()
        shuffled = (labels + 1) % 3
        with pytest.warns(UserWarning, match=r"(?s)worse than the classifier .*trained: +66.7%.*discriminants: 33.3%"):
            fit_discriminant_head(good, [(x, shuffled)], held_out=[(x[labels == 0], labels[labels == 0])])
        assert torch.equal(trained.weight, before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            taken = fit_discriminant_head(bad, [(x, labels)], held_out=[(x, labels)])
        assert torch.equal(taken.weight, before)

    def test_other_tasks_and_the_models_own_head_stay(self):
        x, labels = examples()
        model = task()
        model.add_adapter("second", RecastConfig(target_modules=["body.0", "body.1"], num_classes=3))
        first = model.eval()(x)
        model.set_adapter("second")
        fit_discriminant_head(model, [(x, labels)], "second")
        model.set_adapter("default")
        assert torch.equal(model.eval()(x), first)
        with model.disable_adapter():
            assert torch.equal(model(x), net().eval()(x))

    def test_a_task_of_another_method(self):
        x, labels = examples()
        model = get_peft_model(
            net(), LoraConfig(r=2, target_modules=["body.0"], modules_to_save=["head"], init_lora_weights=False)
        )
        model.double()
        fit_discriminant_head(model, [(x, labels % 2)])
        features = model.eval().get_base_model().features(x).detach()
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels % 2)
        assert (model(x).argmax(1).numpy() == peer.predict(features)).all()
        with model.disable_adapter():
            assert torch.equal(model(x), net().eval()(x))

    @pytest.mark.parametrize(
        ("config", "kind", "part"),
        [
            (BertConfig, BertForSequenceClassification, "classifier"),
            (RobertaConfig, RobertaForSequenceClassification, "classifier.out_proj"),
        ],
    )
    def test_a_head_of_several_layers_gets_a_new_last_one(self, config, kind, part):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        model = get_recast_model(kind(config(vocab_size=30, max_position_embeddings=20, **sizes)), RecastConfig(num_classes=3))
        head, _, last = part.partition(".")
        own = getattr(model.get_base_model(), head).modules_to_save["default"]
        other = {n: p.clone() for n, p in model.named_parameters() if not n.endswith(f"{last}.weight" if last else "weight")}
        ids = torch.randint(2, 30, (12, 6))
        batch = {"input_ids": ids, "labels": torch.arange(12) % 3}
        assert fit_discriminant_head(model, [batch]) is own.get_submodule(last)
        for name, parameter in model.named_parameters():
            if name in other and not name.endswith("bias"):
                assert torch.equal(parameter, other[name])
        found = model.eval()(input_ids=ids).logits.argmax(1)
        assert (found == batch["labels"]).float().mean() > 0.5  # a third by chance
        fitted = own.get_submodule(last).weight.clone()
        fit_discriminant_head(model, [({"input_ids": ids}, batch["labels"])])
        assert torch.equal(own.get_submodule(last).weight, fitted)


class TestRefusals:
    def test_tasks_without_a_linear_classifier(self):
        x, labels = examples()
        plain, beside = (
            get_recast_model(net(), RecastConfig(target_modules=["body.0", "body.1"], partners=partners))
            for partners in (None, [AdaptFormerConfig(target_modules=["body"])])  # a bottleneck is no classifier
        )
        for model in (plain, beside, task(head_type="prototypes")):
            with pytest.raises(RecastTargetError, match="owns 0 linear classifiers"):
                fit_discriminant_head(model, [(x, labels)])

    def test_a_name_that_is_empty_is_not_the_active_task(self):
        with pytest.raises(RecastTargetError, match="task '' owns 0 linear classifiers"):
            linear_head(task(), "")

    def test_a_classifier_without_biases(self):
        model = task()
        model.get_base_model().head.modules_to_save["default"].bias = None
        with pytest.raises(RecastTargetError, match="owns 0 linear classifiers with biases"):
            linear_head(model)

    @pytest.mark.parametrize("fields", [{}, {"head_type": "prototypes"}], ids=["linear", "prototypes"])
    def test_a_task_whose_classifier_is_not_in_the_place_of_the_first_ones(self, fields):
        """It was refused, as not active or without prototypes."""
        x, labels = examples()
        base = net()
        base.second_head = nn.Linear(5, 2).double()
        base.forward = lambda x: (base.head(base.features(x)), base.second_head(base.features(x)))
        at = {"target_modules": ["body.0", "body.1"], "num_classes": 3, **fields}
        model = get_recast_model(base, RecastConfig(**at, head_module="head"))
        model.add_adapter("second", RecastConfig(**at, head_module="second_head"))
        model.set_adapter("second")
        (fit_prototypes if fields else fit_discriminant_head)(model, [(x, labels)])
        own = base.second_head.modules_to_save["second"]
        assert next(iter(own.state_dict().values())).abs().max() > 0.1  # a fresh one is near zero

    def test_a_task_that_is_not_active(self):
        x, labels = examples()
        model = task()
        model.add_adapter("second", RecastConfig(target_modules=["body.0", "body.1"], num_classes=3))
        with pytest.raises(RecastTargetError, match=r"set_adapter\('second'\)"):
            fit_discriminant_head(model, [(x, labels)], "second")
        with model.disable_adapter(), pytest.raises(RecastTargetError, match="not active"):
            fit_discriminant_head(model, [(x, labels)])

    def test_tasks_that_are_not_trained(self, tmp_path):
        x, labels = examples()
        model = task()
        pool = TaskPool(model)
        pool.add("first", "default")
        with pool.use("first"), pytest.raises(RecastTargetError, match="then add it to the pool"):
            fit_discriminant_head(model, [(x, labels)])  # would write to a copy
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(net(), tmp_path)
        with pytest.raises(RecastTargetError, match="is_trainable=True"):
            fit_discriminant_head(again, [(x, labels)])
        fit_discriminant_head(PeftModel.from_pretrained(net(), tmp_path, is_trainable=True), [(x, labels)])

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.zeros(19, dtype=torch.long), r"class \[1, 2\]"),
            (torch.arange(19), "0 to 2"),
            (torch.arange(18) % 3, "vector"),
        ],
    )
    def test_labels_that_do_not_fit_leave_the_head_as_it_was(self, labels, message):
        x, _ = examples()
        model = task()
        head = linear_head(model)
        before = head.weight.clone(), head.bias.clone()
        with pytest.raises(RecastTargetError, match=message):
            fit_discriminant_head(model, [(x, labels)])
        assert torch.equal(head.weight, before[0])
        assert torch.equal(head.bias, before[1])
        assert not head._forward_pre_hooks

    def test_more_than_one_vector_for_each_example(self):
        x, labels = examples()
        with pytest.raises(RecastTargetError, match=r"its input: \(19, 2, 5\)"):
            fit_discriminant_head(task(), [(torch.stack([x, x], dim=1), labels)])
