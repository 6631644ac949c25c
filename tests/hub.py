"""A stand-in for the Hugging Face hub: a local server whose repositories of models are in memory."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """The server. `repos` holds the repositories: {id: {"refs": {branch: commit}, "commits": {commit: {path: bytes}},
    "messages", "private"}}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos, self.tokens = {}, set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def create(self, name, private=False):
        self.repos[name] = {"refs": {}, "commits": {}, "messages": [], "private": private}
        self.commit(name, "main", {}, "initial commit")

    def commit(self, name, branch, files, message):
        """Add a commit to a branch, and return its id. `files` are all files of the commit."""
        repo = self.repos[name]
        commit = hashlib.sha1(repr((name, branch, message, len(repo["commits"]))).encode()).hexdigest()
        repo["commits"][commit], repo["refs"][branch] = files, commit
        repo["messages"].append(message)
        return commit

    def at(self, name, revision="main"):
        """Return the id and the files of a branch or commit, or (None, None) if there is none."""
        repo = self.repos.get(name, {"refs": {}, "commits": {}})
        commit = repo["refs"].get(revision, revision)
        return (commit, repo["commits"][commit]) if commit in repo["commits"] else (None, None)


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            name, what, revision = "/".join(path[2:4]), *(path[4:6] or ("revision", "main"))
            commit, files = self.server.at(name, revision)
            if commit is None:
                return self.missing(name)
            if what == "revision":
                return self.answer({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self.answer(listed)
        if path[0] == "api":  # not about models
            return self.answer({}, status=404)
        name, revision, file = "/".join(path[:2]), path[3], "/".join(path[4:])
        commit, files = self.server.at(name, revision)
        if commit is None or file not in files:
            return self.missing(name, "EntryNotFound" if commit else None)
        etag = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": commit}
        self.answer(files[file], headers=etag)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repos:
                return self.answer({"url": f"{self.server.address}/{name}"}, status=409)
            self.server.create(name, bool(asked.get("private") or asked.get("visibility") == "private"))
            return self.answer({"url": f"{self.server.address}/{name}"})
        if path == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name, what, revision = "/".join(path[2:4]), *path[4:6]
        repo = self.server.repos[name]
        if what == "branch":
            if revision in repo["refs"]:
                return self.answer({"error": "exists"}, status=409)
            repo["refs"][revision] = repo["refs"]["main"]
            return self.answer({})
        if what == "preupload":
            files = json.loads(body)["files"]
            told = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": told})
        assert what == "commit" and not parse_qs(urlsplit(self.path).query)
        commit, files = self.server.at(name, revision)
        if commit is None:
            return self.missing(name)
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                del files[value["path"]]
        commit = self.server.commit(name, revision, files, message)
        self.answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}"}
        )

    def missing(self, name, code=None):
        code = code or ("RevisionNotFound" if name in self.server.repos else "RepoNotFound")
        self.answer({"error": code}, status=404, headers={"X-Error-Code": code})

    def answer(self, value, status=200, headers=None):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for header, told in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(header, told)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
