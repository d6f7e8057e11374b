"""The API's other routes on a real socket: health, metrics, admin calls, and who may make them."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from local_backend import Served, served

from llumnix.api import app
from llumnix.api.server import ApiServer, open_socket
from llumnix.core.config import EngineConfig, FrontendConfig
from llumnix.core.errors import ConfigurationError

ENGINE = EngineConfig(kind="simulated", simulated_step_ms=1, max_model_len=512, kv_blocks=512, batch_max=32)
CHAT = [{"role": "user", "content": "hi"}]
CHAT_PROMPT = "user: hi\nassistant: "


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(ENGINE, FrontendConfig(port=0, body_bytes_max=1 << 20, requests_max=64)) as running:
        yield running


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False) as made:
        yield made


class TestOtherRoutes:
    def test_health_version_and_tokenize(self, server: Served, http: httpx.Client) -> None:
        assert http.get("/health").status_code == 200
        server.backend.ready = False
        assert http.get("/health").status_code == 503
        server.backend.ready = True
        assert http.get("/version").json()["version"]
        answer = http.post("/tokenize", json={"prompt": "ab"}).json()
        assert answer == {"count": 2, "max_model_len": 512, "tokens": [97, 98]}
        assert http.post("/tokenize", json={"messages": CHAT}).json()["count"] == len(CHAT_PROMPT)
        assert http.post("/tokenize", json={}).status_code == 400

    def test_metrics(self, server: Served, http: httpx.Client) -> None:
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        page = http.get("/metrics").text
        assert 'llumnix_http_requests_total{route="/v1/completions",status="200"}' in page
        assert "llumnix_time_to_first_token_seconds_count" in page
        assert 'llumnix_instance_capacity_blocks{instance="instance-0"} 512.0' in page
        server.backend.admin.away = True
        try:
            page = http.get("/metrics")
            assert page.status_code == 200 and "instance-0" not in page.text
        finally:
            server.backend.admin.away = False

    def test_metrics_do_not_wait_for_a_manager_that_hangs(
        self, server: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(app, "SCRAPE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.backend.admin, "instances", lambda: asyncio.sleep(60))
        page = http.get("/metrics")
        assert page.status_code == 200 and "llumnix_http_requests_total" in page.text

    def test_admin(self, server: Served, http: httpx.Client) -> None:
        assert http.get("/admin/status").json()["migrations_committed"] == 2
        assert http.get("/admin/instances").json()["data"][0]["instance_id"] == "instance-0"
        assert http.get("/admin/requests").json() == {"data": []}
        assert [one["sequence"] for one in http.get("/admin/events?after=1&limit=1").json()["data"]] == [2]
        assert http.get("/admin/events?after=-1").status_code == 400
        moved = http.post("/admin/migrate", json={"request_id": "r", "target_id": "instance-1"})
        assert moved.json()["outcome"] == "committed"
        refused = http.post("/admin/migrate", json={"request_id": "r", "target_id": "nowhere"})
        assert refused.status_code == 409 and "nowhere" in refused.json()["error"]["message"]
        assert http.post("/admin/drain", json={"instance_id": "instance-0"}).json()["state"] == "serving"
        assert http.post("/admin/resume", json={"instance_id": "x"}).status_code == 409
        roled = http.post("/admin/role", json={"instance_id": "instance-0", "role": "prefill"})
        assert roled.json()["role"] == "prefill"
        unknown = http.post("/admin/role", json={"instance_id": "instance-0", "role": "cook"})
        assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "role"
        assert http.post("/admin/scale", json={"instances": 2}).status_code == 200
        assert http.post("/admin/scale", json={"instances": "2"}).json()["error"]["param"] == "instances"
        assert http.post("/admin/scale", json={"instance": 2}).status_code == 400
        foreign = http.post(
            "/admin/scale", content=b'{"instances": 1}', headers={"content-type": "text/plain"}
        )
        assert foreign.status_code == 415 and ("scale", "1") not in server.backend.admin.orders
        server.backend.admin.away = True
        try:
            away = http.get("/admin/status")
            assert away.status_code == 503 and away.headers["retry-after"]
        finally:
            server.backend.admin.away = False


class TestAccess:
    def test_a_token_guards_admin_calls_and_nothing_else(self) -> None:
        with served(ENGINE, FrontendConfig(port=0, admin_token="sesame")) as running:
            url = f"{running.url}/admin/status"
            assert httpx.get(f"{running.url}/v1/models", trust_env=False).status_code == 200
            for header in (None, "Bearer wrong", "Basic sesame", "Bearer", "Bearer sésame"):
                headers = {"authorization": header.encode()} if header else {}
                response = httpx.get(url, headers=headers, trust_env=False)
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_admin_token"
            assert (
                httpx.get(url, headers={"authorization": "Bearer sesame"}, trust_env=False).status_code == 200
            )

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
    def test_listening_for_others_needs_a_token(self, host: str) -> None:
        with pytest.raises(ConfigurationError, match="admin_token"):
            open_socket(FrontendConfig(host=host, port=0))

    def test_a_taken_port_is_said_before_anything_starts(self, server: Served) -> None:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            ApiServer(FrontendConfig(port=port), server.backend.model)
