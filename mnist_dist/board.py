"""What the ranks of a run leave for each other in torch's store: why a run fails, which rank is gone or silent, and where the others are.

A collective that fails says only that somebody is missing. The first rank that notices rings a bell. A thread of each living rank answers,
with the Python stack of its main thread. Who does not answer is stopped or gone; who answers, but is in no failing collective, hangs.
"""

import contextlib
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from mnist_dist.errors import RunError, first_line
from mnist_dist.files import write_atomically
from mnist_dist.program import make_printable, start_thread
from mnist_dist.record import STACK_NAME, make_timestamp
from mnist_dist.rendezvous import name_with_hosts

_TRYING_S = 0.5  # until it must have answered by a connection that was open for long
_REACHING_S = 2.0  # until the store must have answered
_ANSWERING_S = 3.0  # until each living rank must have
_VERDICT_S = 2 * _ANSWERING_S + _REACHING_S
_TICK_S = 30.0  # at most: one that takes longer shows that this process stood still
_SILENCE = "nothing came"
_LEAVING_S = 5.0
_LEAVING_GPU_S = 2 * _LEAVING_S
_COMPUTING_S = 60.0  # at most: a process may also spin while it waits
_STACK_BYTES = 16_384
_PACKAGE = Path(__file__).resolve().parent
_WAITING_FILES = {str(_PACKAGE / name) for name in ("distributed.py", "exchange.py")}  # ours that wait in collectives


class Board:
    """One rank's hold of the board, with the thread that answers for it."""

    def __init__(self, connect: Callable[[], Any], rank: int, hosts: tuple[str, ...], timeout: timedelta, on_gpu: bool = False) -> None:
        """`connect` opens a connection to the store: a thread waits at the first, and the second is for what this rank says itself.

        The connection of the process group is not used, since a collective that waits for a peer may hold it. Others are opened only where
        one of these has broken: torch's store asks for the name of each new peer, and where no name server answers in time, nobody is
        served until it has given up.
        """
        self.folder: Path | None = None  # where the stacks go
        self._connect, self._rank, self._timeout, self._on_gpu = connect, rank, timeout, on_gpu
        self._ear, self._voice, self._hears = connect(), connect(), True  # whether the store is within reach
        self._tick_s = min(_TICK_S, timeout.total_seconds() / 4)
        self._tick_begun = time.monotonic()
        self._still = (0.0, 0.0)  # for how many seconds this process once stood still, and when it went on
        self._closed = threading.Event()
        threading.Thread(target=self._tick, name="ticks", daemon=True).start()
        self._for_spare: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._spare_is_free = threading.Event()
        self._spare_is_free.set()
        start_thread(self._serve, "spare")
        self._hosts = dict(enumerate(hosts))
        self._thread_of_run = threading.get_ident()
        self._told = ""  # why the run fails, once the thread knows
        self._watcher = start_thread(self._watch, "board")

    def name(self, ranks: Iterable[int]) -> str:
        """Ranks and their hosts, in words."""
        return name_with_hosts(ranks, self._hosts)

    def close(self, store: Any, waits: bool = False) -> None:
        """End the thread, by a connection that is no longer used: from here on this rank is gone.

        Where all has gone well, rank zero `waits` until all have closed theirs: they would take it for lost.
        """

        def end() -> None:
            store.set(f"bell/{self._rank}", "end")
            store.add("closed", 1)
            if waits:
                self._linger(store, "closed", len(self._hosts))

        self._closed.set()
        if self._watcher.is_alive():
            self._in_time(end, 1.0 + _ANSWERING_S * waits)
            self._watcher.join(1.0)
        self._for_spare.put(None)

    def blame_self(self, error: Exception) -> None:
        """Tell the others that this rank fails, and why."""
        text = f"{self.name([self._rank])} failed: {type(error).__name__}: {first_line(error)}"

        def blame() -> None:
            store = self._reach()
            _decide(store, text, [])
            self._ring(store)
            self._linger(store, "told", len(self._hosts))

        self._in_time(blame, _REACHING_S + _ANSWERING_S)

    def report_lost_rank(self, error: Exception) -> None:
        """Tell the others that this rank waits in vain, as its collective's `error` says, and let all of them answer."""

        def report() -> None:
            store = self._reach()
            store.set(f"lost/{self._rank}", _SILENCE if is_timeout(error) else "a connection broke")
            self._ring(store)

        if not self._told:
            self._in_time(report, _REACHING_S)

    def explain(self, error: Exception) -> str:
        """Why a collective has failed with `error`: the same words on every rank."""
        reached, box = threading.Event(), [self._told] if self._told else []
        over = self._begin(lambda: self._investigate(error, reached, box))
        end = time.monotonic() + _REACHING_S
        while not over.is_set() and not reached.is_set() and not self._told and self._hears and time.monotonic() < end:
            time.sleep(0.01)
        if reached.is_set():
            over.wait(2 * _VERDICT_S)
        if self._told or box:
            return self._told or box[0]
        if text := self._describe_stillness():
            return text
        if self._rank != 0:  # which has the board in its memory, and does not answer
            silent = is_timeout(error) and self._hears
            if self._hears and not silent:  # it is there, and another rank is gone
                return f"{self.name([0])} does not answer (stopped, or out of reach), and {_describe_broken(error, aside='')}"
            if silent:
                self._write_stacks({self._rank: self._describe_stacks()})
            return self._name_lost([0], silent) + (self._mention_stacks() if silent else "")
        return f"another rank is gone and left no reason, or it is this: {first_line(error)}"

    def _reach(self) -> Any:
        """The connection for what this rank says itself; a new one where that has broken, or was forgotten by a firewall on the way."""
        answered = threading.Event()

        def ask() -> None:
            self._voice.check(["rung"])
            answered.set()

        self._in_time(ask, _TRYING_S)
        if not answered.is_set():
            self._voice = self._connect()
        return self._voice

    def _linger(self, store: Any, kind: str, expected: int) -> None:
        """Rank zero has the board in its memory: before it ends, let so many have read (`told`), or ended (`closed`)."""
        end = time.monotonic() + _ANSWERING_S
        while self._rank == 0 and time.monotonic() < end and int(store.add(kind, 0)) < expected:
            time.sleep(0.02)

    def _ring(self, store: Any) -> None:
        """Ring the bell of every rank, if this rank is the first to do so."""
        if store.compare_set("rung", "", str(self._rank)) == str(self._rank).encode():
            store.multi_set([f"bell/{rank}" for rank in self._hosts], ["ring"] * len(self._hosts))

    def _wait_for(self, store: Any, kind: str) -> set[int]:
        """The ranks that leave no note of this kind in time."""
        missing = set(self._hosts)
        end = time.monotonic() + _ANSWERING_S
        while (missing := {rank for rank in missing if not store.check([f"{kind}/{rank}"])}) and time.monotonic() < end:
            time.sleep(0.02)
        return missing

    def _investigate(self, error: Exception, reached: threading.Event, box: list[str]) -> None:
        store = self._reach()
        rung = store.compare_set("rung", "", "nobody")
        reached.set()
        if rung == str(self._rank).encode():
            box.append(self._find_verdict(store, error))
        elif not box:
            box.append(self._await_verdict(store, _VERDICT_S, error)["text"])
        self._linger(store, "told", sum(store.check([f"alive/{rank}"]) for rank in self._hosts) if self._rank == 0 else 0)

    def _await_verdict(self, store: Any, seconds: float, error: Exception) -> dict[str, Any]:
        """The verdict that is put up; where none is in time, since the rank that was to find it is gone as well, this rank's own."""
        if not self._hear(store, "verdict", seconds):
            self._find_verdict(store, error)
        verdict: dict[str, Any] = json.loads(store.get("verdict"))
        return verdict

    def _find_verdict(self, store: Any, error: Exception) -> str:
        """What the answers of the others say. The rank that was the first to notice finds it for all."""
        if text := self._describe_stillness():
            return _decide(store, text, [])
        silent, seconds = is_timeout(error), self._timeout.total_seconds()
        dead = self._wait_for(store, "alive")
        alive = sorted(set(self._hosts) - dead)
        if dead:
            return _decide(store, self._name_lost(dead, silent) + (self._mention_stacks() if silent else ""), alive if silent else [])
        stuck = self._wait_for(store, "lost")
        waited = [rank for rank in alive if rank not in stuck and store.get(f"lost/{rank}") == _SILENCE.encode()]
        if not waited:
            return _decide(store, _describe_broken(error), [])
        answers = {rank: json.loads(store.get(f"alive/{rank}")) for rank in alive}
        stuck |= {rank for rank, answer in answers.items() if answer["is_elsewhere"]}  # it has come since
        if not stuck:
            text = (
                f"{self.name(waited)} waited {seconds:g} s in vain for another rank, though all answer: do their hosts reach each other "
                "(python -m mnist_dist.probe exchange), or was one slow (--timeout_s)?"
            )
            return _decide(store, text, [])
        text = "; ".join(f"{self.name([rank])} was silent for {seconds:g} s: it is {answers[rank]['where']}" for rank in sorted(stuck)[:4])
        return _decide(store, text + self._mention_stacks(), alive)

    def _describe_stillness(self) -> str:
        """That this process has just stood still for longer than the connections allow, in words; empty where it has not."""
        now, allowed_s = time.monotonic(), self._timeout.total_seconds()
        perhaps = now - self._tick_begun - self._tick_s, now  # the thread may not have noticed yet
        still_s = max(seconds for seconds, until in (self._still, perhaps) if now - until < 2 * _TICK_S)
        if still_s + self._tick_s < allowed_s:
            return ""
        return (
            f"{self.name([self._rank])} stood still for {still_s:.0f} s (the job was suspended, or its host), "
            f"and the connections between the ranks outlast {allowed_s:g} s; see --timeout_s"
        )

    def _name_lost(self, ranks: Iterable[int], silent: bool) -> str:
        several = len(list(ranks)) > 1
        if not silent:
            return f"{self.name(ranks)} {'are' if several else 'is'} gone and left no reason (killed, or the node went down)"
        seconds = self._timeout.total_seconds()
        was = "were" if several else "was"
        return f"{self.name(ranks)} {was} silent for {seconds:g} s (stopped, or the node is out of reach); see --timeout_s"

    def _mention_stacks(self) -> str:
        return "" if self.folder is None else f"; where the others were: {self.folder}"

    # The threads.

    def _begin(self, work: Callable[[], object]) -> threading.Event:
        """Begin `work` in a thread; what comes back is set when it is over.

        Where this host starts no more threads, the spare one does it. Where that is still at something else, it is left: a rank that
        ends waits for nobody without a limit.
        """
        over = threading.Event()

        def run() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone
                work()
            over.set()

        try:
            start_thread(run)
        except RuntimeError:
            if self._spare_is_free.is_set():
                self._spare_is_free.clear()
                self._for_spare.put(run)
            else:
                over.set()
        return over

    def _in_time(self, work: Callable[[], object], seconds: float) -> None:
        """Do `work` in a thread, and wait for it so long: the rank that serves the board may be the one that no longer answers."""
        self._begin(work).wait(seconds)

    def _serve(self) -> None:
        while (work := self._for_spare.get()) is not None:
            work()
            self._spare_is_free.set()

    def _tick(self) -> None:
        """Notice when this process, and so this thread, stands still. Asks nobody: the others may stand still as well."""
        is_closed = False
        while not is_closed:
            self._tick_begun = time.monotonic()
            is_closed = self._closed.wait(self._tick_s)
            now = time.monotonic()
            if (still_s := now - self._tick_begun - self._tick_s) > 1:
                self._still = still_s, now

    def _watch(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(RuntimeError):
                self._answer()
                return
            self._hears = False
            if not self._closed.is_set():
                self._in_time(self._connect_again, _VERDICT_S)
            if not self._hears and self._rank != 0:  # the store is gone, and with it rank zero
                self._told = self._told or self._name_lost([0], silent=False)
                self.leave(self._told)
            self._closed.wait(1)

    def _connect_again(self) -> None:
        self._ear, self._hears = self._connect(), True

    def _answer(self) -> None:
        """Wait for the bell, answer it, and end with the others. Raises RuntimeError where the store cannot be reached."""
        while not self._hear(self._ear, f"bell/{self._rank}", 7 * 86_400):
            pass
        if self._closed.is_set():
            return
        is_elsewhere = _is_elsewhere(self._thread_of_run)
        answer = {"where": describe_place(self._thread_of_run), "is_elsewhere": is_elsewhere, "stacks": self._describe_stacks()}
        self._ear.set(f"alive/{self._rank}", json.dumps(answer))
        verdict = self._await_verdict(self._ear, 4 * _VERDICT_S, RuntimeError("no rank said why"))
        self._told = verdict["text"]
        if self._rank == 0 and verdict["stacks_of"]:
            answers = self._ear.multi_get([f"alive/{rank}" for rank in verdict["stacks_of"]])
            self._write_stacks({rank: json.loads(text)["stacks"] for rank, text in zip(verdict["stacks_of"], answers, strict=True)})
        self._ear.add("told", 1)
        self.leave(self._told)

    def leave(self, reason: str) -> None:
        """End the process, saying why, once it waits for a rank that is gone: it may do so already, or be busy and wait later.

        Gloo connects two ranks when they first talk to each other, and waits out its time where the other has left before. A kernel of
        NCCL waits for ever, and with it whoever waits for the GPU, wherever that is. On a CPU a long backward stands at the same call of
        torch as one that waits. But it uses the processor, and rank zero may have steps to save after it.
        """
        since, place, allowed_s = time.monotonic(), None, _LEAVING_GPU_S if self._on_gpu else _LEAVING_S
        find_wait = _find_stop if self._on_gpu else _find_collective
        entered = looked = since
        used_s = time.process_time()
        while not self._closed.wait(0.2):
            now, before, used_before_s = find_wait(self._thread_of_run), looked, used_s
            looked, used_s = time.monotonic(), time.process_time()
            computes = not self._on_gpu and used_s - used_before_s > 0.1 * (looked - before)
            if now != place or now is None:
                since, entered, place = looked, looked, now
            elif computes and looked - entered < _COMPUTING_S:
                since = looked
            if looked - since > allowed_s:
                with contextlib.suppress(OSError):
                    os.write(2, f"[rank {self._rank}] error: {make_printable(reason)}\n".encode(errors="backslashreplace"))
                os._exit(RunError.exit_code)

    def _hear(self, store: Any, key: str, seconds: float) -> bool:
        """Wait for a key; whether it came. Raises RuntimeError where the store is gone."""
        end = time.monotonic() + seconds - 1
        try:
            store.wait([key], timedelta(seconds=seconds))
            return True
        except RuntimeError:
            if time.monotonic() < end:
                raise
            return False

    def _describe_stacks(self) -> str:
        lines = [f"{self.name([self._rank])}, process {os.getpid()}, {make_timestamp()}"]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        for ident in sorted(frames, key=lambda ident: (ident != self._thread_of_run, ident)):
            lines += ["", f"thread {names.get(ident, ident)!a}, innermost call first:"]
            lines += [f"  {_describe_frame(frame)}" for frame in _walk(frames[ident])]
        return "\n".join(lines)[:_STACK_BYTES] + "\n"

    def _write_stacks(self, stacks: dict[int, str]) -> None:
        """Replace what a failure before this one has left in the run folder. A disk that refuses it is no matter now."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            if self._rank == 0:
                self.folder.mkdir(exist_ok=True)
                for path in self.folder.iterdir():
                    if STACK_NAME.fullmatch(path.name):
                        path.unlink()
            elif self.folder.parent.is_dir():  # a host that does not share the run folder has none
                self.folder.mkdir(exist_ok=True)
            for rank, text in stacks.items():
                write_atomically(self.folder / f"rank{rank}.txt", text.encode(errors="backslashreplace"))


def _describe_broken(error: Exception, aside: str = ", though all answer") -> str:
    """Why a collective failed though all ranks answer: NCCL does so also where it cannot work here at all, and then may say why."""
    if duplicate := re.search(r"Duplicate GPU detected *:? *(.*)", str(error)):
        return f"two processes have the same GPU ({duplicate[1]}): start at most one process for each GPU"
    words = re.sub(r"^\[\S*gloo\S*\] ", "", first_line(error)).partition(". This ")[0]  # of gloo, its source and a guess
    if reason := re.search(r"Last error:[ \t]*\n?[ \t]*(\S.*)", str(error)):  # NCCL's, some lines below its source and its version
        words = reason[1]
        if not re.search("ncclRemoteError|network error", str(error)):
            return f"NCCL failed{aside}: {words}"
    return f"the connection to another rank broke{aside}: {words}"


def is_timeout(error: Exception) -> bool:
    """Whether a collective has failed because nothing came, rather than because a connection broke.

    Where a rank is gone, its host refuses a connection to it at once, and Gloo then says that it timed out.
    """
    return re.search("[Tt]imed? ?out(?!.*Connection refused)", str(error), re.DOTALL) is not None


def _decide(store: Any, text: str, stacks_of: list[int]) -> str:
    """Put up why the run fails, unless that is known already; what is known."""
    verdict = store.compare_set("verdict", "", json.dumps({"text": text, "stacks_of": stacks_of}))
    return str(json.loads(verdict)["text"])


def _walk(frame: FrameType | None) -> Iterable[FrameType]:
    for _ in range(100):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def _describe_frame(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"


def _find_collective(ident: int) -> str | None:
    """Where a thread may wait for other ranks, and has nothing to save: in torch's own code, or in what calls it."""
    frame = sys._current_frames().get(ident)
    path = frame.f_code.co_filename if frame is not None else ""
    return "a collective" if _may_wait(path) else None


def _may_wait(path: str) -> bool:
    """Whether code of this file may wait for other ranks."""
    return "/torch/distributed/" in path or "/torch/autograd/" in path or path in _WAITING_FILES


def _is_elsewhere(ident: int) -> bool:
    """Whether a thread is in no call that may wait for other ranks, and in none that asks why one failed."""
    paths = {frame.f_code.co_filename for frame in _walk(sys._current_frames().get(ident))}
    return __file__ not in paths and not any(map(_may_wait, paths))


def _find_stop(ident: int) -> tuple[Any, int] | None:
    """Where a thread is that may wait for a GPU; None where it waits for what is none, such as a process: by the standard library."""
    frame = sys._current_frames().get(ident)
    if frame is None or str(frame.f_globals.get("__name__")).partition(".")[0] in sys.stdlib_module_names:
        return None
    return frame.f_code, frame.f_lasti


def describe_place(ident: int) -> str:
    """Where a thread is, in words: its innermost call, and the innermost one of this package if that is another."""
    frames = list(_walk(sys._current_frames().get(ident)))
    if not frames:
        return "at an unknown place"
    own = next((frame for frame in frames if Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)), frames[0])
    where = f"at {_describe_frame(frames[0])}"
    return where if own is frames[0] else f"{where}, called from {_describe_frame(own)}"
