"""`ft ui`: a local web page."""

from __future__ import annotations

import importlib.util
import ipaddress
import tempfile
import webbrowser
from pathlib import Path

import click

from finetune import terminal
from finetune.errors import UserError

NEEDED = ("starlette", "uvicorn")


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Folder of the runs. Recipes, captions and logs that the page writes lie there too.",
)
@click.option(
    "--allow",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A folder that the page may read images from; repeat for several. Default: the working directory.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port. Default: 8765, or the next one that is free."
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. Others than the default can be reached from other machines, without encryption.",
)
@click.option("--open/--no-open", "opens", default=True, help="Open the page in the browser.")
@click.option(
    "--demo", is_flag=True, help="Train lora/emoji for some minutes in a temporary folder, to look at the page."
)
def command(folder: Path, allow: tuple[Path, ...], port: int, host: str, opens: bool, demo: bool) -> None:
    """Serve a local web page to check data, plan, train and sample.

    The page can be reached from this machine only, with the token in the printed address. Ctrl-C ends the server; runs
    that train go on. For a remote machine, forward the port: ssh -L 8765:127.0.0.1:8765 MACHINE.

    \b
    Examples:
      ft ui
      ft ui --allow ~/photos
      ft ui --demo
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the web page needs {' and '.join(missing)}", remedy="pip install 'ft-image[ui]'")
    if not demo:
        serve(folder, allow or (Path.cwd(),), host, port, opens)
        return
    with tempfile.TemporaryDirectory(prefix="ft-ui-demo-") as scratch:
        serve(Path(scratch), allow or (Path.cwd(),), host, port, opens, demo=True)


def serve(folder: Path, allow: tuple[Path, ...], host: str, port: int, opens: bool, demo: bool = False) -> None:
    """Serve until Ctrl-C.

    Raises:
        UserError: the address cannot be used.
    """
    import uvicorn

    from finetune.cli.estimate import local_gpu
    from finetune.ui.app import application, listen, new_token
    from finetune.ui.demo import start, stop
    from finetune.ui.queue import Queue
    from finetune.ui.security import LOOPBACK, Folders
    from finetune.ui.site import Site

    token, bound = new_token(), listen(host, port)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{bound.getsockname()[1]}/?token={token}"
    local = _is_loopback(host)
    site = Site(Folders([*allow, folder]), Queue(folder.resolve()), demo)
    site.memory["local gpu"] = local_gpu()
    server = uvicorn.Server(
        uvicorn.Config(application(site, token, LOOPBACK if local else ()), log_level="warning", access_log=False)
    )
    terminal.echo(address)
    if not local:
        terminal.echo(
            f"warning: {host} can be reached from other machines, and the connection is not encrypted; an SSH tunnel "
            f"is",
            err=True,
        )
    if demo:
        start(site.queue)
    if opens:
        webbrowser.open(address)
    try:
        server.run(sockets=[bound])
    finally:
        site.queue.close()
        if demo:
            stop(site.queue)
        bound.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
