"""Every overlay is valid Kubernetes, starts onecast by a command it takes, and fits itself."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from cli_runs import ONECAST
from deploy_files import DEPLOY, ROOT, dockerfile, expanded, understood
from hosts import NoHosts, TwoHosts, two_hosts
from kubernetes_overlays import CRDS, Overlay, definitions, nbytes, one_container
from prometheus_server import free_port, wait_for

from onecast.telemetry import TelemetrySettings
from onecast.telemetry.ring import RECORD_BYTES, RECORDS_OFFSET

OVERLAYS = ("single-node", "single-node-gpu", "multi-node", "multi-node-gpu")
EPHEMERAL = (32768, 60999)  # Linux: net.ipv4.ip_local_port_range
VERSION = "1.33"
# Their definitions come with LeaderWorkerSet's and the Prometheus operator's releases.
CUSTOM = ("LeaderWorkerSet", "PodMonitor")


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Iterator[Overlay]:
    yield Overlay(request.param)


def test_kubernetes_own_schemas_take_every_document(overlay: Overlay) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    own = [document for document in overlay.documents if document["kind"] not in CUSTOM]
    assert len(own) >= 4
    for document in own:
        validate(document, VERSION, strict=True)


def test_pod_templates_are_valid_in_a_group_too(overlay: Overlay) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for template in overlay.templates.values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        validate(pod | {"metadata": {"name": "pod"}}, VERSION, strict=True)


def test_custom_resources_fit_their_definitions(overlay: Overlay) -> None:
    """Fields that a definition does not have are dropped by the cluster, silently: here not."""
    jsonschema = pytest.importorskip("jsonschema")
    for kind in sorted({*CUSTOM} & set(overlay.by_kind)):
        if kind not in definitions():
            pytest.skip(f"the definition of {kind} is not in {CRDS}")
        version = overlay.by_kind[kind]["apiVersion"].partition("/")[2]
        jsonschema.validate(overlay.by_kind[kind], definitions()[kind][version])


def test_every_pod_starts_onecast_by_a_command_it_takes(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    for component, template in overlay.templates.items():
        container = one_container(template)
        variables = overlay.variables(component)
        config, nodes = understood(expanded(container["args"], variables), monkeypatch)
        assert nodes.nnodes == overlay.nodes
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == config.metrics_port
        if component == "leader":
            assert ports["http"] == config.port
        if nodes.nnodes > 1:
            assert nodes.node_rank == ("leader", "worker").index(component)
            rendezvous = f"{variables['LWS_LEADER_ADDRESS']}:29500"
            assert nodes.rdzv_endpoint == rendezvous and nodes.local_addr == "10.0.0.7"
            leader = one_container(overlay.templates["leader"])
            assert {"name": "rendezvous", "containerPort": 29500} in leader["ports"]
        local_ranks = nodes.ranks_per_node(config.tp)
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert (config.device == "cuda") == (gpus is not None)
        if gpus is not None:
            assert int(gpus) == local_ranks and container["image"].endswith(":cu130")


def test_what_is_named_is_there(overlay: Overlay) -> None:
    for template in overlay.templates.values():
        container = one_container(template)
        names = {port["name"] for port in container["ports"]}
        probes = [container[key] for key in container if key.endswith("Probe")]
        assert probes and {probe["httpGet"]["port"] for probe in probes} <= names
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        monitor = overlay.by_kind["PodMonitor"]["spec"]
        assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= names
        for selector in (
            monitor["selector"]["matchLabels"],
            overlay.by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        ):
            assert selector.items() <= template["metadata"]["labels"].items()
        assert monitor["jobLabel"] in template["metadata"]["labels"]
    service = overlay.by_kind["Service"]["spec"]
    chosen = [
        component
        for component, template in overlay.templates.items()
        if service["selector"].items() <= template["metadata"]["labels"].items()
    ]
    assert chosen == ["leader"], "only rank 0 answers requests"


def test_the_policy_lets_in_clients_prometheus_and_ranks_and_nobody_else(overlay: Overlay) -> None:
    rules = overlay.by_kind["NetworkPolicy"]["spec"]["ingress"]
    allowed = [
        {(port["port"], port.get("endPort", port["port"])) for port in rule["ports"]}
        for rule in rules
    ]
    ranks = {(29500, 29500), EPHEMERAL}
    assert allowed == [{("http", "http")}, {("metrics", "metrics")}, ranks]
    assert all(rule["from"] for rule in rules), "an empty `from` is everybody"
    (prometheus,) = rules[1]["from"]
    assert prometheus["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    (peers,) = rules[2]["from"]
    assert peers == {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "onecast"}}}
    outward = overlay.by_kind["NetworkPolicy"]["spec"]["egress"]
    assert outward[0] == {"to": rules[2]["from"], "ports": rules[2]["ports"]}


def test_shared_memory_and_memory_hold_what_ranks_put_there(overlay: Overlay) -> None:
    tp = int(overlay.variables("leader")["TP"])
    ring = RECORDS_OFFSET + TelemetrySettings().ring_records * RECORD_BYTES
    for template in overlay.templates.values():
        (shm,) = (v["emptyDir"] for v in template["spec"]["volumes"] if v["name"] == "shm")
        size = nbytes(shm["sizeLimit"])
        assert shm["medium"] == "Memory" and size >= 4 * ring * tp // overlay.nodes
        resources = one_container(template)["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        assert nbytes(resources["limits"]["memory"]) >= 4 * size, "the volume counts as memory"
        assert "cpu" not in resources["limits"], "a throttled rank holds up all others"


def test_there_is_time_to_drain_and_workers_outlast_the_leader(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = {}
    for component, template in overlay.templates.items():
        container = one_container(template)
        (program, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        pauses[component] = float(seconds)
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        arguments = expanded(container["args"], overlay.variables(component))
        config, _ = understood(arguments, monkeypatch)
        if component == "leader":
            # 15 s: what the sidecar may take to write and send its last spans
            assert grace_s >= pauses["leader"] + config.drain_timeout_s + 15
        else:
            assert pauses["leader"] + config.drain_timeout_s <= pauses["worker"] <= grace_s - 15


def test_pods_are_restricted_and_can_write_where_the_image_does(overlay: Overlay) -> None:
    (user,) = dockerfile("USER")
    for template in overlay.templates.values():
        pod, container = template["spec"], one_container(template)
        security = pod["securityContext"]
        assert f"{security['runAsUser']}:{security['runAsGroup']}" == user
        assert security["runAsNonRoot"] and security["seccompProfile"]["type"] == "RuntimeDefault"
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert writable == {"/dev/shm", "/tmp", "/flight"}
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False


def ask(url: str) -> int | None:
    """The status; None where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_behind")
def test_the_probes_are_answered_by_the_pods_own_command(tmp_path: Path) -> None:
    overlays = {name: Overlay(name) for name in ("single-node", "multi-node")}
    pod = one_container(overlays["single-node"].templates["leader"])
    worker = one_container(overlays["multi-node"].templates["worker"])
    ports = {"http": free_port(), "metrics": free_port()}
    changes = {
        "--host": "127.0.0.1",
        "--metrics-host": "127.0.0.1",
        "--port": str(ports["http"]),
        "--metrics-port": str(ports["metrics"]),
        "--model": str(ROOT / "runtime" / "demo" / "checkpoint"),
    }
    variables = overlays["single-node"].variables("leader")
    arguments = [
        f"{option}={changes[option]}"
        if (option := argument.partition("=")[0]) in changes
        else argument
        for argument in expanded(pod["args"], variables)
    ]
    log = tmp_path / "log"
    environment = os.environ | {"ONECAST_FLIGHT_DIR": str(tmp_path / "flight")}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [Path(sys.executable).parent / "onecast", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        probes = [one[key] for one in (pod, worker) for key in one if key.endswith("Probe")]
        assert {probe["httpGet"]["path"] for probe in probes} == {"/health", "/ready", "/-/ready"}
        for probe in probes:
            get = probe["httpGet"]
            url = f"http://127.0.0.1:{ports[get['port']]}{get['path']}"
            wait_for(
                lambda url=url: ask(url) == 200 or server.poll() is not None, f"{url} to be well"
            )
            assert server.poll() is None, log.read_text()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()


def started(
    hosts: TwoHosts, node: int, command: Sequence[str | Path], log: Path
) -> subprocess.Popen[bytes]:
    made: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, **hosts.environment(2 * node)}
    with log.open("wb") as output:
        hosts.start(
            2 * node,
            lambda: made.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            ),
        )
    return made[0]


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_behind")
def test_a_group_serves_by_its_pods_own_commands_and_workers_end_with_the_leader(
    tmp_path: Path,
) -> None:
    """Two hosts for two pods: all ranks come, and only the leader is told to stop."""
    overlay = Overlay("multi-node")
    try:
        with two_hosts() as hosts:
            logs = [tmp_path / f"{component}.log" for component in overlay.templates]
            processes: dict[int, subprocess.Popen[bytes]] = {}
            try:
                for node, (component, template) in enumerate(overlay.templates.items()):
                    address = list(hosts.addresses())[node]
                    variables = overlay.variables(component) | {
                        "LWS_LEADER_ADDRESS": hosts.address,
                        "POD_IP": address,
                        "MODEL": str(ROOT / "runtime" / "demo" / "checkpoint"),
                    }
                    command = [ONECAST, *expanded(one_container(template)["args"], variables)]
                    processes[node] = started(hosts, node, command, logs[node])

                def told() -> str:
                    return "\n".join(log.read_text(errors="replace") for log in logs)

                def ready(node: int, url: str) -> bool:
                    assert all(process.poll() is None for process in processes.values()), told()
                    return bool(hosts.on_network(node, lambda: ask(url)) == 200)

                wait_for(lambda: ready(0, "http://127.0.0.1:8000/ready"), "the leader")
                wait_for(lambda: ready(1, "http://127.0.0.1:9464/-/ready"), "the worker")
                processes[0].terminate()
                assert [processes[node].wait(60) for node in (0, 1)] == [0, 0], told()
            finally:
                for process in processes.values():
                    process.kill()
                    process.wait()
    except NoHosts as error:
        pytest.skip(f"two hosts cannot be made: {error}")


def test_the_readme_makes_a_rule_that_the_operator_takes() -> None:
    """The command of deploy/kubernetes/README.md that puts our rules into a PrometheusRule."""
    jsonschema = pytest.importorskip("jsonschema")
    text = (DEPLOY / "kubernetes" / "README.md").read_text()
    found = re.search(r"^(\(printf .*PrometheusRule.*\)) \|", text, re.MULTILINE)
    assert found is not None
    made = subprocess.run(
        ["sh", "-c", found[1]], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    rule = yaml.safe_load(made.stdout)
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    if "PrometheusRule" in definitions():
        jsonschema.validate(rule, definitions()["PrometheusRule"]["v1"])
