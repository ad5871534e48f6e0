"""The program: `python -m mnist_dist.train`, alone or under `accelerate launch -m`, `torchrun -m` or srun.

It turns options into a config, signals into a flag, and the end of a run into an exit status. The training itself is
`mnist_dist.loop.train`. Nothing is imported before the signals are taken over: already the options take a quarter of a second, in which
Ctrl-C would end in a traceback, and torch takes seconds.
"""

import sys
from collections.abc import Sequence

from mnist_dist.preemption import StopSignals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 finished, 85 asks to be requeued, 143 and 130 stopped, 2 a user's mistake, 1 the rest."""
    signals = StopSignals().install()
    from mnist_dist.program import importing, run_program

    def run() -> int:
        import os

        from mnist_dist.config import parse_command_line
        from mnist_dist.source import explaining
        from mnist_dist.starter import find_size, start_ranks
        from mnist_dist.tracking import starting_ahead
        from mnist_dist.world import find_world

        config = parse_command_line(arguments)
        size, alone = find_size(os.environ, is_program=arguments is None)
        config.check_world(size)
        if alone:
            return start_ranks(size, signals)
        with explaining(config.task.name, "in load_ahead"):
            config.task.load_ahead()
        with starting_ahead(config.wandb, find_world(os.environ)):
            with importing():
                from mnist_dist.loop import train

            return train(config, signals).stop.exit_code

    return run_program(run)


if __name__ == "__main__":
    sys.exit(main())
