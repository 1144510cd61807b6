"""Messages to bytes and back: one version byte, then MessagePack."""

from typing import TypeVar

import msgspec

from engine.protocol.messages import PROTOCOL_VERSION, Message

T = TypeVar("T")

_ENCODER = msgspec.msgpack.Encoder()


class ProtocolError(RuntimeError):
    """Bytes that are no message of this version."""


def encode(message: Message) -> bytes:
    """Return `message` as bytes."""
    return bytes((PROTOCOL_VERSION,)) + _ENCODER.encode(message)


class Decoder:
    """Decodes one message type, or any of several.

    Raises:
        ProtocolError: on another version, or on bytes that are none of the expected types.
    """

    def __init__(self, *message_types: type[Message]) -> None:
        union = message_types[0]
        for message_type in message_types[1:]:
            union = union | message_type  # type: ignore[assignment]  # a union at run time, which msgspec takes
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(union)

    def decode(self, payload: bytes) -> Message:
        """Return the message that `payload` holds."""
        if not payload or payload[0] != PROTOCOL_VERSION:
            found = payload[0] if payload else "none"
            raise ProtocolError(f"message of protocol version {found}, expected {PROTOCOL_VERSION}")
        try:
            return self._decoder.decode(memoryview(payload)[1:])
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ProtocolError(f"not a message expected here: {error}") from error
