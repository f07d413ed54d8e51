"""What a process hears when another one is killed or hangs."""

import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch._dynamo  # here once, not in each of the processes that wrap a model
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from genvision.errors import UserError
from genvision.training.peers import lost_contact


def all_reduce(rank: int) -> None:
    dist.all_reduce(torch.ones(1000))


def ddp_step(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    while True:
        model(torch.ones(2, 8)).sum().backward()
        leave(rank, signal.SIGKILL)


def fsdp_step(rank: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    while True:
        model(torch.ones(2, 8)).sum().backward()
        leave(rank, signal.SIGKILL)


def killed(rank: int) -> None:
    leave(rank, signal.SIGKILL)
    all_reduce(rank)


def killed_in_mid_transfer(rank: int) -> None:
    if rank == 1:
        multiprocessing.get_context("fork").Process(target=kill_later, args=(os.getpid(),)).start()
    dist.all_reduce(torch.ones(1 << 23))
    time.sleep(60)


def kill_later(pid: int) -> None:
    time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)


def hangs(rank: int) -> None:
    leave(rank, signal.SIGSTOP)
    all_reduce(rank)


def leave(rank: int, how: signal.Signals) -> None:
    if rank == 1:
        os.kill(os.getpid(), how)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def keep_store(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.get("never")


def what_rank_0_hears(work) -> tuple[bool, str, float]:
    """Whether it is a loss of contact, the text of the error, and the seconds that it took."""
    port, fork = free_port(), multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe()
    processes = [fork.Process(target=run, args=(work, rank, port, theirs)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        assert mine.poll(60)
        return mine.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(work, rank: int, port: int, tell: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=1 if work is hangs else 60))
    all_reduce(rank)
    started = time.monotonic()
    try:
        work(rank)
    except RuntimeError as error:
        if rank == 0:
            tell.send((lost_contact(error), str(error), time.monotonic() - started))


@pytest.mark.parametrize("work", [killed, killed_in_mid_transfer, ddp_step, fsdp_step, hangs])
def test_the_loss_of_another_process_is_heard_soon_and_recognised(work):
    recognised, text, seconds = what_rank_0_hears(work)
    assert recognised, text
    assert seconds < 10, text


def test_the_loss_of_the_process_that_keeps_the_store_is_recognised():
    port = free_port()
    keeper = multiprocessing.get_context("fork").Process(target=keep_store, args=(port,))
    keeper.start()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    keeper.kill()
    keeper.join()
    with pytest.raises(RuntimeError) as lost:
        store.get("anything")
    assert lost_contact(lost.value)


@pytest.mark.parametrize(
    "error",
    [UserError("Connection reset by peer"), RuntimeError("Connection reset by peer"), ConnectionResetError(), torch.OutOfMemoryError()],
)
def test_other_errors_are_no_loss_of_contact(error):
    assert not lost_contact(error)
