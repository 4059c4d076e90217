"""The web application: routes, static files, and the server."""

from __future__ import annotations

import secrets
import socket
from importlib.resources import files

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from finetune.errors import UserError
from finetune.ui.security import LOOPBACK, Guard
from finetune.ui.site import Site
from finetune.ui.tabs import data, plan, result, train

STATIC = {
    "page.css": ("finetune.report", "templates/page.css", "text/css"),
    "ui.css": ("finetune.ui", "static/ui.css", "text/css"),
    "app.js": ("finetune.ui", "static/app.js", "text/javascript"),
}


def application(site: Site, token: str, hosts: tuple[str, ...] = LOOPBACK) -> ASGIApp:
    """The application behind its guard.

    Args:
        site: folders, queue and what tabs remember.
        token: that every request must bring.
        hosts: allowed names in the Host header; empty: any.
    """
    routes = [
        Route("/", _start),
        Route("/static/{name}", _static),
        *data.ROUTES,
        *plan.ROUTES,
        *train.ROUTES,
        *result.ROUTES,
    ]
    app = Starlette(routes=routes)
    app.state.site = site
    return Guard(app, token, hosts)


def new_token() -> str:
    """A token that cannot be guessed."""
    return secrets.token_urlsafe(24)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; without `port`, 8765 or the next free one.

    Raises:
        UserError: the address is in use or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last: OSError | None = None
    for candidate in [port] if port else [*range(8765, 8785), 0]:
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, candidate))
            bound.listen(128)
            return bound
        except OSError as error:
            bound.close()
            last = error
    assert last is not None
    raise UserError(
        f"the page cannot be served at {host}:{port}: {last.strerror}", where="--port", remedy="choose another port"
    ) from last


async def _start(request: Request) -> Response:
    site: Site = request.app.state.site
    return RedirectResponse("/train" if site.queue.seen() else "/data", 303)


async def _static(request: Request) -> Response:
    if (entry := STATIC.get(request.path_params["name"])) is None:
        return Response("not found\n", 404)
    package, path, kind = entry
    return Response(files(package).joinpath(path).read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})
