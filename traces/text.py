"""Text of files from elsewhere, made fit for one line of a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    """The object's text without line ends and whatever else could steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))
