"""Submits runs through submitit, to Slurm or to this machine. Imports no torch."""

import contextlib
import fcntl
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm import slurm
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

import mnist_dist
from launch.cluster import read_jobs, run_slurm
from launch.request import Request, list_arguments, note_request, split_options
from launch.runs import LOCAL_LOG, RunState, read_own_note, read_state
from launch.training import Training, write_note
from mnist_dist.config import Config
from mnist_dist.errors import RunError, UserError
from mnist_dist.preemption import Stop, deferring_signals, ending_as_interrupt, holding_back_signals
from mnist_dist.program import say
from mnist_dist.record import check_folder, make_timestamp
from mnist_dist.source import find_root
from mnist_dist.task import Task
from mnist_dist.world import list_inherited

# -P: a folder mnist_dist where the job was submitted is not the package.
_PYTHON = f"{shlex.quote(sys.executable)} -P"
_POLICY = Path(__file__).resolve().with_name("policy.sh")
# The variables that sbatch heeds before a script's options, or beside them, by the option of a request that the script has them from.
_SBATCH_VARIABLES = {
    "name": "JOB_NAME OUTPUT ERROR OPEN_MODE EXPORT ARRAY_INX REQUEUE NO_REQUEUE",
    "time": "TIMELIMIT",
    "signal_delay_s": "SIGNAL",
    "partition": "PARTITION",
    "account": "ACCOUNT",
    "qos": "QOS",
    "constraint": "CONSTRAINT",
    "reservation": "RESERVATION",
    "memory_gb": "MEM_PER_NODE MEM_PER_CPU MEM_PER_GPU",
    "cpus_per_task": "CPUS_PER_GPU TRES_PER_TASK",
    "gpus_per_node": "GPUS GPUS_PER_NODE GPUS_PER_TASK GRES TRES_PER_TASK",
}
_GPUS = Path("/proc/driver/nvidia/gpus")  # an entry for each
_LOST = 1  # status of a job that has not noted how it ended
# What sbatch says where the controller may have taken the job, and the answer was lost.
_UNSURE = re.compile(r"timed? ?out|unable to contact|communication|zero bytes|connection|response", re.IGNORECASE)


def find_package_folder() -> Path | None:
    """The checkout that this program runs from; None where the package is installed and every Python of its environment finds it."""
    folder = Path(mnist_dist.__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


class _Executor(SlurmExecutor):
    """submitit's executor, which also writes a script where there is no srun (--dry_run), and knows a job before its files are in place."""

    queued = ""  # the job that sbatch has taken

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _submit_command(self, command: str) -> SlurmJob[Any]:
        # submitit's own takes all that a site prints for UTF-8: at anything else it kills sbatch, which may have queued the job.
        script = self.folder / f".submission_file_{uuid.uuid4().hex}.sh"
        script.write_text(self._make_submission_file_text(command, ""))
        answer = subprocess.run(self._make_submission_command(script), capture_output=True, text=True, errors="replace")
        if answer.returncode:
            words = (answer.stderr or answer.stdout).strip()
            raise FailedJobError(words or f"it ended with {answer.returncode} and no response")
        job = SlurmJob[Any](self.folder, self._read_job_id(answer.stdout), [*range(self._num_tasks())])
        job.paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
        return job

    def _read_job_id(self, text: str) -> str:
        numbers = re.findall(r"^Submitted batch job (\d{1,18})\b", text, re.MULTILINE)  # beside it, a site may say anything
        if not numbers:
            raise RunError(f"sbatch's answer has no number of a job, which may be queued all the same (squeue --me): {text[:300]!r}")
        self.queued = numbers[-1]
        return self.queued

    def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
        # For an array submitit makes another executor, which would read sbatch's answer in its own way: let that be this one.
        plain = slurm.SlurmExecutor
        slurm.SlurmExecutor = lambda *_: self  # type: ignore[assignment, misc]
        try:
            return super()._internal_process_submissions(delayed_submissions)
        finally:
            slurm.SlurmExecutor = plain  # type: ignore[misc]


def make_slurm_executor(
    request: Request,
    folder: Path,
    count: int = 1,
    parallel: int | None = None,
    group: str = "",
    task: type[Task] | None = None,
    before: Sequence[str] = (),
) -> _Executor:
    """An executor for `count` runs that keeps its files in `folder`; makes no folder. More than one run become an array.

    `before`: the jobs that come before this one in a chain, whose run folder `folder` lies in.
    """
    executor = _Executor(folder, python=f"run_training {_PYTHON}")
    parameters: dict[str, Any] = {
        "job_name": request.name,
        "time": request.time,
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks,
        "gpus_per_node": request.gpus or None,
        "cpus_per_task": request.cpus_per_task,
        "mem": request.memory,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "exclude": request.exclude,
        "nodelist": request.nodelist,
        "wckey": None,
        "stderr_to_stdout": True,
        # Not submitit's own signal, whose handler in the job would save and requeue by itself. No "B:": it goes to the tasks.
        "additional_parameters": {
            **{name: True if value is None else value for name, value in split_options(request.sbatch).items()},
            **({"reservation": request.reservation} if request.reservation else {}),
            **({"dependency": f"afterany:{':'.join(before)}"} if before else {}),
            "signal": f"USR1@{request.signal_delay_s}",
            "requeue": True,
            "output": f"{folder}/{'%A_%a' if count > 1 else '%j'}.log",
        },
        "setup": _list_setup(request, folder, group, task, before),
        "use_srun": False,  # the policy calls it
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


def _list_setup(request: Request, folder: Path, group: str, task: type[Task] | None, before: Sequence[str]) -> list[str]:
    lines = [f"source {shlex.quote(str(_POLICY))} || exit", f"MAX_REQUEUES={request.max_requeues}", "export SUBMITIT_LOG_LEVEL=WARNING"]
    if request.srun:
        lines.append(f"srun_options=({shlex.join(list_srun_options(request))})")
    paths = _find_paths(task)
    if paths:
        lines.append(f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}${{PYTHONPATH:+:$PYTHONPATH}}")
    if group:
        lines.append(f"export WANDB_RUN_GROUP={shlex.quote(group)}")
    if before:
        lines.append(f"leave_if_done {_PYTHON} -m launch.chain {':'.join(before)} --run_dir={shlex.quote(str(folder.parent))}")
    return lines


def list_srun_options(request: Request) -> list[str]:
    """The options of --srun, a word each."""
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in split_options(request.srun).items()]


def make_local_executor(request: Request, folder: Path) -> LocalExecutor:
    """An executor that runs all tasks of all nodes on this machine. What GPUs they see, their `Training` says."""
    executor = LocalExecutor(folder, python=_PYTHON)
    executor.update_parameters(
        tasks_per_node=request.world_size,
        timeout_min=request.time,
        signal_delay_s=request.signal_delay_s,
        stderr_to_stdout=True,
    )
    return executor


def submit_to_slurm(
    request: Request, configs: Sequence[Config], folder: Path, parallel: int | None = None, group: str = "", chain: int = 1
) -> list[list[str]]:
    """Queue a job for each of `configs`, more than one as an array; `chain` jobs for one of them, each after those before it.

    The names of each one's jobs; RUN_DIR/slurm/job.json holds them, too. Raises `UserError`, and Ctrl-C KeyboardInterrupt, and then nothing
    is queued; `RunError` names what is queued and could not be withdrawn.
    """
    made = _prepare_folders(configs, folder)
    first = Path(configs[0].run_dir)
    with contextlib.ExitStack() as stack:
        # A sweep excludes who submits one of its runs, without a lock for each of a thousand.
        stack.enter_context(_submitting_alone(first.parent, fcntl.LOCK_EX if len(configs) > 1 else fcntl.LOCK_SH))
        for private in {folder, first / "slurm"} if len(configs) == 1 else {folder}:
            stack.enter_context(_submitting_alone(private))
        try:
            jobs = read_jobs()
            for config in configs:
                check_free(read_state(Path(config.run_dir), jobs), config)
        except BaseException:
            _withdraw([], made, "")
            raise
        return _submit(request, configs, folder, parallel, group, chain, made)


@contextlib.contextmanager
def _submitting_alone(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Raise `UserError` where another submission to `folder` is under way: of two, each could find the folder free."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another submission to {folder.parent if folder.name == 'slurm' else folder} is under way: wait for it"
                ) from None
        yield
    finally:
        os.close(descriptor)


def _submit(
    request: Request, configs: Sequence[Config], folder: Path, parallel: int | None, group: str, chain: int, made: list[Path]
) -> list[list[str]]:
    names: list[list[str]] = [[] for _ in configs]
    more: dict[str, Any] = {"request": note_request(request), "time": make_timestamp()}  # it may begin before all is written
    executors: list[_Executor] = []
    try:
        for _ in range(chain):
            executor = make_slurm_executor(request, folder, len(configs), parallel, group, type(configs[0].task), names[0])
            executors.append(executor)
            with queueing(request):
                jobs = executor.submit_array([_make_training(config) for config in configs])
                _make_private(folder, jobs[0].job_id)
                for config, job, mine in zip(configs, jobs, names, strict=True):
                    mine.append(job.job_id)
                    if chain > 1:
                        more["chain"] = ":".join(mine)
                    write_note(Path(config.run_dir), "job", {"job": mine[0], "log": str(folder / f"{mine[0]}.log"), **more})
    except (FailedJobError, FailedSubmissionError, OSError, KeyboardInterrupt) as error:
        queued, doubt = [executor.queued for executor in reversed(executors) if executor.queued], ""
        if isinstance(error, KeyboardInterrupt):
            words = "interrupted"
        elif isinstance(error, OSError):
            words = f"{folder} cannot be written: {error.strerror or error}"
        else:
            words = describe_refusal(error)
            found, doubt = find_unanswered(folder, error)
            queued += [job for job in found if job not in queued]
        _withdraw(queued, [] if doubt else made, words)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise (RunError(f"{words}\n{doubt}") if doubt else UserError(words)) from error
    return names


def find_unanswered(folder: Path, error: Exception) -> tuple[list[str], str]:
    """The jobs of scripts in `folder` that are queued though sbatch has failed with `error`: its answer may be lost, and not the job.

    And what to tell where none is found, and one may be there: then its files are to stay.
    """
    if not _UNSURE.search(str(error)):
        return [], ""
    reason = "squeue does not show it yet"
    try:
        jobs = [job.name.partition("_")[0] for job in read_jobs() if job.is_active and Path(job.script).parent == folder]
    except RunError as silent:
        jobs, reason = [], str(silent)
    return list(dict.fromkeys(jobs)), "" if jobs else f"it may be queued all the same ({reason}): look with squeue --me, and scancel it"


def check_free(run: RunState, config: Config) -> bool:
    """Whether `config` may begin or go on in the folder of `run`; False where it is finished. Raises `UserError` for a folder not free."""
    check_folder(run.path, config)
    if run.is_active:
        by = f"job {run.job}" if run.job else f"process {run.pid}" if run.pid else "another process"
        raise UserError(f"run_dir {run.path} is in use by {by} ({run.state}): wait for it, or use another run_dir")
    return not run.is_finished


def _withdraw(queued: list[str], made: list[Path], words: str) -> None:
    """As if nothing had been asked for. Raises `RunError`, which begins with `words`, and leaves the files where jobs stay queued."""
    if queued:
        try:
            run_slurm("scancel", *queued)
        except RunError as error:
            raise RunError(f"{words}\nthese jobs are queued, and cannot be withdrawn ({error}): scancel {' '.join(queued)}") from error
    for path in reversed(made):
        if path.name == "slurm":
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def queueing(request: Request) -> Iterator[None]:
    """While sbatch is called: without variables that would change the job.

    Those are what an outer job left, which srun would take for the new job's, and what sbatch heeds before the options in a script.
    Signals to end wait, sbatch's as well: there may be no job of which nobody knows.
    """
    before = dict(os.environ)
    given = [names for option, names in _SBATCH_VARIABLES.items() if getattr(request, option)]
    names = {f"SBATCH_{name}" for names in given for name in names.split()}
    names.add("SBATCH_WAIT")  # sbatch would return when the job has ended
    if "gpu" not in before.get("SBATCH_GRES", ""):  # but of something else, such as a local disk
        names.discard("SBATCH_GRES")
    with holding_back_signals():
        for name in names.intersection(before) | {*list_inherited(before)}:
            del os.environ[name]
        try:
            yield
        finally:
            os.environ.update(before)


def describe_refusal(error: Exception) -> str:
    """What submitit raises where sbatch refuses a job, as one line."""
    return f"sbatch refused the job: {' '.join(str(error).split()).removeprefix('sbatch: error: ')}"


def run_locally(request: Request, configs: Sequence[Config], parallel: int = 1, group: str = "") -> dict[str, int]:
    """Run each of `configs` on this machine, `parallel` at a time, and wait. The exit status of each, by run folder.

    As in a cluster, a run that saves before its time limit is started again. Ctrl-C and TERM stop and save all of them.
    """
    gpus = _find_gpus(request.all_gpus)
    _prepare_environment(group, type(configs[0].task))
    runs = _LocalRuns(request, parallel, gpus, deque((config, 0) for config in configs))
    try:
        with ending_as_interrupt():
            while runs.waiting or runs.active:
                try:
                    runs.start_and_collect()
                    time.sleep(0.1)
                except KeyboardInterrupt:
                    runs.stop()
    except BaseException:
        _stop(run.job for run in runs.active.values())  # nobody would watch them any more
        raise
    return runs.statuses


def _find_gpus(count: int) -> list[str]:
    """The GPUs of this machine that its user may have, as CUDA_VISIBLE_DEVICES names them. Raises `UserError` for fewer than `count`."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        there = [str(number) for number in range(len([*_GPUS.glob("*")]) or count)]  # where the driver does not tell, torch will
    else:  # CUDA heeds what stands before the first name that is none, such as -1
        names = [name.strip() for name in given.split(",")]
        there = [*dict.fromkeys(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-\S+").fullmatch, names))]
    if len(there) < count:
        known = "this machine has" if given is None else f"CUDA_VISIBLE_DEVICES is {given!r}, which names"
        raise UserError(f"nodes times gpus_per_node is {count}, and {known} {len(there)}")
    return there


@dataclass(frozen=True)
class _LocalRun:
    """A run that trains on this machine: how often it was started again, and its GPUs."""

    config: Config
    restarts: int
    gpus: list[str]
    job: LocalJob[None]


@dataclass
class _LocalRuns:
    """Runs on this machine, some of them at a time: those that wait, each with how often it was started again, and those that train."""

    request: Request
    parallel: int
    gpus: list[str]
    waiting: deque[tuple[Config, int]]
    active: dict[str, _LocalRun] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    is_stopping: bool = False

    def start_and_collect(self) -> None:
        """Start as many as there is room for, and note the exit statuses of those that have ended."""
        while self.waiting and len(self.active) < self.parallel:
            self._start(*self.waiting.popleft())
        for run_dir, run in list(self.active.items()):
            if not run.job.done():
                continue
            del self.active[run_dir]
            end = read_own_note(Path(run_dir), "end")
            status = end.get("status") if end.get("job") == run.job.job_id else None
            self.statuses[run_dir] = status if isinstance(status, int) else _LOST
            asks_again = self.statuses[run_dir] == Stop.REQUEUE.exit_code and run.restarts < self.request.max_requeues
            if asks_again and not self.is_stopping:
                self.waiting.appendleft((run.config, run.restarts + 1))

    def _start(self, config: Config, restarts: int) -> None:
        """Start a run, or note that it is finished already, or that another submission came first: the other runs of this one go on."""
        gpus = self._choose_gpus()
        with deferring_signals():  # a job that is not known here yet would not be told to save
            try:
                job = _start_locally(self.request, config, gpus)
            except (UserError, OSError) as error:
                say(f"error: {error}")
                self.statuses[config.run_dir] = UserError.exit_code
                return
            if job is None:
                self.statuses[config.run_dir] = Stop.NONE.exit_code
            else:
                self.active[config.run_dir] = _LocalRun(config, restarts, gpus, job)

    def _choose_gpus(self) -> list[str]:
        """The GPUs of the next run: others than those that train have, as far as there are enough."""
        used = Counter(itertools.chain(*(run.gpus for run in self.active.values())))
        return sorted(self.gpus, key=used.__getitem__)[: self.request.all_gpus]

    def stop(self) -> None:
        """Let all save and end; the second time, end them at once."""
        at_once, self.is_stopping = self.is_stopping, True
        print("stopping at once" if at_once else "saving and stopping; Ctrl-C again stops at once")
        self.waiting.clear()
        _stop((run.job for run in self.active.values()), at_once=at_once)


def _stop(jobs: Iterable[LocalJob[None]], *, at_once: bool = False) -> None:
    """Tell jobs on this machine to save and end, or end them `at_once`."""
    for job in jobs:
        if job._process is None or job._process.poll() is not None:
            continue
        if not at_once:
            job._process.send_signal(signal.SIGTERM)  # submitit's controller hands it on to the ranks
            continue
        for process in [*psutil.Process(job._process.pid).children(recursive=True), job._process]:
            with contextlib.suppress(psutil.Error):  # it has ended of itself: the others are still to be killed
                process.kill()


def _start_locally(request: Request, config: Config, gpus: Sequence[str]) -> LocalJob[None] | None:
    """The job of a run; None where it has been finished meanwhile. Raises `UserError` where another one has it."""
    path, folder = Path(config.run_dir), Path(config.run_dir) / "slurm"
    _prepare_folders([config], folder)
    with _submitting_alone(folder):
        if not check_free(read_state(path, []), config):
            return None
        # Ctrl-C on the terminal reaches every process; submitit's controller would kill the ranks a second later, while they save.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            job = make_local_executor(request, folder).submit(_make_training(config, gpus))
        finally:
            signal.signal(signal.SIGINT, before)
        assert isinstance(job, LocalJob)
        _make_private(folder, job.job_id)
        log = folder / f"{job.job_id}{LOCAL_LOG}"
        write_note(path, "job", {"job": job.job_id, "log": str(log), "request": note_request(request)})
    print(f"{config.run_dir}: started here, {request.describe_size()}; log: {log}")
    return job


def _make_training(config: Config, gpus: Sequence[str] | None = None) -> Training:
    return Training(config.run_dir, list_arguments(config), None if gpus is None else ",".join(gpus))


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
    for name in list_inherited(os.environ):
        del os.environ[name]
    os.environ["SUBMITIT_LOG_LEVEL"] = "WARNING"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*_find_paths(task), os.environ.get("PYTHONPATH"))))
    if group:
        os.environ["WANDB_RUN_GROUP"] = group
