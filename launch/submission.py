"""Submits runs through submitit, to Slurm or to this machine. Imports no torch."""

import contextlib
import io
import os
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor

import mnist_dist
from launch.request import Request, list_arguments
from launch.runs import read_own_note
from launch.training import Training, write_note
from mnist_dist.config import Config
from mnist_dist.errors import UserError
from mnist_dist.preemption import Stop
from mnist_dist.source import find_root
from mnist_dist.task import Task
from mnist_dist.world import MPI_VARIABLES, TORCH_VARIABLES

_LOST = 1  # status of a job that has not noted how it ended


def find_package_folder() -> Path | None:
    """The checkout that this program runs from; None where the package is installed and every Python of its environment finds it."""
    folder = Path(mnist_dist.__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


class _ScriptWriter(SlurmExecutor):
    """submitit's executor, which also writes a script where there is no srun (--dry_run)."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def make_slurm_executor(
    request: Request, folder: Path, count: int = 1, parallel: int | None = None, group: str = "", task: type[Task] | None = None
) -> SlurmExecutor:
    """An executor for `count` runs that keeps its files in `folder`; makes no folder. More than one run become an array."""
    # A rank that has not yet come as far as its own signal handlers would die of USR1, and the job with it: until then it is ignored, and
    # one rank that heard it is enough. -P: a folder mnist_dist where the job was submitted is not the package.
    python = f'bash -c \'trap "" USR1; exec "$@"\' bash {shlex.quote(sys.executable)} -P'
    executor = _ScriptWriter(folder, python=python)
    parameters: dict[str, Any] = {
        "job_name": request.name,
        "time": request.time,
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_task,
        "mem": None if request.memory_gb is None else f"{round(request.memory_gb * 1024)}M",
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "wckey": None,
        "stderr_to_stdout": True,
        # Not submitit's own signal, whose handler in the job would save and requeue by itself. No "B:": it goes to the tasks.
        "additional_parameters": {
            "signal": f"USR1@{request.signal_delay_s}",
            "requeue": True,
            "output": f"{folder}/{'%A_%a' if count > 1 else '%j'}.log",
        },
        "setup": _list_setup(group, task),
        "srun_args": _list_srun_arguments(request),
        "teardown": _list_teardown(request),
        "array_parallelism": parallel or count,
    }
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None or name == "wckey"})
    return executor


def write_script(executor: SlurmExecutor, count: int = 1) -> str:
    """The batch script that `executor` would submit for `count` runs."""
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _find_paths(task: type[Task] | None) -> list[str]:
    """The folders in which a job finds this package, where it is a checkout, and the module of its task."""
    folders = [find_package_folder(), None if task is None else find_root(task)]
    return list(dict.fromkeys(str(folder) for folder in folders if folder is not None))


def _list_setup(group: str, task: type[Task] | None) -> list[str]:
    lines = [
        "# scancel, requeue and preemption send TERM to this shell, too; it stays to hear how the training ended.",
        "trap : TERM",
        "export SUBMITIT_LOG_LEVEL=WARNING",
    ]
    paths = _find_paths(task)
    if paths:
        lines.append(f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}${{PYTHONPATH:+:$PYTHONPATH}}")
    if group:
        lines.append(f"export WANDB_RUN_GROUP={shlex.quote(group)}")
    return lines


def _list_srun_arguments(request: Request) -> list[str]:
    # Not --kill-on-bad-exit=1: the first rank that ends with 85 would make srun send TERM to those still on their way out, and 143 could
    # hide the 85. --wait alone ends what a lost rank leaves hanging. --output=all: one log, that of the job.
    arguments = ["--kill-on-bad-exit=0", "--wait=120", "--export=ALL", "--output=all"]
    if request.cpus_per_task is not None:
        arguments.append(f"--cpus-per-task={request.cpus_per_task}")  # srun inherits it only before Slurm 22.05
    return arguments


def _list_teardown(request: Request) -> list[str]:
    return [
        "status=$?",
        f'if [ "$status" -eq {Stop.REQUEUE.exit_code} ]; then',
        f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {request.max_requeues} ]; then',
        f'        echo "launch: not requeued again (max_requeues is {request.max_requeues}); submit it again to go on"',
        '    elif scontrol requeue "$SLURM_JOB_ID"; then',
        '        echo "launch: requeued"',
        "    else",
        '        echo "launch: could not be requeued; submit it again to go on"',
        "    fi",
        "fi",
        'exit "$status"',
    ]


def make_local_executor(request: Request, folder: Path) -> LocalExecutor:
    """An executor that runs all tasks of all nodes on this machine."""
    executor = LocalExecutor(folder, python=f"{shlex.quote(sys.executable)} -P")
    executor.update_parameters(
        tasks_per_node=request.world_size,
        gpus_per_node=request.gpus_per_node,
        timeout_min=request.time,
        signal_delay_s=request.signal_delay_s,
        stderr_to_stdout=True,
    )
    return executor


def submit_to_slurm(
    request: Request, configs: Sequence[Config], folder: Path, parallel: int | None = None, group: str = ""
) -> list[tuple[str, Path]]:
    """Queue a job for each of `configs`, more than one as an array. Its name and log for each. Raises `UserError`."""
    made = _prepare_folders(configs, folder)
    executor = make_slurm_executor(request, folder, len(configs), parallel, group, type(configs[0].task))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints there what it also raises
            jobs = executor.submit_array([_make_training(config) for config in configs])
        _make_private(folder, jobs[0].job_id)
        submitted = []
        for config, job in zip(configs, jobs, strict=True):
            submitted.append((job.job_id, folder / f"{job.job_id}.log"))
            write_note(Path(config.run_dir), "job", {"job": job.job_id, "log": str(submitted[-1][1])})
    except (FailedJobError, FailedSubmissionError) as error:
        for path in reversed(made):  # as if nothing had been asked for
            if path.name == "slurm":
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rmdir()
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split()).removeprefix('sbatch: error: ')}") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return submitted


def run_locally(
    request: Request, configs: Sequence[Config], parallel: int = 1, group: str = "", report: Callable[[str], None] = print
) -> dict[str, int]:
    """Run each of `configs` on this machine, `parallel` at a time, and wait. The exit status of each, by run folder.

    As in a cluster, a run that saves before its time limit is started again. Ctrl-C and TERM stop and save all of them.
    """
    for config in configs:
        _prepare_folders([config], Path(config.run_dir) / "slurm")
    _prepare_environment(group, type(configs[0].task))
    waiting = deque((config, 0) for config in configs)
    active: dict[str, tuple[Config, int, LocalJob[None]]] = {}
    statuses: dict[str, int] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a closed terminal, unless this runs under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    stopping = False
    while waiting or active:
        try:
            while waiting and len(active) < parallel:
                config, restarts = waiting.popleft()
                active[config.run_dir] = (config, restarts, _start_locally(request, config, report))
            for run_dir, (config, restarts, job) in list(active.items()):
                if not job.done():
                    continue
                del active[run_dir]
                end = read_own_note(Path(run_dir), "end")
                status = end.get("status") if end.get("job") == job.job_id else None
                statuses[run_dir] = status if isinstance(status, int) else _LOST
                if statuses[run_dir] == Stop.REQUEUE.exit_code and restarts < request.max_requeues and not stopping:
                    waiting.appendleft((config, restarts + 1))
            time.sleep(0.1)
        except KeyboardInterrupt:
            stopping = True
            waiting.clear()
            report("saving and stopping")
            for _, _, job in active.values():
                if job._process is not None and job._process.poll() is None:
                    job._process.send_signal(signal.SIGTERM)  # submitit's controller hands it on to the ranks
    return statuses


def _start_locally(request: Request, config: Config, report: Callable[[str], None]) -> LocalJob[None]:
    folder = Path(config.run_dir) / "slurm"
    # Ctrl-C on the terminal reaches every process; submitit's controller would kill the ranks a second later, while they save.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = make_local_executor(request, folder).submit(_make_training(config))
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(job, LocalJob)
    _make_private(folder, job.job_id)
    log = folder / f"{job.job_id}_0_log.out"
    write_note(Path(config.run_dir), "job", {"job": job.job_id, "log": str(log)})
    report(f"{config.run_dir}: started here, {request.world_size} processes; log: {log}")
    return job


def _make_training(config: Config) -> Training:
    return Training(config.run_dir, list_arguments(config))


def _prepare_folders(configs: Sequence[Config], folder: Path) -> list[Path]:
    """Make the folders for the files of the jobs, which only their user can read; those that were not there yet, parents first."""
    made: list[Path] = []
    try:
        for private in [folder, *(Path(config.run_dir) / "slurm" for config in configs)]:
            missing = [path for path in (private, *private.parents) if not path.exists()]
            private.parent.mkdir(parents=True, exist_ok=True)
            if private in missing:  # one that is there may be somebody's own, and stays as open as it is
                private.mkdir(mode=0o700)
            made += reversed(missing)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}; expected a writable folder") from error
    return made


def _make_private(folder: Path, job_id: str) -> None:
    for pickle in folder.glob(f"{job_id.partition('_')[0]}*.pkl"):
        with contextlib.suppress(FileNotFoundError):
            pickle.chmod(0o600)


def _prepare_environment(group: str, task: type[Task]) -> None:
    """The environment of jobs on this machine: what an outer job or launcher left in it would mislead them."""
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in TORCH_VARIABLES + MPI_VARIABLES]:
        del os.environ[name]
    os.environ["SUBMITIT_LOG_LEVEL"] = "WARNING"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*_find_paths(task), os.environ.get("PYTHONPATH"))))
    if group:
        os.environ["WANDB_RUN_GROUP"] = group
