"""A hub on loopback that the real huggingface_hub client can talk to, with faults that can be switched on.

It speaks what the client needs to make a repository, push to it (LFS, not xet), open a pull request and download:
its answers are modelled on those of huggingface.co. Everything is in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

WRITE, READ = "hf_writeSecretSecretSecretSecretSecret", "hf_readSecretSecretSecretSecretSecret"
# What the real hub keeps out of git's own storage.
LARGE = (".safetensors", ".png")


class CutError(Exception):
    """The connection ends here, without an answer."""


@dataclass
class Answer:
    status: int
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """For the next `times` requests of this method whose path matches.

    how: a status to answer with; "cut" for no answer; "lost" for the work done but no answer; "corrupt" for one bit of
    what was sent stored wrongly; or a function to call before the work.
    """

    method: str
    path: str
    how: int | str | Callable[[], None]
    times: int = 1
    answer: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "main", "refs/pr/1" → commit
    pulls: list[str] = field(default_factory=list)  # titles

    def add(self, ref: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def head(self, ref: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[ref]]


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes sent
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, method: str, path: str, how: Any, **options: Any) -> None:
        self.faults.append(Fault(method, path, how, **options))

    def make(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repository

    def sent(self, method: str, path: str) -> list[int]:
        """Bytes of each such request so far."""
        return [size for each, where, size in self.requests if each == method and re.search(path, where)]


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process ask the hub at `url`."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for its headers to be acknowledged

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path, len(body)))
            try:
                self._send(self._faulty(path, query, body))
            except CutError:
                self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _faulty(self, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                break
        else:
            return self._route(path, query, body)
        if isinstance(fault.how, int):
            return Answer(fault.how, fault.answer, fault.headers)
        if callable(fault.how):
            fault.how()
        elif fault.how == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault.how == "lost":
            self._route(path, query, body)
        if fault.how in ("cut", "lost"):
            raise CutError
        return self._route(path, query, body)

    def _send(self, answer: Answer) -> None:
        raw = isinstance(answer.body, bytes)
        content = answer.body if raw else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {"Content-Type": "application/octet-stream" if raw else "application/json", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return handle(self, query=query, body=body, **match.groupdict())
        return Answer(404, {"error": f"this test hub does not know {self.command} {path}"})

    # ------------------------------------------------------------------------------------------------- who may do what

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _refusal(self, name: str, *, write: bool = False) -> Answer | None:
        token, repository = self._token(), self.hub.repositories.get(name)
        if token not in (None, WRITE, READ):
            message = "Invalid credentials in Authorization header"
            return Answer(401, {"error": message}, {"X-Error-Message": message})
        if repository is None or (repository.private and token is None):
            return Answer(404 if token else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if write and token != WRITE:
            return Answer(403, {"error": "you have no write access"}, {"X-Error-Message": "you have no write access"})
        return None

    def _commit_of(self, name: str, revision: str) -> str | None:
        repository = self.hub.repositories[name]
        return revision if revision in repository.commits else repository.refs.get(revision)

    # ------------------------------------------------------------------------------------------------------ the routes

    def create(self, query: Any, body: bytes) -> Answer:
        values = json.loads(body)
        name = f"{values['organization']}/{values['name']}"
        if self._token() not in (WRITE, READ):
            return self._refusal(name) or Answer(401)
        if self._token() == READ:
            return Answer(403, {"error": "you may not create a repository here"})
        if name in self.hub.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.make(name, values.get("visibility") == "private" or values.get("private", False))
        return Answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, query: Any, body: bytes) -> Answer:
        errors = [{"message": error} for error in card_errors(json.loads(body)["content"])]
        return Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, query: dict[str, list[str]], body: bytes, name: str, revision: str | None = None) -> Answer:
        if refusal := self._refusal(name):
            return refusal
        commit = self._commit_of(name, revision or "main")
        if commit is None:
            return Answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        repository = self.hub.repositories[name]
        siblings = [_sibling(file, data) for file, data in repository.commits[commit].items()]
        return Answer(200, {"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, query: Any, body: bytes, name: str, revision: str) -> Answer:
        commit = None if self._refusal(name) else self._commit_of(name, revision)
        if commit is None:
            return self._refusal(name) or Answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repositories[name].commits[commit]
        entries = [{"type": "file", "path": n, "size": len(d), "oid": git_hash(d)} for n, d in files.items()]
        return Answer(200, entries)

    def preupload(self, query: dict[str, list[str]], body: bytes, name: str, revision: str) -> Answer:
        if refusal := self._refusal(name, write=not ("create_pr" in query or revision.startswith("refs/pr/"))):
            return refusal
        head = self.hub.repositories[name].head(revision)
        files = []
        for file in json.loads(body)["files"]:
            large, data = file["path"].endswith(LARGE), head.get(file["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_hash(data)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(200, {"files": files})

    def lfs(self, query: Any, body: bytes, name: str) -> Answer:
        if refusal := self._refusal(name):
            return refusal
        objects = []
        for each in json.loads(body)["objects"]:
            stored = self.hub.objects.get(each["oid"])
            whole = stored is not None and hashlib.sha256(stored).hexdigest() == each["oid"]
            upload = {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}}
            objects.append({**each, **({} if whole else {"actions": upload})})
        return Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, query: Any, body: bytes, oid: str) -> Answer:
        self.hub.objects[oid] = body
        return Answer(200)

    def commit(self, query: dict[str, list[str]], body: bytes, name: str, revision: str) -> Answer:
        opens = "create_pr" in query
        if refusal := self._refusal(name, write=not (opens or revision.startswith("refs/pr/"))):
            return refusal
        repository = self.hub.repositories[name]
        header, *operations = (json.loads(line) for line in body.splitlines())
        if not opens and header["value"].get("parentCommit", repository.refs[revision]) != repository.refs[revision]:
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.head(revision))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                return Answer(400, {"error": f"LFS pointer to {value['oid']}, which was not uploaded"})
        answer = {}
        if opens:
            repository.pulls.append(header["value"]["summary"])
            revision = f"refs/pr/{len(repository.pulls)}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{len(repository.pulls)}"
        sha = repository.add(revision, files)
        return Answer(200, {**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def branch(self, query: Any, body: bytes, name: str, revision: str) -> Answer:
        if refusal := self._refusal(name, write=True):
            return refusal
        refs = self.hub.repositories[name].refs
        refs[revision] = refs["main"]
        return Answer(200)

    def discussions(self, query: Any, body: bytes, name: str) -> Answer:
        if refusal := self._refusal(name):
            return refusal
        about = {"author": {"name": "somebody"}, "createdAt": "2026-01-01T00:00:00.000Z", "status": "open"}
        about |= {"repo": {"name": name, "type": "model"}, "isPullRequest": True}
        pulls = [{**about, "title": t, "num": n} for n, t in enumerate(self.hub.repositories[name].pulls, 1)]
        return Answer(200, {"discussions": pulls, "count": len(pulls), "start": 0})

    def resolve(self, query: Any, body: bytes, name: str, revision: str, file: str) -> Answer:
        if refusal := self._refusal(name):
            return refusal
        commit = self._commit_of(name, revision)
        if commit is None:
            return Answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        data = self.hub.repositories[name].commits[commit].get(file)
        if data is None:
            return Answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        tag = hashlib.sha256(data).hexdigest() if file.endswith(LARGE) else git_hash(data)
        return Answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'})


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("GET", f"/api/models/{_NAME}/discussions", _Handler.discussions),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"/api/models/{_NAME}/branch/{_REVISION}", _Handler.branch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", _Handler.put),
    ("GET HEAD", f"/{_NAME}/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sibling(file: str, data: bytes) -> dict[str, Any]:
    if not file.endswith(LARGE):
        return {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
    lfs = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return {"rfilename": file, "size": len(data), "blobId": git_hash(b"pointer"), "lfs": lfs}


_ID = r"[\w.-]+(/[\w.-]+)?"


def card_errors(card: str) -> list[str]:
    """What the real hub's validation of metadata finds, as far as our cards use it."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    values = yaml.safe_load(match.group(1)) if match else {}
    errors = []
    if "base_model" in values and not re.fullmatch(_ID, str(values["base_model"])):
        errors.append(f'"base_model" is no model id: {values["base_model"]}')
    if values.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of [adapter, finetune, merge, quantized]')
    for name in ("tags", "datasets", "metrics"):
        listed = values.get(name, [])
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            errors.append(f'"{name}" must be an array of strings')
    errors += [
        f'"datasets" is no id: {each}' for each in values.get("datasets", []) if not re.fullmatch(_ID, str(each))
    ]
    for model in values.get("model-index", []):
        for result in model["results"]:
            if not result["task"].get("type") or not {"type", "name"} <= result["dataset"].keys():
                errors.append('"model-index" lacks a task or data set')
            errors += ['"model-index" lacks a value' for metric in result["metrics"] if "value" not in metric]
    return errors
