"""Real monitoring of a service: Prometheus and Alertmanager, with the files of deploy/, and a webhook that is told."""

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from tests.http_server import HTTPServer, PostHandler
from tests.service_process import ROOT

FILES = ROOT / "deploy" / "prometheus"
PROGRAMS = {  # each with the package, and its names: the project's own and Debian's
    "prometheus": ("prometheus", ("prometheus",)),
    "promtool": ("prometheus", ("promtool",)),
    "alertmanager": ("prometheus-alertmanager", ("alertmanager", "prometheus-alertmanager")),
    "amtool": ("prometheus-alertmanager", ("amtool",)),
}
START_SECONDS = 60.0  # generous: only a hang should exceed it


def program(name: str) -> str:
    """Return where a program is, or skip the test."""
    package, names = PROGRAMS[name]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"there is no {name}: apt-get install {package}")
    return found


class Listener:
    """A program of Prometheus' project that listens on a free port, and says where: `with Listener(…) as listener:`."""

    def __init__(self, *command: str) -> None:
        self._command = [*command, "--web.listen-address=127.0.0.1:0"]
        self._lines: list[str] = []
        self._is_listening = threading.Event()
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._is_listening.wait(START_SECONDS) or not self.url:
            self.__exit__(None, None, None)
            raise RuntimeError("".join(self._lines))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._reader.join(60)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if found := re.search(r'msg="Listening on" address=(\S+)', line):
                self.url = f"http://{found[1]}"
                self._is_listening.set()
        self._is_listening.set()


class Alertmanager(Listener):
    """Alertmanager with the file of deploy/, which tells `webhook` at once."""

    def __init__(self, folder: Path, webhook: str) -> None:
        text = (FILES / "alertmanager.yml").read_text().replace("http://127.0.0.1:9099/alerts", webhook)
        assert webhook in text
        text = re.sub("group_wait: .*", "group_wait: 0s", text)
        (folder / "alertmanager.yml").write_text(re.sub("group_interval: .*", "group_interval: 1s", text))
        super().__init__(
            program("alertmanager"),
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/alertmanager",
            "--cluster.listen-address=",
        )


class Prometheus(Listener):
    """Prometheus with the files of deploy/, which reads the service at `service`, and the rules, each second."""

    def __init__(self, folder: Path, service: str, alertmanager: str) -> None:
        files = folder / "prometheus"
        shutil.copytree(FILES, files)
        text = (files / "prometheus.yml").read_text().replace("ryzanstein:8000", service.removeprefix("http://"))
        (files / "prometheus.yml").write_text(re.sub("(scrape|evaluation)_interval: .*", r"\1_interval: 1s", text))
        (files / "alertmanagers.yml").write_text(json.dumps([{"targets": [alertmanager.removeprefix("http://")]}]))
        data = f"--storage.tsdb.path={folder}/data"
        super().__init__(program("prometheus"), f"--config.file={files}/prometheus.yml", data)

    def ask(self, path: str, **parameters: str) -> Any:
        """Return what its API answers."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression now, each with `metric` and `value`."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float:
        """Return the sum of an expression's series now."""
        return sum(float(series["value"][1]) for series in self.query(expression))


class Webhook(HTTPServer):
    """What is told of alerts: `with Webhook() as webhook:` keeps those that come to `webhook.url`."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        webhook = self

        class Handler(PostHandler):
            def take(self, body: bytes) -> int:
                webhook.alerts.extend(json.loads(body)["alerts"])
                return 200

        super().__init__(Handler, "/alerts")

    def named(self, alert: str) -> list[dict[str, Any]]:
        """Return what came of an alert."""
        return [found for found in self.alerts if found["labels"]["alertname"] == alert]
