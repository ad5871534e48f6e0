import subprocess
import sys

import torch
from torch import nn

from mnist_dist.model import build_model, sum_bits
from mnist_dist.task import Task
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tasks.mnist.model import PARAMETERS


def test_the_program_prints_the_table():
    table = subprocess.run([sys.executable, "-m", "mnist_dist.model"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    layers = [(row[0], "".join(row[2:6]), row[-1]) for row in rows if row and row[0].startswith(("conv", "linear"))]
    assert layers == [
        ("conv1", "[-1,32,26,26]", "320"),
        ("conv2", "[-1,64,24,24]", "18,496"),
        ("conv3", "[-1,128,10,10]", "73,856"),
        ("conv4", "[-1,256,8,8]", "295,168"),
        ("linear1", "[-1,50]204,850", "204,850"),
        ("linear2", "[-1,10]510", "510"),
    ]
    assert ["total", "parameters", "593,200"] in rows
    assert ["trainable", "parameters", "593,200"] in rows


def test_a_sum_of_bits_sees_each_number_of_any_type_and_place():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int8, torch.bool):
        for count in (1, 7, 8, 33):
            values = torch.arange(40).to(dtype)[3 : 3 + count]
            sums = sum_bits([values, values.clone(), values.reshape(1, -1).t()])
            assert sums.dtype == torch.int64
            assert len({*sums.tolist()}) == 1
            for place in range(count):
                other = values.clone()
                other[place] = ~other[place] if dtype == torch.bool else other[place] + 1
                assert sum_bits([other]) != sums[0]


def test_the_parameters_are_as_many_as_promised_and_follow_from_the_seed():
    model = build_model(Mnist(), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS == 593_200
    before = torch.random.get_rng_state()
    again, other = build_model(Mnist(), 0).state_dict(), build_model(Mnist(), 1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(again["conv1.weight"], other["conv1.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_samples_do_not_see_each_other():
    images = torch.rand(4, 1, 28, 28)
    model = build_model(Mnist(), 0)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), rtol=1e-4, atol=1e-5)


class WithGaps(Task):
    """A model whose parameters are views of more memory, or of less, than they have numbers; the last is dense."""

    def build_model(self):
        values = torch.linspace(0.5, 1.5, 120)
        views = values[:30].view(3, 10)[:, 0], values.view(4, 30)[:, ::3], values[:3].expand(5, 3), values.view(2, 3, 4, 5).transpose(1, 3)
        return nn.ParameterList([nn.Parameter(view) for view in views])


def test_a_parameter_with_gaps_gets_memory_of_its_own():
    before, after = WithGaps().build_model(), build_model(WithGaps(), 0)
    assert [parameter.untyped_storage().size() // 4 for parameter in after] == [3, 40, 15, 120]
    assert [parameter.shape for parameter in after] == [parameter.shape for parameter in before]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert after[3].stride() == before[3].stride()
