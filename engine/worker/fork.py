"""From one process that has imported torch to all ranks of a group.

Importing takes a second of one core, and a fork milliseconds. What is forked must not have begun anything that a fork
breaks: no thread but the main one, no parallel operation of torch, no device.
"""

import os
import socket

from engine.protocol.environment import STORE_FD_VARIABLE


def become_ranks() -> str | None:
    """Wait to be told, on standard input, how many ranks to be of what; return the path of that in each rank's process.

    This process becomes rank 0, and tells the ids of the others. They are its siblings, not its children: children of
    the process above that adopts orphans. In each, torchrun's variables say which it is. Standard input must be a
    socket. Returns None if it ends before.
    """
    with socket.socket(fileno=os.dup(0)) as link:
        os.dup2(_nowhere(), 0)
        told = link.recv(65536)
        if not told:
            return None
        world_size, path = os.fsdecode(told).split(" ", 1)
        rank = _fork(int(world_size), link)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    if rank > 0:
        os.close(int(os.environ.pop(STORE_FD_VARIABLE)))  # only rank 0 listens: with it, the meeting point is gone
    return path


def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _fork(world_size: int, link: socket.socket) -> int:
    """Fork all ranks but rank 0; return the rank in each process, when all ids have been told."""
    wait, begin = os.pipe()
    pids = []
    for rank in range(1, world_size):
        pid = _fork_sibling()
        if pid == 0:
            os.close(begin)
            os.read(wait, 1)  # returns when nobody holds the other end any more
            os.close(wait)
            return rank
        pids.append(pid)
    link.send(" ".join(map(str, pids)).encode())
    os.close(wait)
    os.close(begin)
    return 0


def _fork_sibling() -> int:
    """Fork a process that is no child of this one, by way of one that ends at once; return its id, 0 in itself.

    Raises:
        OSError: if the system has no process left for it.
    """
    heard, told = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            pid = os.fork()
        except OSError:
            os._exit(1)  # what was forked with it is the other process's to tell and to end
        if pid != 0:
            os.write(told, str(pid).encode())
            os._exit(0)
        os.close(heard)
        os.close(told)
        return 0
    os.close(told)
    pid_text = os.read(heard, 32)
    os.close(heard)
    os.waitpid(middle, 0)
    if not pid_text:
        raise OSError("no process can be started for another rank")
    return int(pid_text)
