"""What a submitted job runs: a small class of plain values, which is all that a job's pickle holds. Imports no torch."""

import datetime
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.errors import UserError
from mnist_dist.files import mark_folder
from mnist_dist.train import main  # here, so that nothing is left to import between submitit's signal handlers and ours
from mnist_dist.world import find_world


@dataclass(frozen=True)
class Training:
    """One run: the folder that it is kept in, and the options of `mnist_dist.train`. submitit calls it on every rank."""

    run_dir: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Train. Always ends the process, with the training's exit status."""
        # The program's own handlers replace submitit's, which would save and requeue from one rank, between any two bytecodes.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        self._note_end(None)  # this start may end without noting how
        status = main(self.arguments)
        self._note_end(status)
        # No result for submitit: the run folder is the record.
        sys.exit(status)

    def _note_end(self, status: int | None) -> None:
        """Note on rank zero how this start ended; with None, forget how the one before it did."""
        try:
            if find_world(os.environ).rank != 0:
                return
            if status is None:
                (Path(self.run_dir) / "slurm/end.json").unlink(missing_ok=True)
            else:
                write_note(Path(self.run_dir), "end", {"job": find_job_id(), "status": status})
        except (OSError, UserError) as error:
            print(f"launch: how this start ends cannot be noted: {error}", file=sys.stderr)


def find_job_id() -> str:
    """The job that this process belongs to, as submitit names it: 12, or 12_3 in an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")


def write_note(run_dir: Path, name: str, values: dict[str, str | int]) -> None:
    """Write RUN_DIR/slurm/NAME.json: `job` says which job has the run, `end` how it ended. Raises OSError."""
    folder = run_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new = folder / f".{name}.{os.getpid()}"
    new.write_text(json.dumps({"time": now, "folder": mark_folder(run_dir), **values}) + "\n")
    new.replace(folder / f"{name}.json")
