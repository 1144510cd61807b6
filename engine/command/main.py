"""From the arguments of `python -m engine.… COMMAND JSON` to the exit code."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from engine.command.output import complain
from engine.command.stop_request import Stopped, StopRequest
from engine.protocol.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNREAD, EXIT_USER_ERROR, is_mistake


def run_command(arguments: Sequence[str], commands: Mapping[str, type], run: Callable[[Any, StopRequest], int]) -> int:
    """Run one command and return the exit code: its own, or 1, 2, 130 or 141 where it does not come to its end.

    SIGINT and SIGTERM are answered from here on: with an end at once, until `run` lets the request unwind.

    Args:
        arguments: the command's name, and what it is told, as JSON.
        commands: what each is told, by name.
        run: does it; imports what takes long by itself, since signals must be answered meanwhile.
    """
    stop = StopRequest()
    try:
        stop.listen()
        name, content = arguments
        return run(msgspec.json.decode(content, type=commands[name]), stop)
    except ValueError as error:
        complain(error)
        return EXIT_USER_ERROR if is_mistake(error) else EXIT_FAILED
    except Stopped:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_UNREAD
    finally:
        stop.end()
