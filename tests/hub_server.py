"""A Hub on this machine: the part of its HTTP protocol that pushing and loading a model uses, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from card_schema import problems

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("0" * 40, "initial commit", {})])
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def files(self):
        return self.commits[-1].files

    @property
    def messages(self):
        return [commit.message for commit in self.commits[1:]]

    def at(self, revision):
        """The commit of a branch (`main`), a tag or a hash; `None` if there is none."""
        if revision == "main":
            return self.commits[-1]
        oid = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def commit(self, message, changes):
        """Add a commit; a path whose content is `None` is deleted."""
        files = {path: content for path, content in {**self.files, **changes}.items() if content is not None}
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return oid


def is_lfs(path):
    return path.endswith(LFS_SUFFIXES)


def etag(path, content):
    """As git names a file, or its sha256 where it lies in the large-file store."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class RefusedError(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.code, self.message = status, code, message


class Hub:
    """The state that all requests share."""

    def __init__(self, user, token):
        self.user, self.token, self.url = user, token, ""
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def repo(self, name, authorised):
        repo = self.repos.get(name)
        if repo is None or (repo.private and not authorised):
            raise RefusedError(401 if not authorised else 404, "RepoNotFound", "Repository not found")
        return repo

    def commit_of(self, name, revision, authorised):
        commit = self.repo(name, authorised).at(unquote(revision))
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", "Invalid rev id")
        return commit


ROUTES = []


def route(method, pattern, write=False):
    """Register a handler for a path; one that writes needs the token."""

    def register(handler):
        ROUTES.append((method, re.compile(pattern), write, handler))
        return handler

    return register


@route("GET", r"/api/whoami-v2", write=True)
def whoami(hub, request):
    return {"type": "user", "name": hub.user, "orgs": []}


@route("POST", r"/api/repos/create", write=True)
def create(hub, request):
    asked = request.json()
    name = f"{asked.get('organization') or hub.user}/{asked['name']}"
    if name in hub.repos:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}", "id": name}
    hub.repos[name] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
    return {"url": f"{hub.url}/{name}", "id": name, "name": name}


@route("POST", r"/api/validate-yaml")
def validate(hub, request):
    content = request.json()["content"]
    header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    found = problems(yaml.safe_load(header[1])) if header else ["no metadata"]
    body = {"errors": [{"message": text} for text in found], "warnings": []}
    return (400, body) if found else body


@route("POST", r"/api/models/(.+)/preupload/(.+)", write=True)
def preupload(hub, request, name, revision):
    known = hub.commit_of(name, revision, True).files
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": etag(file["path"], known[file["path"]]) if file["path"] in known else None,
            }
            for file in request.json()["files"]
        ]
    }


@route("POST", r"/(.+)\.git/info/lfs/objects/batch", write=True)
def lfs_batch(hub, request, name):
    hub.repo(name, True)
    objects = []
    for entry in request.json()["objects"]:
        known = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}} if entry["oid"] not in hub.large else None
        objects.append({**entry, **({"actions": known} if known else {})})
    return {"transfer": "basic", "objects": objects}


@route("PUT", r"/lfs/([0-9a-f]{64})")  # as in the Hub's storage, the address alone is the permission
def lfs_put(hub, request, oid):
    content = request.body()
    if hashlib.sha256(content).hexdigest() != oid:
        raise RefusedError(400, message="content and oid differ")
    hub.large[oid] = content
    return {}


@route("POST", r"/api/models/(.+)/commit/(.+)", write=True)
def commit(hub, request, name, revision):
    repo, message, changes = hub.repo(name, True), "", {}
    for line in request.body().splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            message = value["summary"]
        elif item["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            changes[value["path"]] = hub.large[value["oid"]]
        elif item["key"] == "deletedFile":
            changes[value["path"]] = None
        else:
            raise RefusedError(400, message=f"unknown operation {item['key']}")
    oid = repo.commit(message, changes)
    return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "hookOutput": ""}


@route("POST", r"/api/models/(.+)/tag/(.+)", write=True)
def tag(hub, request, name, revision):
    repo = hub.repo(name, True)
    repo.tags[request.json()["tag"]] = hub.commit_of(name, revision, True).oid
    return {}


@route("GET", r"/api/models/(.+)/refs")
def refs(hub, request, name):
    repo = hub.repo(name, request.authorised)
    return {
        "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1].oid}],
        "tags": [{"name": k, "ref": f"refs/tags/{k}", "targetCommit": v} for k, v in repo.tags.items()],
        "converts": [],
    }


@route("GET", r"/api/models/(.+)/tree/([^/]+)(?:/(.*))?")
def tree(hub, request, name, revision, folder):
    found = hub.commit_of(name, revision, request.authorised)
    under = f"{unquote(folder)}/" if folder else ""
    files = {path: content for path, content in found.files.items() if path.startswith(under)}
    if under and not files:
        raise RefusedError(404, "EntryNotFound", "no such folder")
    return [{"type": "file", "path": p, "size": len(c), "oid": etag(p, c)} for p, c in files.items()]


@route("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
def info(hub, request, name, revision):
    found, repo = hub.commit_of(name, revision or "main", request.authorised), hub.repo(name, request.authorised)
    siblings = [{"rfilename": path} for path in found.files]
    return {"id": name, "sha": found.oid, "private": repo.private, "siblings": siblings, "tags": []}


@route("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
def resolve(hub, request, name, revision, path):
    found, path = hub.commit_of(name, revision, request.authorised), unquote(path)
    if path not in found.files:
        raise RefusedError(404, "EntryNotFound", "Entry not found")
    return found.files[path], {"X-Repo-Commit": found.oid, "ETag": f'"{etag(path, found.files[path])}"'}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def body(self):
        return self._body

    def json(self):
        return json.loads(self._body)

    def answer(self):
        method, path = self.command.replace("HEAD", "GET"), urlsplit(self.path).path
        path = path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")  # one name, whatever the kind
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.authorised = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            try:
                self.reply(*self.find(method, path))
            except RefusedError as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                self.reply(refused.status, {"error": refused.message}, headers)

    do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

    def find(self, method, path):
        for asked, pattern, write, handler in ROUTES:
            if asked == method and (match := pattern.fullmatch(path)):
                if write and not self.authorised:
                    raise RefusedError(401, message="Invalid username or password.")
                result = handler(self.hub, self, *match.groups())
                if isinstance(result, tuple) and isinstance(result[0], bytes):
                    return 200, *result
                return result if isinstance(result, tuple) else (200, result)
        raise RefusedError(404, message=f"{method} {path} is not spoken here")

    def reply(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def running_hub(user="me", token="hf_test"):
    """A Hub that listens on a free port of this machine."""
    hub = Hub(user, token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
