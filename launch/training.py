"""What a job runs: the training, and a note of how it ended. Imports no torch.

A job of submitit calls `Training`, whose few plain values are all that its pickle holds; slurm/train.sh runs this module as a program.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.runs import is_run
from mnist_dist.config import parse_command_line
from mnist_dist.errors import UserError
from mnist_dist.files import mark_folder, write_atomically
from mnist_dist.record import make_timestamp
from mnist_dist.train import main  # here, so that nothing is left to import between submitit's signal handlers and ours
from mnist_dist.world import find_world


@dataclass(frozen=True)
class Training:
    """One run: the folder that it is kept in, and the options of `mnist_dist.train`. submitit calls it on every rank.

    `gpus` are those that it may see, as CUDA_VISIBLE_DEVICES names them; None: those that whoever starts it shows.
    """

    run_dir: str
    arguments: tuple[str, ...]
    gpus: str | None = None

    def __call__(self) -> None:
        """Train. Always ends the process, with the training's exit status."""
        # The program's own handlers replace submitit's, which would save and requeue from one rank, between any two bytecodes.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        if self.gpus is not None:  # on one machine submitit would show every run the first ones, whichever its user has left
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        was_there = os.path.lexists(self.run_dir)
        self._note_end(None)  # this start may end without noting how
        status = main(self.arguments)
        if os.path.lexists(self.run_dir) or not was_there:  # one that was removed meanwhile is not made anew
            self._note_end(status)
        # No result for submitit: the run folder is the record.
        sys.exit(status)

    def _note_end(self, status: int | None) -> None:
        """Note on rank zero how this start ended; with None, forget how the one before it did."""
        try:
            folder = Path(self.run_dir)
            # What is in the folder may be somebody's own: the training will refuse it.
            is_ours = not os.path.lexists(folder) or is_run(folder) or {*os.listdir(folder)} <= {"slurm"}
            if find_world(os.environ).rank != 0 or not is_ours:
                return
            if status is None:
                (folder / "slurm/end.json").unlink(missing_ok=True)
            else:
                write_note(folder, "end", {"job": find_job_id(), "status": status})
        except (OSError, UserError) as error:
            print(f"launch: how this start ends cannot be noted: {error}", file=sys.stderr)


def find_job_id() -> str:
    """The job that this process belongs to, as submitit names it: 12, or 12_3 in an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")


def write_note(run_dir: Path, name: str, values: dict[str, Any]) -> None:
    """Write RUN_DIR/slurm/NAME.json: `job` says which job has the run, `end` how it ended. Raises OSError."""
    folder = run_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    note = {"time": make_timestamp(), "folder": mark_folder(run_dir), **values}
    write_atomically(folder / f"{name}.json", (json.dumps(note) + "\n").encode())


if __name__ == "__main__":
    words = tuple(sys.argv[1:])
    try:
        Training(parse_command_line(words).run_dir, words)()
    except UserError:
        sys.exit(main(words))  # which says it
