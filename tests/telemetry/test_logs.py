"""Logs are JSON lines that name the request and its trace, and never hold a secret."""

import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import structlog

from shared.config import ServiceSettings, settings_config
from shared.telemetry.logs import adopt_logger, bind_request, reset_logs
from shared.telemetry.secrets import mask, mask_text
from shared.telemetry.setup import start

TRACE = f"00-{'4' * 32}-{'7' * 16}-01"
SECRET = "hunter2-and-more"


class LoudSettings(ServiceSettings):
    service: ClassVar[str] = "loud"
    model_config = settings_config("loud")


class QuietSettings(ServiceSettings):
    service: ClassVar[str] = "quiet"
    model_config = settings_config("quiet")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    reset_logs()
    structlog.contextvars.clear_contextvars()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_says_when_who_what_and_for_which_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry = start(LoudSettings(), "loud-7f")
    log = bind_request(telemetry.log, "r1", TRACE)
    log.warning("slice.lost", worker="w1", tokens=3)
    (line,) = lines_of(capsys)
    timestamp = line.pop("timestamp")
    assert timestamp.endswith("Z")
    assert line == {
        "level": "warning",
        "service": "loud",
        "boot_id": "loud-7f",
        "event": "slice.lost",
        "request_id": "r1",
        "trace_id": "4" * 32,
        "worker": "w1",
        "tokens": 3,
    }


def test_no_trace_id_for_a_request_that_is_not_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = start(LoudSettings(), "loud-7f")
    bind_request(telemetry.log, "r1", "").info("done")
    (line,) = lines_of(capsys)
    assert "trace_id" not in line
    assert "trace" not in line


def test_a_request_bound_to_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = start(LoudSettings(), "loud-7f")
    with structlog.contextvars.bound_contextvars(request_id="r9", trace=TRACE):
        telemetry.log.info("inside")
        logging.getLogger("a.library").warning("its own words")
    ours, theirs = lines_of(capsys)
    assert ours["request_id"] == theirs["request_id"] == "r9"
    assert ours["trace_id"] == theirs["trace_id"] == "4" * 32


def test_starting_again_never_doubles_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        telemetry = start(LoudSettings(), "loud-7f")
    start(QuietSettings(), "quiet-1")
    telemetry.log.info("once")
    assert [line["event"] for line in lines_of(capsys)] == ["once"]


def test_each_service_has_its_own_level(capsys: pytest.CaptureFixture[str]) -> None:
    loud = start(LoudSettings(log_level="debug"), "loud-1")
    quiet = start(QuietSettings(log_level="error"), "quiet-1")
    for telemetry in (loud, quiet):
        telemetry.log.debug("detail")
        telemetry.log.error("trouble")
    assert [(line["service"], line["event"]) for line in lines_of(capsys)] == [
        ("loud", "detail"),
        ("loud", "trouble"),
        ("quiet", "trouble"),
    ]


def test_libraries_speak_through_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("uvicorn.error")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    start(LoudSettings(), "loud-7f")
    library.warning("%s connections", 3)
    library.info("not shown: libraries start at warning")
    logging.getLogger("some_library").debug("body of a message")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("from Python", UserWarning, stacklevel=1)
    (line, warning) = lines_of(capsys)
    assert (
        line.items()
        >= {
            "event": "3 connections",
            "level": "warning",
            "logger": "uvicorn.error",
            "service": "loud",
            "boot_id": "loud-7f",
        }.items()
    )
    assert "from Python" in warning["event"]


def test_a_library_in_a_process_of_several_services(capsys: pytest.CaptureFixture[str]) -> None:
    start(LoudSettings(), "loud-1")
    start(QuietSettings(), "quiet-1")
    logging.getLogger("some_library").error("no route")
    structlog.get_logger("shared.bus.handling").info("ours, but of no service")
    library, shared = lines_of(capsys)
    assert (library["service"], library["logger"]) == ("tranche", "some_library")
    assert (shared["service"], shared["logger"]) == ("tranche", "shared.bus.handling")
    assert "boot_id" not in library


def test_a_library_that_comes_with_its_own_handler(capsys: pytest.CaptureFixture[str]) -> None:
    start(LoudSettings(), "loud-1")
    library = logging.getLogger("one.with.handlers")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    adopt_logger("one.with.handlers")
    library.warning("once")
    assert [line["event"] for line in lines_of(capsys)] == ["once"]


def test_the_hub_client_of_transformers_speaks_once(capsys: pytest.CaptureFixture[str]) -> None:
    start(LoudSettings(), "loud-1")
    client = logging.getLogger("huggingface_hub")
    client.addHandler(logging.StreamHandler())
    adopt_logger("transformers")
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 2s")
    assert [line["event"] for line in lines_of(capsys)] == ["Retrying in 2s"]


def test_a_traceback_is_one_line_without_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = start(LoudSettings(), "loud-7f")
    try:
        raise ConnectionError(f"cannot reach amqp://tranche:{SECRET}@broker:5672/")
    except ConnectionError:
        telemetry.log.exception("bus.lost", request_id="r1")
        logging.getLogger("some_library").exception("lost")
    ours, theirs = lines_of(capsys)
    for line in (ours, theirs):
        assert "ConnectionError: cannot reach amqp://tranche:***@broker:5672/" in line["exception"]
    assert SECRET not in json.dumps([ours, theirs])


def test_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = start(LoudSettings(log_format="console"), "loud-7f")
    telemetry.log.info("ready", url=f"amqp://u:{SECRET}@h/")
    text = capsys.readouterr().err
    assert "ready" in text
    assert "amqp://u:***@h/" in text
    assert not text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("setting", "advice"),
    [({"log_level": "chatty"}, "debug"), ({"log_format": "xml"}, "console")],
)
def test_a_wrong_setting_says_what_to_choose(setting: dict[str, str], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        start(LoudSettings(**setting), "loud-7f")  # type: ignore[arg-type]


SECRETS: list[tuple[str, Any]] = [
    ("a url", f"amqp://guest:{SECRET}@localhost:5672/%2F"),
    ("a url with odd signs", f"amqps://guest:@:/{SECRET}@localhost/"),
    ("a url in words", f"could not connect to 'amqp://guest:{SECRET}@localhost', trying again"),
    ("two urls", f"amqp://a:{SECRET}@h1,amqp://b:{SECRET}@h2"),
    ("a header line", f"Authorization: Bearer {SECRET}"),
    ("a header in a repr", f"{{'authorization': 'Basic {SECRET}', 'accept': '*/*'}}"),
    ("a raw header pair", f"[(b'authorization', b'Bearer {SECRET}')]"),
    ("a custom header", f"x-api-key: {SECRET}"),
    ("bytes", f"Authorization: Bearer {SECRET}".encode()),
    ("a mapping", {"headers": {"Authorization": f"Bearer {SECRET}"}}),
    ("a named value", {"api_key": SECRET}),
    ("a named value in a list", [{"broker-password": SECRET}]),
    ("a key of ours", f"unknown key tr-{SECRET}"),
    ("a key as OpenAI's", f"sk-proj-{SECRET}"),
    ("an exception", ValueError(f"amqp://u:{SECRET}@h")),
    ("far down", {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"password": SECRET}}}}}}}}),
]


@pytest.mark.parametrize(("_name", "value"), SECRETS, ids=[name for name, _ in SECRETS])
def test_no_secret_reaches_a_line(
    capsys: pytest.CaptureFixture[str], _name: str, value: Any
) -> None:
    telemetry = start(LoudSettings(), "loud-7f")
    telemetry.log.error("trouble", value=value)
    telemetry.log.error(f"trouble with {value}")
    logging.getLogger("a.library").error("trouble with %s", value)
    text = capsys.readouterr().err
    assert text.count("trouble") == 3
    assert SECRET not in text


@pytest.mark.parametrize(
    "text",
    [
        "tokens=12 key=3 http://127.0.0.1:8000/v1/models",
        "basic checks passed",
        "12:30:59 worker-1 back at http://broker:15672/api",
        "the author: ization",
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert mask_text(text) == text


def test_numbers_keep_their_type() -> None:
    value = {"tokens": 3, "share": 0.5, "ok": True, "none": None, "access_token": 4}
    assert mask(value) == value
