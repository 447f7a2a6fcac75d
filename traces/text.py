"""Small pieces of text: names from elsewhere made fit for one line of a terminal, numbers with their nouns."""

from __future__ import annotations


def printable(text: object) -> str:
    """The object's text without line ends and whatever else could steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def count(number: int, what: str) -> str:
    """A number and its noun: `1 load`, `1,234 loads`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
