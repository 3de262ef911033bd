"""What the overlays of deploy/kubernetes send to a cluster. A helper of the tests, not a test."""

import functools
from collections.abc import Mapping
from typing import Any

import yaml
from deploy_files import DEPLOY, ROOT, kustomize

# Of LeaderWorkerSet and the Prometheus operator, from their releases; not in this repository.
CRDS = ROOT / "build" / "tools" / "crds"
_BYTES = {"Mi": 2**20, "Gi": 2**30}


@functools.cache
def built(name: str) -> str:
    return kustomize(DEPLOY / "kubernetes" / "overlays" / name)


@functools.cache
def definitions() -> dict[str, Any]:
    """The definitions that are here, by kind, each version's schema closed."""
    return {
        found["spec"]["names"]["kind"]: {
            one["name"]: closed(one["schema"]["openAPIV3Schema"])
            for one in found["spec"]["versions"]
        }
        for path in sorted(CRDS.glob("*.yaml"))
        for found in yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    }


class Overlay:
    """What is sent to the cluster, by kind."""

    def __init__(self, name: str) -> None:
        self.documents = list(yaml.safe_load_all(built(name)))
        self.by_kind = {document["kind"]: document for document in self.documents}
        assert len(self.by_kind) == len(self.documents)

    @property
    def templates(self) -> dict[str, Any]:
        """Pod templates by component: leader, and worker where there are several nodes."""
        if "Deployment" in self.by_kind:
            return {"leader": self.by_kind["Deployment"]["spec"]["template"]}
        group = self.by_kind["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        return {"leader": group["leaderTemplate"], "worker": group["workerTemplate"]}

    @property
    def nodes(self) -> int:
        group = self.by_kind.get("LeaderWorkerSet")
        return group["spec"]["leaderWorkerTemplate"]["size"] if group else 1

    def variables(self, component: str) -> dict[str, str]:
        """Of a container: its own, those of the ConfigMap, and of the LeaderWorkerSet's webhook."""
        container = one_container(self.templates[component])
        (source,) = container["envFrom"]
        settings = self.by_kind["ConfigMap"]
        assert source["configMapRef"]["name"] == settings["metadata"]["name"]
        found = dict(settings["data"])
        found |= {variable["name"]: "10.0.0.7" for variable in container.get("env", ())}
        if "LeaderWorkerSet" in self.by_kind:
            found["LWS_LEADER_ADDRESS"] = "onecast-0.onecast.default"
            found["LWS_GROUP_SIZE"] = str(self.nodes)
            found["LWS_WORKER_INDEX"] = "0" if component == "leader" else "1"
        return found


def one_container(template: Mapping[str, Any]) -> dict[str, Any]:
    container: dict[str, Any]
    (container,) = template["spec"]["containers"]
    return container


def nbytes(quantity: str) -> int:
    return int(quantity[:-2]) * _BYTES[quantity[-2:]]


def closed(schema: Any) -> Any:
    """The schema, with every object limited to the properties that it names."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    if isinstance(schema.get("pattern"), str):
        del found["pattern"]  # of Go's syntax
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found
