"""`ryzanstein doctor`, from the options to the exit code."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from engine.protocol.checks import Check, CheckEvent, CheckResult, CheckStatus, Finding, ok, run_checks, warning
from engine.protocol.config import EngineConfig
from engine.protocol.units import format_bytes, format_count
from server.config import ServerConfig
from server.doctor import service, verify
from server.doctor.report import JsonReport, Report, TableReport
from server.doctor.source import ModelSource
from server.launch import EngineProcess
from server.signals import stop_signals_delayed

ENGINE_CHECKS = (sys.executable, "-P", "-m", "engine.doctor")
EXIT_SERVES, EXIT_FAILS = 0, 2
FEW_INODES, LITTLE_SPACE = 1000, 16 << 20  # what a service puts there is far less; the disk is all but full


def examine(engine: EngineConfig, server: ServerConfig, *, as_json: bool, with_verify: bool) -> int:
    """Run every check, show what it finds as it is found, and return the exit code."""
    name = server.model_name(engine.model)
    report: Report = JsonReport(sys.stdout, engine) if as_json else TableReport(sys.stdout, name, engine)
    source = ModelSource(engine, server)
    run_checks(source.checks(), report.take)
    if source.is_here:
        _examine_model(source.engine, replace(server, served_model_name=name), report, with_verify=with_verify)
    else:
        run_checks(service.access_checks(server), report.take)
    report.close()
    return EXIT_FAILS if report.count(CheckStatus.FAILURE) else EXIT_SERVES


def _examine_model(engine: EngineConfig, server: ServerConfig, report: Report, *, with_verify: bool) -> None:
    with contextlib.ExitStack() as ending:
        started = _EngineChecks(engine, ending)
        run_checks([Check(service.SECTION, "run directory", started.start)], report.take)
        run_checks(service.checks(engine, server), report.take)
        started.relay(report.take)
    if with_verify:
        run_checks(verify.checks(engine), report.take)


class _EngineChecks:
    """The process of the engine's checks: started first, since it imports torch while the server's checks run."""

    def __init__(self, engine: EngineConfig, ending: contextlib.ExitStack) -> None:
        self._engine = engine
        self._ending = ending
        self._process: EngineProcess | None = None

    def start(self) -> Finding:
        """Start it, in a folder as the service would have it."""
        with stop_signals_delayed():
            self._process = EngineProcess(self._engine, ENGINE_CHECKS, stdout=subprocess.PIPE)
            self._ending.callback(self._process.stop)
        return run_directory(self._process.run_dir)

    def relay(self, take: Callable[[CheckEvent], None]) -> None:
        """Pass on what it finds, until it ends."""
        if self._process is None:
            return
        decoder = msgspec.json.Decoder(CheckEvent)
        for line in self._process.output:
            take(decoder.decode(line))
        code = self._process.wait()
        if code:
            detail = f"they ended early, with code {code}; standard error says why"
            take(CheckResult("engine", "checks", CheckStatus.FAILURE, detail, "", 0.0))


def run_directory(path: Path) -> Finding:
    """Tell where the sockets are, and what room is left there."""
    usage, status = shutil.disk_usage(path), os.statvfs(path)
    mode = path.stat().st_mode & 0o777
    found = f"{path} ({mode:04o}); {format_bytes(usage.free)} and {format_count(status.f_favail)} files free"
    if path.parent != Path(tempfile.gettempdir()):
        return warning(f"{found}; TMPDIR is too long a path for sockets", "set TMPDIR to a shorter one")
    if usage.free < LITTLE_SPACE or (status.f_files and status.f_favail < FEW_INODES):
        return warning(f"{found}: nearly full", "free some, or set TMPDIR to another file system")
    return ok(found)
