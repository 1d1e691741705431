"""CLR: the convolutions that it follows."""

from __future__ import annotations

import pytest
import torch
from models import outputs, seeded
from partner_cases import WEIGHTS, image, is_partners, learn, tiny_cnn
from safetensors.torch import load_file
from torch import nn

from recast_peft import CLRConfig, RecastConfig, get_recast_model
from recast_peft.names import modules_of
from recast_peft.parts.clr import Reprogramming
from recast_peft.parts.partner import TaskPartners


class TestPlaces:
    def test_clr_can_leave_out_convolutions_of_one_by_one(self):
        model = get_recast_model(tiny_cnn(), RecastConfig(partners=[CLRConfig(pointwise_kernel_size=None)]))
        assert [holder.place for holder in modules_of(model, TaskPartners)] == ["stem", "conv1", "conv2"]

    def test_keep_their_partner_when_a_later_task_composes_the_weight(self):
        config = RecastConfig(target_modules=["conv1"], partners=[CLRConfig()])
        model = get_recast_model(tiny_cnn(), config, "first").eval()
        learn(model, "first")
        live = outputs(model, image())
        model.add_adapter("second", RecastConfig(target_modules=["conv2", "stem"]))
        learn(model, "second", seed=2)
        assert torch.equal(outputs(model, image()), live)
        model.set_adapter("second")
        second = outputs(model, image())
        mixed = outputs(model, image(), adapter_names=["second", "first", "first"])
        torch.testing.assert_close(mixed, torch.cat([second[:1], live[1:]]), rtol=1e-4, atol=1e-5)

    def test_may_lie_in_a_model_that_calls_all_of_its_children(self):
        backbone = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
        expected = outputs(backbone, image())
        model = get_recast_model(backbone, RecastConfig(target_modules=["0", "2"], partners=["clr"])).eval()
        assert torch.equal(outputs(model, image()), expected)
        learn(model)
        assert not torch.allclose(outputs(model, image()), expected, atol=1e-2)


class TestFiles:
    def test_name_places_as_the_plain_model_does(self, tmp_path):
        get_recast_model(tiny_cnn(), RecastConfig(target_modules=["conv1"], partners=["clr"])).save_pretrained(tmp_path)
        keys = {key for key in load_file(tmp_path / WEIGHTS) if is_partners(key)}
        assert keys == {f"base_model.model.recast_partners.{n}.clr.offset" for n in ("stem", "conv1", "conv2", "point")}


class TestTheConvolution:
    def test_is_the_identity_and_its_offset(self):
        follower = Reprogramming(channels=2, size=3)
        y = torch.tensor([[[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]])  # two channels of one row
        assert torch.equal(follower(y, y), y)
        follower.offset.data[0, 0, 1, 2] = 10.0  # of the first channel: ten times what lies to the right
        assert follower(y, y).tolist() == [[[[1.0 + 20.0, 2.0 + 30.0, 3.0]], [[4.0, 5.0, 6.0]]]]

    @pytest.mark.parametrize(("kernel", "size"), [(3, 5), (1, 3), ((1, 3), 5)])
    def test_has_a_size_of_its_own_after_one_by_one(self, kernel, size):
        config = CLRConfig(kernel_size=5, pointwise_kernel_size=3)
        follower = config.build(nn.Conv2d(2, 4, kernel), None, torch.Generator())
        assert follower.offset.shape == (4, 1, size, size)
