"""A task with all that makes a step depend on the number of processes: BatchNorm, dropout, and a Dataset that draws random numbers."""

import torch
from torch import nn
from torch.utils.data import Dataset

from mnist_dist.task import Data
from mnist_dist.tasks.classification import Classification


class Points(Dataset):
    """Points around three centres, each read with new noise."""

    classes = ("left", "middle", "right")

    def __init__(self, count):
        self.labels = torch.arange(count) % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        label = self.labels[index]
        return label + 0.7 * torch.randn(6), label


class Noisy(Classification):
    """Read by workers or not, on the CPU within milliseconds."""

    samples = "points"
    width: int = 16

    def load(self):
        return Data(Points(60), Points(31))

    def build_model(self):
        first, last = nn.Linear(6, self.width), nn.Linear(self.width, len(self.class_names))
        return nn.Sequential(first, nn.BatchNorm1d(self.width), nn.ReLU(), nn.Dropout(0.3), last)
