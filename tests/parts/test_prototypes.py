"""Heads of class means: fitted, nearest, stored."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from models import small_vit
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from recast_peft import RecastConfig, RecastConfigError, RecastTargetError, get_recast_model
from recast_peft.parts.discriminant import fit_discriminant_head
from recast_peft.parts.head_building import PrototypeHead
from recast_peft.parts.prototypes import fit_prototypes


class TestPrototypes:
    def test_they_are_the_class_means_and_the_nearest_one_wins(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes"))
        labels = torch.tensor([0, 1, 0, 1, 0, 1])
        features = small_vit(num_classes=0)
        features.load_state_dict(small_vit().state_dict(), strict=False)
        means = torch.stack([features(images)[labels == k].mean(0) for k in (0, 1)])
        fitted = fit_prototypes(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
        assert torch.allclose(fitted, means, atol=1e-5)
        distances = (features(images)[:, None] - means).square().sum(-1)
        assert torch.allclose(model(images), -distances, atol=1e-4)

    def test_a_plain_model_has_the_linear_layer_of_the_same_probabilities(self, images):
        """Prototypes in its file were no classifier to timm and transformers, which drew a random one."""
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes")).eval()
        fit_prototypes(model, [(images, torch.tensor([0, 1, 0, 1, 0, 1]))])
        wanted = model(images).softmax(-1)
        assert wanted.std() > 0.01
        plain = model.merge_and_unload()
        assert torch.allclose(plain(images).softmax(-1), wanted, atol=1e-4)
        again = small_vit(num_classes=2).eval()
        again.load_state_dict(plain.state_dict())
        assert torch.equal(again(images), plain(images))

    def test_a_class_without_an_example_is_named(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3, head_type="prototypes"))
        with pytest.raises(RecastTargetError, match=r"class \[2\]"):
            fit_prototypes(model, [(images[:2], torch.tensor([0, 1]))])

    def test_batches_that_are_no_pairs(self, images):
        """Two pictures would be taken for inputs and labels."""
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes"))
        for batches in ((images[:2], torch.tensor([0, 1])), [images[:2]], [(images, [0, 1])]):
            with pytest.raises(RecastConfigError, match=r"expected a list of \(inputs, labels\) pairs"):
                fit_prototypes(model, batches)
        labels = torch.tensor([0, 1, 0, 1, 0, 1])
        as_tokenizers_give_them = UserDict(x=images, labels=labels)
        assert fit_prototypes(model, [as_tokenizers_give_them]).equal(fit_prototypes(model, [(images, labels)]))

    def test_labels_that_are_no_classes_and_a_task_that_is_not_in_force(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3, head_type="prototypes"), "first")
        for labels in ([3, 0], [-1, 0]):
            with pytest.raises(RecastTargetError, match="numbers of the task's classes"):
                fit_prototypes(model, [(images[:2], torch.tensor(labels))])
        model.add_adapter("second", RecastConfig(num_classes=3))
        model.set_adapter("second")
        with pytest.raises(RecastTargetError, match="set_adapter"):
            fit_prototypes(model, [(images[:3], torch.arange(3))], "first")

    def test_labels_of_any_whole_numbers_and_of_none(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes"))
        labels = torch.tensor([0, 1, 0, 1, 0, 1])
        wanted = fit_prototypes(model, [(images, labels)])
        assert torch.equal(fit_prototypes(model, [(images, labels.to(torch.uint8))]), wanted)
        for odd in (labels.float(), labels == 1, torch.eye(2)[labels], labels[:, None], torch.tensor(1)):
            with pytest.raises(RecastTargetError, match=rf"labels: +{odd.dtype} of shape \({', '.join(map(str, odd.shape))}"):
                fit_prototypes(model, [(images, odd)])
        with pytest.raises(RecastTargetError, match=r"labels: +None"):
            fit_prototypes(model, [{"x": images}])

    @pytest.mark.parametrize("fields", [{"head_type": "prototypes"}, {}], ids=["prototypes", "discriminant"])
    def test_examples_that_are_no_numbers_are_refused(self, fields, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, **fields))
        before = model.state_dict().copy()
        batches = [(images, torch.tensor([0, 1] * 3)), (images / 0, torch.tensor([0, 1] * 3))]
        with pytest.raises(RecastTargetError, match="numbers that are not finite"):
            (fit_prototypes if fields else fit_discriminant_head)(model, batches)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_task_without_prototypes_is_refused(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3))
        with pytest.raises(RecastTargetError, match="head_type='prototypes'"):
            fit_prototypes(model, [(images, torch.zeros(6, dtype=torch.long))])

    def test_they_are_stored_and_never_trained(self, images, tmp_path):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes"))
        fit_prototypes(model, [(images, torch.tensor([0, 1] * 3))])
        assert not any("prototypes" in name for name, _ in model.named_parameters())
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(small_vit(), tmp_path)
        assert isinstance(again.get_base_model().head.modules_to_save["default"], PrototypeHead)
        assert torch.equal(again(images), model(images))

    def test_they_are_part_of_what_torch_saves_without_the_pretrained_weights(self, images):
        trained = StateDictOptions(ignore_frozen_params=True, strict=False)
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes")).eval()
        fit_prototypes(model, [(images, torch.tensor([0, 1] * 3))])
        state = get_model_state_dict(model, options=trained)
        assert not any(key.endswith("patch_embed.proj.weight") for key in state)
        other = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes")).eval()
        assert not torch.equal(other(images), model(images))
        set_model_state_dict(other, state, options=trained)
        assert torch.equal(other(images), model(images))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_they_compute_in_float32_behind_a_model_in_half_precision(self, dtype, images):
        model = get_recast_model(small_vit().to(dtype), RecastConfig(num_classes=2, head_type="prototypes")).eval()
        inside: list[torch.Tensor] = []
        model.get_base_model().head.register_forward_pre_hook(lambda module, args: inside.append(args[0].float()))
        means = fit_prototypes(model, [(images.to(dtype), torch.tensor([0, 1] * 3))])
        assert means.dtype == torch.float32
        logits = model(images.to(dtype))
        assert logits.dtype == dtype
        distances = torch.cdist(inside[-1].double(), means.double()).square()
        torch.testing.assert_close(logits.double(), -distances, rtol=torch.finfo(dtype).eps, atol=1e-4)
