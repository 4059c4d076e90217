"""`ft ui` refuses whoever is not the user: no token, another origin, another host, a path outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from finetune.cli import ui
from finetune.errors import UserError
from finetune.ui.app import application, listen, new_token
from finetune.ui.security import Folders, Guard
from tests.helpers import web


async def no_app(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers nothing."""


def plain(tmp_path: Path) -> TestClient:
    """A client that sends nothing by itself."""
    return TestClient(application(web.site(tmp_path), web.TOKEN), base_url=web.ORIGIN, follow_redirects=False)


@pytest.mark.parametrize("path", ["/", "/train", "/data", "/plan", "/result", "/static/app.js", "/train/live?run=x"])
def test_request_without_the_token_is_refused(tmp_path: Path, path: str) -> None:
    answer = plain(tmp_path).get(path)
    assert answer.status_code == 401
    assert web.TOKEN not in answer.text


@pytest.mark.parametrize("token", ["", "wrong", web.TOKEN[:-1], web.TOKEN + "x", "é"])
def test_request_with_a_wrong_token_is_refused(tmp_path: Path, token: str) -> None:
    client = plain(tmp_path)
    assert client.get("/train", params={"token": token}).status_code == 401
    assert client.get("/train", headers={b"authorization": f"Bearer {token}".encode()}).status_code == 401


def test_printed_address_sets_a_cookie_and_redirects_without_the_token(tmp_path: Path) -> None:
    client = plain(tmp_path)
    answer = client.get("/", params={"token": web.TOKEN})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 200 and "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    assert web.TOKEN not in answer.text and "url=/" in answer.text
    assert client.get("/train").status_code == 200


def test_cookies_of_two_servers_on_one_host_differ() -> None:
    first, second = (Guard(no_app, new_token()) for _ in range(2))
    assert first.cookie != second.cookie


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"origin": web.ORIGIN, "sec-fetch-site": "cross-site"},
        {"origin": web.ORIGIN, "sec-fetch-site": "same-site"},
    ],
)
def test_post_from_another_origin_is_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    client = web.client(web.site(tmp_path))
    answer = client.post("/train/start", data={"recipe": "lora/emoji", "name": "x"}, headers=headers)
    assert answer.status_code == 403


def test_post_with_a_cookie_and_no_origin_is_refused(tmp_path: Path) -> None:
    client = plain(tmp_path)
    client.get("/", params={"token": web.TOKEN})
    assert client.post("/train/remove", data={"job": "1"}).status_code == 403
    assert client.post("/train/remove", data={"job": "1"}, headers={"origin": web.ORIGIN}).status_code == 303


def test_image_requested_by_another_site_is_refused(tmp_path: Path) -> None:
    client = web.client(web.site(tmp_path))
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/train/sample?run=a&file=b", headers=headers).status_code == 403


def test_request_with_another_host_name_is_refused(tmp_path: Path) -> None:
    client = web.client(web.site(tmp_path))
    assert client.get("/train", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/train", headers={"host": "evil.example:8765"}).status_code == 403
    local = {"host": "localhost:1234", "origin": "http://localhost:1234"}
    assert client.get("/train", headers=local).status_code == 200


def test_response_headers_forbid_foreign_scripts_and_frames(tmp_path: Path) -> None:
    for answer in (web.client(web.site(tmp_path)).get("/train"), plain(tmp_path).get("/train")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("name", ["../secret", "/etc", "..", ".", "", "a/../../secret", "secret-link", "nul\0"])
def test_run_outside_the_runs_folder_is_refused(tmp_path: Path, name: str) -> None:
    state = web.site(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "plan.json").write_text("{}")
    (tmp_path / "runs" / "secret-link").symlink_to(tmp_path / "secret")
    client = web.client(state)
    assert client.get("/train/live", params={"run": name}).status_code == 400
    assert client.post("/train/stop", data={"run": name}).status_code == 400
    assert client.post("/train/resume", data={"run": name}).status_code == 400
    with pytest.raises(UserError, match="there is no run"):
        state.run_folder(name)


def test_sample_outside_its_run_is_refused(tmp_path: Path) -> None:
    state = web.site(tmp_path)
    run = tmp_path / "runs" / "one"
    (run / "samples" / "step-0").mkdir(parents=True)
    (run / "plan.json").write_text("{}")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (run / "samples" / "step-0" / "link.png").symlink_to(tmp_path / "secret.png")
    client = web.client(state)
    for file in ("../../secret.png", "plan.json", "samples/../../../secret.png", "samples/step-0/link.png", ""):
        answer = client.get("/train/sample", params={"run": "one", "file": file})
        assert answer.status_code in (400, 404) and answer.content != b"secret"


def test_recipe_outside_the_allowed_folders_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: lora\n")
    state = web.site(tmp_path)
    answer = web.client(state).post("/train/start", data={"recipe": str(recipe), "name": "mine"})
    assert answer.status_code == 403 and "outside the folders" in answer.text
    assert state.queue.jobs() == []


def test_allowed_folders_resolve_links_before_comparing(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    folders = Folders([inside])
    assert folders.checked(inside / "a") == (inside / "a").resolve()
    for path in (outside, inside / "link", inside / ".." / "out", tmp_path, "/", "~", f"{inside}x"):
        with pytest.raises(UserError, match="outside the folders"):
            folders.checked(path)


def test_form_that_is_too_large_is_refused(tmp_path: Path) -> None:
    answer = web.client(web.site(tmp_path)).post("/train/start", data={"recipe": "x" * 2_000_000})
    assert answer.status_code == 413


def test_token_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        Guard(no_app, "short")


def test_server_without_a_port_takes_the_next_free_one() -> None:
    first = listen("127.0.0.1", 0)
    second = listen("127.0.0.1", 0)
    assert first.getsockname()[1] != second.getsockname()[1]
    with pytest.raises(UserError, match="cannot be served"):
        listen("127.0.0.1", first.getsockname()[1])
    first.close()
    second.close()


def test_ui_without_its_packages_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    monkeypatch.setattr(ui, "NEEDED", ("a_package_that_is_not_there",))
    error = CliRunner().invoke(ui.command, []).exception
    assert isinstance(error, UserError) and error.remedy == "pip install 'ft-image[ui]'"
