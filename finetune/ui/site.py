"""What all tabs share: the state of the server, pages from templates, forms, and errors as messages on the page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from urllib.parse import parse_qs, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from finetune.errors import UserError
from finetune.report.html import render
from finetune.ui.queue import Queue
from finetune.ui.security import Folders

TABS = (("data", "Data"), ("plan", "Plan"), ("train", "Train"), ("result", "Result"))
FORM_BYTES = 1 << 20
Work = Callable[["Site", Mapping[str, str]], Response]
Endpoint = Callable[[Request], Awaitable[Response]]


@final
@dataclass
class Site:
    """The state of one server.

    Attributes:
        folders: that the page may read and write.
        queue: of runs, in `queue.runs`.
        demo: whether the page shows the bundled run; it says so.
        memory: what tabs keep between requests, by tab.
    """

    folders: Folders
    queue: Queue
    demo: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def run_folder(self, name: str) -> Path:
        """The folder of a run, by its name.

        Raises:
            UserError: there is no such run, or the name leads elsewhere.
        """
        runs = self.queue.runs.resolve()
        try:
            folder = (runs / name).resolve()
        except (OSError, ValueError):
            folder = runs
        if not name or not folder.is_relative_to(runs) or folder == runs or not (folder / "plan.json").is_file():
            raise UserError(f'there is no run "{name}"', where=str(runs), remedy="choose one in the tab Train")
        return folder

    def name_of(self, folder: Path) -> str:
        """The name of a run in addresses: its folder below the folder of all runs."""
        return folder.resolve().relative_to(self.queue.runs.resolve()).as_posix()


def page(site: Site, tab: str, template: str, **context: Any) -> Response:
    """A whole page with its tabs.

    Args:
        site: of this server.
        tab: the active one.
        template: in `finetune/ui/templates`; extends `ui.html.j2`.
        context: its variables.
    """
    shared = {"tabs": TABS, "tab": tab, "demo": site.demo, "url": url, "error": None}
    return HTMLResponse(render(template, package="finetune.ui", **(shared | context)))


def fragment(template: str, status: int = 200, **context: Any) -> Response:
    """A part of a page, which `app.js` puts into the page."""
    return HTMLResponse(render(template, package="finetune.ui", url=url, **context), status)


def url(path: str, /, **query: object) -> str:
    """An address with its query, encoded."""
    given = {key: value for key, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


def moved(path: str, /, **query: object) -> Response:
    """Send the browser on to a page, after a form."""
    return RedirectResponse(url(path, **query), 303)


def shown(work: Work) -> Endpoint:
    """An endpoint for GET: runs `work` in a thread with the query; errors become a message on the page."""

    async def endpoint(request: Request) -> Response:
        return await _answer(request, work, dict(request.query_params))

    return endpoint


def posted(work: Work) -> Endpoint:
    """An endpoint for POST: runs `work` in a thread with the form's fields; errors become a message on the page."""

    async def endpoint(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > FORM_BYTES:
                return Response("the form is too large\n", 413)
        fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
        return await _answer(request, work, {key: values[-1] for key, values in fields.items()})

    return endpoint


async def _answer(request: Request, work: Work, fields: Mapping[str, str]) -> Response:
    site: Site = request.app.state.site
    try:
        return await run_in_threadpool(work, site, fields)
    except UserError as error:
        about = {"problem": error.problem, "where": error.where, "remedy": error.remedy}
        if request.headers.get("x-fragment"):
            return fragment("_error.html.j2", 400, error=about)
        tab = request.url.path.split("/")[1]
        answer = page(site, tab, "error.html.j2", error=about)
        answer.status_code = 403 if "outside the folders" in error.problem else 400
        return answer
