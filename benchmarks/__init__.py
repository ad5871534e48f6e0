"""Benchmarks of the training, each one command; see README.md here. They are part of the checkout, not of the package."""
