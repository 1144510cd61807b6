import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from server.cli import _parser, configure, main, warn_of_unknown_variables
from server.config import ServerConfig
from server.options import options_of, parse_size
from server.signals import STOP_SIGNALS


@pytest.fixture(autouse=True)
def keep_signal_handlers() -> Iterator[None]:
    """`main` is the whole of a process's life, and ends with signals ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def parse(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[EngineConfig, ServerConfig]:
    return configure(_parser().parse_args(["serve", *arguments]), environment or {})


def write(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert parse() == (EngineConfig(), ServerConfig())


def test_the_first_of_command_line_environment_and_file_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nmax-num-seqs: 1\nblock_size: 1\n")
    environment = {"RYZANSTEIN_PORT": "2", "RYZANSTEIN_MAX_NUM_SEQS": "2"}
    engine, server = parse("--config", file, "--port", "3", environment=environment)
    assert (server.port, engine.max_num_seqs, engine.block_size) == (3, 2, 1)


def test_the_file_can_come_from_the_environment(tmp_path: Path) -> None:
    assert parse(environment={"RYZANSTEIN_CONFIG": write(tmp_path, "port: 9")})[1].port == 9


def test_the_model_is_an_argument_a_variable_or_a_key(tmp_path: Path) -> None:
    assert parse("/a")[0].model == "/a"
    assert parse(environment={"RYZANSTEIN_MODEL": "/b"})[0].model == "/b"
    assert parse("--config", write(tmp_path, "model: /c"))[0].model == "/c"


def test_short_spellings_work() -> None:
    assert parse("-tp", "4")[0].tensor_parallel_size == 4


def test_switches_are_words_in_the_environment_and_flags_on_the_command_line() -> None:
    assert not parse(environment={"RYZANSTEIN_ACCESS_LOG": "off"})[1].access_log
    assert parse("--access-log", environment={"RYZANSTEIN_ACCESS_LOG": "off"})[1].access_log
    assert not parse("--no-access-log")[1].access_log


def test_null_in_the_file_leaves_an_option_out(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path, "port: null\nmax-model-len:\n")) == parse()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512MB", 512_000_000), ("1e9", 10**9), ("7", 7), ("2k", 2048), ("1.5 KiB", 1536), ("3B", 3)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse("--kv-cache-memory", text)[0].kv_cache_memory == size == parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "environment", "file", "named"),
    [
        (["--port", "x"], {}, "", ["--port", "whole number", "command line"]),
        ([], {"RYZANSTEIN_PORT": "x"}, "", ["--port", "environment RYZANSTEIN_PORT"]),
        ([], {}, "port: x", ["--port", "options.yaml"]),
        ([], {}, "port: true", ["--port", "whole number"]),
        (["--rank-timeout", "soon"], {}, "", ["--rank-timeout", "must be a number", "command line"]),
        ([], {}, "rank-timeout: yes", ["--rank-timeout", "must be a number"]),
        (["--rank-timeout", "0"], {}, "", ["--rank-timeout", "between 1 and 86400 seconds"]),
        (["--port", "65536"], {}, "", ["--port", "65535", "command line"]),
        ([], {"RYZANSTEIN_DTYPE": "int3"}, "", ["--dtype", "float32", "RYZANSTEIN_DTYPE"]),
        ([], {}, "tensor-parallel-size: 0", ["--tensor-parallel-size", "not 0", "options.yaml"]),
        (["--kv-cache-memory", "4 potatoes"], {}, "", ["--kv-cache-memory", "4GiB", "command line"]),
        (["--kv-cache-memory", "1e400"], {}, "", ["--kv-cache-memory", "2**63", "command line"]),
        (["--kv-cache-memory", "9e18T"], {}, "", ["--kv-cache-memory", "2**63"]),
        ([], {}, f"kv-cache-memory: {10**40}", ["--kv-cache-memory", "2**63", "options.yaml"]),
        (["--port", "9" * 90], {}, "", ["--port", "65535"]),
        (["--kv-cache-memory", "1G", "--num-kv-blocks", "4"], {}, "", ["--num-kv-blocks", "--kv-cache-memory"]),
        ([], {"RYZANSTEIN_ACCESS_LOG": "maybe"}, "", ["--access-log", "true or false"]),
        (["--served-model-name", ""], {}, "", ["--served-model-name"]),
        (["--served-model-name", "a\udcff"], {}, "", ["--served-model-name", "UTF-8", r"'a\udcff'", "command line"]),
        (["/models/a\udcff/b"], {}, "", ["--model", "UTF-8", r"'/models/a\udcff/b'", "command line"]),
        ([], {"RYZANSTEIN_MODEL": "/a\udcff"}, "", ["--model", "UTF-8", "RYZANSTEIN_MODEL"]),
        (["--log-level", "loud"], {}, "", ["--log-level", "warning"]),
        ([], {}, "model: 7", ["--model", "text", "options.yaml"]),
        ([], {}, "prot: 7", ["prot", "options.yaml"]),
        ([], {}, "max-model-len: 1\nmax_model_len: 2", ["twice"]),
        ([], {}, "port: 1\nport: 2", ["port is written twice", "options.yaml"]),
        ([], {}, "[" * 2000, ["options.yaml", "not YAML"]),
        ([], {}, "- port", ["options.yaml", "option: value"]),
        ([], {}, "a: [", ["options.yaml", "not YAML"]),
        (["--config", "/nowhere.yaml"], {}, None, ["/nowhere.yaml", "No such file"]),
        (["--config", "/bin/true"], {}, None, ["/bin/true", "not UTF-8"]),
        (["--prot", "7"], {}, "", ["--prot"]),
        (["--po", "7"], {}, "", ["--po"]),
        (["one", "two"], {}, "", ["two"]),
    ],
)
def test_a_mistake_is_one_line_that_names_option_and_source_and_ends_in_2(
    arguments: list[str],
    environment: dict[str, str],
    file: str | None,
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if file is not None:
        arguments = [*arguments, "--config", write(tmp_path, file)]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        code: object = main(["serve", *arguments])
    except SystemExit as error:  # argparse's own way
        code = error.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("ryzanstein: error: ")
    assert all(word in lines[0] for word in named)


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1, -(2**63), 2**64, 10**30])
def test_any_whole_number_is_a_seed(seed: int, tmp_path: Path) -> None:
    assert parse(f"--seed={seed}")[1].seed == seed
    assert parse("--config", write(tmp_path, f"seed: {seed}"))[1].seed == seed


def test_a_variable_that_no_option_reads_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_unknown_variables({"RYZANSTEIN_PROT": "1", "RYZANSTEIN_PORT": "1", "HOME": "/"})
    assert capsys.readouterr().err == "ryzanstein: warning: no option reads RYZANSTEIN_PROT\n"


def test_help_shows_each_option_with_default_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for option in [*options_of(EngineConfig)[1:], *options_of(ServerConfig)]:
        assert option.flag in text
        assert option.variable in text
    assert "default 8000" in text
    assert "OMP_NUM_THREADS sets the threads of each" in text


@pytest.mark.parametrize(
    ("command", "usage"),
    [("limits", "ryzanstein bench limits [options]"), ("decode", "ryzanstein bench decode MODEL [options]")],
)
def test_help_begins_with_what_is_typed(command: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {usage}\n")


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_an_unknown_option_is_named_with_the_help_that_lists_the_known(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--gpu-memory-utilization", "0.9"])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert "unrecognized arguments: --gpu-memory-utilization" in errors
    assert f"(see ryzanstein {command} --help)" in errors


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("ryzanstein ")


def test_a_model_is_named_after_its_directory_unless_told_otherwise() -> None:
    assert ServerConfig().model_name("/models/llama/") == "llama"
    assert ServerConfig().model_name(str(EMBEDDED_MODEL)) == "ryzanstein-embedded"
    assert ServerConfig(served_model_name="mine").model_name("/models/llama") == "mine"


def test_a_directory_without_a_name_in_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "a\udcff")
    with pytest.raises(ValueError, match=r"^the name of the directory --model must be UTF-8 text, not 'a\\udcff'$"):
        ServerConfig().model_name(".")


def test_a_model_behind_a_link_has_the_links_name(tmp_path: Path) -> None:
    (tmp_path / "abc123").mkdir()
    (tmp_path / "llama").symlink_to("abc123")
    assert ServerConfig().model_name(str(tmp_path / "llama")) == "llama"
    assert ServerConfig().model_name(str(tmp_path / "llama" / ".")) == "llama"
    (tmp_path / "embedded").symlink_to(EMBEDDED_MODEL)
    assert ServerConfig().model_name(str(tmp_path / "embedded")) == "ryzanstein-embedded"
