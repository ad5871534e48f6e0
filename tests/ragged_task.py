"""A task of sentences that `collate` pads to the longest and may mask, whose forward pass moves a frozen average of its embedding."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mnist_dist.task import Data, Task


class Sentences(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(2 + index * 7 % 11) * 3 % 10 + 1


class Model(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.average = copy.deepcopy(self.embedding).requires_grad_(False)  # equal, until the first step
        self.reader = nn.GRU(6, 6, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor) -> Tensor:
        self.average.weight.data.lerp_(self.embedding.weight.data, 0.1)  # autograd sees nothing of it; in evaluations, too
        read, _ = self.reader(self.embedding(words))
        return (self.dropout(read) - self.average(words)).square().mean(-1)


class RaggedTask(Task):
    dropout: float = 0.0
    masked: float = 0.0
    blind: bool = False

    def load(self) -> Data:
        return Data(Sentences(100), Sentences(31))

    def build_model(self) -> nn.Module:
        return Model(self.dropout)

    def collate(self, samples: list[Any]) -> Any:
        words = pad_sequence(samples, batch_first=True)
        if self.masked:
            words = torch.where(torch.rand(words.shape) < self.masked, 0, words)
        return {"words": words, "lengths": torch.tensor([len(sample) for sample in samples])}

    def losses(self, model: nn.Module, batch: Any, drawn: Tensor | None) -> Tensor:
        words = batch["words"]
        if self.blind:  # to what is padding
            return model(words).mean(1)
        is_word = torch.arange(words.shape[1], device=words.device) < batch["lengths"].unsqueeze(1)
        return (model(words) * is_word).sum(1) / batch["lengths"]
