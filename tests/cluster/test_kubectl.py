"""The lines of docs/cluster.md for Kubernetes, given to the real `kubectl`.

The cluster is not real: a small server answers as an API server does to a client that creates, reads, follows and
deletes a RayJob. It takes what the schema of KubeRay takes (rayjob_schema.yaml), and finds the head's pod
by the labels that KubeRay gives it. So a misspelt option, a file that kubectl cannot send, a field that the
definition lacks and a name or label that does not fit the file are found. That pods start is not.
"""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import pytest
import yaml

from tests.pages import ROOT, shell_commands, text

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
SCHEMA = yaml.safe_load(Path(__file__).with_name("rayjob_schema.yaml").read_text())
JOBS, PODS = "/apis/ray.io/v1/namespaces/default/rayjobs", "/api/v1/namespaces/default/pods"
GROUP = {"groupVersion": "ray.io/v1", "version": "v1"}
VERBS = ["create", "delete", "get", "list"]
RAYJOBS = {"name": "rayjobs", "singularName": "rayjob", "namespaced": True, "kind": "RayJob", "verbs": VERBS}
POD = {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": VERBS}
TAKES_STRICT = {  # how a server says that it refuses unknown fields by itself
    "x-kubernetes-group-version-kind": {"group": "ray.io", "version": "v1", "kind": "RayJob"},
    "parameters": [{"name": "fieldValidation", "in": "query"}],
}
DISCOVERY: dict[str, dict[str, Any]] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList", "apiVersion": "v1",
        "groups": [{"name": "ray.io", "versions": [GROUP], "preferredVersion": GROUP}],
    },
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [POD]},
    "/apis/ray.io/v1": {"kind": "APIResourceList", "groupVersion": "ray.io/v1", "resources": [RAYJOBS]},
    "/openapi/v3": {"paths": {"apis/ray.io/v1": {"serverRelativeURL": "/openapi/v3/apis/ray.io/v1"}}},
    "/openapi/v3/apis/ray.io/v1": {
        "openapi": "3.0.0", "info": {"title": "RayJob", "version": "v1"},
        "paths": {f"{JOBS}/{{name}}": {"patch": TAKES_STRICT}},
    },
}  # fmt: skip


class Api(BaseHTTPRequestHandler):
    """Answers of an API server that knows RayJobs and their pods."""

    jobs: dict[str, dict[str, Any]]

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def answer(self, status: int, body: dict[str, Any] | str) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message,
                             "reason": "NotFound" if status == 404 else "Invalid", "code": status})  # fmt: skip

    def do_GET(self) -> None:
        """Discovery, a job, the pods of a selector, a pod's log."""
        at = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(at.query).items()}
        job, pod = at.path.removeprefix(f"{JOBS}/"), at.path.removeprefix(f"{PODS}/").removesuffix("/log")
        if at.path in DISCOVERY:
            self.answer(200, DISCOVERY[at.path])
        elif job in self.jobs:
            self.answer(200, self.jobs[job])
        elif at.path == PODS:
            wanted = dict(pair.split("=") for pair in asked["labelSelector"].split(","))
            found = [p for p in map(head_pod, self.jobs) if wanted.items() <= p["metadata"]["labels"].items()]
            self.answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found})
        elif at.path.endswith("/log") and pod.removesuffix("-head") in self.jobs:
            containers = [c["name"] for c in head_pod(pod.removesuffix("-head"))["spec"]["containers"]]
            known = asked.get("container") in containers
            self.answer(200 if known else 400, f"followed: {asked.get('follow')}\n" if known else "no such container\n")
        elif pod.removesuffix("-head") in self.jobs:
            self.answer(200, head_pod(pod.removesuffix("-head")))
        else:
            self.refuse(404, f"{at.path} not found")

    def do_POST(self) -> None:
        """A job that fits the schema is kept."""
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            metadata = {k: v for k, v in sent["metadata"].items() if k != "namespace"}  # kubectl adds it
            jsonschema.validate(sent | {"metadata": metadata}, SCHEMA)
        except jsonschema.ValidationError as error:
            self.refuse(422, error.message)
            return
        sent["metadata"] |= {"uid": "1", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.jobs[sent["metadata"]["name"]] = sent
        self.answer(201, sent)

    def do_DELETE(self) -> None:
        """The job is gone."""
        gone = self.jobs.pop(self.path.removeprefix(f"{JOBS}/").split("?")[0], None)
        if gone is None:
            self.refuse(404, "not found")
        else:
            self.answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": {"uid": "1"}})


def head_pod(job: str) -> dict[str, Any]:
    """The pod of a job's head as KubeRay names and labels it, with the submitter beside it (SidecarMode)."""
    labels = {"ray.io/node-type": "head", "ray.io/originated-from-cr-name": job}
    containers = [{"name": "ray-head"}, {"name": "ray-job-submitter"}]
    return {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": f"{job}-head", "namespace": "default",
            "labels": labels}, "spec": {"containers": containers}, "status": {"phase": "Running"}}  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """The jobs of a server to which kubectl talks."""
    jobs: dict[str, dict[str, Any]] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Api,), {"jobs": jobs}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "kind": "Config",
        "apiVersion": "v1",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "", "namespace": "default"}}],
        "current-context": "here",
    }
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.setenv("HOME", str(tmp_path))  # kubectl's cache of what servers can
    yield jobs
    server.shutdown()
    server.server_close()


def kubectl(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_documented_lines_are_taken(cluster: dict[str, dict[str, Any]]) -> None:
    """Catches an option that kubectl lacks, and names and labels of the page that are not those of the file."""
    lines = [words for words in shell_commands(text("docs/cluster.md")) if words[0] == "kubectl"]
    assert [words[1] for words in lines] == ["create", "logs", "get", "delete"]
    done = [kubectl(words) for words in lines]
    assert [run.returncode for run in done] == [0] * 4, [run.stderr for run in done]
    assert [run.stdout.splitlines()[-1].split()[0] for run in done] == [
        "rayjob.ray.io/mmkt", "followed:", "mmkt", "rayjob.ray.io",
    ]  # fmt: skip
    assert "followed: true" in done[1].stdout
    assert not cluster


def test_a_file_that_the_definition_does_not_fit_is_refused(
    cluster: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Catches a server of the test that takes anything."""
    job = yaml.safe_load((ROOT / "jobs" / "cluster" / "rayjob.yaml").read_text())
    job["spec"]["entrypont"] = job["spec"].pop("entrypoint")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run = kubectl(["kubectl", "create", "-f", str(tmp_path / "job.yaml")])
    assert run.returncode != 0
    assert "entrypont" in run.stderr
    assert not cluster
