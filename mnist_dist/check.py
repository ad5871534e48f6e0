"""Does a task keep the promises of mnist_dist/task.py? `python -m mnist_dist.check --task my_task.py` tells in seconds, on a CPU.

One line for each check, `PASS` or `FAIL`; the checks themselves are in mnist_dist/promises.py, imported once the options are right.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from mnist_dist.config import RUN_FOLDER_OPTIONS, Config, add_config_options, find_given_task, resolve_config, take_options
from mnist_dist.errors import UserError
from mnist_dist.options import Parser
from mnist_dist.program import answering, importing, print_answer
from mnist_dist.source import note_named
from mnist_dist.world import find_world, ignore_job

# In the order in which they are made.
CHECKS = {
    "losses": "one finite loss for each sample, in the order of the samples",
    "rows": "no sample sees another one, but in BatchNorm",
    "tier": "on how many processes a step is the same",
    "repeat": "forward and backward twice give the same bits",
    "gradients": "every parameter gets a gradient, on every rank",
    "model": "the initial weights are the same, here and in another process",
    "data": "a sample is the same whenever and wherever it is read",
    "state": "another process continues from state_dict as this one does",
    "two processes": "they train as one does",
    "evaluation": "two processes count as one does",
    "resume": "killed and resumed is as never stopped",
    "cost": "parameters, seconds of a step, a checkpoint, and the grace they need (always passes)",
}

# The short runs have their own.
_UNUSED = (*RUN_FOLDER_OPTIONS, "device", "precision", "cuda_graph")


class _Ended(BaseException):
    """SIGTERM came."""


def _end(*_: object) -> None:
    raise _Ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 all checks pass, 1 one fails, 2 a user's mistake."""

    def run() -> int:
        config, names, options = _parse(arguments)
        note_named(config.task.name)
        # Ended by `kill`, too, it leaves no process and no folder.
        signal.signal(signal.SIGTERM, _end)
        with importing():
            from mnist_dist.promises import examine

        answers = []
        # Closed whatever happens: its processes end, and its folder goes.
        with answering(options.json), contextlib.closing(examine(config, names, options.deadline_s)) as found:
            for name, answer in found:
                answers.append({"check": name, "passed": answer.passed, "text": answer.text, **answer.values})
                if not options.json:
                    print(f"{'PASS' if answer.passed else 'FAIL'} {name}: {answer.text}", flush=True)
        if options.json:
            print(json.dumps(answers))
        return 0 if all(answer["passed"] for answer in answers) else 1

    before = signal.getsignal(signal.SIGTERM)
    try:
        return print_answer(run)
    except _Ended:
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments: Sequence[str] | None) -> tuple[Config, list[str], argparse.Namespace]:
    with answering(is_alone=True):  # whether it must be is not known before the task is
        task, recipe = find_given_task(arguments, "mnist_dist.check")
    listed = "; ".join(f"{name}: {what}" for name, what in CHECKS.items())
    parser = Parser(
        "mnist_dist.check",
        f"Does a task keep its promises? A line for each check. {listed}.",
        usage="[--config FILE] [--task NAME] [--only NAME,NAME] [--skip NAME] [--json] [--option value ...]",
    )
    parser.add_argument("--only", metavar="NAME[,NAME]", default="", help="make only these checks")
    parser.add_argument("--skip", metavar="NAME[,NAME]", default="", help="make all checks but these")
    parser.add_argument("--json", action="store_true", help="print a list with one object for each check")
    parser.add_argument("--deadline_s", metavar="S", default="120", help="how long another process may take (seconds; default: 120)")
    add_config_options(parser, task, hidden=_UNUSED)
    given = parser.parse(arguments)
    own: dict[str, Any] = {name: given.pop(name) for name in ("only", "skip", "json", "deadline_s")}
    if find_world(ignore_job(os.environ)).size > 1:
        raise UserError(
            "this program was started as several processes; start it once: it starts others itself (in a Slurm job: srun --ntasks=1)"
        )
    given_deadline, own["deadline_s"] = own["deadline_s"], 0.0
    with contextlib.suppress(TypeError, ValueError):
        own["deadline_s"] = float(given_deadline)
    if not 1 <= own["deadline_s"] <= 86_400:
        raise UserError(f"deadline_s is {str(given_deadline)[:40]!r}; expected a number of seconds from 1 to 86400")
    only, skipped = (_read_names(option, own[option]) for option in ("only", "skip"))
    names = [name for name in CHECKS if name in (only or CHECKS) and name not in skipped]
    if not names:
        raise UserError(f"skip is {own['skip']!r}, which leaves no check to make; there are {', '.join(CHECKS)}")
    with answering(own["json"]):
        config = resolve_config(take_options(given, _UNUSED, "check"), recipe)
    return config, names, argparse.Namespace(**own)


def _read_names(option: str, text: str | None) -> list[str]:
    names = [name.strip().replace("_", " ") for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in CHECKS:
            raise UserError(f"{option} is {name[:80]!r}, which is no check; allowed: {', '.join(CHECKS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
