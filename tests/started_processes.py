"""Commands of genvision as several processes that know of one another, as `accelerate launch` starts them.

They are forks of this process, which has loaded torch already.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` sets for FSDP2."""
GATHERED = SHARDED | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
SECONDS = 300


def start(words: Sequence[str], num: int = 2, environment: dict[str, str] | None = None, errors: Path | None = None) -> list[BaseProcess]:
    """Start `num` processes; what each says on stderr goes to `errors`.RANK."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_run_as, args=(rank, num, port, words, environment or {}, errors)) for rank in range(num)]
    for process in processes:
        process.start()
    return processes


def finish(processes: Sequence[BaseProcess], seconds: float = SECONDS) -> list[int | None]:
    """Wait for all; those that are left when one has failed are killed, since they would wait for it. Gives their exit codes."""
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            kill(processes)
        time.sleep(0.01)
    return [process.exitcode for process in processes]


def kill(processes: Sequence[BaseProcess]) -> None:
    """SIGKILL to all, as a machine that goes down."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def run(words: Sequence[str], num: int = 2, environment: dict[str, str] | None = None) -> None:
    assert finish(start(words, num, environment)) == [0] * num


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _run_as(rank: int, num: int, port: int, words: Sequence[str], environment: dict[str, str], errors: Path | None) -> None:
    from accelerate.state import AcceleratorState

    from genvision.cli import main

    if errors is not None:
        os.dup2(os.open(f"{errors}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", **environment}
    AcceleratorState._reset_state(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, even if the tests themselves run in the background
    main(list(words))
