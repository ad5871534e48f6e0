"""A task of sentences, batched in several ways and maybe masked, whose forward pass moves a frozen average of its embedding."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import Dataset

from mnist_dist.task import Data, Task


class Sentences(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(2 + index * 7 % 11) * 3 % 10 + 1


@dataclass
class Bag:
    """A batch of the task's own: no tensor in it has a row for each sample."""

    sentences: list[Tensor]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Bag":
        return Bag([words.to(device, non_blocking=non_blocking) for words in self.sentences])


class Model(nn.Module):
    def __init__(self, dropout: float, unseen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.average = copy.deepcopy(self.embedding).requires_grad_(False)  # equal, until the first step
        self.reader = nn.GRU(6, 6, batch_first=True)
        self.dropout = partial(nn.functional.dropout, p=dropout) if unseen else nn.Dropout(dropout)

    def forward(self, batch: Any) -> Any:
        self.average.weight.data.lerp_(self.embedding.weight.data, 0.1)  # autograd sees nothing of it; in evaluations, too
        if isinstance(batch, Bag):
            return [self.guess(words.unsqueeze(0), self.reader(self.embedding(words.unsqueeze(0)))[0]) for words in batch.sentences]
        if isinstance(batch, PackedSequence):
            read, _ = self.reader(batch._replace(data=self.embedding(batch.data)))
            return batch._replace(data=self.guess(batch.data, read.data))
        return self.guess(batch, self.reader(self.embedding(batch))[0])

    def guess(self, words: Tensor, read: Tensor) -> Tensor:
        return (self.dropout(read) - self.average(words)).square().mean(-1)


class RaggedTask(Task):
    dropout: float = 0.0
    masked: float = 0.0
    blind: bool = False
    unseen: bool = False
    average_differs: bool = False
    made: Literal["padded", "packed", "a bag"] = "padded"

    def load(self) -> Data:
        return Data(Sentences(100), Sentences(31))

    def build_model(self) -> nn.Module:
        model = Model(self.dropout, self.unseen)
        if self.average_differs:
            model.average.weight.data.mul_(2)
        return model

    def collate(self, samples: list[Any]) -> Any:
        if self.masked:
            samples = [torch.where(torch.rand(words.shape) < self.masked, 0, words) for words in samples]
        if self.made == "a bag":
            return Bag(samples)
        if self.made == "packed":
            return pack_sequence(samples, enforce_sorted=False)
        return {"words": pad_sequence(samples, batch_first=True), "lengths": torch.tensor([len(sample) for sample in samples])}

    def losses(self, model: nn.Module, batch: Any, drawn: Tensor | None) -> Tensor:
        if self.made == "a bag":
            return torch.stack([losses.mean() for losses in model(batch)])
        if self.made == "packed":
            losses, lengths = pad_packed_sequence(model(batch), batch_first=True)
            return losses.sum(1) / lengths.to(losses.device)
        words = batch["words"]
        if self.blind:  # to what is padding
            return model(words).mean(1)
        is_word = torch.arange(words.shape[1], device=words.device) < batch["lengths"].unsqueeze(1)
        return (model(words) * is_word).sum(1) / batch["lengths"]
