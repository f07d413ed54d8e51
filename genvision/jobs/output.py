"""What jobs that write a folder of results check before they begin."""

import os
from pathlib import Path

from genvision.errors import UserError


def check_output(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already holds another job's results; choose another --out")


def check_one_process(command: str) -> None:
    """Refuse to run several times at once under torchrun or accelerate launch.

    Raises:
        UserError: there are several processes.
    """
    num = os.environ.get("WORLD_SIZE", "1")  # set by every launcher; asking Accelerate would already start a group of processes
    if num != "1":
        raise UserError(f"{command} runs on one process, got {num}; start it without torchrun or accelerate launch")
