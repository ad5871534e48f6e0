"""What a person sees of a run: a bar on a terminal, plain lines in a log; the rank in front where there are several."""

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from mnist_dist.config import Config
from mnist_dist.program import make_printable, surviving_stderr
from mnist_dist.task import format_measure

_log = logging.getLogger("mnist_dist")
_CENTURY = 100 * 365.25 * 86400  # seconds


class _Handler(logging.Handler):
    """Prints log lines to standard error, above the bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with surviving_stderr():
            tqdm.write(make_printable(self.format(record), kept="\n\t"), file=sys.stderr)


def set_up_logging(rank: int, world_size: int) -> None:
    """Send this package's log lines to standard error: all of rank zero's, the warnings of the others."""
    handler = _Handler()
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    _log.handlers = [handler]
    _log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _log.propagate = False


class Progress:
    """The progress of a run, from `step` to its last one. Makes no noise on ranks other than zero."""

    def __init__(self, step: int, shown: bool, config: Config) -> None:
        self._start = (step, time.perf_counter())
        self._total = config.total_steps
        self._shown = shown
        self._config = config
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=self._total, initial=step, unit=" step", dynamic_ncols=True) if on_terminal else None

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            with surviving_stderr():
                self._bar.update()

    def report(self, row: dict[str, Any]) -> None:
        """Show a row of the record: each on the bar, each evaluation as a line; in a log, each as a line."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{row['train/loss']:.4f}", refresh=False)
        if self._bar is None or self._config.best in row:
            _log.info("%s", self._describe(row))

    def _describe(self, row: dict[str, Any]) -> str:
        first_step, start = self._start
        step = row["step"]
        pace = (time.perf_counter() - start) / max(1, step - first_step)
        words = [
            f"step {step}/{self._total}",
            f"epoch {row['epoch']:.2f}",
            f"loss {row['train/loss']:.4f}",
            f"learning rate {row['train/learning_rate']:.2g}",
            f"{row['train/images_per_s']:,.0f} {self._config.task.samples}/s",
        ]
        if self._config.best in row:
            names = dict.fromkeys(("loss", self._config.task.best))
            measures = (f"{name} {format_measure(name, row[f'{self._config.evaluated_split}/{name}'])}" for name in names)
            words.append(f"{self._config.evaluated_on} {', '.join(measures)}")
        words.append(f"{format_duration(pace * (self._total - step))} left")
        return ", ".join(words)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with surviving_stderr():
                self._bar.close()


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min. A record of somebody else may lead to any number, infinity too."""
    if not seconds < _CENTURY:
        return "more than a century"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
