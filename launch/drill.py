"""A short training that is stopped on purpose, and what its end and its continuation say of a site. Imports no torch.

Each rank runs `run_part`: to the end, or until a rank is killed, or until a signal comes.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_dist.config import Config, configure
from mnist_dist.errors import UserError
from mnist_dist.files import read_file, write_atomically
from mnist_dist.finding import Finding
from mnist_dist.preemption import Stop, StopSignals
from mnist_dist.record import CHECKPOINTS, WEIGHTS_FILE, list_newest_first, parse_timestamp, read_ends, read_note, read_starts
from mnist_dist.world import find_host, find_world

UNBROKEN, KILLED, REQUEUED = "unbroken", "killed", "requeued"  # the parts, and the folders of their runs
STEPS, TURN_STEP, CHECKPOINT_EVERY = 40, 25, 10  # the run is stopped at the turn
HOLD_S = 130.0  # how long a rank waits there for a signal, from its start
SIGNAL_LIMIT_MIN, SIGNAL_DELAY_S = 3, 75  # of the job that waits for one: it comes 75 to 135 s after the start
_SAVED_S = 20.0  # how long the rank to be killed waits for a checkpoint
_LATE_S = 30.0  # how much later than asked for a signal may come
_EARLY_S = 60.0 + 10.0  # and how much earlier: Slurm allows itself a minute
_WEIGHTS_BYTES_MAX = 64 << 20
_PROGRAM = "launch.drill"


def make_config(folder: Path, part: str, size: int) -> Config:
    """The run of a part in `folder`, for `size` ranks. Only the run that nothing stops is mirrored to W&B."""
    return configure(
        run_dir=str(folder / part),
        dataset="synthetic",
        steps=STEPS,
        batch_size=min(4096, max(32, 2 * size)),
        optimizer="sgd",
        learning_rate=0.01,
        momentum=0.9,
        threads=1,
        log_every=5,
        checkpoint_every=CHECKPOINT_EVERY,
        report=False,
        wandb="auto" if part == UNBROKEN else "disabled",
        timeout_s=300 if part == REQUEUED else 100,
    )


class _NotedSignals(StopSignals):
    """Stop signals, of which the first to reach this rank is noted in a file at once."""

    def __init__(self, note: Callable[[Stop], None]) -> None:
        self._note, self._strongest = note, Stop.NONE
        super().__init__()

    @property
    def received(self) -> Stop:
        """The strongest stop so far."""
        return self._strongest

    @received.setter
    def received(self, stop: Stop) -> None:
        if stop and not self._strongest:
            with contextlib.suppress(OSError):  # then this rank counts as not reached
                self._note(stop)
        self._strongest = stop


def _write_note(folder: Path, name: str, rank: int, stop: Stop = Stop.NONE) -> None:
    path = folder / "notes" / f"{name}-{rank}.json"
    if not path.exists():  # of the start before
        note = {"rank": rank, "host": find_host(), "time": time.time(), "stop": stop.name}
        write_atomically(path, json.dumps(note).encode())


def read_notes(folder: Path, name: str, size: int) -> dict[int, dict[str, Any]]:
    """What the ranks noted as `name` in `folder`: rank, host and time, by rank. Damaged notes count as missing."""
    found = {rank: read_note(folder / "notes" / f"{name}-{rank}.json") for rank in range(size)}
    return {rank: note for rank, note in found.items() if isinstance(note.get("time"), float) and isinstance(note.get("host"), str)}


def run_part(folder: Path, part: str, hold_s: float = HOLD_S) -> int:
    """Train as one rank; the exit status. The folder `notes` in `folder` must exist."""
    begun = time.monotonic()
    rank, size = (world := find_world(os.environ)).rank, world.size
    signals = _NotedSignals(lambda stop: _write_note(folder, "signal", rank, stop)).install()

    def turn(batches: Iterable[Any], _: object) -> Iterable[Any]:
        for batch in batches:
            if batch.step == TURN_STEP and part == KILLED and rank == size - 1:
                _be_killed(folder, part, rank)
            if batch.step == TURN_STEP and part == REQUEUED:
                _write_note(folder, "ready", rank)
                while not signals.received and time.monotonic() < begun + hold_s:
                    time.sleep(0.01)
            yield batch

    from mnist_dist.loop import train
    from mnist_dist.program import run_program

    return run_program(lambda: train(make_config(folder, part, size), signals, turn).stop.exit_code)


def _be_killed(folder: Path, part: str, rank: int) -> None:
    """Die of SIGKILL, once."""
    if read_note(folder / "notes" / f"kill-{rank}.json"):
        return
    end = time.monotonic() + _SAVED_S
    while not list_newest_first(folder / part / CHECKPOINTS) and time.monotonic() < end:
        time.sleep(0.01)
    _write_note(folder, "kill", rank)
    os.kill(os.getpid(), signal.SIGKILL)


def list_words(folder: Path, part: str) -> tuple[str, ...]:
    """What `python -m` is given to run a part."""
    return _PROGRAM, str(folder), part


@dataclass(frozen=True)
class Drill:
    """A part as a job: submitit calls it on every rank."""

    folder: Path
    part: str
    hold_s: float = HOLD_S

    def __call__(self) -> None:
        """Train. Always ends the process, with the training's exit status."""
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler; the training replaces the others
        sys.exit(run_part(self.folder, self.part, self.hold_s))


def compare_weights(folder: Path, part: str) -> tuple[bool | None, str]:
    """Whether the run of `part` ended with the bits of the run that nothing stopped, and that in words. None where that left none."""
    digests = []
    for run in (UNBROKEN, part):
        try:
            digests.append(hashlib.sha256(read_file(folder / run / WEIGHTS_FILE, _WEIGHTS_BYTES_MAX)).hexdigest())
        except OSError:
            return None if run == UNBROKEN else False, f"the run {run} left no weights to compare"
    if digests[0] == digests[1]:
        return True, "weights bit-equal to an unbroken run's"
    notes = [str(start.get("processor")) for run in (UNBROKEN, part) for start in _read_rows(read_starts, folder / run)]
    # Where the ranks of one start have several kinds, those of another may have them in another order.
    kinds = dict.fromkeys(kind for note in notes for kind in note.split("; "))
    if len(kinds) > 1:
        return False, f"weights differ from an unbroken run's, and the ranks had different processors or GPUs ({', '.join(kinds)})"
    return False, f"weights differ from an unbroken run's (SHA-256 {digests[1][:8]}, not {digests[0][:8]})"


def _read_rows(read: Callable[[Path], list[dict[str, Any]]], path: Path) -> list[dict[str, Any]]:
    try:
        return read(path)
    except UserError:
        return []


def _name_ranks(ranks: Sequence[int], hosts: dict[int, dict[str, Any]]) -> str:
    shown = [f"{rank} on {hosts[rank]['host']}" if rank in hosts else str(rank) for rank in ranks[:4]]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{' and others' if len(ranks) > 4 else ''}"


def judge_signal(folder: Path, size: int, *, sent_at: float | None = None, limit_at: float | None = None) -> Finding:
    """How many of `size` ranks a signal reached: one sent at `sent_at`, or one before the time limit at `limit_at` (seconds since 1970)."""
    stopped, ready = (read_notes(folder, name, size) for name in ("signal", "ready"))
    heard = {rank: note for rank, note in stopped.items() if note.get("stop") == Stop.REQUEUE.name}
    values: dict[str, Any] = {"ranks": size, "reached": len(heard)}
    missed = [rank for rank in range(size) if rank not in heard]
    measured = f"USR1 reached {len(heard)} of {size} ranks"
    last = max((float(note["time"]) for note in heard.values()), default=0.0)
    if heard and sent_at is not None:
        values["after_s"] = round(max(last - sent_at, 0), 3)
        measured += f", {values['after_s']:.2f} s after it was sent"
    elif heard and limit_at is not None:
        values["before_limit_s"] = round(limit_at - last, 1)
        measured += f", {limit_at - last:.0f} s before the time limit ({SIGNAL_DELAY_S} s were asked for)"
    if not heard and not ready:
        return Finding("signal", "WRONG", "the ranks never were ready for the signal", "look at the log of the job", values)
    early_s = SIGNAL_DELAY_S + _EARLY_S
    if stopped and not heard and limit_at is not None and (left_s := limit_at - min(note["time"] for note in stopped.values())) > early_s:
        measured = f"not tried: another signal ended the job {left_s:.0f} s before its time limit, before USR1 was due"
        return Finding("signal", "WARN", measured, "see who or what ended the job (a requeue, a preemption, a node), and repeat", values)
    if not heard:
        step = "no run saves before its time limit here: ask whether sbatch --signal is heeded, and set --checkpoint_every"
        return Finding("signal", "WRONG", measured, step, values)
    if missed:
        step = f"{_name_ranks(missed, ready)} heard nothing: see what stands between srun and the program there (a container, a wrapper)"
        return Finding("signal", "WARN", measured, step, values)
    if limit_at is not None and limit_at - last > early_s:
        step = "it came before Slurm sends it for the time limit: see who or what sent it (a preemption, a person), and repeat"
        return Finding("signal", "WARN", measured, step, values)
    if limit_at is not None and limit_at - last < SIGNAL_DELAY_S - _LATE_S:
        return Finding("signal", "WARN", measured, "it comes late: ask for a larger --signal_delay_s", values)
    return Finding("signal", "ok", measured, "", values)


def judge_requeue(folder: Path, *, by: str, is_forbidden: bool = False, state: str = "") -> Finding:
    """Whether the run that a signal stopped came back, and with the same bits. `by`: who started it again, such as Slurm."""
    run = folder / REQUEUED
    starts, ends = _read_rows(read_starts, run), _read_rows(read_ends, run)
    saved = next((end for end in ends if str(end.get("why", "")).startswith("stopped by")), None)
    if saved is None:
        return Finding("requeue", "WARN", "not tried, since no signal stopped the run", "see signal, and look at the log of the job")
    step = saved.get("step")
    if Stop.REQUEUE.cause not in str(saved["why"]):
        measured = f"not tried, since another signal than USR1 ended the run at step {step}"
        return Finding("requeue", "WARN", measured, "see signal, and repeat")
    if len(starts) < 2:
        return Finding(
            "requeue", "WRONG", f"saved at step {step} and never came back{state and f' ({state})'}", "look at the log of the job"
        )
    is_equal, words = compare_weights(folder, REQUEUED)
    ended, began = (parse_timestamp(row.get("time")) or 0.0 for row in (saved, starts[1]))
    back_s = max(began - ended, 0)
    values = {"back_s": round(back_s, 1), "step": step, "bit_equal": is_equal}
    resumed = f"at step {starts[1].get('step')}; {words}"
    if not is_equal:
        word, advice = _judge_bits(is_equal, words)
        return Finding("requeue", word, f"saved at step {step}, went on {resumed}", advice, values)
    if starts[1].get("step") != step:
        return Finding(
            "requeue", "WRONG", f"saved at step {step}, but went on {resumed}", "is the run folder the same on all nodes?", values
        )
    if is_forbidden:
        measured = f"this site did not requeue the job; submitted again, it went on {resumed}"
        advice = "give launch.submit --chain 5: jobs that follow each other; or ask the site to allow requeue (scontrol requeue)"
        return Finding("requeue", "WARN", measured, advice, values | {"requeued": False})
    return Finding("requeue", "ok", f"{by} after {back_s:.0f} s, {resumed}", "", values | {"requeued": True})


def _judge_bits(is_equal: bool | None, words: str) -> tuple[str, str]:
    """How bad it is that weights are not the same, as `compare_weights` tells, and what to do now."""
    if is_equal is None:
        return "WARN", "see why the run that was to be compared with did not finish: gradients and curve, and the log of the first job"
    word = "WARN" if "different processors" in words else "WRONG"
    return word, "compare one kind of node with itself (--constraint); else see gradients: a node that computes differently"


def judge_kill(folder: Path, size: int, *, log: str, ended_at: float | None, status: int | None) -> Finding:
    """How the others ended when a rank was killed, and whether the run went on with the same bits.

    `log`, `ended_at`: of the start in which it was killed, None where it had to be ended; `status`: of the start after it.
    """
    victim = size - 1
    note = read_notes(folder, "kill", size).get(victim)
    if note is None:
        return Finding("kill", "WRONG", "no rank was ready to be killed", "look at the log kill.log")
    who = f"rank {victim} on {note['host']} was killed"
    if ended_at is None:
        return Finding("kill", "WRONG", f"{who}, and the others did not end", "set --timeout_s; look at the log kill.log")
    others_s = max(ended_at - note["time"], 0)
    values: dict[str, Any] = {"others_s": round(others_s, 2), "rank": victim}
    named = re.search(rf"\brank {victim}\b.*\bgone\b", log) is not None
    values["named"] = named
    others = f"; the others ended after {others_s:.1f} s{' and named it' if named else ', and did not name it'}" if size > 1 else ""
    if status:
        return Finding("kill", "WRONG", f"{who}{others}; the same command ended with status {status}", "look at the log kill.log", values)
    is_equal, words = compare_weights(folder, KILLED)
    starts = _read_rows(read_starts, folder / KILLED)
    values |= {"step": starts[-1].get("step") if starts else None, "bit_equal": is_equal}
    measured = f"{who}{others}; the same command went on at step {values['step']}; {words}"
    if not is_equal:
        word, advice = _judge_bits(is_equal, words)
        return Finding("kill", word, measured, advice, values)
    if size > 1 and not named:
        return Finding("kill", "WARN", measured, "look at the log kill.log for what the others said instead", values)
    return Finding("kill", "ok", measured, "", values)


def judge_tracking(log: str) -> Finding:
    """Whether W&B was online, from the log of the run that nothing stopped."""
    online = re.search(r"W&B mirrors this run: (\S+)", log)
    if online:
        return Finding("W&B", "ok", f"online: {online[1]}", "", {"online": True})
    offline = re.search(r"W&B keeps this run offline(?:, because ([^\n]*))?", log)
    if offline:
        reason = re.split(r"; (?:upload|metrics)", offline[1] or "W&B's own settings ask for it")[0].strip()
        values = {"online": False, "reason": reason}
        if "no API key" in reason or not offline[1]:
            return Finding("W&B", "ok", f"offline: {reason}", "", values)
        step = "the run is kept, and `wandb sync` uploads it where there is a network; or give the nodes a way to the server"
        return Finding("W&B", "WARN", f"offline: {reason}", step, values)
    refused = re.search(r"(this run is not mirrored to W&B[^\n]*|W&B failed[^\n]*)", log)
    if refused:
        return Finding("W&B", "WARN", refused[1], "see docs/tracking.md", {"online": False})
    return Finding("W&B", "ok", "disabled by W&B's own settings", "", {"online": False})


if __name__ == "__main__":
    sys.exit(run_part(Path(sys.argv[1]), sys.argv[2]))
