"""The command line: `ryzanstein serve [MODEL] [options]`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import NoReturn

from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from server.config import ServerConfig
from server.credentials import Credentials
from server.launch import EngineProcess
from server.limits import RequestLimits
from server.listener import listen
from server.logs import configure_logging
from server.model_files import ModelFiles
from server.options import (
    Value,
    add_options,
    build,
    from_command_line,
    from_environment,
    from_file,
    options_of,
    unknown_variables,
)
from server.signals import StopRequested, ignore_stop_signals, on_stop_signal, stop_signals_delayed, unwind

EXIT_STOPPED, EXIT_USER_ERROR = 0, 2
SERVE_EPILOG = """\
Each option can also be set by the environment variable in its brackets, or in the YAML file of --config
(RYZANSTEIN_CONFIG), where the keys are the options' names without the dashes in front. The command line wins over
the environment, the environment over the file. Sampling values that a request leaves out are the model's
(generation_config.json).
"""


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"ryzanstein: error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    on_stop_signal(unwind)  # until the server waits for signals
    try:
        namespace = _parser().parse_args(arguments)
        engine, server = configure(namespace, os.environ)
        return _serve(engine, server)
    except ValueError as error:
        print(f"ryzanstein: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except StopRequested:
        return EXIT_STOPPED
    finally:
        ignore_stop_signals()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ryzanstein", description="Serve open-weights language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ryzanstein {version('ryzanstein')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible API",
        description="Serve a model over an OpenAI-compatible API.",
        epilog=SERVE_EPILOG,
        formatter_class=_HelpFormatter,
        usage="ryzanstein serve [MODEL] [options]",
        allow_abbrev=False,
    )
    model, *engine_options = options_of(EngineConfig)
    serve.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=argparse.SUPPRESS,
        help=f"{model.field.metadata['help']} ({model.variable})",
    )
    serve.add_argument("--config", metavar="FILE", help="YAML file with options (RYZANSTEIN_CONFIG)")
    add_options(serve, "model and engine", engine_options)
    limits = options_of(RequestLimits)
    add_options(serve, "server", [item for item in options_of(ServerConfig) if item not in limits])
    add_options(serve, "most of a request", limits)
    return parser


def configure(namespace: argparse.Namespace, environment: Mapping[str, str]) -> tuple[EngineConfig, ServerConfig]:
    """Return the configuration from command line, environment, file and defaults, in this order.

    Raises:
        ValueError: one line naming the option and where its value came from.
    """
    engine_options, server_options = options_of(EngineConfig), options_of(ServerConfig)
    options = [*engine_options, *server_options]
    unknown = unknown_variables(environment, options)
    if unknown:
        print(f"ryzanstein: warning: no option reads {', '.join(unknown)}", file=sys.stderr)
    path = namespace.config or environment.get("RYZANSTEIN_CONFIG")
    file: dict[str, Value] = from_file(path, options) if path else {}
    sources = from_command_line(namespace, options), from_environment(environment, options), file
    return build(EngineConfig, engine_options, *sources), build(ServerConfig, server_options, *sources)


def _serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Check what is cheap to check, start the engine, and import and build the server while it loads."""
    configure_logging(server.log_level)
    credentials = Credentials.load(server)
    with listen(server.host, server.port) as listener, contextlib.ExitStack() as ending:
        model_config = ModelConfig.from_directory(engine.model)
        model_config.check_tensor_parallel_size(engine.tensor_parallel_size)
        model_config.check_max_model_len(engine.max_model_len)
        files = ModelFiles.read(engine.model)
        with stop_signals_delayed():  # there is no moment at which the process runs and nobody would end it
            process = EngineProcess(engine)
            ending.callback(process.stop)
        # FastAPI takes half a second to import, which the ranks use to import torch.
        from server.run import run  # noqa: PLC0415
        from server.service import TextModel  # noqa: PLC0415

        return run(listener, process, TextModel.load(files, server, model_config), server, credentials)
