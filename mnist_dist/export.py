"""The program: `python -m mnist_dist.export runs/NAME digits.pt2` (or digits.onnx) makes a run's model usable without this package.

The file holds the normalisation, too: pixels from 0 to 1 go in, log-probabilities come out. It is written only if what was exported, read
back from its bytes, gives what the model itself gives on test images.
"""

if __name__ == "__main__":
    from mnist_dist.program import end_on_interrupt

    end_on_interrupt()


import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_dist.config import EMBEDDED_DATASETS, Config
from mnist_dist.errors import RunError, UserError
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import print_answer

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-4  # largest difference allowed in a log-probability; float32 sums in another order differ by some 1e-6
_CHECKED_IMAGES = 64
_ONNX_PACKAGES = ("onnx", "onnxscript")

Runner = Callable[["Tensor"], "Tensor"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 written, 2 a user's mistake, 1 the rest."""
    return print_answer(lambda: _export(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("mnist_dist.export", "Write the model of a run, its normalisation included, as a file that needs none of this package.")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="a run folder, or a .safetensors file that a run wrote")
    parser.add_argument("file", metavar="FILE", type=path_argument, help="the file to write: NAME.pt2 (torch.export) or NAME.onnx")
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it exists")
    return parser.parse_args(arguments)


def _export(options: argparse.Namespace) -> int:
    file = Path(options.file)
    if file.suffix not in (".pt2", ".onnx"):
        raise UserError(f"the file to write is {file}; expected a name that ends in .pt2 or .onnx")
    if os.path.isdir(file) or not os.path.isdir(file.parent):
        raise UserError(f"the file to write is {file}, which is a folder or lies in none; expected a name in an existing folder")
    if os.path.lexists(file) and not options.force:
        raise UserError(f"{file} exists; give another name, or --force to overwrite it")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if file.suffix == ".onnx" and missing:
        raise UserError(f"ONNX needs packages that are not installed: pip install {' '.join(missing)} (a .pt2 file needs none)")

    from mnist_dist.data import load_dataset
    from mnist_dist.files import write_atomically
    from mnist_dist.weights import load_model

    trained = load_model(options.run)
    classifier = make_classifier(trained.model, trained.mean, trained.std)
    content, runner = (to_pt2 if file.suffix == ".pt2" else to_onnx)(classifier)
    # Where the run's own data are not at hand, other images of this shape serve as well.
    images = load_dataset(Config(dataset=trained.dataset if trained.dataset in EMBEDDED_DATASETS else "mnist")).test.images
    difference = check_export(classifier, runner, images[:_CHECKED_IMAGES].unsqueeze(1).float() / 255)
    write_atomically(file, content)
    print(
        f"{file}: {len(content):,} bytes; on {_CHECKED_IMAGES} test images it differs from the model by at most {difference:.0e}\n"
        "in:  pixels, float32 [n, 1, 28, 28] for any n, from 0 to 1, bright on black; normalised inside\n"
        "out: log_probabilities, float32 [n, 10]; exp gives probabilities"
    )
    return 0


def make_classifier(model: "nn.Module", mean: float, std: float) -> "nn.Module":
    """A module from `pixels` float32 [n, 1, 28, 28], 0 to 1, to log-probabilities float32 [n, 10], in evaluation mode."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        mean: "Tensor"
        std: "Tensor"

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("mean", torch.tensor(mean))
            self.register_buffer("std", torch.tensor(std))

        def forward(self, pixels: "Tensor") -> "Tensor":
            return torch.log_softmax(self.model((pixels - self.mean) / self.std), dim=1)

    return Classifier().eval()


def to_pt2(classifier: "nn.Module") -> tuple[bytes, Runner]:
    """A `torch.export` archive of `classifier` for any batch size, and a function that runs what was read back from it."""
    import torch

    # Two images as the example: one would be taken for a constant.
    shapes = {"pixels": {0: torch.export.Dim("n")}}
    program = torch.export.export(classifier, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def to_onnx(classifier: "nn.Module") -> tuple[bytes, Runner]:
    """An ONNX model of `classifier` for any batch size, and a function that runs it by ONNX's own reference implementation."""
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(
        classifier,
        (torch.zeros(2, 1, 28, 28),),
        dynamo=True,
        input_names=["pixels"],
        output_names=["log_probabilities"],
        dynamic_shapes={"pixels": {0: "n"}},
        verbose=False,
    )
    assert program is not None
    content = program.model_proto.SerializeToString()
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    evaluator = ReferenceEvaluator(model)
    return content, lambda pixels: torch.from_numpy(evaluator.run(None, {"pixels": pixels.numpy()})[0])


def check_export(classifier: "nn.Module", runner: Runner, pixels: "Tensor") -> float:
    """The largest difference between both on `pixels` float32 [n, 1, 28, 28], n at least 2. Raises `RunError` above TOLERANCE."""
    import torch

    with torch.no_grad():
        expected = classifier(pixels)
        # One image and many: a batch size that became a constant shows.
        outputs = torch.cat([runner(pixels[:1]), runner(pixels[1:])])
    difference = (outputs - expected).abs().max().item()
    if outputs.shape != expected.shape or not difference <= TOLERANCE:  # NaN, too
        raise RunError(f"what was exported differs from the model by {difference:.1e}, allowed {TOLERANCE:.0e}: nothing was written")
    return difference


if __name__ == "__main__":
    sys.exit(main())
