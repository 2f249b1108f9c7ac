"""Every shipped configuration serves: started as a process, asked, and stopped."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import trio
import trustme

from tests.fake_model import says, serve_fake_model
from tests.test_cli import ROOT, running, served

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("name", CONFIGS)
async def test_every_configuration_serves(name: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.default = says("fine")
        environ = {
            "OPENAI_API_KEY": "sk-not-a-real-key",
            "OPENAI_BASE_URL": fake.base_url,
            "OPENAI_MODEL": "any",
            "ALICE_TOKEN": TOKEN,
            "OPS_TOKEN": TOKEN[::-1],
            "TLS_CERT": str(tmp_path / "cert.pem"),
            "TLS_KEY": str(tmp_path / "key.pem"),
            "DATABASE_FILE": str(tmp_path / "hector.db"),
        }
        config = str(ROOT / "configs" / name)
        async with (
            served(tmp_path, "--config", config, "--host", "127.0.0.1", **environ) as (_, url),
            httpx2.AsyncClient(
                base_url=url, verify=trusted, timeout=20, headers={"Authorization": f"Bearer {TOKEN}"}
            ) as client,
        ):
            agents = (await client.get("/agents")).json()["agents"]
            assert agents
            for agent in agents:
                path = f"/agents/{agent['agentId']}/tasks"
                task = (await client.post(path, json={"input": {"content": "Count to 3"}})).json()
                assert task["status"] == "completed", task
        nursery.cancel_scope.cancel()


async def test_the_configuration_for_hypercorn_serves(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "hypercorn.toml").read_text()
    assert '"127.0.0.1:8080"' in text
    (tmp_path / "hypercorn.toml").write_text(text.replace('"127.0.0.1:8080"', f'"unix:{tmp_path}/socket"'))
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-c", "hypercorn.toml", "hector_trio.asgi:app"]
    async with running(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        await process.wait_said("Running on")
        transport = httpx2.AsyncHTTPTransport(uds=f"{tmp_path}/socket")
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
            task = (await client.post("/agents/assistant/tasks", json={"input": {"content": "Count to 3"}})).json()
            assert task["status"] == "completed"
