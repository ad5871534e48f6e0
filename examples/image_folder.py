"""A network of torchvision on your own pictures: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, one folder for each class.

python -m mnist_dist.train --task examples/image_folder.py --data_dir DIR --workers 4
"""

from typing import Literal

from torch import nn
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomCrop, RandomHorizontalFlip, Resize, ToTensor

from mnist_dist.errors import UserError
from mnist_dist.task import Data, option
from mnist_dist.tasks.classification import Classification


class Pictures(Classification):
    """The classes are called as their folders. The network has BatchNorm: a run goes on only with as many processes as it began with."""

    samples = "pictures"

    arch: Literal["resnet18", "resnet50", "mobilenet_v3_small"] = option("resnet18", "network of torchvision.models")
    side: int = option(64, "width and height of what the network sees (pixels)", ge=32)

    def load(self) -> Data:
        """Find the files; a picture is read when its turn comes, by --workers processes."""
        if self.data_dir is None:
            raise UserError("data_dir is none; expected the folder that holds train/CLASS/*.jpg and test/CLASS/*.jpg")
        to_input = [ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        augment = [RandomCrop(self.side, padding=self.side // 8), RandomHorizontalFlip()]
        train = ImageFolder(f"{self.data_dir}/train", Compose([Resize(self.side), *augment, *to_input]))
        test = ImageFolder(f"{self.data_dir}/test", Compose([Resize(self.side), CenterCrop(self.side), *to_input]))
        if train.classes != test.classes:
            raise UserError(f"data_dir {self.data_dir} has classes {train.classes} in train, {test.classes} in test; expected the same")
        return Data(train, test)

    def build_model(self) -> nn.Module:
        return models.get_model(self.arch, num_classes=len(self.class_names))
