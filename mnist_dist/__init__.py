"""Distributed training of one CNN on MNIST: the same run on a CPU, a GPU, many GPUs and many nodes."""

__version__ = "0.1.0"
