"""A stand-in of the Hub on this machine: the part of its HTTP API that pushing and loading a model use.

Start the processes that shall use it with the variables of [`HubServer.environment`]. Files of more than a few hundred
bytes that are not text go through the LFS protocol, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "a" * 34
USER = "user"


@dataclass
class Commit:
    """A commit: its files as bytes by path, and which of them are in LFS."""

    oid: str
    message: str
    files: dict[str, bytes]
    lfs: frozenset[str] = frozenset()


@dataclass
class Repository:
    """A model repository, whose branches and pull requests are lists of commits, the first one empty."""

    is_private: bool = False
    refs: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, "initial commit", {})]})

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a pull request or an oid."""
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((c for commits in self.refs.values() for c in commits if c.oid == revision), None)

    def commit(self, ref: str, lines: list[dict], objects: dict[str, bytes]) -> Commit:
        """Add a commit made of the lines of the commit API."""
        parent = self.refs[ref][-1]
        files, lfs = dict(parent.files), set(parent.lfs)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                lfs.discard(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = objects[value["oid"]]
                lfs.add(value["path"])
            else:
                raise NotImplementedError(line["key"])
        content = repr((parent.oid, lines[0], sorted(files.items()))).encode()
        commit = Commit(hashlib.sha1(content).hexdigest(), lines[0]["value"]["summary"], files, frozenset(lfs))
        self.refs[ref].append(commit)
        return commit


@dataclass
class Fault:
    """Answers of the server that go wrong: those to requests whose method and path match, as often as said.

    Args:
        pattern: Regular expression for `METHOD /path`.
        times: How many requests fail.
        status: Status code, or `None` to drop the connection.
        is_late: Whether the request is carried out before its answer gets lost.
    """

    pattern: str
    times: int
    status: int | None = 503
    is_late: bool = False


class HubServer:
    """The server, running in threads of this process. Use it as a context manager."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for processes that use this server: with a cache of their own, with a token or none."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }


class _RefusedError(Exception):
    def __init__(self, status: int, code: str | None = None):
        super().__init__(f"{status} {code}")
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            path = urlsplit(self.path).path
            request = f"{self.command} {path}"
            self.hub.requests.append(request)
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, request)), None)
            if fault is not None:
                fault.times -= 1
            if fault is None or fault.is_late:
                try:
                    answer = self._route(path, body)
                except _RefusedError as failure:
                    headers = {} if failure.code is None else {"X-Error-Code": failure.code}
                    answer = failure.status, {"error": str(failure)}, headers
        if fault is not None:
            if fault.status is None:
                self.close_connection = True
                return
            answer = fault.status, {"error": "injected"}, {}
        self._answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815  # names of http.server

    def _answer(self, status: int, content: dict | list | bytes, headers: dict[str, str]) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if content is payload else "application/json")
        self.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def _route(self, path: str, body: bytes) -> tuple[int, dict | list | bytes, dict[str, str]]:
        for pattern, name in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return getattr(self, name)(body, **{key: unquote(value) for key, value in match.groupdict().items()})
        raise _RefusedError(404)

    @property
    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, repo: str, to_write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.is_private and not self._has_token):
            raise _RefusedError(404 if self._has_token else 401, "RepoNotFound")
        if to_write and not self._has_token:
            raise _RefusedError(403)
        return repository

    def _commit(self, repo: str, revision: str) -> Commit:
        commit = self._repository(repo).find(revision)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound")
        return commit

    def create(self, body: bytes) -> tuple:
        if not self._has_token:
            raise _RefusedError(401)
        request = json.loads(body)
        repo = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repositories:
            return 409, answer, {}
        self.hub.repositories[repo] = Repository(is_private=request.get("visibility") == "private")
        return 200, answer, {}

    def validate_yaml(self, body: bytes) -> tuple:
        return 200, {"errors": [], "warnings": []}, {}

    def branch(self, body: bytes, repo: str, branch: str) -> tuple:
        repository = self._repository(repo, to_write=True)
        if branch in repository.refs:
            raise _RefusedError(409)
        repository.refs[branch] = list(repository.refs["main"])
        return 200, {}, {}

    def info(self, body: bytes, repo: str, revision: str = "main") -> tuple:
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        is_private = self.hub.repositories[repo].is_private
        return 200, {"id": repo, "sha": commit.oid, "private": is_private, "tags": [], "siblings": siblings}, {}

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> tuple:
        files = self._commit(repo, revision).files
        inside = {path: data for path, data in files.items() if path.startswith(folder)}
        if folder and not inside:
            raise _RefusedError(404, "EntryNotFound")
        return 200, [{"type": "file", "path": p, "size": len(d), "oid": _blob_id(d)} for p, d in inside.items()], {}

    def preupload(self, body: bytes, repo: str, revision: str) -> tuple:
        commit = self._commit(repo, revision)
        self._repository(repo, to_write=True)
        answer = []
        for file in json.loads(body)["files"]:
            is_lfs = b"\0" in base64.b64decode(file["sample"])
            known = commit.files.get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if is_lfs else _blob_id(known)
            mode = "lfs" if is_lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answer}, {}

    def lfs_batch(self, body: bytes, repo: str) -> tuple:
        self._repository(repo, to_write=True)
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}
                entry = {**entry, "actions": {"upload": upload, "verify": verify}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, body: bytes, oid: str) -> tuple:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400)
        self.hub.objects[oid] = body
        return 200, {}, {}

    def lfs_verify(self, body: bytes, repo: str) -> tuple:
        entry = json.loads(body)
        if len(self.hub.objects.get(entry["oid"], b"")) != entry["size"]:
            raise _RefusedError(404)
        return 200, {}, {}

    def commit(self, body: bytes, repo: str, revision: str) -> tuple:
        repository = self._repository(repo, to_write=True)
        self._commit(repo, revision)
        url = None
        if parse_qs(urlsplit(self.path).query).get("create_pr"):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            repository.refs[f"refs/pr/{number}"] = list(repository.refs[revision])
            revision, url = f"refs/pr/{number}", f"{self.hub.endpoint}/{repo}/discussions/{number}"
        commit = repository.commit(revision, [json.loads(line) for line in body.splitlines()], self.hub.objects)
        commit_url = f"{self.hub.endpoint}/{repo}/commit/{commit.oid}"
        return 200, {"commitUrl": commit_url, "commitOid": commit.oid, "pullRequestUrl": url}, {}

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> tuple:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise _RefusedError(404, "EntryNotFound")
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_blob_id(data)}"'}
        if path in commit.lfs:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        return 200, data, headers


def _blob_id(data: bytes) -> str:
    """The id that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>[^/]+)", "branch"),
    (rf"POST /api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    (rf"POST /api/models/{_REPO}/commit/{_REVISION}", "commit"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (rf"POST /{_REPO}\.git/info/lfs/verify", "lfs_verify"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
    (rf"GET /api/models/{_REPO}", "info"),
    (rf"GET /api/models/{_REPO}/revision/{_REVISION}", "info"),
    (rf"GET /api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", "tree"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
]
