"""A server on loopback that speaks the part of the Hub's protocol that ``huggingface_hub`` uses: for tests, without a network.

It keeps repositories in memory: commits are immutable snapshots, branches and tags point to them. Large files go by the
LFS protocol and are served by a redirect, as on the Hub; what is "large" is decided by the file's name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_ENDINGS = (".safetensors", ".bin")


@dataclass
class Commit:
    """A snapshot of a repository."""

    oid: str
    files: dict[str, bytes]
    message: str


@dataclass
class Repository:
    """A model repository."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> Commit:
        parent = self.branches.get(branch, "")
        listing = "".join(f"{path} {hashlib.sha1(content).hexdigest()}\n" for path, content in sorted(files.items()))
        oid = hashlib.sha1(f"{self.name}\n{parent}\n{message}\n{listing}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), message)
        self.branches[branch] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def history(self) -> list[str]:
        """Messages of all commits, in the order they were made."""
        return [commit.message for commit in self.commits.values()]


class HubServer:
    """The server's state, and how a test makes it fail.

    Attributes:
        tokens: user names by token.
        read_only: tokens that may not write.
        repositories: by name.
        broken: endings of paths whose content breaks off half way, however often it is asked for.
        failing: status codes by a part of a path.
        requests: ``"METHOD path"`` of all requests so far.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_writer": "ada", "hf_reader": "bob"}
        self.read_only = {"hf_reader"}
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.failing: dict[str, int] = {}
        self.requests: list[str] = []
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.cdn_endpoint = f"http://localhost:{port}"  # another host: the client follows no redirect to it by itself

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Serve requests until the block ends."""
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def add(self, name: str, files: dict[str, bytes], *, branch: str = "main", private: bool = False) -> str:
        """Put files into a repository as a test's premise; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(name, private))
        before = repository.find(branch)
        return repository.commit(branch, {**(before.files if before else {}), **files}, "premise").oid


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        del args

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    # -------------------------------------------------------------- dispatch

    def _answer(self, method: str) -> None:
        self.body = self._read_body()
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = parts.path
        self.hub.requests.append(f"{method} {unquote(path)}")
        try:
            for fragment, status in self.hub.failing.items():
                if fragment in unquote(path):
                    raise _Refusal(status, "made to fail")
            for verb, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in verb:
                    function(self, **{key: unquote(value) for key, value in match.groupdict().items() if value is not None})
                    return
            raise _Refusal(404, f"no such page: {path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    # -------------------------------------------------------------- who asks for what

    def _user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not given:
            return None
        if given not in self.hub.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[given]

    def _writer(self) -> str:
        user = self._user()
        if user is None:
            raise _Refusal(401, "Invalid username or password.")
        if self.headers.get("Authorization", "").removeprefix("Bearer ") in self.hub.read_only:
            raise _Refusal(403, "Forbidden: you must use a write token")
        return user

    def _repository(self, name: str) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and user != name.partition("/")[0]):
            # the Hub does not say whether a repository is missing or private to one who is not known
            raise _Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _snapshot(self, name: str, revision: str) -> Commit:
        commit = self._repository(name).find(revision)
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -------------------------------------------------------------- pages

    def whoami(self) -> None:
        self._send_json({"type": "user", "name": self._writer(), "orgs": []})

    def validate_yaml(self) -> None:
        found = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(found[1]) if found else {}
            wrong = [] if isinstance(data, dict) else ["metadata is no mapping"]
        except yaml.YAMLError as error:
            wrong = [str(error)]
        self._send_json({"errors": [{"message": w} for w in wrong], "warnings": []}, 400 if wrong else 200)

    def create(self) -> None:
        user = self._writer()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not name.startswith(f"{user}/"):
            raise _Refusal(403, f"you have no rights on {name.partition('/')[0]}")
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repositories:
            self._send_json({"error": "You already created this model repo", **url}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(name, private)
        self.hub.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._send_json(url)

    def preupload(self, name: str, revision: str) -> None:
        self._writer()
        present = self._snapshot(name, revision).files
        answer = []
        for file in json.loads(self.body)["files"]:
            path, mode = file["path"], "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular"
            oid = _object_id(path, present[path]) if path in present else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answer})

    def lfs_batch(self, name: str) -> None:
        self._writer()
        self._repository(name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/lfs-verify"},
                }
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "the content is not what was announced")
        self.hub.large[oid] = self.body
        self._send(200)

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        content = self.hub.large.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise _Refusal(404, "no such object")
        self._send_json({})

    def commit(self, name: str, revision: str) -> None:
        self._writer()
        files = dict(self._snapshot(name, revision).files)
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, self._snapshot(name, revision).oid):
                    raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refusal(400, "an LFS file was committed that was never uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, f"unknown operation {item['key']}")
        request = f"{self.hub.endpoint}/{name}/discussions/1" if self.query.get("create_pr") else None
        made = self._repository(name).commit("refs/pr/1" if request else revision, files, message)
        url = f"{self.hub.endpoint}/{name}/commit/{made.oid}"
        self._send_json({"success": True, "commitOid": made.oid, "commitUrl": url, "pullRequestUrl": request})

    def branch(self, name: str, branch: str) -> None:
        self._writer()
        repository = self._repository(name)
        if branch in repository.branches:
            raise _Refusal(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self._snapshot(name, start).oid
        self._send_json({})

    def tag(self, name: str, revision: str) -> None:
        self._writer()
        self._repository(name).tags[json.loads(self.body)["tag"]] = self._snapshot(name, revision).oid
        self._send_json({})

    def info(self, name: str, revision: str = "main") -> None:
        commit = self._snapshot(name, revision)
        card = commit.files.get("README.md", b"").decode()
        found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.hub.repositories[name].private
        content = {"id": name, "modelId": name, "sha": commit.oid, "siblings": siblings, "private": private}
        self._send_json({**content, "tags": data.get("tags", []), "cardData": data})

    def refs(self, name: str) -> None:
        repository = self._repository(name)
        kinds = {"branches": repository.branches, "tags": repository.tags}
        self._send_json(
            {
                kind: [{"name": key, "ref": f"refs/{key}", "targetCommit": oid} for key, oid in entries.items()]
                for kind, entries in {**kinds, "converts": {}}.items()
            }
        )

    def tree(self, name: str, revision: str, path: str = "") -> None:
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        entries = []
        for file, content in sorted(self._snapshot(name, revision).files.items()):
            if not file.startswith(prefix):
                continue
            entry = {"type": "file", "path": file, "size": len(content), "oid": _git_oid(content)}
            if file.endswith(LFS_ENDINGS):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._send_json(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._snapshot(name, revision)
        if path not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit.oid}
            self._send(404, b"Entry not found", headers)
            return
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_object_id(path, content)}"'}
        if not path.endswith(LFS_ENDINGS):
            self._send_content(path, content, headers)
            return
        oid = hashlib.sha256(content).hexdigest()
        self.hub.large.setdefault(oid, content)
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn_endpoint}/cdn/{oid}/{path}"})

    def cdn(self, oid: str, path: str) -> None:
        if oid not in self.hub.large:
            raise _Refusal(404, "no such object")
        self._send_content(path, self.hub.large[oid], {"ETag": f'"{oid}"'})

    def _send_content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        end = int(wanted[2]) + 1 if wanted and wanted[2] else len(content)
        if wanted:
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        part = content[start:end]
        if self.command != "HEAD" and any(f"/{path}".endswith(ending) for ending in self.hub.broken):
            self._break_off(part, headers, 206 if wanted else 200)
            return
        self._send(206 if wanted else 200, part, {**headers, "Accept-Ranges": "bytes"})

    def _break_off(self, content: bytes, headers: dict[str, str], status: int) -> None:
        """Announce everything, send half of it, and hang up."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _object_id(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_ENDINGS) else _git_oid(content)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/tag/(?P<revision>[^/]+)", _Handler.tag),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", r"/lfs-verify", _Handler.lfs_verify),
    ("GET HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})/(?P<path>.+)", _Handler.cdn),
    ("GET HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


# ---------------------------------------------------------------- for tests


def connect(server: HubServer, monkeypatch: Any, cache: Any, token: str | None = "hf_writer") -> None:
    """Point the real client, in this process, to a server: what HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN would do at import."""
    import huggingface_hub.hf_api
    import transformers.utils.hub
    from huggingface_hub import constants

    settings = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


def folder_content(folder: Any) -> dict[str, bytes]:
    """All files below a folder, by their path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
