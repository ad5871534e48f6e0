"""The CNN: 593,200 parameters, no BatchNorm and no dropout, so nothing in it depends on the world size."""

import torch
from torch import Tensor, nn

PARAMETERS = 593_200


class CNN(nn.Module):
    """Four 3x3 convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 128, 3)
        self.conv4 = nn.Conv2d(128, 256, 3)
        self.pool = nn.MaxPool2d(2)
        self.linear1 = nn.Linear(4096, 50)
        self.linear2 = nn.Linear(50, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] for normalised images [n, 1, 28, 28]; the log-softmax lives in the loss."""
        x = torch.relu(self.conv1(images))
        x = torch.relu(self.pool(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        x = torch.relu(self.pool(self.conv4(x)))
        x = torch.relu(self.linear1(x.flatten(1)))
        return self.linear2(x)


class Classifier(nn.Module):
    """A model with its normalisation: from pixels float32 [n, 1, 28, 28], 0 to 1, to log-probabilities float32 [n, 10]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, pixels: Tensor) -> Tensor:
        """Log-probabilities."""
        return torch.log_softmax(self.model((pixels - self.mean) / self.std), dim=1)
