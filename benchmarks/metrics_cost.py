"""What it costs to measure: throughput with everything on /metrics, scraped each second, against throughput without.

    .venv/bin/python benchmarks/metrics_cost.py --rounds 4 --json cost.json -tp 2

Two services are started: one as it is by default, and one with --no-step-timing. They get the same load in turns, in
pairs, of which each is first in turns too; the other service has nothing to do meanwhile. While the first has load, its
/metrics is scraped as Prometheus would. A load is so many requests at once, each answered as a whole, and again so
often; loads are short and their turns quick, since what else the machine does changes several times a second. What
counts is all tokens by all seconds: most loads end between two scrapes, so a median would leave the scrapes out. Two
processes of one program can differ in speed by how they happen to lie in memory, which pairs do not even out, and that
which was started first can be the slower one. So a round does all this twice, with each of the two services started
first, and the interval is that of the rounds (Student's t, of logarithms).

Rounds that FILE of --json already has count, too. Options that are not known here are the service's, and so is a model;
without one the embedded model is served, whose short steps make the most of what each costs.
"""

import argparse
import http.client
import json
import math
import os
import re
import socket
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arguments import count, seconds
from running_service import running_service

REQUEST_SECONDS = 300.0
PAGE_BYTES = 4 << 20  # of which a page of /metrics takes some percent
WITH, WITHOUT = "with", "without"
SCRAPE_HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "Accept-Encoding": "gzip",
}
# Student's t for 95%, two-sided, by degrees of freedom from 1 on; for more than 30 that of 30 is a little too wide.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Scraper:
    """Reads /metrics over a connection that it keeps, as Prometheus does.

    It takes next to no time, since it runs on the service's cores: `http.client` took more than the service.
    """

    def __init__(self, host: str) -> None:
        name, port = host.rsplit(":", 1)
        self._socket = socket.create_connection((name, int(port)), REQUEST_SECONDS)
        headers = "".join(f"{name}: {value}\r\n" for name, value in {"Host": host, **SCRAPE_HEADERS}.items())
        self._request = f"GET /metrics HTTP/1.1\r\n{headers}\r\n".encode()
        self._answer = bytearray(PAGE_BYTES)

    def scrape(self) -> int:
        """Return the bytes of a page."""
        self._socket.sendall(self._request)
        read = end = 0
        while not end or read < end:
            received = self._socket.recv_into(memoryview(self._answer)[read:])
            if received == 0:
                raise ConnectionError("the service closed the connection before the end of /metrics")
            read += received
            end = end or self._end_of_answer(read)
        return end

    def _end_of_answer(self, read: int) -> int:
        """Return where the answer ends; 0 while its headers have not all come."""
        body = self._answer.find(b"\r\n\r\n", 0, read) + 4
        if body < 4:
            return 0
        head = bytes(self._answer[:body])
        length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head, re.IGNORECASE)
        if not head.startswith(b"HTTP/1.1 200 ") or length is None or body + int(length[1]) > PAGE_BYTES:
            raise RuntimeError(f"/metrics answered {head.decode(errors='replace')}")
        return body + int(length[1])


class Client:
    """Asks one service, over connections that it keeps.

    Args:
        url: of the service.
        streams: requests at once.
        max_tokens: of a request.
        scrape_seconds: of loads, after which /metrics is scraped again; None is never.
    """

    def __init__(self, url: str, streams: int, max_tokens: int, scrape_seconds: float | None) -> None:
        self._host = urlsplit(url).netloc
        self._connections = [http.client.HTTPConnection(self._host, timeout=REQUEST_SECONDS) for _ in range(streams)]
        self._body = json.dumps(
            {"prompt": "def ", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "n": 1}
        )
        self._tokens = streams * max_tokens
        self._scraper = Scraper(self._host)
        self._scrape_seconds = scrape_seconds
        self._until_scrape = 0.0
        self.scrape_bytes: list[int] = []

    def warm_up(self) -> None:
        """Have the service do once what it does more slowly for the first time."""
        self._scraper.scrape()
        self.run_load(1)

    def run_load(self, repeats: int) -> float:
        """Return the tokens a second of all connections, each of which asks so often, one request after the other."""
        with ThreadPoolExecutor(len(self._connections)) as pool:
            began = time.perf_counter()
            loads = [pool.submit(self._complete, connection, repeats) for connection in self._connections]
            self._scrape_during(loads, began)
            for load in loads:
                load.result()
            return self._tokens * repeats / (time.perf_counter() - began)

    def _scrape_during(self, loads: list[Future[None]], began: float) -> None:
        """Scrape /metrics as often as is due, in this thread, which has nothing else to do."""
        if self._scrape_seconds is None:
            return
        while wait(loads, max(0.0, began + self._until_scrape - time.perf_counter())).not_done:
            self._until_scrape += self._scrape_seconds
            self.scrape_bytes.append(self._scraper.scrape())
        self._until_scrape -= time.perf_counter() - began

    def _complete(self, connection: http.client.HTTPConnection, repeats: int) -> None:
        for _ in range(repeats):
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer.decode()}")


def run_round(namespace: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Return what `run_pairs` does with each of the services started first."""
    return [run_pairs(namespace, arguments, names) for names in ((WITH, WITHOUT), (WITHOUT, WITH))]


def run_pairs(namespace: argparse.Namespace, arguments: list[str], names: tuple[str, str]) -> dict[str, Any]:
    """Return the tokens a second of each pair, of new services that are started in the order of `names`."""
    options = {WITH: [*arguments, "--tensor-parallel-size", str(namespace.tensor_parallel_size)]}
    options[WITHOUT] = [*options[WITH], "--no-step-timing"]
    pairs: list[dict[str, float]] = []
    with running_service(options[names[0]]) as url, running_service(options[names[1]]) as other_url:
        scrape_seconds = {WITH: namespace.scrape_seconds, WITHOUT: None}
        clients = {
            name: Client(address, namespace.streams, namespace.max_tokens, scrape_seconds[name])
            for name, address in zip(names, (url, other_url), strict=True)
        }
        for client in clients.values():
            client.warm_up()
        for number in range(namespace.pairs):
            pair = {}
            for name in names if number % 2 == 0 else reversed(names):
                pair[name] = clients[name].run_load(namespace.repeats)
            pairs.append(pair)
    sizes = clients[WITH].scrape_bytes
    return {"started_first": names[0], "pairs": pairs, "scrapes": len(sizes), "scrape_bytes": max(sizes)}


def throughput(pairs: list[dict[str, float]], name: str) -> float:
    """Return the tokens a second of all loads of one service, each of which had as many tokens."""
    return statistics.harmonic_mean(pair[name] for pair in pairs)


def log_ratio(pairs: list[dict[str, float]]) -> float:
    """Return the logarithm of the throughputs' ratio."""
    return math.log(throughput(pairs, WITH) / throughput(pairs, WITHOUT))


def summarise(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the throughputs, and their ratio with its interval; that of one round has none."""
    pairs = [pair for each in rounds for order in each for pair in order["pairs"]]
    logs = [statistics.fmean(log_ratio(order["pairs"]) for order in each) for each in rounds]
    mean, interval = statistics.fmean(logs), None
    if len(logs) > 1:
        half = T_95[min(len(logs) - 1, len(T_95)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
        interval = [math.exp(mean - half), math.exp(mean + half)]
    return {
        "rounds": len(rounds),
        "pairs": len(pairs),
        "tokens_per_second_with": throughput(pairs, WITH),
        "tokens_per_second_without": throughput(pairs, WITHOUT),
        "ratio": math.exp(mean),
        "ratio_95": interval,
        "ratio_of_rounds": [math.exp(log) for log in logs],
    }


def table(summary: dict[str, Any]) -> str:
    """Return the summary as people read it."""
    interval = summary["ratio_95"]
    told = f"95%: {interval[0]:.4f} to {interval[1]:.4f}" if interval else "no interval: that takes two rounds"
    return (
        f"tokens a second, scraped and timed   {summary['tokens_per_second_with']:10.1f}\n"
        f"tokens a second, without             {summary['tokens_per_second_without']:10.1f}\n"
        f"ratio                                {summary['ratio']:10.4f}   ({told})\n"
        f"pairs, rounds                        {summary['pairs']:10d}   {summary['rounds']}\n"
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=count, default=4, help="of new services, twice two (4)")
    parser.add_argument("--pairs", type=count, default=80, help="of loads of two services (80)")
    parser.add_argument("--streams", type=count, default=8, help="requests at once (8)")
    parser.add_argument("--max-tokens", type=count, default=32, help="of a request (32)")
    parser.add_argument("--repeats", type=count, default=1, help="requests after one another in a load (1)")
    parser.add_argument("--scrape-seconds", type=seconds, default=1.0, help="between two scrapes (1)")
    parser.add_argument("--tensor-parallel-size", "-tp", type=count, default=2, help="ranks (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    namespace, arguments = parser.parse_known_args()  # what is unknown is the service's: a model, other options
    rounds: list[list[dict[str, Any]]] = []
    if namespace.json is not None and namespace.json.exists():
        rounds = json.loads(namespace.json.read_text())["rounds"]
    try:
        for _ in range(namespace.rounds):
            rounds.append(run_round(namespace, arguments))
            if namespace.json is not None:
                document = {"cores": os.cpu_count(), "summary": summarise(rounds), "rounds": rounds}
                namespace.json.write_text(json.dumps(document, indent=2) + "\n")
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    sys.stdout.write(table(summarise(rounds)))


if __name__ == "__main__":
    main()
