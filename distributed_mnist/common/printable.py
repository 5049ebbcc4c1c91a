"""Show text from files, such as names and versions, without letting it control the terminal."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


_MOST = 200


def shortened(text: str) -> str:
    """Return the text as one line, without its middle if it is long: thousands of characters, say."""
    text = " ".join(text.split())
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]}...{text[-_MOST // 4 :]}"


def printable(text: str) -> str:
    """Return the text with escapes such as `\\x1b` for control characters and bytes that are not UTF-8.

    Line ends and tabs stay as they are.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
