"""Messages that can be read, however much is wrong and however long the names in a file are."""

from __future__ import annotations

from collections.abc import Sequence

_LINES, _CHARACTERS, _WIDTH = 29, 1900, 500


def shortened(message: str) -> str:
    """``message`` in at most thirty lines and 2,000 characters.

    Lines that are too long are cut, and those left out are counted in the last one.
    """
    lines = [
        line if len(line) <= _WIDTH else f"{line[: _WIDTH - 2]} …" for line in message.splitlines()
    ]
    kept, left = 0, _CHARACTERS
    for line in lines[:_LINES]:
        left -= len(line) + 1
        if left < 0:
            break
        kept += 1
    more = len(lines) - kept
    return "\n".join([*lines[:kept], *([f"  and {more} more"] if more else [])])


def listed(names: Sequence[str], most: int = 8) -> str:
    """The names, or the first ``most`` of them and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
