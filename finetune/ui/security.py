"""What protects the page: a token, checks of Host and Origin, response headers, and the folders it may read and write.

The page starts programs and shows files, so no other web site, user or machine may reach it:

* Every request needs the token, as a cookie (set by the address that `ft ui` prints) or as `Authorization: Bearer`.
* A request that another site's page causes is refused by its Origin and Sec-Fetch-Site headers (CSRF).
* A Host that is not this machine's is refused, so a foreign name that resolves to 127.0.0.1 does not help (DNS rebinding).
* Paths are resolved, links included, and must lie in an allowed folder.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import final
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAFE_METHODS = ("GET", "HEAD")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; media-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer, browsers would send `Origin: null` with forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
ENTER = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={path}"><title>ft</title>'


@final
class Guard:
    """ASGI middleware that refuses requests without the token, of another origin or for another host.

    Args:
        app: what it protects.
        token: the secret; at least 16 characters.
        hosts: host names that may stand in the Host header; empty: any.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Sequence[str] = LOOPBACK) -> None:
        if len(token) < 16:
            raise ValueError("the token is too short to be secret")
        self._app, self._token, self._hosts = app, token, frozenset(hosts)
        # Cookies are shared by all ports of a host: two servers must not overwrite each other's.
        self.cookie = "ft-" + hashlib.sha256(token.encode()).hexdigest()[:12]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """The response to a request that is not let through; None for one that is."""
        if scope["type"] != "http":
            return PlainTextResponse("only HTTP is served here\n", 403)
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts and _host_name(host) not in self._hosts:
            return PlainTextResponse("this host name is not served here\n", 403)
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return PlainTextResponse("requests from another origin are refused\n", 403)
        navigates = headers.get("sec-fetch-mode") == "navigate" and scope["method"] in SAFE_METHODS
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not navigates:
            return PlainTextResponse("requests from another site are refused\n", 403)
        by_header = self._is_token(headers.get("authorization", "").removeprefix("Bearer "))
        if scope["method"] not in SAFE_METHODS and origin is None and not by_header:
            return PlainTextResponse("a change needs an Origin header\n", 403)
        if by_header or self._is_token(self._cookie_of(headers)):
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["method"] == "GET" and self._is_token(query.get("token", [""])[0]):
            # A page that moves on, not a redirect: after a redirect from another site's link, browsers withhold the cookie.
            answer = HTMLResponse(ENTER.format(path="/"))
            answer.set_cookie(self.cookie, self._token, httponly=True, samesite="strict")
            return answer
        return PlainTextResponse("Open the address that `ft ui` printed: it contains the token.\n", 401)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _cookie_of(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found is not None else ""


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@final
class Folders:
    """The folders that the page may read; nothing outside them is opened.

    Args:
        allowed: data is read and recipes are written below these.
    """

    def __init__(self, allowed: Sequence[Path]) -> None:
        self.allowed = tuple(dict.fromkeys(folder.expanduser().resolve() for folder in allowed))

    def checked(self, path: str | Path) -> Path:
        """The path, absolute, with links resolved.

        Raises:
            UserError: it lies in no allowed folder.
        """
        try:
            resolved = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):
            resolved = None
        if resolved is None or not any(resolved.is_relative_to(folder) for folder in self.allowed):
            raise UserError(
                f'"{path}" is outside the folders that this page may read',
                where=", ".join(map(str, self.allowed)),
                remedy=f"start it with that folder: ft ui --allow {path}",
            )
        return resolved
