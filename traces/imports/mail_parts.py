# SPDX-License-Identifier: Apache-2.0
"""A mail to the texts in it: of each body its plain form, and what is attached as text, packed or not."""

from __future__ import annotations

import gzip
import html
import lzma
import re
from collections.abc import Iterator
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Final

_TAG: Final = re.compile(rb"<[^<>\n]{0,400}>")
_MOST: Final = 1 << 28  # bytes that an attachment may unpack to


def mail_texts(mail: bytes) -> Iterator[bytes]:
    """Each text ends with a line's end. What is neither text nor packed text is left out."""
    message = message_from_bytes(mail, policy=default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("plain", "html"))
    parts = [part for part in message.walk() if part.is_attachment()]
    for part in [*([body] if body is not None else []), *parts]:
        text = _unpacked(part.get_payload(decode=True) or b"")
        if part.get_content_type() == "text/html":
            text = html.unescape(_TAG.sub(b"", text).decode(errors="replace")).encode()
        if b"\0" not in text:
            yield text + b"\n"


def _unpacked(data: object) -> bytes:
    assert isinstance(data, bytes)
    try:
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)[:_MOST]
        if data.startswith(b"\xfd7zXZ\0"):
            return lzma.decompress(data)[:_MOST]
    except (OSError, EOFError, lzma.LZMAError):
        return b""
    return data
