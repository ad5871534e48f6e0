"""The program: `python -m mnist_dist.train`, alone or under `accelerate launch -m`, `torchrun -m` or srun.

It turns options into a config, signals into a flag, and the end of a run into an exit status. The training itself is
`mnist_dist.loop.train`, imported only once the options are right: torch takes seconds to import.
"""

import os
import sys
from collections.abc import Sequence

from mnist_dist.config import parse_command_line
from mnist_dist.preemption import StopSignals
from mnist_dist.program import run_program
from mnist_dist.world import find_world


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 finished, 85 asks to be requeued, 143 and 130 stopped, 2 a user's mistake, 1 the rest."""
    signals = StopSignals().install()

    def run() -> int:
        config = parse_command_line(arguments)
        config.check_world(find_world(os.environ).size)
        from mnist_dist.loop import train

        return train(config, signals).stop.exit_code

    return run_program(run)


if __name__ == "__main__":
    sys.exit(main())
