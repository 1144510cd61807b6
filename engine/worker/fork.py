"""From one process that has imported torch to all ranks of a group, and later to those of the next.

Importing takes a second of one core, and a fork milliseconds. What is forked must not have begun anything that a fork
breaks: no thread but the main one, no parallel operation of torch, no device. So the process that forks is no rank.
"""

import os
import socket

from engine.protocol.environment import EPOCH_VARIABLE, STORE_FD_VARIABLE


def serve_forks() -> str | None:
    """Fork a group of ranks whenever standard input, a socket, asks for one; return the path of its task in each rank.

    Each order comes with the socket of the ranks' meeting point, and is answered with the ranks' process ids. They are
    this process's siblings, not its children: children of the process above that adopts orphans. In each, torchrun's
    variables say which it is. Returns None, in this process, when standard input ends.
    """
    with socket.socket(fileno=os.dup(0)) as link:
        os.dup2(_nowhere(), 0)
        while True:
            told, descriptors, _, _ = socket.recv_fds(link, 65536, 1)
            if not told:
                return None
            with socket.socket(fileno=descriptors[0]) as store:
                epoch, world_size, path = os.fsdecode(told).split(" ", 2)
                rank = _fork_ranks(int(world_size), link)
                if rank is not None:
                    _be_rank(rank, world_size, epoch, store)
                    return path


def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _be_rank(rank: int, world_size: str, epoch: str, store: socket.socket) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=world_size,
        LOCAL_WORLD_SIZE=world_size,
        **{EPOCH_VARIABLE: epoch},
    )
    os.environ["MASTER_PORT"] = str(store.getsockname()[1])
    if rank == 0:  # only rank 0 listens: with it, the meeting point is gone
        os.environ[STORE_FD_VARIABLE] = str(store.detach())


def _fork_ranks(world_size: int, link: socket.socket) -> int | None:
    """Fork all ranks; return the rank in each, and None in this process when it has told their ids.

    They are forked by a process that ends at once, whose children are then adopted. Each waits for a word of this one,
    which comes when its id is told: a rank of which nobody would know ends itself.

    Raises:
        OSError: if the system has no process left for one.
    """
    wait, begin = os.pipe()
    heard, told = os.pipe()
    middle = os.fork()
    if middle == 0:
        rank = _fork_each(world_size, told)
        for descriptor in (heard, told, begin):
            os.close(descriptor)
        if not os.read(wait, 1):
            os._exit(1)
        os.close(wait)
        return rank
    try:
        os.waitpid(middle, 0)
        os.close(told)
        pids = os.read(heard, 65536).split()
        if len(pids) < world_size:
            raise OSError("no process can be started for another rank")
        link.send(b" ".join(pids))
        os.write(begin, bytes(world_size))
    finally:
        for descriptor in (wait, begin, heard):
            os.close(descriptor)
    return None


def _fork_each(world_size: int, told: int) -> int:
    """Return the rank in each rank; end this process, with their ids written to `told`."""
    try:
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                return rank
            os.write(told, f"{pid} ".encode())
    except OSError:
        os._exit(1)
    os._exit(0)
