"""The program: `python -m mnist_dist.export runs/NAME digits.pt2` (or digits.onnx) makes a run's model usable without this package.

That of the built-in task holds the normalisation, too: pixels from 0 to 1 go in, log-probabilities come out. The file is written only if
what was exported, read back from its bytes, gives what the model itself gives on test samples.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import argparse
import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_dist.config import make_config
from mnist_dist.errors import RunError, UserError
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import importing, print_answer
from mnist_dist.source import BUILT_IN
from mnist_dist.task import Export, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-4  # largest difference allowed in an output; float32 sums in another order differ by some 1e-6
_NAME_MAX = 200  # bytes: a file that is being written has a longer one
_ONNX_PACKAGES = ("onnx", "onnxscript")

Runner = Callable[["Tensor"], "Tensor"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 written, 2 a user's mistake, 1 the rest."""
    return print_answer(lambda: _export(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("mnist_dist.export", "Write the model of a run, its normalisation included, as a file that needs none of this package.")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="a run folder, or a .safetensors file that a run wrote")
    parser.add_argument("file", metavar="FILE", type=path_argument, help="the file to write: NAME.pt2 (torch.export) or NAME.onnx")
    parser.add_argument("--data_dir", metavar="DIR", type=path_argument, help="folder with the run's data (default: its own)")
    parser.add_argument("--task", metavar="NAME", help="the code of the run's task (default: its own, where you have trained it before)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it exists")
    return parser.parse_args(arguments)


def _export(options: argparse.Namespace) -> int:
    file = Path(options.file)
    if file.suffix not in (".pt2", ".onnx"):
        raise UserError(f"the file to write is {file}; expected a name that ends in .pt2 or .onnx")
    if os.path.isdir(file) or not os.path.isdir(file.parent):
        raise UserError(f"the file to write is {file}, which is a folder or lies in none; expected a name in an existing folder")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"the file to write is {file}, whose folder may not be written to; expected one where you may write")
    if (size := len(os.fsencode(file.name))) > _NAME_MAX:
        raise UserError(f"the file to write is {file}, whose name has {size} bytes; expected at most {_NAME_MAX}")
    if os.path.lexists(file) and not options.force:
        raise UserError(f"{file} exists; give another name, or --force to overwrite it")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if file.suffix == ".onnx" and missing:
        raise UserError(f"ONNX needs packages that are not installed: pip install {' '.join(missing)} (a .pt2 file needs none)")

    with importing():
        import torch

        from mnist_dist.data import load_data
        from mnist_dist.files import write_atomically
        from mnist_dist.source import explaining
        from mnist_dist.weights import load_model

    trained = load_model(options.run, options.task)
    task = trained.task
    values = task.model_dump()
    if options.data_dir is not None:
        values["data_dir"] = options.data_dir
    elif task.name == BUILT_IN and task.data_dir is not None:  # other images of this shape serve as well
        values = type(task)().model_dump()
    _, data = load_data(make_config({"task": task.name, "batch_size": 1} | values, task=type(task)))
    with explaining(task.name, "in export"):
        exported = task.export(trained.model, data)
    _check_example(task.name, exported)
    exported = exported._replace(module=getattr(exported.module, "_orig_mod", exported.module))  # of torch.compile
    exported.module.eval().to(memory_format=torch.contiguous_format)  # the layout in which everybody else has weights
    by_default = "" if type(task).export is not Task.export else ", its first tensor (a task may have a method export of its own)"
    with explaining(task.name, f"as the model was called with the example of export{by_default}"), torch.no_grad():
        _check_output(task.name, exported.module(exported.example[:2]))
    with explaining(task.name, f"as {file.name} was made of its model"):
        content, runner = (to_pt2 if file.suffix == ".pt2" else to_onnx)(exported)
        difference = check_export(exported.module, runner, exported.example)
    try:
        write_atomically(file, content)
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror or error}") from error
    kind = f"{str(exported.example.dtype).removeprefix('torch.')} [{', '.join(['n', *map(str, exported.example.shape[1:])])}] for any n"
    print(
        f"{file}: {len(content):,} bytes; on {len(exported.example)} {task.samples} it differs from the model by at most {difference:.0e}\n"
        f"in:  {', '.join(filter(None, (exported.input_name, kind, exported.input_is)))}\n"
        f"out: {', '.join(filter(None, (exported.output_name, exported.output_is)))}"
    )
    return 0


def _check_example(name: str, exported: object) -> None:
    from torch import Tensor, nn

    if not isinstance(exported, Export) or not isinstance(exported.module, nn.Module):
        raise UserError(f"task {name}: export returned {type(exported).__name__}; expected mnist_dist.task.Export(module, example)")
    if not isinstance(exported.example, Tensor) or exported.example.ndim < 1 or len(exported.example) < 2:
        shown = f"a tensor {list(exported.example.shape)}" if isinstance(exported.example, Tensor) else type(exported.example).__name__
        raise UserError(
            f"task {name}: the example of export is {shown}; expected a tensor of at least 2 samples: where a batch is something else, the "
            "task needs a method export (mnist_dist/task.py)"
        )


def _check_output(name: str, output: object) -> None:
    from torch import Tensor

    if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != 2:
        shown = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(
            f"task {name}: for 2 samples the model to export gives {shown}; expected one tensor with a row for each sample: a model that "
            "gives something else needs a method export, whose module gives one (mnist_dist/task.py)"
        )


def to_pt2(exported: Export) -> tuple[bytes, Runner]:
    """A `torch.export` archive for any batch size, and a function that runs what was read back from it."""
    import torch

    # Two samples as the example: one would be taken for a constant.
    program = torch.export.export(exported.module, (exported.example[:2],), dynamic_shapes=({0: torch.export.Dim("n")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def to_onnx(exported: Export) -> tuple[bytes, Runner]:
    """An ONNX model for any batch size, and a function that runs it by ONNX's own reference implementation."""
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(
        exported.module,
        (exported.example[:2],),
        dynamo=True,
        input_names=[exported.input_name],
        output_names=[exported.output_name],
        dynamic_shapes=({0: "n"},),
        verbose=False,
    )
    assert program is not None
    content = program.model_proto.SerializeToString()
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    evaluator = ReferenceEvaluator(model)
    return content, lambda values: torch.from_numpy(evaluator.run(None, {exported.input_name: values.numpy()})[0])


def check_export(module: "nn.Module", runner: Runner, example: "Tensor") -> float:
    """The largest difference between both on `example` [n, ...], n at least 2. Raises `RunError` above TOLERANCE."""
    import torch

    with torch.no_grad():
        expected = module(example)
        # One sample and many: a batch size that became a constant shows.
        outputs = torch.cat([runner(example[:1]), runner(example[1:])])
    difference = (outputs - expected).abs().max().item() if outputs.shape == expected.shape else math.nan
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())  # of large outputs the last digits differ by more
    if not difference <= allowed:  # NaN, too
        raise RunError(f"what was exported differs from the model by {difference:.1e}, allowed {allowed:.0e}: nothing was written")
    return difference


if __name__ == "__main__":
    sys.exit(main())
