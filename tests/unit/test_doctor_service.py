"""The server's own checks: port, credentials, and the files of the model that concern text."""

import json
import socket
import tempfile
from pathlib import Path

import pytest

from engine.protocol.checks import CheckResult, CheckStatus, run_checks
from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from server.config import ServerConfig
from server.doctor import service
from server.doctor.run import run_directory
from server.launch import EngineProcess
from tests.unit.server_support import BOS, EOS, VOCAB_SIZE, byte_level_tokenizer, write_model

OK, WARNING, FAILURE, SKIPPED = CheckStatus.OK, CheckStatus.WARNING, CheckStatus.FAILURE, CheckStatus.SKIPPED


def examined(directory: Path, **options: object) -> dict[str, CheckResult]:
    results: dict[str, CheckResult] = {}

    def take(event: object) -> None:
        if isinstance(event, CheckResult):
            results[event.name] = event

    server = ServerConfig(**{"port": 0, **options})  # type: ignore[arg-type]
    run_checks(service.checks(EngineConfig(model=str(directory)), server), take)
    return results


def rewrite(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_the_embedded_model_passes_every_check() -> None:
    assert {result.status for result in examined(EMBEDDED_MODEL).values()} == {OK}


def test_a_port_in_use_fails_in_servings_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = examined(EMBEDDED_MODEL, port=port)["port"]
    assert result.status is FAILURE
    assert result.detail == f"--port {port}: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert examined(EMBEDDED_MODEL, port=port)["port"].detail == f"{port} on 127.0.0.1 is free"


def test_a_collector_of_traces_that_does_not_answer_is_a_warning() -> None:
    assert "traces" not in examined(EMBEDDED_MODEL)
    with socket.socket() as collector:
        collector.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{collector.getsockname()[1]}/v1/traces"
        result = examined(EMBEDDED_MODEL, otlp_traces_endpoint=url)["traces"]
        collector.listen()
        assert examined(EMBEDDED_MODEL, otlp_traces_endpoint=url)["traces"].status is OK
    assert (result.status, result.detail) == (WARNING, f"{url} does not answer: Connection refused")


def test_traces_without_their_extra_fail_in_servings_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.tracing.extra.MODULES", ("no_such_package",))
    result = examined(EMBEDDED_MODEL, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")["traces"]
    assert result.status is FAILURE
    assert result.detail.startswith("--otlp-traces-endpoint needs OpenTelemetry")


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"host": "127.0.0.1"}, OK, "only this machine reaches"),
        ({"host": "localhost"}, OK, "only this machine reaches"),
        ({"host": "::1"}, OK, "only this machine reaches"),
        ({"host": "0.0.0.0"}, WARNING, "whoever reaches 0.0.0.0:0 may use the API"),
        ({"host": "0.0.0.0", "api_key": "secret"}, OK, "an API key; plain HTTP"),
        ({"api_key_file": "{keys}"}, OK, "2 API keys; plain HTTP"),
        ({"api_key_file": "/no/such/file"}, FAILURE, "--api-key-file /no/such/file: No such file or directory"),
        ({"ssl_certfile": "/no/such/file"}, FAILURE, "--ssl-certfile /no/such/file: No such file or directory"),
    ],
)
def test_an_api_that_is_open_to_others_is_warned_of(
    options: dict[str, str], status: CheckStatus, words: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: a, key: secret-1}\n- {name: b, key: secret-2}\n")
    options = {name: value.format(keys=keys) for name, value in options.items()}
    result = examined(write_model(tmp_path), **options)["API key and TLS"]
    assert result.status is status
    assert words in result.detail
    assert "secret" not in result.detail


def test_without_a_tokenizer_what_builds_on_it_is_skipped(tmp_path: Path) -> None:
    (write_model(tmp_path) / "tokenizer.json").unlink()
    results = examined(tmp_path)
    assert results["model files"].status is FAILURE
    assert {results[name].status for name in ("tokenizer", "vocabulary", "special tokens", "chat template")} == {
        SKIPPED
    }


def test_a_tokenizer_that_cannot_be_read_fails(tmp_path: Path) -> None:
    (write_model(tmp_path) / "tokenizer.json").write_text("{}")
    result = examined(tmp_path)["tokenizer"]
    assert result.status is FAILURE
    assert "tokenizer.json: cannot be read" in result.detail


def test_rows_of_padding_are_told_and_tokens_without_a_row_warned_of(tmp_path: Path) -> None:
    result = examined(write_model(tmp_path))["vocabulary"]
    assert (result.status, f"{VOCAB_SIZE} tokens" in result.detail, "rows of padding" in result.detail) == (
        OK,
        True,
        True,
    )
    rewrite(tmp_path / "config.json", vocab_size=100)
    result = examined(tmp_path)["vocabulary"]
    assert result.status is WARNING
    assert result.detail.endswith("the model knows 100")


def test_special_tokens_are_listed_and_unknown_ones_warned_of(tmp_path: Path) -> None:
    result = examined(write_model(tmp_path))["special tokens"]
    assert (result.status, BOS in result.detail, EOS in result.detail) == (OK, True, True)
    rewrite(tmp_path / "tokenizer_config.json", pad_token="<nobody>")
    result = examined(tmp_path)["special tokens"]
    assert (result.status, result.detail) == (WARNING, "not in the vocabulary: pad_token '<nobody>'")


def test_a_model_without_an_end_of_text_is_warned_of(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert examined(tmp_path)["end of text"].detail == f"{byte_level_tokenizer().token_to_id(EOS)} ({EOS})"
    rewrite(tmp_path / "config.json", eos_token_id=None)
    assert examined(tmp_path)["end of text"].detail.endswith("by tokenizer_config.json")
    rewrite(tmp_path / "tokenizer_config.json", eos_token=None)
    assert examined(tmp_path)["end of text"].status is WARNING


@pytest.mark.parametrize(
    ("template", "status", "words"),
    [
        ("{{ messages[0].content }}", OK, "characters; renders a user's message in"),
        ("{% for %}", FAILURE, "chat template: "),
        ("{{ raise_exception('no system message') }}", WARNING, "no system message"),
        ("hello", WARNING, "it leaves out what the user says"),
    ],
)
def test_the_chat_template_is_rendered(template: str, status: CheckStatus, words: str, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(template)
    result = examined(write_model(tmp_path / "model"), chat_template=str(path))["chat template"]
    assert result.status is status
    assert words in result.detail


def test_a_model_without_a_chat_template_is_no_failure(tmp_path: Path) -> None:
    rewrite(write_model(tmp_path) / "tokenizer_config.json", chat_template=None)
    assert examined(tmp_path)["chat template"].status is SKIPPED


def test_sampling_defaults_are_told_with_what_is_ignored(tmp_path: Path) -> None:
    result = examined(write_model(tmp_path, temperature=0.5))["sampling defaults"]
    assert result.status is OK
    assert "temperature 0.5" in result.detail
    result = examined(write_model(tmp_path, typical_p=0.9))["sampling defaults"]
    assert result.status is WARNING
    assert result.detail.endswith("without effect here: typical_p=0.9")
    assert examined(write_model(tmp_path, temperature=-1))["sampling defaults"].status is FAILURE


def test_the_run_directory_is_a_folder_of_ones_own() -> None:
    process = EngineProcess(EngineConfig(), command=("cat",))
    try:
        result = run_directory(process.run_dir)
    finally:
        process.stop()
    assert result.status is OK
    assert "(0700)" in result.detail


def test_a_temporary_folder_with_too_long_a_path_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    process = EngineProcess(EngineConfig(), command=("cat",))
    try:
        result = run_directory(process.run_dir)
    finally:
        process.stop()
    assert result.status is WARNING
    assert "TMPDIR is too long a path for sockets" in result.detail


def test_no_folder_for_sockets_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"^TMPDIR: no folder for the engine's sockets can be made: No such file"):
        EngineProcess(EngineConfig())
