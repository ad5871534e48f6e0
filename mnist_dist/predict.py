"""The program: `python -m mnist_dist.predict runs/NAME picture.png ...` labels a person's own pictures of digits.

torch is imported only once the options are right.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist.errors import UserError
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import importing, make_printable, make_table, print_answer
from mnist_dist.record import CONFIG_FILE, read_config
from mnist_dist.source import BUILT_IN
from mnist_dist.tasks.mnist.digit import FORMATS, prepare_image

if TYPE_CHECKING:
    from torch import Tensor

# Data sets of handwritten digits that were all made in the same way.
_DIGITS = ("mnist", "qmnist")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 all pictures are labelled, 2 some are not or another mistake of the user, 1 the rest."""
    return print_answer(lambda: _predict(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "mnist_dist.predict",
        f"Label pictures of one digit each ({', '.join(FORMATS)}), in any size and colours, with the weights of a run.",
    )
    parser.add_argument("run", metavar="RUN", type=path_argument, help="a run folder, or a .safetensors file that a run wrote")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="picture files")
    parser.add_argument("--json", action="store_true", help="print one JSON array with an object for each picture, in their order")
    return parser.parse_args(arguments)


def _predict(options: argparse.Namespace) -> int:
    with importing():
        import torch

        from mnist_dist.tasks.mnist import Mnist
        from mnist_dist.weights import load_model

    if os.path.isfile(Path(options.run) / CONFIG_FILE) and (name := read_config(Path(options.run)).task.name) != BUILT_IN:
        raise UserError(f"the weights of {options.run} were trained for task {name[:200]}; pictures of digits need those of {BUILT_IN}")
    trained = load_model(options.run)
    task = trained.task
    dataset = str(task.facts["dataset"]) if isinstance(task, Mnist) else f"task {task.name}"
    if not isinstance(task, Mnist) or dataset not in _DIGITS:
        raise UserError(f"the weights of {options.run} were trained on {dataset}; pictures of digits need {' or '.join(_DIGITS)}")
    images: list[Tensor] = []
    answers: list[dict[str, Any]] = []
    for path in options.pictures:
        answer = {"file": path}
        answers.append(answer)
        try:
            images.append(prepare_image(path))
        except UserError as error:
            answer["error"] = str(error)
            print(f"error: {make_printable(str(error))}", file=sys.stderr)
    with torch.inference_mode():
        batches = torch.split(torch.stack(images), 500) if images else ()
        rows = [row for batch in batches for row in trained.model(task.make_inputs((batch, None))[0]).softmax(dim=1).tolist()]
    good = [answer for answer in answers if "error" not in answer]
    for answer, row in zip(good, rows, strict=True):
        digit, runner_up = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:2]
        answer |= {"digit": digit, "probability": row[digit], "runner_up": runner_up, "runner_up_probability": row[runner_up]}
        answer["probabilities"] = row
    if options.json:
        print(json.dumps(answers, indent=2))
    elif good:
        print(_make_table(good))
    return 0 if len(good) == len(answers) else UserError.exit_code


def _make_table(answers: list[dict[str, Any]]) -> str:
    rows = [
        (answer["file"], answer["digit"], f"{answer['probability']:.2%}", answer["runner_up"], f"{answer['runner_up_probability']:.2%}")
        for answer in answers
    ]
    return make_table(("file", "digit", "probability", "runner-up", "probability"), rows)


if __name__ == "__main__":
    sys.exit(main())
