"""A task file that is wrong in any way ends in one clear message; its code is run only where its user named it."""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from processes import Programs, Train, run_ranks
from safetensors.torch import load_file

from launch import jobs, submit, sweep
from mnist_dist import evaluate, export, report
from mnist_dist.config import make_config, parse_command_line
from mnist_dist.errors import UserError
from mnist_dist.record import list_newest_first
from mnist_dist.source import find_changed, find_task
from mnist_dist.task import Task

SANE = """
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from mnist_dist.task import Data, Tally, Task, option
from mnist_dist.tasks.classification import Classification

class Mine(Classification):
    class_names = ("even", "odd")
    width: int = option(8, "width of the hidden layer", ge=1)

    def load(self):
        numbers = torch.arange(60.0)
        inputs = torch.stack([torch.sin(numbers), numbers / 60, numbers % 2], dim=1)
        return Data(TensorDataset(inputs, (numbers % 2).long()), TensorDataset(inputs[:20], (numbers[:20] % 2).long()))

    def build_model(self):
        return nn.Sequential(nn.Linear(3, self.width), nn.ReLU(), nn.Linear(self.width, 2))
"""
SHORT = ["--steps", "4", "--batch_size", "10", "--log_every", "1", "--wandb", "disabled", "--report", "false", "--precision", "fp32"]
SHORT += ["--threads", "1"]  # the same bits are those of as many threads, and a process that is alone would take two


def write(path, text=SANE, *changes):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


LOAD, BUILD = "    def load(self):", "    def build_model(self):"
SEQUENTIAL = "nn.Sequential(nn.Linear(3, self.width), nn.ReLU(), nn.Linear(self.width, 2))"
LOSSES = "    def losses(self, model, batch, drawn):\n        return {}\n\n    def build_model(self):"
MEASURE = "    def measure(self, sums):\n        return super().measure(sums) | {{{}}}\n\n    def build_model(self):"
DESCRIBE = "    def describe(self, measures):\n        return {}\n\n    def build_model(self):"
TABULATE = "    def tabulate(self, measures):\n        return ('class', 'n'), [('a', 1, 'note')]\n\n    def build_model(self):"
TALLY = "    def tally(self, model, batch):\n        {}\n\n    def build_model(self):"
DATA = "return Data(TensorDataset(inputs, (numbers % 2).long()), TensorDataset(inputs[:20], (numbers[:20] % 2).long()))"
MANY = DATA.replace("[:20]", "")  # of which an evaluation has several batches

STORED = """class Stored(Dataset):
    rows = [torch.ones(3) for _ in range(60)]
    own = torch.Generator()

    def __len__(self):
        return 60

    def __getitem__(self, index):
        row = self.rows[index]
        {}
        return row, index % 2


class Mine"""

LATE = """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), None

    def forward(self, inputs):
        hidden = self.body(inputs)
        self.head = self.head or nn.Linear(8, 2)
        return self.head(hidden)


class Mine"""

# What is wrong, the changes that make it so, words of the message, the exit status.
LISTED = """    def collate(self, samples):
        return [row for row, _ in samples], torch.tensor([label for _, label in samples])

    def losses(self, model, batch, drawn):
        return super().losses(model, (torch.stack([*batch[0]]), batch[1]), drawn)

    def tally(self, model, batch):
        batch[0][0].mul_(0.9)
        return super().tally(model, (torch.stack([*batch[0]]), batch[1]))

"""

WRONG = [
    (
        "load_ahead fails",
        [(LOAD, "    def load_ahead(self):\n        1 / 0\n\n    def load(self):")],
        ["in load_ahead", "ZeroDivisionError"],
        2,
    ),
    ("a syntax error", [(LOAD, "    def load(self:")], ["was imported", "line 12", "SyntaxError"], 2),
    (
        "an import that fails",
        [("import torch\n", "import torch\nimport nothing_of_this_name\n")],
        ["ModuleNotFoundError", "nothing_of_this_name"],
        2,
    ),
    ("an exception while it is imported", [("class Mine", "1 / 0\nclass Mine")], ["broken.py:", "ZeroDivisionError"], 2),
    ("an exit while it is imported", [("class Mine", "raise SystemExit(0)\nclass Mine")], ["was imported", "SystemExit"], 2),
    ("no class", [("class Mine(Classification)", "class Mine")], ["must define one class", "found: none"], 2),
    ("two classes", [("class Mine(", "class Other(Classification):\n    pass\n\nclass Mine(")], ["found: Mine, Other"], 2),
    ("no load", [(LOAD, "    def lode(self):")], ["class Mine lacks load"], 2),
    (
        "an option of another type",
        [("width: int = option(8", "width: list[int] = option([8]")],
        ["width", "allowed: bool, int, float, str"],
        2,
    ),
    (
        "sizes that fail",
        [(LOAD, "    @property\n    def sizes(self):\n        return len(None)\n\n    def load(self):")],
        ["in sizes", "TypeError"],
        2,
    ),
    ("a number too many", [(SEQUENTIAL, "nn.Linear(3, 3)")], ["numbers of shape [4, 3]", "there are 2 classes"], 2),
    (
        "facts without the classes",
        [('    class_names = ("even", "odd")\n', "    def find_facts(self, train):\n        return {'size': 3}\n\n")],
        ["there are no class names", "super().find_facts(train)"],
        2,
    ),
    ("an option without a default", [("    width: int", "    depth: int\n    width: int")], ["depth has no default"], 2),
    ("an option that clashes", [("    width: int", "    batch_size: int = 3\n    width: int")], ["batch_size", "every training has"], 2),
    ("an option that hides a method", [("    width: int", "    draw: int = 3\n    width: int")], ["draw"], 2),
    ("a default that is not allowed", [("option(8,", "option(0,")], ["failed with its defaults", "width: Input should be"], 2),
    ("an option without a type", [("    width: int", "    depth = 3\n    width: int")], ["`depth = 3` (", "ClassVar[int] = 3"], 2),
    ("an option that is a module", [("    width: int", "    net: nn.Module = None\n    width: int")], ["Unable", "ClassVar[int] = 3"], 2),
    (
        "a constructor with an attribute",
        [(LOAD, f"    def __init__(self):\n        super().__init__()\n        self.count = 60\n\n{LOAD}")],
        ["in __init__", "count: ", "a task holds its options alone"],
        2,
    ),
    ("a constructor that fails", [(LOAD, f"    def __init__(self, depth):\n        pass\n\n{LOAD}")], ["with its defaults", "depth"], 2),
    (
        "load fails",
        [("numbers = torch.arange(60.0)", "numbers = torch.load('/no/such/file')")],
        ["in load", "broken.py:", "No such file"],
        2,
    ),
    ("load returns something else", [(DATA, "return inputs, numbers")], ["load returned tuple", "Data(train, test)"], 2),
    (
        "an iterable data set",
        [(DATA, "return Data(type('Stream', (IterableDataset,), {'__iter__': None})(), TensorDataset(inputs))")],
        ["IterableDataset"],
        2,
    ),
    ("no samples", [("torch.arange(60.0)", "torch.arange(0.0)")], ["hold no samples"], 2),
    ("build_model fails", [(SEQUENTIAL, "nn.Linear(3, 'x')")], ["in build_model", "broken.py:", "TypeError"], 2),
    ("build_model returns no module", [(SEQUENTIAL, "lambda inputs: inputs")], ["build_model returned function", "torch.nn.Module"], 2),
    (
        "draw without its seed",
        [(BUILD, "    def draw(self, seed, step, size):\n        return torch.rand(size)\n\n    def build_model(self):")],
        ["draw gives other numbers for the same seed and step"],
        2,
    ),
    ("load sets an attribute", [(DATA, f"self.count = 60\n        {DATA}")], ["in load", "count: ", "a task holds its options alone"], 2),
    (
        "load sets a private attribute",
        [(DATA, f"self._count = 60\n        {DATA}")],
        ["in load", " _count: ", "a task holds its options alone"],
        2,
    ),
    (
        "too few losses of a whole batch",
        [(BUILD, LOSSES.format("super().losses(model, batch, drawn)[len(batch[0]) // 10 :]"))],
        ["has shape [9] for 10 samples"],
        2,
    ),
    (
        "a mask in a checkpoint",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model.register_buffer('mask', torch.full((2,), -torch.inf))\n        return model",
            )
        ],
        ["mask", "not finite", "persistent=False"],
        2,
    ),
    (
        "a frozen part that is not in the state",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model[0].requires_grad_(False)\n"
                "        model.register_state_dict_post_hook(lambda m, state, *_: [state.pop(n) for n in list(state) if n < '1'].clear())\n"
                "        return model",
            )
        ],
        ["cannot load what its state_dict gives", 'Missing key(s) in state_dict: "0.weight", "0.bias"'],
        2,
    ),
    (
        "a trained part that is not loaded",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        load = model.load_state_dict\n"
                "        model.load_state_dict = lambda state: load({n: t for n, t in state.items() if n != '0.bias'}, strict=False)\n"
                "        return model",
            )
        ],
        ["0.bias of its model is another one once the model has loaded what its state_dict gave"],
        2,
    ),
    (
        "an average that is not loaded",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}.append(nn.BatchNorm1d(2))\n        load = model.load_state_dict\n"
                "        model.load_state_dict = lambda state: load({n: state[n] for n in state if n != '3.running_mean'}, strict=False)\n"
                "        return model",
            )
        ],
        ["3.running_mean of its model is another one once the model has loaded what its state_dict gave"],
        2,
    ),
    (
        "a state in fewer digits",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model[0].register_state_dict_post_hook(lambda m, state, prefix, _: "
                "state.update({prefix + 'weight': m.weight.detach().half()}))\n        return model",
            )
        ],
        ["0.weight of its model is another one once the model has loaded what its state_dict gave"],
        2,
    ),
    (
        "the last mask in a checkpoint",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model.register_buffer('mask', torch.zeros(2))\n"
                "        model.register_forward_hook(lambda m, _, out: m.mask.copy_(torch.tensor([0, -torch.inf])).clamp(min=0) + out)\n"
                "        return model",
            )
        ],
        ["mask of its model holds values that are not finite after the first forward pass", "persistent=False"],
        2,
    ),
    (
        "a buffer that no weights file holds",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model.register_buffer('odd', torch.zeros(2).cdouble())\n        return model",
            )
        ],
        ["odd in the state_dict", "torch.complex128", "persistent=False"],
        2,
    ),
    ("an option of the program", [("    width: int", "    print_config: int = 3\n    width: int")], ["print_config"], 2),
    ("an option called help", [("    width: int", "    help: int = 3\n    width: int")], ["option help", "another"], 2),
    (
        "load that times out",
        [("numbers = torch.arange(60.0)", "raise RuntimeError('download timed out')")],
        ["in load", "download timed out"],
        2,
    ),
    (
        "measures in rows that there are not",
        [("    width: int", "    in_rows = ('loss', 'nothing')\n    width: int")],
        ["it lacks nothing"],
        2,
    ),
    ("a lazy layer", [("nn.Linear(3,", "nn.LazyLinear(")], ["has no shape yet", "0.weight"], 2),
    ("a model without memory", [(SEQUENTIAL, SEQUENTIAL + ".to('meta')")], ["0.weight", "on meta; expected torch.float32 on the CPU"], 2),
    ("half precision", [(SEQUENTIAL, SEQUENTIAL + ".half()")], ["0.weight", "torch.float16", "expected torch.float32"], 2),
    ("the shapes do not fit", [("nn.Linear(3,", "nn.Linear(4,")], ["in losses", "RuntimeError", "shapes"], 2),
    (
        "labels outside of the classes",
        [("(numbers % 2).long()),", "(numbers % 5).long()),")],
        ["in losses", "IndexError", "out of bounds"],
        2,
    ),
    (
        "losses averaged",
        [(BUILD, LOSSES.format("nn.functional.cross_entropy(model(batch[0]), batch[1])"))],
        ["losses has shape [] for 4 samples; expected [4]", "reduction='none'"],
        2,
    ),
    ("losses that are no tensor", [(BUILD, LOSSES.format("0.5"))], ["losses returned float"], 2),
    ("losses detached", [(BUILD, LOSSES.format("model(batch[0]).sum(1).detach()"))], ["do not depend on the model's parameters"], 2),
    ("losses that are not finite", [(BUILD, LOSSES.format("model(batch[0]).sum(1) / 0"))], ["expected finite numbers"], 2),
    (
        "an embedding with sparse gradients",
        [
            (SEQUENTIAL, "nn.Sequential(nn.Embedding(2, 2, sparse=True))"),
            (BUILD, LOSSES.format("nn.functional.cross_entropy(model(batch[1]), batch[1], reduction='none')")),
        ],
        ["0.weight gets a sparse gradient; expected a dense one (an embedding with sparse=False)"],
        2,
    ),
    (
        "a checkpoint within the model that asks for more than a gradient",
        [
            (
                BUILD,
                LOSSES.format("model[2](torch.utils.checkpoint.checkpoint(model[1], model[0](batch[0]), use_reentrant=True)).sum(1)"),
            ),
            ("import torch\n", "import torch\nimport torch.utils.checkpoint\n"),
        ],
        ["failed in the backward pass of its losses", "use_reentrant=True"],
        2,
    ),
    (
        "extra state",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model.__class__ = type('Odd', (nn.Sequential,), "
                "{'get_extra_state': lambda s: 1, 'set_extra_state': lambda s, x: None})\n        return model",
            )
        ],
        ["_extra_state", "expected tensors alone"],
        2,
    ),
    (
        "draw with other rows",
        [(BUILD, "    def draw(self, seed, step, size):\n        return torch.zeros(3)\n\n    def build_model(self):")],
        ["draw returned [3]"],
        2,
    ),
    (
        "a tensor data set that reads several samples in a way of its own",
        [
            ("class Mine", "class Doubled(TensorDataset):\n    def __getitems__(self, indices):\n        return []\n\n\nclass Mine"),
            (DATA, DATA.replace("TensorDataset(inputs[", "Doubled(inputs[")),
        ],
        ["its test data are a TensorDataset with a method __getitems__, which nobody would call"],
        2,
    ),
    (
        "draw with sparse rows",
        [(BUILD, "    def draw(self, seed, step, size):\n        return torch.eye(size).to_sparse()\n\n    def build_model(self):")],
        ["draw returned [10, 10]; expected a dense tensor"],
        2,
    ),
    (
        "tally that counts something else",
        [
            (
                BUILD,
                TALLY.format("found = super().tally(model, batch)\n        return Tally(found.sums.flip(0), found.scores, found.outputs)"),
            )
        ],
        ["the first of tally's sums counted", "expected the number of samples"],
        2,
    ),
    (
        "scores without an order",
        [(BUILD, TALLY.format("found = super().tally(model, batch)\n        return Tally(found.sums, found.scores > 0, found.outputs)"))],
        ["the scores of tally are", "expected numbers with an order"],
        2,
    ),
    (
        "test samples that are changed as they are read",
        [
            ("class Mine", STORED.format("row.add_(1.0)")),
            (DATA, "return Data(TensorDataset(inputs, (numbers % 2).long()), Stored())"),
        ],
        ["the first 4 samples of the test data differ when they are read again"],
        2,
    ),
    (
        "test samples that tally changes",
        [
            ("class Mine", STORED.format("pass")),
            (DATA, "return Data(Stored(), Stored())"),
            (BUILD, LISTED + BUILD),
        ],
        ["the first 4 samples of the test data differ when they are read again, after tally had them"],
        2,
    ),
    (
        "tally that returns something else",
        [(BUILD, TALLY.format("return torch.zeros(3)"))],
        ["tally returned Tensor", "float64"],
        2,
    ),
    (
        "tally that counts twice",
        [(BUILD, TALLY.format("tally = super().tally(model, batch); return Tally(tally.sums * (1 + (len(batch[0]) > 4)))"))],
        ["counted 40 samples", "and 20 were evaluated"],
        1,
    ),
    (
        "measure without its best",
        [(BUILD, "    def measure(self, sums):\n        return {'loss': 1.0}\n\n    def build_model(self):")],
        ["it lacks accuracy"],
        2,
    ),
    (
        "a measure that is a tensor",
        [
            (
                BUILD,
                MEASURE.format("'loss': sums[1] / sums[0]"),
            )
        ],
        ["measure must return numbers", "loss is tensor("],
        2,
    ),
    (
        "an accuracy in percent",
        [(BUILD, MEASURE.format("'accuracy': 55.0"))],
        ["measure must return numbers", "accuracy is 55.0"],
        2,
    ),
    (
        "a layer that the first pass makes",
        [
            (f"return {SEQUENTIAL}", "return Net()"),
            ("class Mine", LATE),
        ],
        ["the first forward pass adds head.bias", "build_model"],
        2,
    ),
    (
        "tally with a slip",
        [(BUILD, TALLY.format("return self.nothing"))],
        ["failed in tally", "has no attribute 'nothing'", "broken.py"],
        2,
    ),
    ("a table with a cell too many", [(BUILD, TABULATE)], ["failed in tabulate", "a row of the table has 3 cells, and its header 2"], 2),
    ("describe with a slip", [(BUILD, DESCRIBE.format("self.nothing"))], ["failed in describe", "has no attribute 'nothing'"], 2),
    (
        "tally with more sums for some batches",
        [
            (DATA, MANY),
            (
                BUILD,
                TALLY.format(
                    "tally = super().tally(model, batch); return Tally(torch.cat([tally.sums, tally.sums[:batch[0][0, 1] > 0.1]]))"
                ),
            ),
        ],
        ["tally has [6, 7] sums for different batches; expected as many for each"],
        1,
    ),
    ("sparse samples", [("TensorDataset(inputs,", "TensorDataset(inputs.to_sparse(),")], ["a TensorDataset of a sparse tensor"], 2),
    (
        "measure with a slip",
        [(BUILD, "    def measure(self, sums):\n        return {'loss': float(sums[99])}\n\n    def build_model(self):")],
        ["failed in measure", "IndexError", "broken.py"],
        2,
    ),
    (
        "a tally that needs gradients",
        [(BUILD, TALLY.format("model(batch[0]).sum().backward(); return super().tally(model, batch)"))],
        ["failed in tally", "with torch.enable_grad()"],
        2,
    ),
    (
        "samples that are changed as they are read",
        [
            (
                "class Mine",
                STORED.format("row[int(torch.randint(3, ()))] += 1"),
            ),
            (DATA, "return Data(Stored(), Stored())"),
        ],
        ["sample 0 or 1 of the training data differs when it is read again", "clone it first"],
        2,
    ),
    (
        "samples that are drawn once and kept",
        [
            ("class Mine", STORED.format("row = self.kept[index] = self.kept[index] if index in self.kept else row + torch.rand(3)")),
            ("own = torch.Generator()", "kept = {}"),
            (DATA, "return Data(Stored(), Stored())"),
        ],
        ["is drawn at random when it is first read, and kept"],
        2,
    ),
    (
        "samples of a generator of their own",
        [("class Mine", STORED.format("row = row + torch.rand(3, generator=self.own)")), (DATA, "return Data(Stored(), Stored())")],
        ["sample 0 or 1 of the training data differs when it is read again", "of torch, numpy and random alone"],
        2,
    ),
    (
        "a collate that changes its samples",
        [
            ("class Mine", STORED.format("pass")),
            (DATA, "return Data(Stored(), Stored())"),
            (
                BUILD,
                "    def collate(self, samples):\n        samples[0][0].mul_(0.9)\n        return super().collate(samples)\n\n" + BUILD,
            ),
        ],
        ["sample 0 or 1 of the training data differs when it is read again", "clone it first"],
        2,
    ),
    (
        "data in memory that require gradients",
        [(DATA, f"inputs = nn.Linear(3, 3)(inputs)\n        {DATA}")],
        ["its training data still hold the graph", "x.detach()"],
        2,
    ),
    (
        "samples that require gradients",
        [
            ("class Mine", STORED.format("pass").replace("torch.ones(3)", "nn.Linear(3, 3)(torch.ones(3))")),
            (DATA, "return Data(Stored(), Stored())"),
        ],
        ["its training data still hold the graph", "x.detach()"],
        2,
    ),
    (
        "a batch that leaves its samples behind",
        [
            ("class Mine", STORED.format("pass").replace("class Mine", "class Bag(dict):\n    def to(self, device): pass\n\n\nclass Mine")),
            (DATA, "return Data(Stored(), Stored())"),
            (BUILD, "    def collate(self, samples):\n        return Bag(rows=samples[0][0])\n\n" + BUILD),
        ],
        ["again", "collate makes a Bag, whose method `to` returns NoneType; expected the batch on the device"][1:],
        2,
    ),
    (
        "a batch of a kind that is made in another way",
        [
            ("class Mine", STORED.format("pass").replace("class Mine", "from collections import defaultdict\n\n\nclass Mine")),
            (DATA, "return Data(Stored(), Stored())"),
            (BUILD, "    def collate(self, samples):\n        return defaultdict(list, rows=samples[0][0])\n\n" + BUILD),
        ],
        ["as its batch, a defaultdict, was sent to a device: TypeError"],
        2,
    ),
    (
        "a buffer that becomes another type",
        [
            (SEQUENTIAL, "Widening()"),
            (
                "class Mine",
                "class Widening(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.out = nn.Linear(3, 2)\n"
                "        self.register_buffer('mean', torch.zeros(()))\n\n    def forward(self, inputs):\n"
                "        self.mean = 0.9 * self.mean + inputs.double().mean()\n        return self.out(inputs)\n\n\nclass Mine",
            ),
        ],
        ["the first forward pass makes mean of its model float64, which was float32, and no checkpoint would fit: change it in place"],
        2,
    ),
    (
        "a scripted model",
        [("return nn.Seq", "return torch.jit.script(nn.Linear(3, 2))\n        return nn.Seq")],
        ["build_model returned a RecursiveScriptModule of torch.jit; expected a module that may hold one"],
        2,
    ),
    (
        "a model with a generator of its own",
        [
            (BUILD, LOSSES.format("model(batch[0]).sum(1) * torch.rand(1, generator=OWN)")),
            ("class Mine", "OWN = torch.Generator()\n\n\nclass Mine"),
        ],
        ["two passes over the same samples", "losses that differ", "register_buffer"],
        2,
    ),
    ("losses that are sparse", [(BUILD, LOSSES.format("model(batch[0]).sum(1).to_sparse()"))], ["losses returned a sparse or nested"], 2),
    (
        "losses that are nested",
        [(BUILD, LOSSES.format("torch.nested.as_nested_tensor(list(model(batch[0]).sum(1)))"))],
        ["losses returned a sparse or nested"],
        2,
    ),
    (
        "a sparse buffer",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model.register_buffer('graph', torch.eye(3).to_sparse(), persistent=False)\n"
                "        return model",
            )
        ],
        ["the buffer graph of its model is sparse or nested"],
        2,
    ),
    ("losses that are counts", [(BUILD, LOSSES.format("model(batch[0]).sum(1).long()"))], ["losses", "int64; expected floating-point"], 2),
    (
        "a collate that would not be called",
        [(BUILD, "    def collate(self, samples):\n        return samples\n\n    def build_model(self):")],
        ["has a method collate, and data in a TensorDataset"],
        2,
    ),
    (
        "parameters that share memory",
        [
            (
                f"return {SEQUENTIAL}",
                "model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2))\n"
                "        model[1].weight = nn.Parameter(model[0].weight.t())\n        return model",
            )
        ],
        ["0.weight and 1.weight of its model share memory"],
        2,
    ),
    (
        "buffers that share memory",
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model.register_buffer('one', torch.zeros(2))\n"
                "        model.register_buffer('two', model.one)\n"
                "        model.register_forward_hook(lambda m, _, out: out + 0 * m.one.add_(1))\n"
                "        return model",
            )
        ],
        ["one and two of its model share memory, and each forward pass changes them"],
        2,
    ),
    (
        "losses that write into the data",
        [
            ("class Mine", STORED.format("pass")),
            (DATA, "return Data(Stored(), Stored())"),
            (BUILD, "    def collate(self, samples):\n        return samples\n\n    def build_model(self):"),
            (
                BUILD,
                LOSSES.format(
                    "torch.cat([super(Mine, self).losses(model, (x.mul_(1.1)[None], torch.tensor([y])), None) for x, y in batch])"
                ),
            ),
        ],
        ["losses writes into its batch, and collate hands on what the data set stores"],
        2,
    ),
    (
        "an exception in the words of a lost rank",
        [
            (
                BUILD,
                LOSSES.format(
                    "(_ for _ in ()).throw(RuntimeError('it timed out')) if drawn[0] > 2 else super().losses(model, batch, None)"
                ),
            ),
            (BUILD, "    def draw(self, seed, step, size):\n        return torch.full((size,), float(step))\n\n    def build_model(self):"),
        ],
        ["in step 4", "broken.py", "RuntimeError: it timed out"],
        1,
    ),
    (
        "an exception in the middle",
        [
            (
                BUILD,
                LOSSES.format(
                    "(_ for _ in ()).throw(ValueError('mine')) if model.training and drawn[0] > 2 else super().losses(model, batch, None)"
                ).replace(
                    "    def losses",
                    "    def draw(self, seed, step, size):\n        return torch.full((size,), float(step))\n\n    def losses",
                ),
            )
        ],
        ["in step 4", "ValueError: mine", "broken.py"],
        1,
    ),
]


@pytest.mark.parametrize(("changes", "words", "status"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_task_ends_in_one_message_before_anything_is_made(tmp_path, changes, words, status):
    name = write(tmp_path / "broken.py", SANE, *changes)
    text = run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]), expect=status)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert all(word in errors[0] for word in words), errors
    assert "Traceback" not in text
    if "while it was imported" in errors[0] or any(
        word in words[0] for word in ("in load", "losses", "failed in", "again", "passes", "lacks", "measure", "first forward")
    ):
        assert not (tmp_path / "run").exists()


HOOKED = """model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        for parameter in model.parameters():
            parameter.{}
        return model

    def unused(self):
        return """


def test_a_gradient_that_is_clipped_by_a_hook_is_of_this_world(tmp_path):
    clips = write(
        tmp_path / "clips.py", SANE, ("return nn.Seq", HOOKED.format("register_hook(lambda found: found.clamp(-0.01, 0.01))") + "nn.Seq")
    )
    text = run_ranks(tmp_path / "logs", Train(["--task", clips, "--run_dir", str(tmp_path / "clips"), *SHORT]))
    assert "this world: a step is the same only on as many processes, because the gradient of 0.weight is not the sum" in text
    halves = write(tmp_path / "halves.py", SANE, ("return nn.Seq", HOOKED.format("register_hook(lambda found: found / 2)") + "nn.Seq"))
    assert "any world: " in run_ranks(tmp_path / "logs", Train(["--task", halves, "--run_dir", str(tmp_path / "halves"), *SHORT]))


@pytest.mark.slow
def test_a_hook_for_the_gradient_once_it_is_added_up_is_for_one_process(tmp_path):
    hook = "register_post_accumulate_grad_hook(lambda own: [own.grad.clamp_(-0.01, 0.01)].clear())"
    name = write(tmp_path / "late.py", SANE, ("return nn.Seq", HOOKED.format(hook) + "nn.Seq"))
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    for world, more in ((2, []), (1, ["--shards", "2"])):
        text = run_ranks(tmp_path / "logs", Train([*arguments, *more]), world, expect=2)
        assert "0.weight has a hook for its gradient once it is added up" in text
    text = run_ranks(tmp_path / "logs", Train(arguments))
    assert "because a hook changes the gradient of 0.weight once it is added up" in text


def test_an_evaluation_that_fails_on_a_few_samples_is_a_warning_at_the_start(tmp_path):
    failing = "if len(batch[0]) < 5:\n            raise ValueError('no curve of so few')\n        return super().tally(model, batch)"
    name = write(tmp_path / "curve.py", SANE, (BUILD, TALLY.format(failing)))
    text = run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]), 2)
    assert text.count("failed in tally on the first 4 samples, maybe for there being so few: ") == 1
    assert "ValueError: no curve of so few" in text
    name = write(tmp_path / "ratio.py", SANE, (BUILD, MEASURE.format("'of_five': 1 / (sums[0].item() - 4)")))
    text = run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "ratio"), *SHORT]))
    assert text.count("failed in measure on the first 4 samples, maybe for there being so few: ") == 1


def test_a_warning_of_what_a_task_imports_is_no_mistake(tmp_path):
    name = write(
        tmp_path / "warns.py", SANE, ("import torch\n", "import warnings\nimport torch\nwarnings.warn('a newer version is out')\n")
    )
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]))


def test_a_method_of_the_model_is_named_where_several_processes_cannot_call_it(tmp_path):
    model = "model = nn.Sequential(nn.Linear(3, 2))\n        model.encode = model.forward\n        return model"
    encode = LOSSES.format("nn.functional.cross_entropy(model.encode(batch[0]), batch[1], reduction='none')")
    name = write(tmp_path / "encodes.py", SANE, (f"return {SEQUENTIAL}", model), (BUILD, encode))
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    text = run_ranks(tmp_path / "logs", Train(arguments), 2, expect=1)
    assert "losses may call the model itself alone, and no method or attribute of it" in text
    assert "has no attribute 'encode'" in text
    assert "Traceback" not in text


SHARDED = [*SHORT, "--shards", "2", "--optimizer", "sgd", "--momentum", "0", "--learning_rate", "0.1"]


def test_an_infinite_number_in_a_mask_stays_one_with_shards(tmp_path):
    masked = f"model = {SEQUENTIAL}\n        model.register_buffer('mask', torch.full((2,), -torch.inf), persistent=False)\n"
    masked += "        model.register_forward_hook(lambda m, _, out: out + m.mask.clamp(min=0))\n        return model"
    name = write(tmp_path / "masked.py", SANE, (f"return {SEQUENTIAL}", masked))
    losses = LOSSES.format("super().losses(model, batch, drawn) + (0 if model.mask.isneginf().all() else float('nan'))")
    write(tmp_path / "masked.py", (tmp_path / "masked.py").read_text(), (BUILD, losses))
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHARDED]))


def test_an_infinite_number_that_becomes_finite_does_so_with_shards(tmp_path):
    least = f"model = {SEQUENTIAL}\n        model.register_buffer('least', torch.tensor(torch.inf), persistent=False)\n"
    least += "        model.register_forward_hook(lambda m, _, out: out + 0 * m.least.copy_(torch.minimum(m.least, out.detach().min())))\n"
    name = write(tmp_path / "least.py", SANE, (f"return {SEQUENTIAL}", least + "        return model"))
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHARDED]))
    assert json.loads((tmp_path / "run/result.json").read_text())["test/loss"] > 0


TRACKED = """model = Tracking()
        return model

class Tracking(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("low", torch.full((3,), torch.finfo(torch.float32).max))
        self.register_buffer("high", torch.full((3,), -1e9, dtype=torch.float64))
        self.register_buffer("still", torch.tensor([1 / 9, 1e300, -torch.inf], dtype=torch.float64), persistent=False)
        self.register_buffer("longest", torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64))
        self.register_buffer("short", torch.tensor([1 / 9, 1e38]))

    def forward(self, inputs):
        if self.training:
            self.low.copy_(torch.minimum(self.low, inputs.amin(0)))
            self.high.copy_(torch.maximum(self.high, inputs.amax(0)))
            self.longest.copy_(self.longest if inputs.amax() > 0.9 else torch.ones(()))  # in some shards alone
        assert self.still.tolist() == [1 / 9, 1e300, -torch.inf]
        return self.inner(inputs)
"""


def test_buffers_of_any_size_are_averaged_over_shards_without_loss(tmp_path):
    name = write(tmp_path / "tracks.py", SANE, (f"return {SEQUENTIAL}", TRACKED))
    files = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        run_ranks(tmp_path / "logs", Train(["--task", name, *SHORT, "--shards", "7", "--run_dir", str(folder)]), size)
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    found = load_file(tmp_path / "2/model.safetensors")
    assert found["longest"] < torch.finfo(torch.float64).max / 1.1
    # A few samples in each shard: its extremes lie between those of all data, and their mean does, too.
    assert (found["low"] >= -1).all()
    assert (found["low"] <= found["high"]).all()
    assert (found["high"] <= 1).all()
    # What no pass moves keeps its bits (the task looks at one in float64). Seven ninths added up, and a seventh of that, are no ninth.
    assert torch.equal(found["short"], torch.tensor([1 / 9, 1e38]))


LAYOUTS = {
    "transposed": "model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))\n"
    "        model[0].weight = nn.Parameter(torch.randn(3, 8).t())\n        return model",
    "channels last, in three dimensions": "return nn.Sequential(nn.Unflatten(1, (3, 1, 1, 1)), nn.ConstantPad3d(1, 0.5), "
    "nn.Conv3d(3, 4, 3).to(memory_format=torch.channels_last_3d), nn.Flatten(), nn.Linear(4, 2))",
    "expanded": f"model = {SEQUENTIAL}\n        model.register_buffer('scale', torch.full((1,), 0.5).expand(2))\n"
    "        model.register_forward_hook(lambda m, _, out: out * m.scale)\n        return model",
}


OPTIMIZERS = ("muon", "sgd", "adamw")


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        pytest.param(layout, optimizer, marks=[] if row == column else pytest.mark.slow)
        for row, layout in enumerate(LAYOUTS)
        for column, optimizer in enumerate(OPTIMIZERS)
    ],
)
def test_a_model_of_any_layout_is_trained_alike_with_shards_and_resumed(tmp_path, layout, optimizer):
    name = write(tmp_path / "laid_out.py", SANE, (f"return {SEQUENTIAL}", LAYOUTS[layout]))
    # No momentum, by which rounding would grow: what is wrong is wrong by much.
    arguments = ["--task", name, *SHORT, "--optimizer", optimizer, "--learning_rate", "0.01", "--checkpoint_every", "2"]
    for folder, more in (("plain", ()), ("shards", ("--shards", "2"))):
        run_ranks(tmp_path / "logs", Train([*arguments, *more, "--run_dir", str(tmp_path / folder)]))
    plain, shards = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "shards"))
    assert all(torch.allclose(value, shards[key], atol=1e-4) for key, value in plain.items())
    for file in ("result.json", "model.safetensors"):
        (tmp_path / "shards" / file).unlink()
    run_ranks(tmp_path / "logs", Train([*arguments, "--shards", "2", "--run_dir", str(tmp_path / "shards")]))
    assert all(value.equal(shards[key]) for key, value in load_file(tmp_path / "shards/model.safetensors").items())


def test_initial_weights_are_those_of_rank_zero_also_with_shards(tmp_path):
    told = TALLY.format("print('weights', model[0].weight.sum().item(), flush=True)\n        return super().tally(model, batch)")
    for kind, draws in (
        ("seeded", "torch.randn(8, 3).numpy()"),
        ("not", "np.random.default_rng().normal(size=(8, 3))"),
    ):
        own = f"model = {SEQUENTIAL}\n        model[0].weight.data = torch.from_numpy({draws}).float()\n        return model"
        changes = [(f"return {SEQUENTIAL}", own), (BUILD, told), ("import torch\n", "import numpy as np\nimport torch\n")]
        name = write(tmp_path / f"{kind}.py", SANE, *changes)
        texts = [
            run_ranks(tmp_path / "logs", Train(["--task", name, *SHARDED, "--run_dir", str(tmp_path / f"{kind}{size}")]), size)
            for size in (1, 2)
        ]
        assert "Warning" not in "".join(texts)
        weights = [re.findall("weights (.*)", text) for text in texts]
        assert {*Counter(weights[1]).values()} == {2}  # both ranks have the same at each evaluation
        assert ({*weights[1]} == {*weights[0]}) is (kind == "seeded")


def test_samples_that_reach_no_parameter_are_trained_alike_in_any_pieces(tmp_path):
    apart = "torch.stack([super(Mine, self).losses(model, (x[None], y[None]), None)[0] if y else x.new_zeros(()) for x, y in zip(*batch)])"
    name = write(tmp_path / "apart.py", SANE, (BUILD, LOSSES.format(apart)))
    arguments = ["--task", name, *SHORT, "--optimizer", "sgd", "--learning_rate", "0.1"]
    for folder, more in (("whole", ()), ("pieces", ("--micro_batch", "1")), ("shards", ("--shards", "10"))):
        run_ranks(tmp_path / "logs", Train([*arguments, *more, "--run_dir", str(tmp_path / folder)]))
    whole, *others = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "pieces", "shards"))
    assert all(torch.allclose(value, other[key], atol=1e-6) for other in others for key, value in whole.items())
    few = write(tmp_path / "few.py", SANE, (BUILD, LOSSES.format(apart.replace("if y", "if x[1] < 0.03"))))  # the first two alone
    assert "any world: " in run_ranks(tmp_path / "logs", Train(["--task", few, *SHORT, "--run_dir", str(tmp_path / "few")]))


def test_samples_that_see_each_other_a_little_are_seen_to(tmp_path):
    coupled = "model(batch[0]).square().sum(1) + 0.02 * model(batch[0]).mean(0).square().sum()"
    name = write(tmp_path / "coupled.py", SANE, (BUILD, LOSSES.format(coupled)))
    text = run_ranks(tmp_path / "logs", Train(["--task", name, *SHORT, "--run_dir", str(tmp_path / "run")]))
    assert "this world" in text
    assert "in the losses the samples of a batch see each other" in text


def test_a_loss_that_is_not_finite_blames_no_rank_where_each_has_the_loss_of_all(tmp_path):
    losses = LOSSES.format("super().losses(model, batch, None) * (float('nan') if model.training and drawn[0] > 1 else 1)")
    drawn = "    def draw(self, seed, step, size):\n        return torch.full((size,), float(step))\n\n"
    name = write(tmp_path / "nan.py", SANE, (BUILD, drawn + losses))
    text = run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHARDED]), expect=1)
    assert "the loss is nan at step 3; " in text


def test_two_parameters_that_share_a_gradient_are_trained_alike_in_any_pieces(tmp_path):
    shared = "return Sum()"
    model = (
        "class Sum(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.base = nn.Parameter(torch.zeros(2, 3))\n"
    )
    model += "        self.delta = nn.Parameter(torch.zeros(2, 3))\n\n    def forward(self, inputs):\n"
    model += "        return inputs @ (self.base + self.delta).T\n\n\nclass Mine"
    name = write(tmp_path / "shared.py", SANE, (f"return {SEQUENTIAL}", shared), ("class Mine", model))
    for folder, more in (("whole", ()), ("pieces", ("--micro_batch", "1"))):
        run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / folder), *SHARDED, *more]))
    whole, pieces = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "pieces"))
    assert all(torch.allclose(value, pieces[key], atol=1e-6) for key, value in whole.items())
    assert whole["base"].abs().max() > 0.01


@dataclass(frozen=True)
class TrainOnOwnOrder(Train):
    """A rank whose file system gives the files in an order of its own."""

    def __call__(self):
        os.environ["ORDER"] = os.environ.get("RANK", "0")
        return super().__call__()


FILES = """class Files(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.rows[index]


class Mine"""


def test_ranks_with_other_data_to_evaluate_are_refused(tmp_path):
    kept = "TensorDataset(inputs[:20], (numbers[:20] % 2).long())"
    listed = "[(row, int(number) % 2) for row, number in zip(inputs[:20], numbers[:20])]"
    for form in (kept, f"Files({listed})"):
        own = f"{form.replace('[:20]', '[:20].flip(0)')} if os.environ.get('ORDER', '0') == '1' else {form})"
        name = write(tmp_path / "tests.py", SANE, (f"{kept})", own), ("import torch\n", "import os\nimport torch\n"), ("class Mine", FILES))
        arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
        text = run_ranks(tmp_path / "logs", TrainOnOwnOrder(arguments), 2, expect=2)
        assert "rank zero has other data than rank 1 (test data)" in text
        assert not (tmp_path / "run").exists()


def test_ranks_with_other_data_are_refused(tmp_path):
    own = "import os\n        numbers = torch.arange(60.0) if os.environ['ORDER'] == '0' else torch.arange(60.0).flip(0)"
    name = write(tmp_path / "listed.py", SANE, ("numbers = torch.arange(60.0)", own))
    text = run_ranks(tmp_path / "logs", TrainOnOwnOrder(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]), 2, expect=None)
    assert "rank zero has other data than rank 1 (test data, training data)" in text
    assert not (tmp_path / "run").exists()


FACTS = """    def find_facts(self, train):
        order = int(os.environ.get("ORDER", "0"))
        return {"order": order, "mean": train.tensors[0].mean().item() + 1e-7 * order}

    def build_model(self):"""


@pytest.mark.slow
def test_a_run_has_the_same_facts_and_the_same_shapes_on_all_ranks_and_in_all_starts(tmp_path, monkeypatch):
    name = write(tmp_path / "facts.py", SANE, (BUILD, FACTS), ("import torch\n", "import os\nimport torch\n"))
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    text = run_ranks(tmp_path / "logs", TrainOnOwnOrder(arguments), 2, expect=None)
    assert "rank zero has other data than rank 1 (the fact order)" in text  # the mean is the same but for rounding
    run_ranks(tmp_path / "logs", Train(arguments))
    (tmp_path / "run/result.json").unlink()
    text = run_ranks(tmp_path / "logs", Train(arguments), environ={"ORDER": "1"}, expect=2)
    assert "it was trained on other data: its facts were others (order)" in text
    wide = write(
        tmp_path / "wide.py",
        SANE,
        (SEQUENTIAL, SEQUENTIAL.replace("self.width", "(8 + int(os.environ['ORDER']))")),
        ("import torch\n", "import os\nimport torch\n"),
    )
    text = run_ranks(tmp_path / "logs", TrainOnOwnOrder(["--task", wide, "--run_dir", str(tmp_path / "wide"), *SHORT]), 2, expect=2)
    assert "rank zero has another model than rank 1 (0.weight is [8, 3] there, and [9, 3] here)" in text
    assert not (tmp_path / "wide").exists()


NUMPY_FACTS = """    def find_facts(self, train):
        return {"mean": np.mean([1.0, 2.0]), "words": [*np.unique(["b", "a"])], "counts": Counter(["a"])}

    def build_model(self):"""


def test_facts_that_are_numpys_own_are_those_that_a_checkpoint_gives_back(tmp_path):
    more = ("import torch\n", "from collections import Counter\nimport numpy as np\nimport torch\n")
    name = write(tmp_path / "facts.py", SANE, (BUILD, NUMPY_FACTS), more)
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    run_ranks(tmp_path / "logs", Train(arguments))
    (tmp_path / "run/result.json").unlink()
    assert "from step 4 of 4" in run_ranks(tmp_path / "logs", Train(arguments))
    found = json.loads((tmp_path / "run/result.json").read_text())
    assert (found["mean"], found["words"], found["counts"]) == (1.5, ["a", "b"], {"a": 1})


def test_a_measure_that_draws_is_the_same_on_any_number_of_processes(tmp_path):
    name = write(tmp_path / "drawn.py", SANE, (BUILD, MEASURE.format("'drawn': torch.rand(()).item()")), (DATA, MANY))
    found = []
    for size in (1, 2):
        arguments = ["--task", name, "--shards", "2", "--run_dir", str(tmp_path / str(size)), *SHORT]
        run_ranks(tmp_path / "logs", Train(arguments), size)
        found.append(json.loads((tmp_path / str(size) / "result.json").read_text())["test/drawn"])
    assert found[0] == found[1]


class Counting(Task):
    width: int = 3

    @cached_property
    def words(self):
        return self.width * ["word"] + self.facts.get("words", [])


def test_a_cached_property_follows_the_facts():
    task = Counting(width=1)
    assert task.words == ["word"]
    known = task.with_facts({"words": ["one"]})
    assert (known.width, known.words) == (1, ["word", "one"])
    assert known.with_facts({}).words == task.words == ["word"]


@pytest.mark.slow
def test_a_model_has_its_parts_in_one_order_on_all_ranks_and_in_all_starts(tmp_path):
    """Gradients and the optimizer's state go by the order: those of one part would be another's."""
    ordered = "model = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))\n        turn = int(os.environ.get('ORDER', '0'))\n"
    ordered += "        model = nn.ModuleDict({f'part{(place + turn) % 3}': part for place, part in enumerate(model)})\n"
    ordered += "        model.forward = lambda inputs: model['part0'](inputs) + 2 * model['part1'](inputs) + 3 * model['part2'](inputs)\n"
    name = write(
        tmp_path / "ordered.py",
        SANE,
        ("import torch\n", "import os\nimport torch\n"),
        (f"return {SEQUENTIAL}", f"{ordered}        return model"),
    )
    arguments = ["--task", name, *SHORT, "--run_dir", str(tmp_path / "run"), "--checkpoint_every", "2"]
    for more in ([], ["--shards", "2"]):
        text = run_ranks(tmp_path / "logs", TrainOnOwnOrder([*arguments, *more]), 2, expect=2)
        assert "rank zero has another model than rank 1: its parts are in another order (part0.weight is there where part1.weight" in text
    assert not (tmp_path / "run").exists()
    run_ranks(tmp_path / "logs", Train(arguments))
    (tmp_path / "run/result.json").unlink()
    text = run_ranks(tmp_path / "logs", Train(arguments), environ={"ORDER": "1"}, expect=2)
    assert "it is of another model; its parts are in another order (part0.weight is there where part1.weight is here)" in text
    assert "a set of words has another one in each process: sort it" in text
    run_ranks(tmp_path / "logs", Train(arguments))


@pytest.mark.slow
def test_what_is_trained_is_the_same_in_all_starts_and_all_steps(tmp_path):
    chosen = f"model = {SEQUENTIAL}\n        model[0].requires_grad_('FROZEN' not in os.environ)\n        return model"
    name = write(tmp_path / "chosen.py", SANE, ("import torch\n", "import os\nimport torch\n"), (f"return {SEQUENTIAL}", chosen))
    arguments = ["--task", name, *SHORT, "--run_dir", str(tmp_path / "run"), "--checkpoint_every", "2"]
    run_ranks(tmp_path / "logs", Train(arguments))
    (tmp_path / "run/result.json").unlink()
    text = run_ranks(tmp_path / "logs", Train(arguments), environ={"FROZEN": "1"}, expect=2)
    assert "it is of a run that trains other parameters; use another run_dir, or the same code:" in text
    assert "0.weight: trained there, not asked for" in text
    assert "damaged" not in text
    run_ranks(tmp_path / "logs", Train(arguments))
    for start, then, verbs in (("False", "True", "begins to be"), ("True", "False", "is no longer")):
        later = f"model = {SEQUENTIAL}\n        model[0].requires_grad_({start})\n        passes = torch.zeros(1)\n"
        later += "        model.register_buffer('passes', passes)\n"
        later += "        def count(module, _):\n            module.passes += 1\n            if module.passes > 2:\n"
        later += f"                module[0].requires_grad_({then})\n        model.register_forward_pre_hook(count)\n"
        name = write(tmp_path / "later.py", SANE, (f"return {SEQUENTIAL}", f"{later}        return model"))
        for more in ([], ["--shards", "2"]):
            text = run_ranks(tmp_path / "logs", Train(["--task", name, *SHORT, *more, "--run_dir", str(tmp_path / "later")]), expect=2)
            assert f"in step 3 0.weight {verbs} trained; what is trained must be the same in all steps" in text
            shutil.rmtree(tmp_path / "later")


def test_other_data_to_evaluate_on_are_told_when_a_run_is_resumed(tmp_path):
    changed = DATA.replace("inputs[:20],", "inputs[:20] * int(os.environ.get('TIMES', '1')),")
    name = write(tmp_path / "changed.py", SANE, ("import torch\n", "import os\nimport torch\n"), (DATA, changed))
    arguments = ["--task", name, *SHORT, "--run_dir", str(tmp_path / "run"), "--checkpoint_every", "2"]
    run_ranks(tmp_path / "logs", Train(arguments))
    for times in ("1", "5"):
        (tmp_path / "run/result.json").unlink()
        text = run_ranks(tmp_path / "logs", Train(arguments), environ={"TIMES": times})
        words = "the test data are others than those of the checkpoint: measures before and after step 4 cannot be compared"
        assert (words in text) is (times == "5")


def test_a_piece_of_one_sample_is_told_where_a_layer_needs_two(tmp_path):
    name = write(tmp_path / "normed.py", SANE, (SEQUENTIAL, "nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))"))
    arguments = ["--task", name, *SHORT, "--batch_size", "9", "--micro_batch", "4", "--run_dir", str(tmp_path / "run")]
    text = run_ranks(tmp_path / "logs", Train(arguments), expect=None)
    assert "Expected more than 1 value per channel" in text
    assert "a part of the batch is one sample: batch_size, micro_batch, shards and the number of processes say how it is cut" in text


def test_a_frozen_parameter_is_resumed(tmp_path):
    frozen = f"model = {SEQUENTIAL}\n        model[0].requires_grad_(False)\n        return model"
    name = write(tmp_path / "frozen.py", SANE, (f"return {SEQUENTIAL}", frozen))
    for optimizer in ("muon", "sgd", "adamw"):
        arguments = ["--task", name, "--run_dir", str(tmp_path / optimizer), "--optimizer", optimizer, "--checkpoint_every", "2", *SHORT]
        run_ranks(tmp_path / "logs", Train(arguments))
        (tmp_path / optimizer / "result.json").unlink()
        run_ranks(tmp_path / "logs", Train(arguments))


TABLE = """class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(2, 3, max_norm=9.0), nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, inputs):
        self.seen += 1
        return self.out(self.table((inputs[:, 2] > 0.5).long()) + inputs)


class Mine"""


@pytest.mark.slow
def test_a_forward_pass_that_changes_what_is_trained_is_for_one_process(tmp_path):
    clamped = f"model = {SEQUENTIAL}\n        model.register_forward_pre_hook(lambda m, _: (m[0].weight.data.mul_(0.9), None)[1])\n"
    names = [write(tmp_path / "clamped.py", SANE, (f"return {SEQUENTIAL}", f"{clamped}        return model"))]
    names += [write(tmp_path / "table.py", SANE, (SEQUENTIAL, "Table()"), ("class Mine", TABLE))]
    for name, what in zip(names, ("0.weight", "table.weight"), strict=True):
        arguments = ["--task", name, *SHORT, "--run_dir", str(tmp_path / what[0])]
        for size, more in ((2, []), (1, ["--shards", "2"])):
            text = run_ranks(tmp_path, Train([*arguments, *more]), size, expect=2)
            assert f"a forward pass changes {what} itself, which is trained, too" in text
        text = run_ranks(tmp_path, Train(arguments))
        assert ("each forward pass changes seen, which is in no checkpoint" in text) is (what[0] == "t")


SHORTENED = """class Shortened(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.{}, nn.Linear(3, 2)
        nn.init.constant_(self.table.weight, 0.01)

    def forward(self, inputs):
        places = (inputs[:, 1] * 60).round().long()
        return self.out(self.table({}))


class Mine"""


@pytest.mark.parametrize(
    ("layer", "places"),
    [("Embedding(60, 3, max_norm=0.05)", "places"), ("EmbeddingBag(60, 3, max_norm=0.05)", "places[:, None]")],
    ids=["Embedding", "EmbeddingBag"],
)
def test_an_evaluation_changes_no_vector_that_has_grown_too_long_since_the_start(tmp_path, layer, places):
    name = write(tmp_path / "table.py", SANE, (SEQUENTIAL, "Shortened()"), ("class Mine", SHORTENED.format(layer, places)), (DATA, MANY))
    weights = []
    for every in ("1", "1000000"):
        arguments = ["--task", name, *SHORT, "--steps", "9", "--evaluate_every", every, "--run_dir", str(tmp_path / every)]
        text = run_ranks(tmp_path, Train([*arguments, "--optimizer", "sgd", "--learning_rate", "5", "--schedule", "constant"]))
        assert "this world: a step is the same only on as many processes, because each forward pass changes table.weight" in text
        weights.append((tmp_path / every / "model.safetensors").read_bytes())
    assert load_file(tmp_path / "1/model.safetensors")["table.weight"].norm(dim=1).max() > 0.05
    assert weights[0] == weights[1]


OF_ALL_TYPES = """class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        for kind in ("float16", "bfloat16", "int16", "int8", "uint16", "float8_e4m3fn", "complex64"):
            self.register_buffer("of_" + kind, torch.ones(2).to(getattr(torch, kind)))
        self.register_buffer("of_complex128", torch.ones(2, dtype=torch.complex128), persistent=False)
        self.register_buffer("large", torch.ones(2, 300_000, dtype=torch.bfloat16).T)

    def forward(self, inputs):
        hidden = torch.view_as_complex(self.into(inputs).reshape(-1, 2, 2))
        if self.training:
            with torch.no_grad():
                self.of_complex64.lerp_(hidden.detach().mean(0), 0.1)
                self.of_bfloat16.lerp_(hidden.detach().mean(0).real.bfloat16(), 0.1)
                self.of_int16 += 1
                self.large[1] += 1
        turned = torch.view_as_real(hidden * self.of_complex64).flatten(1)
        used = self.of_bfloat16, self.of_float8_e4m3fn, self.of_int16.float().log1p()
        return self.out(turned * torch.stack([value.float().mean() for value in used]).prod())


class Mine"""


def test_buffers_may_be_of_any_type(tmp_path):
    name = write(tmp_path / "turned.py", SANE, (SEQUENTIAL, "Turned()"), ("class Mine", OF_ALL_TYPES), (DATA, MANY))
    arguments = ["--task", name, *SHORT, "--checkpoint_every", "2"]
    for folder, size, more in (("1", 1, ["--shards", "2"]), ("2", 2, ["--shards", "2"]), ("ddp", 2, [])):
        run_ranks(tmp_path / "logs", Train([*arguments, *more, "--run_dir", str(tmp_path / folder)]), size)
    weights = load_file(tmp_path / "1/model.safetensors")
    assert weights["of_int16"].tolist() == [5, 5]
    assert weights["large"][1].tolist() == [5, 5]
    assert all(weights["of_complex64"].imag)
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()
    before = (tmp_path / "ddp/model.safetensors").read_bytes()
    (tmp_path / "ddp/result.json").unlink()
    list_newest_first(tmp_path / "ddp/checkpoints")[0].unlink()
    run_ranks(tmp_path / "logs", Train([*arguments, "--run_dir", str(tmp_path / "ddp")]), 2)
    assert (tmp_path / "ddp/model.safetensors").read_bytes() == before


def test_what_gets_no_gradient_from_some_samples_is_trained_alike_with_shards(tmp_path):
    chosen = "model = {}\n        model.forward = lambda inputs: model[2](model[0](inputs) if inputs[:, 1].max() < 0.7 "
    chosen += "else inputs @ torch.ones(3, 8))"
    name = write(tmp_path / "chosen.py", SANE, (f"return {SEQUENTIAL}", f"{chosen.format(SEQUENTIAL)}\n        return model"))
    for size in (1, 2):
        arguments = ["--task", name, *SHORT, "--shards", "5", "--run_dir", str(tmp_path / str(size))]
        run_ranks(tmp_path / "logs", Train(arguments), size)
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()
    for folder, more, which in (("plain", [], "the samples"), ("pieces", ["--micro_batch", "2"], "the last samples")):
        text = run_ranks(tmp_path, Train(["--task", name, *SHORT, *more, "--run_dir", str(tmp_path / folder)]), 2, expect=None)
        assert f"gets no gradient from {which} of rank" in text
        assert "or train with --shards, where a missing gradient is zero" in text


@pytest.mark.slow
def test_what_gets_no_gradient_at_first_is_refused_on_several_processes_alone(tmp_path):
    name = write(tmp_path / "unused.py", SANE, (BUILD, LOSSES.format("model[0](batch[0]).sum(1)")))
    text = run_ranks(tmp_path, Train(["--task", name, *SHORT, "--run_dir", str(tmp_path / "two")]), 2, expect=2)
    assert "2.weight, 2.bias get no gradient from the losses, and several processes would wait for it" in text
    assert "train with --shards, where a missing gradient is zero" in text
    for optimizer in ("muon", "sgd", "adamw"):
        run_dir = tmp_path / optimizer
        arguments = ["--task", name, "--run_dir", str(run_dir), "--optimizer", optimizer, "--checkpoint_every", "2", *SHORT]
        assert "2.weight gets no gradient from the first samples" in run_ranks(tmp_path, Train(arguments))
        (run_dir / "result.json").unlink()
        run_ranks(tmp_path, Train(arguments))  # its checkpoint is complete
    bits = [(tmp_path / f"{size}/model.safetensors") for size in (1, 2)]
    for size, path in enumerate(bits, start=1):
        run_ranks(tmp_path, Train(["--task", name, *SHORT, "--shards", "2", "--run_dir", str(path.parent)]), size)
    assert bits[0].read_bytes() == bits[1].read_bytes()


LATER = """class Late(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.after, self.out = after, nn.Linear(3, 2)
        self.average = nn.Parameter(self.out.weight.detach().clone(), requires_grad=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        if self.training:
            self.passes += 1
            if self.passes > self.after:
                {}
        return self.out(inputs)


class Mine"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "self.average.lerp_(self.out.weight.detach(), 0.1)",
            "the forward pass of step 3 changes average, which nobody trains, and the first",
        ),
        (
            "self.average.data.lerp_(self.out.weight.data, 0.1)",
            "by step 3 a forward pass has changed average, which nobody trains, and the",
        ),
        ("torch.no_grad()(self.out.bias.add_)(0.1)", "the forward pass of step 3 changes out.bias, which is trained, too, and the first"),
    ],
    ids=["frozen", "frozen, by its data", "trained"],
)
def test_a_parameter_that_a_pass_begins_to_move_later_is_refused_where_it_would_differ(tmp_path, change, words):
    name = write(tmp_path / "late.py", SANE, (SEQUENTIAL, "Late(self.width - 1)"), ("class Mine", LATER.format(change)))
    for folder, size, more in (("two", 2, ["--width", "3"]), ("shards", 1, ["--width", "3", "--shards", "3"])):
        text = run_ranks(tmp_path, Train(["--task", name, *SHORT, *more, "--run_dir", str(tmp_path / folder)]), size, expect=2)
        assert words in text, text
    run_ranks(tmp_path, Train(["--task", name, *SHORT, "--width", "3", "--run_dir", str(tmp_path / "one")]))
    at_once = ["--task", name, *SHORT, "--width", "1", "--shards", "3", "--run_dir", str(tmp_path / "at once")]
    run_ranks(tmp_path, Train(at_once), expect=2 if "out.bias" in change else 0)


DRIFTING = """    def draw(self, seed, step, size):
        return torch.full((size,), step)

    def losses(self, model, batch, drawn):
        if os.environ.get("RANK") == "1" and int(drawn[0]) > 2:
            model.module[0].bias.data.add_(1e-4)
        return super().losses(model, batch, None)

"""


def test_ranks_whose_weights_have_become_different_are_named_and_nothing_is_saved(tmp_path):
    name = write(tmp_path / "drift.py", SANE, ("class Mine", "import os\n\n\nclass Mine"), (BUILD, DRIFTING + BUILD))
    for size, who in ((2, "ranks 0-1 have"), (3, "rank 1 has")):
        arguments = ["--task", name, *SHORT, "--steps", "6", "--batch_size", "6", "--checkpoint_every", "1"]
        text = run_ranks(tmp_path, Train([*arguments, "--run_dir", str(tmp_path / str(size))]), size, expect=1)
        assert text.count(f"by step 4 {who} different weights (0.bias first), though all had the same gradients") == size, text
        assert max(path.name for path in (tmp_path / str(size) / "checkpoints").iterdir()) < "step_00000004"


KEEPING = """class Row:
    def __init__(self):
        self.row = torch.ones(3)

    @functools.cached_property
    def twice(self):
        return 2 * self.row


class Rows(Dataset):
    rows = [Row() for _ in range(60)]

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return self.rows[index], index % 2


class Mine"""
GIVEN = """    def collate(self, samples):
        return [row for row, _ in samples], torch.tensor([label for _, label in samples])

    def losses(self, model, batch, drawn):
        return super().losses(model, (torch.stack([row.row for row in batch[0]]), batch[1]), drawn)

    def tally(self, model, batch):
        return super().tally(model, (torch.stack([row.twice for row in batch[0]]), batch[1]))

"""


@pytest.mark.parametrize(
    "changes",
    [
        [
            (
                f"return {SEQUENTIAL}",
                f"model = {SEQUENTIAL}\n        model.register_buffer('table', torch.arange(3.0))\n        load = model.load_state_dict\n"
                "        model.load_state_dict = lambda state: load({n: t for n, t in state.items() if n != 'table'}, strict=False)\n"
                "        return model",
            )
        ],
        [
            ("class Mine", KEEPING),
            ("import torch\n", "import functools\nimport torch\n"),
            (DATA, "return Data(Rows(), Rows())"),
            (BUILD, GIVEN + BUILD),
        ],
    ],
    ids=["a constant that is made anew", "stored samples that keep what is found"],
)
def test_what_is_odd_and_harmless_is_trained(tmp_path, changes):
    name = write(tmp_path / "odd.py", SANE, *changes)
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "nn.Sequential(nn.Linear(3, 2), Own(lambda found: found.clamp(-9, 9)))",
            "the gradient of 0.weight is not the sum of its samples'",
        ),
        ("nn.Sequential(nn.Linear(3, 2), Own(lambda found: found + torch.randn(()) / 1e3))", "the backward pass draws random numbers"),
        (
            "nn.Sequential(Counting(9, 2, scale_grad_by_freq=True))",
            "0 (Counting) divides a word's gradient by how often it is in the batch",
        ),
    ],
    ids=["clipped for its size", "with noise", "by frequency"],
)
def test_a_gradient_that_only_a_larger_or_another_batch_shows_to_be_of_this_world_is_so(tmp_path, model, words):
    name = write(tmp_path / "own.py", SANE, (SEQUENTIAL, model), ("class Mine", OWN_GRADIENT))
    text = run_ranks(tmp_path, Train(["--task", name, *SHORT, "--run_dir", str(tmp_path / "run")]))
    assert f"this world: a step is the same only on as many processes, because {words}" in text


def test_a_hook_that_refuses_large_gradients_is_no_obstacle(tmp_path):
    refusing = "nn.Sequential(nn.Linear(3, 2), Own(lambda found: found if found.norm() < 100 else 1 / 0))"
    name = write(tmp_path / "own.py", SANE, (SEQUENTIAL, refusing), ("class Mine", OWN_GRADIENT))
    text = run_ranks(tmp_path, Train(["--task", name, *SHORT, "--run_dir", str(tmp_path / "run")]))
    assert "any world: a step is the same on any number of processes" in text


def test_ranks_on_other_processors_may_round_otherwise(tmp_path):
    # As if each rank had a processor of its own kind, which rounds the optimizer's step in its own way.
    kinds = "import os\n\nfrom mnist_dist import machine\n\nmachine.find_kind = lambda _: f'kind {os.environ[\"RANK\"]}'\n\n\nclass Mine"
    name = write(tmp_path / "kinds.py", SANE, ("class Mine", kinds), (BUILD, DRIFTING + BUILD))
    run_ranks(tmp_path, Train(["--task", name, *SHORT, "--steps", "6", "--batch_size", "6", "--run_dir", str(tmp_path / "run")]), 2)


CLAMPED = """class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.scale = nn.Linear(3, 2), nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        with torch.no_grad():
            self.scale.clamp_(max=4.6)
        return self.out(inputs) * self.scale.exp()


class Mine"""


def test_a_pass_may_clamp_what_is_trained(tmp_path):
    name = write(tmp_path / "clamped.py", SANE, (SEQUENTIAL, "Clamped()"), ("class Mine", CLAMPED))
    for size in (1, 2):
        run_ranks(tmp_path, Train(["--task", name, *SHORT, "--shards", "2", "--run_dir", str(tmp_path / str(size))]), size)
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()
    run_ranks(tmp_path, Train(["--task", name, *SHORT, "--run_dir", str(tmp_path / "two")]), 2)


OWN_GRADIENT = """class Own(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, inputs):
        if inputs.requires_grad:
            inputs.register_hook(self.change)
        return inputs


class Counting(nn.Embedding):
    def forward(self, inputs):
        return super().forward((8 * inputs[:, 1]).long())


class Mine"""


def test_a_run_whose_passes_differ_in_their_last_digits_promises_no_bits(tmp_path):
    losses = LOSSES.format("super().losses(model, batch, drawn) + 1e-6 * next(passes)")
    name = write(
        tmp_path / "noisy.py", SANE, ("class Mine", "import itertools\n\npasses = itertools.count()\n\n\nclass Mine"), (BUILD, losses)
    )
    text = run_ranks(tmp_path, Train(["--task", name, *SHORT, "--shards", "2", "--run_dir", str(tmp_path / "run")]))
    assert "no run has the bits of another one, because two passes over the same samples" in text
    assert "the same bits" not in text


@pytest.mark.parametrize("model", ["nn.Sequential(torch.jit.script(nn.Linear(3, 2)))", "Derived()"], ids=["scripted", "torch.func"])
def test_layers_in_which_nothing_can_be_looked_at_are_trained_alike(tmp_path, model):
    name = write(tmp_path / "closed.py", SANE, (SEQUENTIAL, model), ("class Mine", DERIVED))
    for size in (1, 2):
        run_ranks(tmp_path, Train(["--task", name, *SHORT, "--shards", "2", "--run_dir", str(tmp_path / str(size))]), size)
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


DERIVED = """class Derived(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, inputs):
        slope = torch.func.grad(lambda row: self.layer(row).tanh().sum())
        return self.out(torch.vmap(slope)(inputs))


class Mine"""


GROWING = """class Growing(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.persistent, self.out = persistent, nn.Linear(3, 2)
        self.register_buffer("table", torch.zeros(4), persistent=persistent)

    def forward(self, inputs):
        if len(inputs) > len(self.table):
            self.register_buffer("table", torch.zeros(len(inputs)), persistent=self.persistent)
        return self.out(inputs)


class Mine"""


@pytest.mark.slow
def test_a_buffer_that_grows_is_refused_where_its_shape_matters(tmp_path):
    for kind in ("True", "False"):
        name = write(tmp_path / f"growing_{kind}.py", SANE, (SEQUENTIAL, f"Growing({kind})"), ("class Mine", GROWING))
        for size, more in ((1, []), (2, []), (1, ["--shards", "2"])):
            run_dir = tmp_path / f"{kind} {size} {len(more)}"
            matters = kind == "True" or size > 1 or bool(more)
            text = run_ranks(tmp_path, Train(["--task", name, *SHORT, *more, "--run_dir", str(run_dir)]), size, expect=2 if matters else 0)
            rows = 5 if size > 1 or more else 10
            assert (f"in step 1 the buffer table becomes [{rows}], and was [4]: make it as large" in text) is matters, text


def test_a_count_outside_of_the_state_is_a_warning(tmp_path):
    counted = (
        f"model = {SEQUENTIAL}\n        model.calls = 0\n        model.register_forward_hook(lambda m, *_: setattr(m, 'calls', {{}}))\n"
    )
    for counts, text in (("m.calls + 1", "this world"), ("1", "any world")):  # one that is set for good is none
        name = write(tmp_path / "counts.py", SANE, (f"return {SEQUENTIAL}", f"{counted.format(counts)}        return model"))
        said = run_ranks(tmp_path, Train(["--task", name, *SHORT, "--run_dir", str(tmp_path / text)]))
        assert f"{text}: a step is the same" in said
        words = "each forward pass changes the attribute calls of the model (Sequential), which is in no checkpoint"
        assert (words in said) is (text == "this world")


def test_losses_may_write_into_their_batch(tmp_path):
    own = "nn.functional.cross_entropy(model(batch[0].add_(1.0)), batch[1], reduction='none')"
    name = write(tmp_path / "writes.py", SANE, (BUILD, LOSSES.format(own)))
    for size in (1, 2):
        run_ranks(tmp_path, Train(["--task", name, *SHORT, "--shards", "2", "--run_dir", str(tmp_path / str(size))]), size)
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_compiled_model_is_exported_as_what_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    deep = "nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(12)], nn.Linear(3, 2))"
    name = write(tmp_path / "compiled.py", SANE, (f"return {SEQUENTIAL}", f"return torch.compile({deep}, backend='eager')"))
    text = run_ranks(tmp_path, Train(["--task", name, *SHORT, "--run_dir", str(tmp_path / "run")]))
    assert "recompile" not in text  # the probe's hooks are not compiled
    assert export.main([str(tmp_path / "run"), str(tmp_path / "model.pt2"), "--task", name]) == 0


def test_what_is_drawn_is_laid_out_alike_on_any_number_of_processes(tmp_path):
    drawn = "    def draw(self, seed, step, size):\n        return torch.rand(size, generator=torch.manual_seed(step))\n\n"
    inputs = "batch[0] if drawn is None else batch[0] * drawn.pow(1.7).unsqueeze(1)"  # other bits where they lie apart
    used = LOSSES.format(f"model({inputs}).square().sum(1)")
    name = write(tmp_path / "drawn.py", SANE, (BUILD, drawn + used), ("torch.arange(60.0)", "torch.arange(80.0)"))
    for size in (1, 2):
        arguments = ["--task", name, *SHORT, "--batch_size", "80", "--shards", "2", "--run_dir", str(tmp_path / str(size))]
        run_ranks(tmp_path / "logs", Train(arguments), size)
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


def test_a_model_may_load_what_its_own_state_leaves_out(tmp_path):
    own = f"""model = {SEQUENTIAL}
        model[0].requires_grad_(False)
        model.register_state_dict_post_hook(lambda m, state, *_: [state.pop(name) for name in ('0.weight', '0.bias')].clear())
        model.load_state_dict = lambda state: nn.Module.load_state_dict(model, state, strict=False)
        return model"""
    name = write(tmp_path / "adapter.py", SANE, (f"return {SEQUENTIAL}", own))
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), "--checkpoint_every", "2", *SHORT]
    run_ranks(tmp_path / "logs", Train(arguments))
    (tmp_path / "run/result.json").unlink()
    run_ranks(tmp_path / "logs", Train(arguments))
    assert evaluate.main([str(tmp_path / "run"), "--task", name]) == 0


def test_weights_that_a_model_cannot_load_are_one_message(tmp_path, capsys):
    name = write(tmp_path / "mine.py")
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]))
    fails = f"model = {SEQUENTIAL}\n        model.load_state_dict = lambda state: state['none']\n        return model"
    write(tmp_path / "mine.py", SANE, (f"return {SEQUENTIAL}", fails))
    assert evaluate.main([str(tmp_path / "run"), "--task", name]) == 2
    assert "its model cannot load what its state_dict gives" in capsys.readouterr().err


def test_tied_weights_are_trained_saved_and_read(tmp_path):
    tied = "model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))\n        model[2].weight = model[0].weight"
    name = write(tmp_path / "tied.py", SANE, (f"return {SEQUENTIAL}", f"{tied}\n        return model"))
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), "--checkpoint_every", "2", *SHORT]), 2)
    (tmp_path / "run/result.json").unlink()
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]))
    assert evaluate.main([str(tmp_path / "run"), "--task", name]) == 0


def test_a_lambda_is_no_obstacle_to_workers(tmp_path):
    lambdas = "return Data(*(type('L', (Dataset,), {'f': staticmethod(lambda i: (inputs[i], i % 2)), '__len__': lambda s: 60, "
    lambdas += "'__getitem__': lambda s, i: s.f(i)})() for _ in range(2)))"
    name = write(tmp_path / "lambdas.py", SANE, (DATA, lambdas))
    run_ranks(tmp_path / "logs", Train(["--task", name, "--workers", "2", "--run_dir", str(tmp_path / "run"), *SHORT]))


@pytest.mark.parametrize(
    "name", ["", "no_such_module", "no/such/file.py", "a b", "x" * 5000, "mnist_dist.config", "os", "a..b", "../x", "classification"]
)
def test_a_name_that_means_no_task_is_one_message(name):
    with pytest.raises(UserError) as caught:
        find_task(name)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 800


def test_a_recipe_of_another_task_is_named_as_one(tmp_path, monkeypatch):
    name = write(tmp_path / "mine.py")
    words = rf"smoke.yaml is for the task mnist, whose options it sets \(dataset, .*; the task here is {name}$"
    with pytest.raises(UserError, match=words):
        parse_command_line(["--config", "smoke", "--task", name])
    (tmp_path / "config.yaml").write_text(f"task: {name}\nwidth: 2\n")
    with pytest.raises(UserError, match=rf"config.yaml is for the task {name}, whose options it sets \(width\); the task here is mnist$"):
        parse_command_line(["--config", str(tmp_path / "config.yaml"), "--task", "mnist"])
    (tmp_path / "config.yaml").write_text("task: ./mine.py\nwidt: 2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no option 'widt' \(did you mean 'width'"):  # the same task by another name
        parse_command_line(["--config", "config.yaml", "--task", name])


def test_options_of_a_task_are_options_everywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path / "mine.py")
    config = parse_command_line(["--task", "mine.py", "--width", "5", "--label-smoothing=0.2", "--lr", "0.5"])
    assert (config.task.name, config.task.width, config.learning_rate, config.run_dir) == (name, 5, 0.5, "runs/mine")
    assert config.recipe() | {"task": "mine", "width": 5, "label_smoothing": 0.2} == config.recipe()
    (tmp_path / "recipe.yaml").write_text("task: mine.py\nwidth: 7\n")
    assert parse_command_line(["--config", "recipe.yaml"]).task.width == 7
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert parse_command_line(["--config", "again.yaml"]) == config
    # The task that is named counts, and the code of the recipe's does not run.
    (tmp_path / "other.py").write_text("raise SystemExit(9)\n")
    (tmp_path / "theirs.yaml").write_text("task: other.py\nwidth: 7\n")
    assert parse_command_line(["--config", "theirs.yaml", "--task", "mine.py"]).task.name == name
    with pytest.raises(SystemExit):
        parse_command_line(["--task", "mine.py", "--help"])
    assert "width of the hidden layer" in capsys.readouterr().out
    for wrong, words in ((["--width", "0"], "at least 1"), (["--rotation", "3"], "no option .--rotation"), (["--widht", "3"], "'width'")):
        with pytest.raises(UserError, match=words):
            parse_command_line(["--task", "mine.py", *wrong])
    assert make_config(config.values()) == config


def test_a_task_in_a_folder_whose_name_cannot_be_written_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write(folder / "mine.py")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="expected printable characters"):
        find_task("mine.py")


def test_a_task_that_cannot_describe_its_evaluation_ends_no_run(tmp_path):
    """Of a measure without a value, as a precision where nothing was found, `measures` has None."""
    measured = MEASURE.format("'precision': float('nan')").replace(BUILD, DESCRIBE.format("f\"{measures['precision']:.2%}\""))
    name = write(tmp_path / "mine.py", SANE, (BUILD, measured))
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    for words in ("finished: test accuracy ", "nothing to do"):
        text = run_ranks(tmp_path / "logs", Train(arguments))
        assert words in text
        assert "failed in describe" in text


@pytest.mark.slow
def test_a_large_vocabulary_among_the_facts_is_read_back_and_a_too_large_one_refused(tmp_path):
    facts = "    def find_facts(self, train):\n        return {{'vocabulary': {{f'word {{i:012}}': i for i in range({})}}}}\n\n" + BUILD
    name = write(tmp_path / "mine.py", SANE, (BUILD, facts.format(550_000)))
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    run_ranks(tmp_path / "logs", Train(arguments))
    assert (tmp_path / "run/result.json").stat().st_size > 12 << 20
    assert "is finished" in run_ranks(tmp_path / "logs", Train(arguments))
    run_ranks(tmp_path / "logs", Programs([["evaluate", str(tmp_path / "run")]]))
    write(tmp_path / "mine.py", SANE, (BUILD, facts.format(800_000)))
    text = run_ranks(tmp_path / "logs", Train([*arguments, "--run_dir", str(tmp_path / "other")]), expect=2)
    assert "find_facts returned" in text
    assert "bytes of text; allowed: 16,777,216" in text


OTHER_LAYOUTS = """class Layout(nn.Module):
    def forward(self, inputs):
        if "{kind}" == "sparse":
            return inputs.to_sparse()
        return torch.nested.as_nested_tensor(list(inputs), layout=torch.{kind})


class Dense(nn.Module):
    def forward(self, inputs):
        return torch.nested.to_padded_tensor(inputs, 0.0) if inputs.is_nested else inputs.to_dense()


class Mine"""


@pytest.mark.parametrize("kind", ["sparse", "strided", "jagged"])
def test_an_output_of_a_layer_may_be_sparse_or_nested(tmp_path, kind):
    layers = "nn.Sequential(nn.Linear(3, 8), Layout(), Dense(), nn.Linear(8, 2))"
    name = write(tmp_path / "layout.py", SANE, (SEQUENTIAL, layers), ("class Mine", OTHER_LAYOUTS.format(kind=kind)))
    text = run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]))
    assert "any world: " in text


def test_outputs_may_have_another_length_in_each_batch(tmp_path):
    tally = "tally = super().tally(model, batch); own = batch[0].new_zeros(len(batch[0]), 2 + int(batch[0][0, 1] > 0.1)); "
    name = write(tmp_path / "mine.py", SANE, (DATA, MANY), (BUILD, TALLY.format(tally + "return Tally(tally.sums, tally.scores, own)")))
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]))


RECURRENT = """class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, inputs, hidden):
        return torch.tanh(self.layer(torch.cat([inputs, hidden], 1))) * self.scale


class Mine"""


def test_ranks_may_call_their_model_a_different_number_of_times(tmp_path):
    """As for the longest sample of each rank's own part; a buffer is then exchanged once a step all the same."""
    unrolled = (
        "    def losses(self, model, batch, drawn):\n        hidden = torch.zeros(len(batch[0]), 1)\n"
        "        for _ in range(2 if len(batch[0]) > 4 or batch[1][0] else 5):\n            hidden = model(batch[0], hidden)\n"
        "        return hidden[:, 0]\n\n"
        "    def tally(self, model, batch):\n        return Tally(torch.tensor([len(batch[0]), 0.0], dtype=torch.float64))\n\n"
        "    def measure(self, sums):\n        return {'loss': 0.0, 'accuracy': 0.0}\n\n"
        "    def describe(self, measures):\n        return 'done'\n\n    def tabulate(self, measures):\n        return None\n\n"
        "    in_rows = ('loss',)\n\n    def build_model(self):"
    )
    changes = [("class Mine", RECURRENT), (f"return {SEQUENTIAL}", "return Cell()"), (BUILD, unrolled)]
    name = write(tmp_path / "mine.py", SANE, *changes)
    arguments = ["--task", name, "--batch_size", "8", "--timeout_s", "20", "--run_dir", str(tmp_path / "run")]
    run_ranks(tmp_path / "logs", Train([*SHORT, *arguments]), 2)


def test_a_layer_that_exchanges_statistics_by_itself_is_refused_on_several_processes(tmp_path):
    name = write(tmp_path / "mine.py", SANE, (SEQUENTIAL, SEQUENTIAL.replace("nn.ReLU()", "nn.SyncBatchNorm(self.width)")))
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    text = run_ranks(tmp_path / "logs", Train(arguments), 2, expect=2)
    assert "1 of its model is SyncBatchNorm, which waits for other processes by itself: use BatchNorm, with --shards" in text


def test_a_measure_without_a_value_ends_no_run(tmp_path):
    undefined = "'precision': float('nan'), 'parts': [float('inf'), 0.5], 'recall': None"
    name = write(tmp_path / "mine.py", SANE, (BUILD, MEASURE.format(undefined)))
    run_ranks(tmp_path, Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert [result[f"test/{name}"] for name in ("precision", "parts", "recall")] == [None, [None, 0.5], None]


@pytest.mark.slow
def test_jobs_and_sweeps_take_a_task(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path / "mine.py")
    assert submit.main(["--task", "mine.py", "--width", "5", "--dry_run", "--run_dir", "runs/x"]) == 0
    assert sweep.main(["--task", "mine.py", "width=2,3", "--cluster", "local", "--parallel", "2", *SHORT]) == 0
    text = capfd.readouterr().out
    assert "test accuracy" in text
    for width in (2, 3):
        folder = tmp_path / f"runs/sweep/width={width}"
        assert f"task: {name}" in (folder / "config.yaml").read_text()
        assert json.loads((folder / "result.json").read_text())["test/samples"] == 20
    assert jobs.main(["runs"]) == 0
    assert "accuracy" in capfd.readouterr().out
    # A module is found where the job was submitted from, also by `python -P`.
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "module_of_mine.py")
    assert submit.main(["--task", "module_of_mine", "--cluster", "local", "--run_dir", "runs/module", *SHORT]) == 0


def test_a_run_folder_of_somebody_else_runs_no_code(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    evil = SANE + f"\nopen({str(tmp_path / 'ran')!r}, 'a').write('x')\n"
    name = write(tmp_path / "mine.py", evil)
    run = str(tmp_path / "run")
    run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", run, *SHORT]), environ={"XDG_STATE_HOME": str(tmp_path / "theirs")})
    (tmp_path / "ran").unlink()
    assert jobs.main([str(tmp_path)]) == 0
    assert report.main([run]) == 0
    assert "whose code" in capfd.readouterr().err or "has not been named" in (tmp_path / "run/report.html").read_text()
    for program in (lambda: evaluate.main([run]), lambda: export.main([run, str(tmp_path / "x.pt2")])):
        assert program() == 2
        assert "add --task" in capfd.readouterr().err
    assert evaluate.main([f"{run}/model.safetensors"]) == 2
    assert not (tmp_path / "ran").exists()
    # Named by the user, once; from then on their own runs of it need no more.
    assert evaluate.main([run, "--task", name]) == 0
    assert (tmp_path / "ran").exists()
    assert evaluate.main([run]) == 0
    assert "accuracy" in capfd.readouterr().out
    assert export.main([run, str(tmp_path / "x.pt2")]) == 0


def test_the_code_of_a_task_is_part_of_the_run(tmp_path):
    name = write(tmp_path / "mine.py", "from beside import WIDTH\n" + SANE)
    (tmp_path / "beside.py").write_text("WIDTH = 8\n")
    arguments = ["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]
    run_ranks(tmp_path / "logs", Train([*arguments, "--checkpoint_every", "2"]))
    start = json.loads((tmp_path / "run/starts.jsonl").read_text())
    assert "mine.py" in start["source"]
    assert "beside.py" in start["source"]
    (tmp_path / "run/result.json").unlink()
    text = run_ranks(tmp_path / "logs", Train(arguments))
    assert "the code of task" not in text
    (tmp_path / "run/result.json").unlink()
    (tmp_path / "beside.py").write_text("WIDTH = 9\n")
    text = run_ranks(tmp_path / "logs", Train(arguments))
    assert text.count("the code of task") == 1
    assert "has changed since the last start (beside.py)" in text
    assert find_changed("a.py 1, b.py 2", "a.py 1, b.py 3, c.py 4") == ["b.py", "c.py"]


@dataclass(frozen=True)
class TrainOwnFile:
    """A rank whose node has a file of its own."""

    folder: str

    def __call__(self):
        return Train(["--task", f"{self.folder}/{os.environ['RANK']}/mine.py", "--run_dir", f"{self.folder}/run", *SHORT])()


def test_ranks_with_another_code_are_refused(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
        write(tmp_path / rank / "mine.py", SANE + f"# the file of node {rank}\n")
    text = run_ranks(tmp_path / "logs", TrainOwnFile(str(tmp_path)), 2, expect=None)
    assert "this rank has other options than rank zero (the source of the task)" in text
    assert not (tmp_path / "run").exists()


def test_options_that_are_too_long_to_be_read_again_are_refused_before_anything_is_made(tmp_path):
    many = "".join(f"    text{number}: str = {'x' * 1000!r}\n" for number in range(70))
    name = write(tmp_path / "mine.py", SANE, ("class Mine(Classification):\n", f"class Mine(Classification):\n{many}"))
    text = run_ranks(tmp_path / "logs", Train(["--task", name, "--run_dir", str(tmp_path / "run"), *SHORT]), expect=2)
    assert re.search(r"the options take 7\d,\d{3} bytes as a config file; allowed: 65,536", text)
    assert not (tmp_path / "run").exists()
