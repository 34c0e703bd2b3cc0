"""Messages: their JSON, which others have to agree on; errors that travel; and what is no message."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnap import errors
from qsnap.errors import ConfigError, ProtocolError, QemuError, QsnapError, StreamError
from qsnap.model import Snapshot
from qsnap.wire.messages import (
    VERSION,
    ClockProbe,
    ClockReply,
    Hello,
    Keep,
    Keeping,
    Message,
    Ping,
    Received,
    Refused,
    Welcome,
    check_version,
    decode_message,
    encode_message,
)
from tests.samples import FINITE, snapshots

st.register_type_strategy(float, FINITE)
st.register_type_strategy(Snapshot, snapshots())

GREETING = '"version":[1,0],"capabilities":["a"],"crl":"PEM"}'
REFUSED = '"kind":"IntegrityError","message":"bad","where":"ram","advice":"","notes":["n"],"details":{"file":"ram"}}'
JSON = [
    (Hello((1, 0), ("a",), "PEM"), '{"type":"Hello",' + GREETING),
    (Welcome((1, 0), ("a",), "PEM"), '{"type":"Welcome",' + GREETING),
    (
        Refused("IntegrityError", "bad", "ram", notes=("n",), details={"file": "ram"}),
        '{"type":"Refused",' + REFUSED,
    ),
    (Ping(), '{"type":"Ping"}'),
    (ClockProbe(1.5), '{"type":"ClockProbe","sent_s":1.5}'),
    (
        Keep("lab", "1f", "vm1", ("pc.ram",), 4096),
        '{"type":"Keep","vne":"lab","operation":"1f","vm":"vm1","backed":["pc.ram"],"ram_limit_bytes":4096,'
        '"record_limit_bytes":null}',
    ),
    (Keeping("progress", 7), '{"type":"Keeping","event":"progress","stream_bytes":7}'),
    (Received(4096, 1), '{"type":"Received","ram_bytes":4096,"data_pages":1}'),
    (ClockReply(1.5, 2.5, 3.5), '{"type":"ClockReply","sent_s":1.5,"received_s":2.5,"answered_s":3.5}'),
]
PUBLIC = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, QsnapError)]


class RefinedError(QemuError):
    """As the parts of qsnap have them."""


def sample(kind: type[QsnapError]) -> QsnapError:
    """An error of this class, with something in all that it has."""
    parameters = inspect.signature(kind).parameters.values()
    given: dict[str, Any] = {
        each.name: 7 if each.annotation == "int" else "x" for each in parameters if each.name != "message"
    }
    error = kind("it went wrong", **given)
    error.add_note("also: another")
    return error


@pytest.mark.parametrize(("message", "text"), JSON, ids=lambda each: type(each).__name__)
def test_json(message: Message, text: str) -> None:
    assert encode_message(message) == text.encode()
    assert decode_message(text.encode()) == message


@pytest.mark.parametrize("kind", get_args(Message))
@given(st.data())
def test_every_message_arrives_as_it_was(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(st.from_type(kind))
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize("kind", PUBLIC)
def test_an_error_arrives_as_it_was(kind: type[QsnapError]) -> None:
    error = sample(kind)
    arrived = decode_message(encode_message(Refused.of(error)))
    assert isinstance(arrived, Refused)
    again = arrived.error()
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)  # the notes among them


def test_a_private_error_arrives_as_what_it_refines() -> None:
    again = Refused.of(RefinedError("died", where="VM alice")).error()
    assert (type(again), str(again)) == (QemuError, "VM alice: died")


def test_an_error_that_is_not_known_here_is_an_error() -> None:
    again = Refused("ShinyNewError", "dull").error()
    assert (type(again), again.message, again.exit_code) == (QsnapError, "dull", 1)


def test_details_do_not_become_anything_else() -> None:
    again = Refused("StreamError", "bad", details={"stream_offset": "x", "exit_code": 0, "message": "y"}).error()
    assert isinstance(again, StreamError)
    assert (again.stream_offset, again.exit_code, again.message) == (0, 9, "bad")


@pytest.mark.parametrize("kind", ["Hello", "Welcome", "Refused"])
def test_what_hosts_of_other_versions_say_is_understood(kind: str) -> None:
    message = next(text for message, text in JSON if type(message).__name__ == kind)
    newer = {**json.loads(message), "novelty": {"deep": [1]}}
    assert decode_message(json.dumps(newer).encode()) == decode_message(message.encode())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff", "codec"),
        (b"[]", "no JSON object"),
        (b"{} {}", "Extra data"),
        (b'{"type":"Ping"}\n{}', "Extra data"),
        (b'{"type":"Ping","type":"Ping"}', "a key is given twice"),
        (b"{}", "unknown type"),
        (b'{"type":["Ping"]}', "unknown type"),
        (b'{"type":"QsnapError"}', "unknown type"),
        (b'{"type":"Ping","more":1}', "extra fields found"),
        (b'{"type":"ClockProbe"}', "required field missing"),
        (b'{"type":"ClockProbe","sent_s":"1"}', "ClockProbe.sent_s"),
        (b'{"type":"ClockProbe","sent_s":true}', "ClockProbe.sent_s"),
        (b'{"type":"ClockProbe","sent_s":NaN}', "out of range"),
        (b'{"type":"ClockProbe","sent_s":1e999}', "out of range"),
        (b'{"type":"ClockProbe","sent_s":' + b"9" * 400 + b"}", "ClockProbe.sent_s"),
        (b'{"type":"ClockProbe","sent_s":' + b"9" * 9000 + b"}", "digits"),
        (b'{"type":"Hello","version":[1],"capabilities":[],"crl":""}', "Hello.version"),
        (b'{"type":"Hello","version":[1,"0"],"capabilities":[],"crl":""}', "Hello.version"),
        (b'{"type":"Hello","version":[1,0],"capabilities":[1],"crl":""}', "Hello.capabilities"),
        (b'{"type":"Refused","kind":"StateError","message":"m","details":{"a":1.5}}', "Refused.details"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_message(data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=f"not a message: .*{reason}"):
        decode_message(data)


@pytest.mark.parametrize("text", [text for _, text in JSON])
def test_a_part_of_a_message_is_none(text: str) -> None:
    for end in range(len(text)):
        with pytest.raises(ProtocolError):
            decode_message(text[:end].encode())


def test_another_major_version_is_refused_by_both() -> None:
    major, minor = VERSION
    check_version((major, minor + 7), peer="beta", here="alpha")
    with pytest.raises(ProtocolError, match=rf"beta speaks version {major + 1}\.0 .* alpha version {major}\.") as newer:
        check_version((major + 1, 0), peer="beta", here="alpha")
    assert newer.value.advice == "Upgrade qsnap on alpha."
    with pytest.raises(ProtocolError, match=r"beta speaks version 0\.9") as older:
        check_version((0, 9), peer="beta", here="alpha")
    assert older.value.advice == "Upgrade qsnap on beta."


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["type", "version", "capabilities", "crl", "kind", "message", "details", "sent_s", "notes"])
kinds = st.sampled_from([each.__name__ for each in get_args(Message)])


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    check(data)


@given(kinds, st.dictionaries(keys, values, max_size=6))
def test_any_json_is_a_message_or_a_protocol_error(kind: str, content: dict[str, Any]) -> None:
    check(json.dumps({**content, "type": kind}).encode())


def check(data: bytes) -> None:
    try:
        message = decode_message(data)
    except ProtocolError:
        return
    assert decode_message(encode_message(message)) == message


def test_a_config_error_keeps_its_place() -> None:
    error = Refused.of(ConfigError("is missing", file="lab.toml", line=3, key="vm.web.memory")).error()
    assert isinstance(error, ConfigError)
    assert (error.file, error.line, error.key) == ("lab.toml", 3, "vm.web.memory")
