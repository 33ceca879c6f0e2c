"""Who may ask: every route without its key, near misses of the key, and what other sites' pages try in a browser."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from llmctl.serve import api, guard
from llmctl.serve.model import Model
from tests.serve.conftest import Running, running

KEY = "sk-correct-horse"


@pytest.fixture(scope="module")
def locked(chat_model: Model) -> Iterator[Running]:
    with running(chat_model, api_key=KEY) as server:
        yield server


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


def routes() -> list[tuple[str, str]]:
    """Every method and path that the application has."""
    application = api.application(api.Service())
    assert isinstance(application, guard.Guard)
    assert isinstance(application.app, Starlette)
    found = []
    for route in application.app.routes:
        assert isinstance(route, Route)
        found += [(method, route.path.replace("{name:path}", "tiny-chat")) for method in route.methods or ()]
    return sorted(found)


@pytest.mark.parametrize(("method", "path"), [*routes(), ("GET", "/no/such/path"), ("OPTIONS", "/v1/models")])
def test_every_route_but_health_needs_the_key(locked: Running, method: str, path: str) -> None:
    response = httpx.request(method, locked.url + path, content=b"{}" if method == "POST" else None)
    if path == "/health":
        assert response.status_code == 200
        return
    assert response.status_code == 401
    assert "www-authenticate" in response.headers
    if method != "HEAD":
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_routes_are_really_enumerated() -> None:
    assert {path for _, path in routes()} >= {"/", "/health", "/v1/chat/completions", "/v1/completions", "/metrics"}


@pytest.mark.parametrize(
    "value",
    [
        "",
        KEY,
        "Bearer",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        f"Digest {KEY}",
        "Basic !!!",
        "Basic " + base64.b64encode(KEY.encode()).decode(),
        basic(KEY + "x"),
        basic(""),
    ],
)
def test_near_misses_are_refused(locked: Running, value: str) -> None:
    response = httpx.get(locked.url + "/v1/models", headers={"Authorization": value})
    assert response.status_code == 401
    assert KEY not in response.text


def test_two_keys_are_none(locked: Running) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
    assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", basic(KEY)])
def test_the_key_opens(locked: Running, value: str) -> None:
    for path in ("/v1/models", "/", "/metrics"):
        assert httpx.get(locked.url + path, headers={"Authorization": value}).status_code == 200


def test_only_the_page_asks_a_browser_for_the_password(locked: Running) -> None:
    assert httpx.get(locked.url + "/").headers["www-authenticate"].startswith("Basic ")
    assert httpx.get(locked.url + "/v1/models").headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "target",
    ["//v1/models", "/v1//models", "//health", "/health/", "/health/../v1/models", "/%2e%2e/v1/models", "/HEALTH"],
)
def test_crooked_paths_lead_nowhere(locked: Running, target: str) -> None:
    assert raw(locked, target, "127.0.0.1").startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("host", ["evil/health?", "localhost/health#", "/health", ""])
def test_an_odd_host_opens_nothing(locked: Running, host: str) -> None:
    """A Host header that poisons `request.url.path` (CVE-2026-48710)."""
    assert raw(locked, "/v1/models", host).split()[1] in (b"401", b"400")


def raw(server: Running, target: str, host: str) -> bytes:
    """The answer to a request that no client library would send."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_another_sites_page_is_refused_and_our_own_is_not(locked: Running) -> None:
    key = {"Authorization": basic(KEY)}  # a browser sends it along with whoever's request
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        refused = httpx.get(locked.url + "/v1/models", headers={**key, "Origin": origin})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
    assert httpx.get(locked.url + "/v1/models", headers={**key, "Origin": locked.url}).status_code == 200


def test_without_a_key_only_this_machine_is_a_host(server: Running, locked: Running) -> None:
    """A site whose name was rebound to 127.0.0.1 comes with its own name as Host."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "evil@x"):
        refused = httpx.get(server.url + "/v1/models", headers={"Host": host})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == 200
    named = {"Host": "models.example", "Authorization": f"Bearer {KEY}"}  # behind a proxy, with a key
    assert httpx.get(locked.url + "/v1/models", headers=named).status_code == 200


def test_a_websocket_is_refused(locked: Running) -> None:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "eA==",
    }
    assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 401
