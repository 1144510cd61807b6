"""As much of a Kubernetes API as kubectl asks for: it keeps what it is given, and says that all of it went well.

Nothing is scheduled and nothing runs. It shows that kubectl understands a command, and what it sends.
"""

import json
import re
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.http_server import HTTPServer

Manifest = dict[str, Any]
GROUPS = {
    "v1": (
        "Namespace",
        "Node",
        "Pod",
        "Service",
        "Secret",
        "ConfigMap",
        "ServiceAccount",
        "PersistentVolumeClaim",
        "Event",
    ),
    "apps/v1": ("Deployment", "ReplicaSet"),
    "batch/v1": ("Job",),
    "policy/v1": ("PodDisruptionBudget",),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "monitoring.coreos.com/v1": ("ServiceMonitor", "PrometheusRule"),
}
OF_THE_CLUSTER = ("Namespace", "Node")
SHORT_NAMES = {"Deployment": ["deploy"], "HorizontalPodAutoscaler": ["hpa"], "Namespace": ["ns"], "Pod": ["po"]}
STATUSES: dict[str, Manifest] = {
    "Job": {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1},
    "Deployment": {
        "observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1,
    },
    "HorizontalPodAutoscaler": {"currentReplicas": 2, "desiredReplicas": 2},
    "Pod": {"phase": "Succeeded"},
}  # fmt: skip
NODE = "worker-1"  # where all pods begin
PATH = re.compile(r"/(?:api|apis)/((?:[^/]+/)?v\d)(?:/namespaces/[^/]+(?=/))?/([a-z]+)(?:/([^/]+))?(?:/([a-z]+))?")
LOG = "what a container wrote\n"


def _plural(kind: str) -> str:
    lower = kind.lower()
    return f"{lower[:-1]}ies" if lower.endswith("y") else f"{lower}s"


KINDS = {(version, _plural(kind)): kind for version, kinds in GROUPS.items() for kind in kinds}


class KubernetesAPI(HTTPServer):
    """`with KubernetesAPI(folder) as api:` answers where `api.kubeconfig` says; `api.objects` is what it was given."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.objects: dict[tuple[str, str], Manifest] = {}  # by kind and name

        class Handler(_Handler):
            objects = self.objects

        super().__init__(Handler)
        cluster = {"name": "test", "cluster": {"server": self.url}}
        context = {"name": "test", "context": {"cluster": "test", "user": "test"}}
        config = {"clusters": [cluster], "contexts": [context], "users": [{"name": "test", "user": {}}]}
        self.kubeconfig.write_text(yaml.safe_dump({"kind": "Config", "current-context": "test", **config}))

    def put(self, version: str, kind: str, name: str, **fields: Any) -> None:
        """Have an object that nobody has sent."""
        metadata = {"name": name, **fields.pop("metadata", {})}
        self.objects[kind, name] = _created({"apiVersion": version, "kind": kind, "metadata": metadata, **fields})


def _created(manifest: Manifest) -> Manifest:
    metadata = {
        "uid": "1", "resourceVersion": "1", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
        **manifest["metadata"],
    }  # fmt: skip
    return {**manifest, "metadata": metadata, "status": STATUSES.get(manifest["kind"], {})}


def _made_by_controllers(manifest: Manifest) -> Iterator[Manifest]:
    """Yield a pod of a workload, and what remembers a Deployment's revisions."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    if kind not in ("Deployment", "Job"):
        return
    owner = {"apiVersion": manifest["apiVersion"], "kind": kind, "name": name, "uid": "1", "controller": True}
    template = manifest["spec"]["template"]
    metadata = {**template["metadata"], "namespace": "ryzanstein", "ownerReferences": [owner]}
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {**template["spec"], "nodeName": NODE}}
    yield {**pod, "metadata": {**metadata, "name": f"{name}-1"}}
    for revision in ("1", "2") if kind == "Deployment" else ():
        annotations = {"deployment.kubernetes.io/revision": revision}
        changed = _merge(template, {"metadata": {"annotations": {"revision": revision}}})
        spec = {**manifest["spec"], "replicas": 0, "template": changed}
        yield {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {**metadata, "name": f"{name}-{revision}", "annotations": annotations},
            "spec": spec,
        }


def _is_asked(manifest: Manifest, query: Mapping[str, str]) -> bool:
    """Return whether a list's field selector takes an object."""
    selector = query.get("fieldSelector", "")
    wanted = [item.split("=", 1) for item in selector.split(",") if "=" in item and "!" not in item]
    for path, value in wanted:
        section, _, name = path.partition(".")
        if section in ("metadata", "spec") and manifest.get(section, {}).get(name) != value:
            return False
    return True


def _scale(manifest: Manifest) -> Manifest:
    metadata = {"name": manifest["metadata"]["name"], "namespace": "ryzanstein", "resourceVersion": "1"}
    spec = {"replicas": manifest["spec"].get("replicas", 1)}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec}


def _merge(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
    return new


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[tuple[str, str], Manifest]

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if (known := _discovery(url.path)) is not None:
            self._answer(known)
        elif url.path.startswith("/apis/custom.metrics.k8s.io/"):
            self._answer({"kind": "MetricValueList", "items": []})
        elif url.path.startswith("/openapi/"):  # of another version
            self._not_found()
        elif "watch" in query:
            self._watch()
        else:
            self._read(url.path, query)

    def do_POST(self) -> None:
        _, kind, name, part = _resource(self.path)
        manifest = self._body()  # of an eviction, too: what is left of a request is taken for the next one
        if part == "eviction":  # there comes another, on another node
            pod = self.objects.pop((kind, name))
            spec = {key: value for key, value in pod["spec"].items() if key != "nodeName"}
            self.objects[kind, f"{name}-again"] = _merge(pod, {"metadata": {"name": f"{name}-again"}}) | {"spec": spec}
            self._answer({"kind": "Status", "apiVersion": "v1", "status": "Success"}, 201)
            return
        for item in (manifest, *_made_by_controllers(manifest)):
            self.objects[item["kind"], item["metadata"]["name"]] = _created(item)
        self._answer(self.objects[manifest["kind"], manifest["metadata"]["name"]], 201)

    def do_PATCH(self) -> None:
        _, kind, name, part = _resource(self.path)
        change = self._body()
        old = self.objects[kind, name]
        # Patches by JSON Patch are lists of changes, which are only taken note of.
        self.objects[kind, name] = new = _merge(old, change if isinstance(change, dict) else {"patched": change})
        self._answer(_scale(new) if part == "scale" else new)

    def do_DELETE(self) -> None:
        _, kind, name, _ = _resource(self.path)
        self._body()
        del self.objects[kind, name]
        self._answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _read(self, path: str, query: Mapping[str, str]) -> None:
        version, kind, name, part = _resource(path)
        if part == "log":
            self._answer(LOG)
        elif part == "scale":
            self._answer(_scale(self.objects[kind, name]))
        elif not name:
            items = [
                item for (its_kind, _), item in self.objects.items() if its_kind == kind and _is_asked(item, query)
            ]
            self._answer({"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items})
        elif (kind, name) in self.objects:
            self._answer(self.objects[kind, name])
        else:
            self._not_found()

    def _not_found(self) -> None:
        self._answer(
            {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}, 404
        )

    def _watch(self) -> None:
        """Tell of nothing, until the client has heard enough."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.flush()
        self.rfile.read(1)
        self.close_connection = True

    def _body(self) -> Any:
        return yaml.safe_load(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: Manifest | str, status: int = 200) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _resource(path: str) -> tuple[str, str, str, str]:
    """Return version, kind, name and part that a path leads to; the name of a list is empty."""
    match = PATH.fullmatch(urlsplit(path).path)
    assert match is not None, path
    return match[1], KINDS[match[1], match[2]], match[3] or "", match[4] or ""


def _discovery(path: str) -> Manifest | None:
    """Return what says which kinds there are, if that is asked."""
    if path == "/version":
        return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [_group(version) for version in GROUPS if "/" in version],
        }
    if path == "/openapi/v3":
        places = {_folder(version): {"serverRelativeURL": f"/openapi/v3/{_folder(version)}"} for version in GROUPS}
        return {"paths": places}
    for version, kinds in GROUPS.items():
        if path == f"/{_folder(version)}":
            resources = [item for kind in kinds for item in _resources(kind)]
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
        if path == f"/openapi/v3/{_folder(version)}":
            return _openapi(version, kinds)
    return None


def _folder(version: str) -> str:
    return f"apis/{version}" if "/" in version else f"api/{version}"


def _group(version: str) -> Manifest:
    entry = {"groupVersion": version, "version": version.split("/")[1]}
    return {"name": version.split("/")[0], "versions": [entry], "preferredVersion": entry}


def _resources(kind: str) -> Iterator[Manifest]:
    is_namespaced = kind not in OF_THE_CLUSTER
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    names = {"singularName": kind.lower(), "shortNames": SHORT_NAMES.get(kind, [])}
    yield {"name": _plural(kind), "namespaced": is_namespaced, "kind": kind, "verbs": verbs, **names}
    if kind == "Pod":
        eviction = {"name": "pods/eviction", "namespaced": True, "kind": "Eviction", "verbs": verbs}
        yield {**eviction, "group": "policy", "version": "v1", "singularName": ""}
    if kind == "Deployment":
        scale = {"name": "deployments/scale", "namespaced": True, "kind": "Scale", "verbs": verbs}
        yield {**scale, "group": "autoscaling", "version": "v1", "singularName": ""}


def _openapi(version: str, kinds: tuple[str, ...]) -> Manifest:
    """Return a description by which kubectl leaves the check of fields to the server."""
    group, _, number = version.rpartition("/")
    parameters = [{"name": "fieldValidation", "in": "query"}]
    paths = {
        f"/{_folder(version)}/{_plural(kind)}/{{name}}": {
            "patch": {
                "parameters": parameters,
                "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
            }
        }
        for kind in kinds
    }
    return {"openapi": "3.0.0", "info": {"title": "test", "version": "1"}, "paths": paths}
