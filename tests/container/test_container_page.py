"""The commands of docs/container.md, as they stand there. `make image` is how the tests have built the image."""

import re
from pathlib import Path

from tests.container.containers import Containers

PAGE = Path(__file__).parents[2] / "docs" / "container.md"
URL = "http://127.0.0.1:8000"


def test_each_command_of_the_page_does_what_it_says(containers: Containers, image: str) -> None:
    assert image
    build, plain, locked_down, stop, compose = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert (build, compose) == ("make image\n", "docker compose up --detach\n")  # test_compose.py runs the latter
    containers.inside("bash", "-euc", plain)
    containers.wait_until_healthy("ryzanstein")
    assert containers.ask(f"{URL}/v1/completions", prompt="import ", max_tokens=2)["choices"]
    containers.remove("ryzanstein")
    containers.inside("bash", "-euc", locked_down)
    containers.wait_until_healthy("ryzanstein")
    assert len(containers.ask(f"{URL}/ready")["ranks"]) == 2
    containers.inside("bash", "-euc", stop)
    assert containers.inspect("ryzanstein")["State"]["ExitCode"] == 0
    containers.remove("ryzanstein")
    containers.inside("podman", "volume", "rm", "huggingface", "shards")
