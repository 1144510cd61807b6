"""The command line: `ryzanstein serve [MODEL] [options]`, `doctor …`, `checkpoint COMMAND …` and `bench COMMAND …`."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from engine.protocol.config import EngineConfig
from engine.protocol.errors import EXIT_FAILED, EXIT_UNREAD, EXIT_USER_ERROR, is_mistake
from engine.protocol.model_config import ModelConfig
from engine.protocol.open_files import check_open_files, raise_open_files_limit
from server.bench_commands import add_bench_commands
from server.checkpoint_commands import add_checkpoint_commands
from server.config import ServerConfig
from server.credentials import Credentials
from server.early_engine import EarlyEngine
from server.launch import EngineProcess
from server.limits import QueueLimits, RequestLimits
from server.listener import listen
from server.logs import configure_logging, tell
from server.model_files import ModelFiles
from server.model_source.config import ModelSourceConfig
from server.model_source.resolve import resolve
from server.model_source.sharded_weights import ShardedWeights, find_entry
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
from server.signals import ignore_stop_signals, on_stop_signal, stop_signals_delayed, unwind
from server.tracing.extra import require_extra

OPTIONS_EPILOG = """\
Each option can also be set by the environment variable in its brackets, or in the YAML file of --config
(RYZANSTEIN_CONFIG), where the keys are the options' names without the dashes in front. The command line wins over
the environment, the environment over the file.

On a CPU the ranks divide the cores that the service may use; OMP_NUM_THREADS sets the threads of each instead.

"""
SAMPLING_NOTE = "Sampling values that a request leaves out are the model's (generation_config.json).\n"
DOCTOR_NOTE = """\
Exit code: 0 where serving with these options would start, with warnings or without; 2 where it would fail, or the
command line cannot be read; 130 when interrupted; 141 when what reads the output wants no more. The speed limit is an
estimate from above: what reading the weights alone would allow.
"""


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"ryzanstein: error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=110)


def main(arguments: Sequence[str] | None = None, engine: EarlyEngine | None = None) -> int:
    """Run the command line, `serve` with an engine that was started already if there is one; return the exit code.

    Raises:
        StopRequested: when a stop signal came, and nothing serves yet that it would end in order.
    """
    on_stop_signal(unwind)  # until the server waits for signals
    try:
        namespace = _parse(arguments)
        namespace.early_engine = engine
        raise_open_files_limit()
        code: int = namespace.run(namespace)
        return code
    except ValueError as error:
        tell(logging.ERROR, str(error))
        return EXIT_USER_ERROR if is_mistake(error) else EXIT_FAILED
    finally:
        ignore_stop_signals()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what is unknown is the command's error, whose help lists the options."""
    namespace, unknown = _parser().parse_known_args(arguments)
    if unknown:
        namespace.command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return namespace


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ryzanstein", description="Serve open-weights language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ryzanstein {version('ryzanstein')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = _add_command(commands, "serve", "serve a model over an OpenAI-compatible API", SAMPLING_NOTE)
    serve.set_defaults(run=partial(_run_configured, _serve), command=serve)
    _add_options(serve)
    doctor = _add_command(commands, "doctor", "check what serving with the same options would run into", DOCTOR_NOTE)
    doctor.set_defaults(run=partial(_run_configured, _doctor), command=doctor)
    doctor.add_argument("--json", action="store_true", help="write one JSON document instead of a table")
    doctor.add_argument(
        "--verify",
        action="store_true",
        help="also run the model on as many ranks as asked for (2 if that is 1) and on one, and compare what they say",
    )
    _add_options(doctor)
    add_checkpoint_commands(commands, _HelpFormatter)
    add_bench_commands(commands, _HelpFormatter)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[_Parser]", name: str, purpose: str, note: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=OPTIONS_EPILOG + note,
        formatter_class=_HelpFormatter,
        usage=f"ryzanstein {name} [MODEL] [options]",
        allow_abbrev=False,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `serve` is told: the model, and every option of engine and server."""
    model, *engine_options = options_of(EngineConfig)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=argparse.SUPPRESS,
        help=f"{model.field.metadata['help']} ({model.variable})",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options (RYZANSTEIN_CONFIG)")
    add_options(parser, "model and engine", engine_options)
    sources, queue, limits = options_of(ModelSourceConfig), options_of(QueueLimits), options_of(RequestLimits)
    own = [item for item in options_of(ServerConfig) if item not in (*sources, *queue, *limits)]
    add_options(parser, "where the model comes from", sources)
    add_options(parser, "server", own)
    add_options(parser, "when more is asked for than can be done at once", queue)
    add_options(parser, "most of a request", limits)


def _run_configured(
    run: Callable[[EngineConfig, ServerConfig, argparse.Namespace], int], namespace: argparse.Namespace
) -> int:
    engine, server = configure(namespace, os.environ)
    return run(engine, server, namespace)


def configure(namespace: argparse.Namespace, environment: Mapping[str, str]) -> tuple[EngineConfig, ServerConfig]:
    """Return the configuration from command line, environment, file and defaults, in this order.

    Raises:
        ValueError: one line naming the option and where its value came from.
    """
    engine_options, server_options = options_of(EngineConfig), options_of(ServerConfig)
    options = [*engine_options, *server_options]
    path = namespace.config or environment.get("RYZANSTEIN_CONFIG")
    file: dict[str, Value] = from_file(path, options) if path else {}
    sources = from_command_line(namespace, options), from_environment(environment, options), file
    return build(EngineConfig, engine_options, *sources), build(ServerConfig, server_options, *sources)


def warn_of_unknown_variables(environment: Mapping[str, str]) -> None:
    """Name variables that look like options and are none."""
    unknown = unknown_variables(environment, [*options_of(EngineConfig), *options_of(ServerConfig)])
    if unknown:
        tell(logging.WARNING, f"no option reads {', '.join(unknown)}")


def _serve(engine: EngineConfig, server: ServerConfig, namespace: argparse.Namespace) -> int:
    """Check what is cheap to check, tell the engine, and import and build the server while it loads."""
    configure_logging(server.log)
    warn_of_unknown_variables(os.environ)
    check_open_files()
    if server.otlp_traces_endpoint is not None:
        require_extra()
    credentials = Credentials.load(server)
    with listen(server.host, server.port) as listener, contextlib.ExitStack() as ending:
        name = server.model_name(engine.model)
        engine = replace(engine, model=str(resolve(engine.model, server, partial(_read_model, engine))))
        model_config, files = _read_model(engine, Path(engine.model))
        server = replace(server, served_model_name=name)
        weights = ShardedWeights(find_entry(Path(engine.model), engine, model_config, server))
        ending.callback(weights.close)
        with stop_signals_delayed():  # there is no moment at which the process runs and nobody would end it
            process = EngineProcess(engine, weights=weights.directory, early=namespace.early_engine, log=server.log)
            ending.callback(process.stop)
        # FastAPI takes half a second to import, which the ranks use to import torch.
        from server.run import run  # noqa: PLC0415
        from server.service import TextModel  # noqa: PLC0415

        return run(listener, process, TextModel.load(files, server, model_config), weights, server, credentials)


def _read_model(engine: EngineConfig, directory: Path) -> tuple[ModelConfig, ModelFiles]:
    """Read what of a model is small, and check that it can be served as asked for."""
    config = ModelConfig.from_directory(directory)
    config.check_tensor_parallel_size(engine.tensor_parallel_size)
    config.check_max_model_len(engine.max_model_len)
    return config, ModelFiles.read(str(directory))


def _doctor(engine: EngineConfig, server: ServerConfig, namespace: argparse.Namespace) -> int:
    """Check what `_serve` would run into."""
    warn_of_unknown_variables(os.environ)
    from server.doctor.report import UnwritableError  # noqa: PLC0415  (serving does not need it)
    from server.doctor.run import examine  # noqa: PLC0415

    if sys.stdout is None:
        raise ValueError("standard output is closed")
    try:
        return examine(engine, server, as_json=namespace.json, with_verify=namespace.verify)
    except UnwritableError as error:
        _give_up_standard_output()
        if error.is_unread:
            return EXIT_UNREAD
        raise ValueError(str(error)) from error


def _give_up_standard_output() -> None:
    """Send what could not be written nowhere; Python would try again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
