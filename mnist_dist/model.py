"""The CNN: 593,200 parameters, no BatchNorm and no dropout, so nothing in it depends on the world size.

`python -m mnist_dist.model` prints its table of layers.
"""

import torch
from torch import Tensor, nn

from mnist_dist.randomness import derive_seed

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


def build_model(seed: int) -> CNN:
    """A CNN whose initial weights are a function of `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return CNN()


def describe_model(model: nn.Module, input_shape: tuple[int, ...] = (1, 28, 28)) -> str:
    """A table of the layers of `model` with output shapes, parameters and float32 memory for one image of `input_shape`."""
    rows: list[tuple[str, str, int]] = []
    outputs = 0

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()
        shape = str([-1, *output.shape[1:]])
        rows.append((f"{name} ({type(module).__name__})", shape, sum(p.numel() for p in module.parameters())))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = "-" * 66
    body = [f"{name:<26}{shape:<24}{count:>16,}" for name, shape, count in rows]
    sums = [
        f"{'total parameters':<50}{total:>16,}",
        f"{'trainable parameters':<50}{trainable:>16,}",
        f"{'memory of the parameters (MiB)':<50}{total * 4 / 2**20:>16.2f}",
        f"{'outputs of one image (MiB)':<50}{outputs * 4 / 2**20:>16.2f}",
    ]
    return "\n".join([f"{'layer':<26}{'output':<24}{'parameters':>16}", line, *body, line, *sums])


if __name__ == "__main__":
    print(describe_model(build_model(seed=0)))
