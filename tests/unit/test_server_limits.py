import pytest

from server.config import ServerConfig
from server.limits import MAX_ITEMS, QueueLimits, RequestLimits
from server.options import options_of


@pytest.mark.parametrize("name", [option.name for option in options_of(RequestLimits)])
@pytest.mark.parametrize("value", [0, -1, MAX_ITEMS + 1])
def test_a_limit_out_of_range_is_refused_by_name(name: str, value: int) -> None:
    options = {name: value}
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be between 1 and"):
        ServerConfig(**options)  # type: ignore[arg-type]


def test_the_least_of_every_limit_is_one() -> None:
    ServerConfig(**{option.name: 1 for option in options_of(RequestLimits)})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [option.name for option in options_of(QueueLimits)])
@pytest.mark.parametrize("value", [0, -1, 10**9 + 1])
def test_a_bound_of_what_waits_out_of_range_is_refused_by_name(name: str, value: int) -> None:
    options = {name: value}
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be between 1 and"):
        ServerConfig(**options)  # type: ignore[arg-type]
