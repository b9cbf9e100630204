"""Find passwords and tokens in URLs, and hide them from output and files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote

HIDDEN = "***"
SHORT = 4
"""Shorter secrets are hidden only inside their URL: elsewhere they could be an ordinary word."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,40}://\S+")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,40})://")
_PARAMETER = re.compile(r"(?<=[?&;])([^=&;#\s]{1,200})=([^&;#\s]+)")
_NAME = re.compile(
    r"token|secret|passw|pwd|signature|credential|api_?-?key|access_?-?key|account_?-?key|auth|^(sig|key|pass|sas)$",
    re.IGNORECASE,
)


def names_secret(name: str) -> bool:
    """Whether a parameter, option or variable of this name usually contains a password, token or key."""
    return _NAME.search(name) is not None


def secrets_in(text: str) -> set[str]:
    """Return the passwords and tokens in the URLs of a text, as written and decoded."""
    secrets = {text[start:stop] for url in _URL.finditer(text) for start, stop in _places(text, *url.span())}
    return secrets | {unquote(secret) for secret in secrets}


def masked(text: str, secrets: Iterable[str] = ()) -> str:
    """Hide the passwords and tokens in the URLs of a text.

    Args:
        text: Any text, or a single URL.
        secrets: Further strings to hide anywhere in the text, such as `secrets_in` a URL that it may quote.
    """
    places = sorted(place for url in _URL.finditer(text) for place in _places(text, *url.span()))
    for start, stop in reversed(places):
        text = f"{text[:start]}{HIDDEN}{text[stop:]}"
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORT:
            text = text.replace(secret, HIDDEN)
    return text


def holds_secret(url: str) -> bool:
    """Whether a URL contains a password or a token."""
    return bool(secrets_in(url))


def _places(text: str, first: int, last: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each secret in the URL at text[first:last], without overlaps."""
    schemes = list(_SCHEME.finditer(text, first, last))
    ends = [scheme.start() for scheme in schemes[1:]] + [last]
    places = [place for scheme, end in zip(schemes, ends, strict=True) if (place := _password(text, scheme, end))]
    for parameter in _PARAMETER.finditer(text, first, last):
        start, stop = parameter.span(2)
        inside = any(begin < stop and start < end for begin, end in places)
        if names_secret(parameter[1]) and not inside:
            places.append((start, stop))
    return places


def _password(text: str, scheme: re.Match[str], last: int) -> tuple[int, int] | None:
    first = scheme.end()
    authority = re.split(r"[/?#]", text[first:last], maxsplit=1)[0]
    at = authority.rfind("@")
    if at < 0:
        # The password contains an unescaped slash, question mark or hash if the text after the colon is not a port.
        port = re.fullmatch(r"[^:\[\]]+:([^:]+)", authority)
        at = text[first:last].rfind("@") if port and not port[1].isdecimal() else -1
    if at < 0:
        return None
    user, colon, password = text[first : first + at].partition(":")
    if colon and password:
        return first + len(user) + 1, first + at
    # Web services accept a token as user name; in other protocols a user name is not secret.
    web = scheme[1].lower().endswith(("http", "https"))
    return (first, first + at) if web and user and not colon else None
