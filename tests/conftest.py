"""Options and fixtures of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the engines under test run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    device: str = request.config.getoption("--device")
    return device
