"""A Hugging Face Hub on localhost: the endpoints of models and Spaces that huggingface_hub calls, over real HTTP.

Small files travel inside the commit, safetensors files as LFS objects, as on the Hub. It does not speak the Xet
protocol, so its clients set HF_HUB_DISABLE_XET=1. Files, commits and branches live in memory.
"""

import base64
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_test_server"
USER = "tester"


@dataclass
class Repository:
    """The repository of a model or a Space: commits by id, each all its files, and branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        content = json.dumps([len(self.commits), message, branch]).encode()
        oid = hashlib.sha1(content).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """The server and all it knows.

    Attributes:
        repositories: by ORG/NAME, Spaces by spaces/ORG/NAME.
        objects: LFS contents by SHA-256.
        requests: "METHOD path" of every request, in order.
        received: bytes of LFS uploads that arrived, complete ones only, by SHA-256.
        cut_after: LFS uploads are cut off when so many bytes were read; None: never.
        stalled: set when an upload was read up to `stall_after` bytes; then nothing more is read.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.received: list[str] = []
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[revision]]

    def client_environment(self, home: object, *, log_in: bool = True) -> dict[str, str]:
        """What a process needs in its environment to take this server for the Hub."""
        environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return environment | ({"HF_TOKEN": TOKEN} if log_in else {})

    def process_environment(self, home: object, *, log_in: bool = True) -> dict[str, str]:
        """All of the environment of such a process: this one's, without what it says of a Hub."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return own | self.client_environment(home, log_in=log_in)

    def run_client(self, home: object, *command: object, log_in: bool = True) -> str:
        """A process of its own, whose Hub is this server from the first import on; returns what it prints."""
        words = [str(word) for word in command]
        environment = self.process_environment(home, log_in=log_in)
        run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-4000:]
        return run.stdout

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients of these tests go away in the middle; that is no news."""


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server on a free port, gone at the end."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request, split by path; what is not known answers 404 as the Hub does."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if self.command == "PUT" and parts[0] == "lfs":
            return self.receive_object(parts[1])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_writing = self.command == "POST" and path != "/api/validate-yaml"
        if (is_writing or path == "/api/whoami-v2") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, status=401)
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create_repository(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.plan_uploads(json.loads(body))
        if parts[:2] in (["api", "models"], ["api", "spaces"]) and len(parts) >= 4:
            prefix = "spaces/" if parts[1] == "spaces" else ""
            return self.serve_api(prefix + "/".join(parts[2:4]), parts[4:], body)
        if "resolve" in parts:
            at = parts.index("resolve")
            return self.serve_file("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def answer(
        self,
        content: object = None,
        *,
        status: int = 200,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, status=404, headers={"X-Error-Code": code, "X-Error-Message": code})

    def create_repository(self, request: dict) -> None:
        prefix = "spaces/" if request.get("type") == "space" else ""
        repo_id = f"{prefix}{request.get('organization') or USER}/{request['name']}"
        url = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repositories:
            return self.answer({**url, "error": "You already created this model repo"}, status=409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repository = Repository(private=private)
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[repo_id] = repository
        return self.answer(url)

    def serve_api(self, repo_id: str, rest: list[str], body: bytes) -> None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            return self.missing("RepoNotFound")
        action, revision = (rest[0] if rest else "revision"), (rest[1] if len(rest) > 1 else "main")
        if action == "branch":
            if revision in repository.branches:
                return self.answer({"error": "Reference already exists"}, status=409)
            repository.branches[revision] = repository.branches["main"]
            return self.answer({})
        oid = repository.resolve(revision)
        if oid is None:
            return self.missing("RevisionNotFound")
        files = repository.commits[oid]
        if action == "preupload":
            return self.answer({"files": [self.upload_mode(file) for file in json.loads(body)["files"]]})
        if action == "commit":
            return self.commit(repo_id, repository, revision, body)
        if action == "tree":
            return self.answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            )
        info = {"id": repo_id, "sha": oid, "private": repository.private, "tags": [], "downloads": 0, "likes": 0}
        return self.answer({**info, "siblings": [{"rfilename": path} for path in files]})

    def upload_mode(self, file: dict) -> dict:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def plan_uploads(self, request: dict) -> None:
        planned = []
        for item in request["objects"]:
            planned.append(dict(item))
            if item["oid"] not in self.server.objects:
                planned[-1]["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": planned})

    def receive_object(self, oid: str) -> None:
        length = int(self.headers["Content-Length"])
        for limit in (self.server.cut_after, self.server.stall_after):
            if limit is not None and length > limit:
                self.rfile.read(limit)
                if self.server.stall_after is not None:
                    self.server.stalled.set()
                    self.rfile.read()  # until the client is gone
                self.close_connection = True
                self.connection.close()
                return
        content = self.rfile.read(length)
        if len(content) < length or hashlib.sha256(content).hexdigest() != oid:
            return self.answer({"error": "content does not have this SHA-256"}, status=400)
        self.server.objects[oid] = content
        self.server.received.append(oid)
        return self.answer({})

    def commit(self, repo_id: str, repository: Repository, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.commits[repository.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.answer({"error": f"LFS object {value['oid']} was not uploaded"}, status=400)
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = repository.commit(branch, lines[0]["value"]["summary"], files)
        return self.answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def serve_file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            return self.missing("RepoNotFound")
        oid = repository.resolve(revision)
        if oid is None:
            return self.missing("RevisionNotFound")
        content = repository.commits[oid].get(path)
        if content is None:
            return self.answer(
                {"error": "Entry not found"},
                status=404,
                headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid},
            )
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(body=content, headers={"ETag": etag, "X-Repo-Commit": oid, "Accept-Ranges": "bytes"})
