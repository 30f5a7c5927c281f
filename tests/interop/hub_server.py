"""A stand-in of the hub's file API on the loopback, for the real client."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Datasets as lists of commits, each a whole tree: branch -> [{path: bytes}]."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.sent: list[str] = []  # paths of files in commits
        self.read: list[str] = []

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files, by branch or by commit."""
        branches = self.repos[repo]
        if revision in branches:
            tree = branches[revision][-1]
            return commit_of(tree), tree
        return revision, next(t for trees in branches.values() for t in trees if commit_of(t) == revision)


def commit_of(tree: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(tree.items())).encode()).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, what, status: int = 200, **headers: str) -> None:
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def visibility(self, repo: str) -> dict[str, bool]:
        return {"private": self.server.private[repo]} if repo in self.server.private else {}

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        path = unquote(self.path.partition("?")[0])
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.server.repos:
                return self.answer({"url": f"{self.server.url}/datasets/{repo}"}, 409)
            self.server.repos[repo] = {"main": [{".gitattributes": b""}]}
            self.server.private[repo] = asked.get("private", asked.get("visibility") == "private")
            return self.answer({"url": f"{self.server.url}/datasets/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/(\w+)/(.+)", path):
            repo, revision, name = match.groups()
            commit, tree = self.server.tree(repo, revision)
            if name not in tree:
                return self.answer({}, 404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                self.server.read.append(name)
            return self.answer(tree[name], ETag=f'"{blob(tree[name])}"', X_Repo_Commit=commit)
        match = re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/(\w+)/(\w+))?", path)
        assert match, path
        repo, verb, revision = match[1], match[2] or "revision", match[3] or "main"
        if repo not in self.server.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        branches = self.server.repos[repo]
        if verb == "branch":
            branches.setdefault(revision, branches["main"][:])
            return self.answer({})
        commit, tree = self.server.tree(repo, revision)
        if verb == "revision":
            return self.answer(
                {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in tree]} | self.visibility(repo)
            )
        if verb == "tree":
            files = [{"type": "file", "path": n, "size": len(d), "oid": blob(d)} for n, d in tree.items()]
            return self.answer(files)
        if verb == "preupload":
            asked = [f["path"] for f in json.loads(body)["files"]]
            oids = {name: blob(data) for name, data in tree.items()}
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": name, "oid": oids.get(name), **modes} for name in asked]})
        assert verb == "commit", path
        changed = dict(tree)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.server.sent.append(line["value"]["path"])
            elif line["key"] == "deletedFile":
                del changed[line["value"]["path"]]
        branches[revision].append(changed)
        commit = commit_of(changed)
        return self.answer({"commitUrl": f"{self.server.url}/datasets/{repo}/commit/{commit}", "commitOid": commit})

    do_GET = do_POST = do_HEAD = handle_any


def ask(monkeypatch, url: str) -> None:
    """What HF_ENDPOINT does, in a process that has imported the client."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    ask(monkeypatch, server.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
