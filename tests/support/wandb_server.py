"""A small W&B server for tests: what wandb 0.31 needs for runs, their resuming, and sweeps.

It keeps in memory what clients tell it (`wandb_store`), records every request, and can be made to
fail, to hang, and to be out of reach.
"""

import base64
import contextlib
import gzip
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from support.wandb_store import (
    ENTITY,
    Artifact,
    Artifacts,
    Operations,
    Refused,
    Run,
    Variables,
    View,
    Views,
)

KEY = "5ec3e7" * 6 + "abcd"  # a key has 40 characters
OWNER = {"id": "RW50aXR5OjE=", "name": ENTITY}


@dataclass
class Sweep:
    """Runs to hand out, by their parameters."""

    config: dict[str, Any]
    waiting: list[dict[str, Any]]
    given: dict[str, dict[str, Any]] = field(default_factory=dict)  # run id: parameters


@dataclass
class Request:
    """A request as it came, and for GraphQL its operation."""

    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    operation: str | None = None
    variables: Variables = field(default_factory=dict)


class WandbServer(ThreadingHTTPServer):
    """Serves at once, on a free port of this address, until `close`."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), _Answer)
        self.url = f"http://{address}:{self.server_port}"
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.stored_artifacts = Artifacts(f"{self.url}/storage/artifacts")
        self.saved_views = Views()
        self.requests: list[Request] = []
        self.unknown: set[str] = set()  # what clients asked for in vain
        self.failures = 0  # so many requests will be answered by 500
        self.answering = threading.Event()  # while it is not set, no request is answered
        self.answering.set()
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self.operations = self._own_operations() | self.stored_artifacts.operations
        self.operations |= self.saved_views.operations
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.refuse()
        self.answering.set()

    def fail(self, requests: int) -> None:
        """Answer so many requests, from now on, with an error of the server (500)."""
        self.failures = requests

    def hang(self) -> None:
        """From now on, accept connections and requests, and never answer."""
        self.answering.clear()

    def refuse(self) -> None:
        """From now on, nobody listens here, and open connections are cut."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """Answer again; requests that hang are never answered, their connections are closed."""
        self.failures = 0
        self.answering.set()
        if self.socket.fileno() == -1:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
            self._serve()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed are part of the tests

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, to be online here."""
        own = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ENTITY": ENTITY}
        return own | {"WANDB_ERROR_REPORTING": "false"}

    def run(self, id: str) -> Run:
        return self.runs[id]

    @property
    def artifacts(self) -> list[Artifact]:
        """The committed versions, the oldest first."""
        return [a for a in self.stored_artifacts.all if a.version is not None]

    @property
    def views(self) -> list[View]:
        return self.saved_views.all

    def sent(self, operation: str) -> list[Variables]:
        """The variables of each request for this GraphQL operation."""
        return [request.variables for request in self.requests if request.operation == operation]

    def add_sweep(self, command: list[str], parameters: list[dict[str, Any]]) -> str:
        """A sweep that hands out these parameters, one run after the other; its id."""
        id = f"sweep{len(self.sweeps) + 1}"
        axes = {name: {"values": [run[name] for run in parameters]} for name in parameters[0]}
        config = {"method": "grid", "command": command, "parameters": axes}
        self.sweeps[id] = Sweep(config, list(parameters))
        return id

    def answer(self, request: Request) -> tuple[int, Any]:
        """Status and JSON body of the answer to a request."""
        with self.lock:
            self.requests.append(request)
            if self.failures:
                self.failures -= 1
                return 500, {"errors": [{"message": "out of order"}]}
            if request.path.startswith("/storage/"):  # as on a store of its own: without the key
                return 200, self._store(request.path.removeprefix("/storage/"), request.body)
            right = base64.b64encode(f"api:{KEY}".encode()).decode()
            if request.headers.get("authorization") != f"Basic {right}":
                return 401, {"errors": [{"message": "wrong API key"}]}
            if request.path == "/graphql":
                return 200, self._graphql(request)
            if file_of := re.fullmatch(r"/files/[^/]+/([^/]+)/([^/]+)/file_stream", request.path):
                run = self._open(file_of[1], file_of[2])
                return 200, self._file_stream(run, json.loads(request.body))
            self.unknown.add(request.path)
            return 404, {"error": "not found"}

    def _graphql(self, request: Request) -> Variables:
        sent = json.loads(request.body)
        named = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
        request.operation = named[1] if named else sent["query"]
        request.variables = sent.get("variables") or {}
        action = self.operations.get(request.operation)
        if action is None:
            self.unknown.add(request.operation)
            return {"data": None, "errors": [{"message": f"no {request.operation} here"}]}
        try:
            return {"data": action(request.variables)}
        except Exception as error:
            if not isinstance(error, Refused):  # an error of this server: let tests see it
                self.unknown.add(f"{request.operation}: {error!r}")
            return {"data": None, "errors": [{"message": str(error)}]}

    def _store(self, place: str, body: bytes) -> Variables:
        """Keep a file that was uploaded, of a run or an artifact."""
        kind, _, rest = place.partition("/")
        if kind == "artifacts":
            self.stored_artifacts.upload(rest, body)
        else:
            run, _, name = rest.partition("/")
            self.runs[run].files[name] = body
        return {}

    def _open(self, project: str | None, id: str) -> Run:
        return self.runs.setdefault(id, Run(project or "uncategorized", id))

    def _file_stream(self, run: Run, sent: Variables) -> Variables:
        for name, part in (sent.get("files") or {}).items():
            lines = enumerate(part["content"], part.get("offset", 0))
            run.streams.setdefault(name, {}).update(lines)
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = int(sent.get("exitcode") or 0)
        return {"exitcode": None, "limits": {}}

    # GraphQL operations of runs

    def _own_operations(self) -> Operations:
        return {
            "ServerFeaturesQuery": self._features,
            "Viewer": self._viewer,
            "OrganizationCoreWeaveOrganizationID": self._organization,
            "UpsertBucket": self._upsert_run,
            "RunResumeStatus": self._resume_status,
            "CreateRunFiles": self._run_files,
            "RunStoppedStatus": self._stopped_status,
            "NotifyScriptableRunAlert": self._alert,
            "SweepWithRuns": self._sweep,
            "CreateAgent": self._create_agent,
            "Heartbeat": self._heartbeat,
        }

    def _features(self, v: Variables) -> Variables:
        return {"serverInfo": {"features": []}}

    def _viewer(self, v: Variables) -> Variables:
        names = dict.fromkeys(("entity", "username", "name"), ENTITY)
        return {"viewer": {"id": "VXNlcjox", "flags": "{}", "teams": {"edges": []}, **names}}

    def _organization(self, v: Variables) -> Variables:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _upsert_run(self, v: Variables) -> Variables:
        """Create a run, go on with it, or change its config."""
        created = v["name"] not in self.runs
        run = self._open(v.get("project"), v["name"])
        run.fields |= {key: value for key, value in v.items() if value is not None}
        if v.get("host"):  # a start: other requests only tell what changed
            run.preempting, run.exit_code = False, None
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": created}}

    def _resume_status(self, v: Variables) -> Variables:
        """The run to go on with, if there is one: how many lines there are, and the last ones."""
        run = self.runs.get(v["name"])
        bucket = run and self._bucket(run)
        if run and bucket:
            for name in ("history", "events"):
                lines = run.lines(f"wandb-{name}.jsonl")
                bucket |= {f"{name}LineCount": len(lines), f"{name}Tail": json.dumps(lines[-1:])}
            bucket["logLineCount"] = len(run.lines("output.log"))
            bucket["summaryMetrics"] = json.dumps(run.summary)
            bucket["wandbConfig"] = json.dumps({"t": 1})
        return {"model": {"name": v["project"], "entity": OWNER, "bucket": bucket}}

    def _bucket(self, run: Run) -> Variables:
        return {
            "id": run.key,
            "name": run.id,
            "displayName": run.fields.get("displayName"),
            "config": run.fields.get("config") or "{}",
            "tags": run.fields.get("tags") or [],
            "sweepName": run.fields.get("sweep"),
            "project": {"id": "UHJvamVjdDox", "name": run.project, "entity": OWNER},
        }

    def _run_files(self, v: Variables) -> Variables:
        place = f"{self.url}/storage/runs/{v['run']}"
        files = [{"name": n, "uploadUrl": f"{place}/{n}"} for n in v["files"]]
        key = self._open(v["project"], v["run"]).key
        return {"createRunFiles": {"runID": key, "uploadHeaders": [], "files": files}}

    def _stopped_status(self, v: Variables) -> Variables:
        return {"project": {"run": {"stopped": False}}}

    def _alert(self, v: Variables) -> Variables:
        alert = v["title"], v["text"], v["severity"]
        self._open(v["projectName"], v["runName"]).alerts.append(alert)
        return {"notifyScriptableRunAlert": {"success": True}}

    # GraphQL operations of sweeps

    def _sweep(self, v: Variables) -> Variables:
        config = json.dumps(self.sweeps[v["sweep"]].config)
        return {"project": {"sweep": {"name": v["sweep"], "config": config, "runs": {"edges": []}}}}

    def _create_agent(self, v: Variables) -> Variables:
        return {"createAgent": {"agent": {"id": v["sweep"]}}}  # agents of a sweep are all alike

    def _heartbeat(self, v: Variables) -> Variables:
        """Give an idle agent a run: a preempted one again, else the next, else the order to end."""
        commands = []
        if not json.loads(v.get("runState") or "{}"):
            commands.append(self._next_run(v["id"]))
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    def _next_run(self, id: str) -> Variables:
        sweep = self.sweeps[id]
        again = [r for r in sweep.given if r in self.runs and self.runs[r].state == "preempted"]
        if not again and not sweep.waiting:
            return {"type": "exit"}
        run = again[0] if again else f"{id}-{len(sweep.given) + 1}"
        if not again:
            sweep.given[run] = sweep.waiting.pop(0)
        args = {name: {"value": value} for name, value in sweep.given[run].items()}
        return {"type": "resume" if again else "run", "run_id": run, "program": None, "args": args}


class _Answer(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        url = urlsplit(self.path)
        request = Request(unquote(url.path), unquote(url.query), headers, body)
        if not self.server.answering.is_set():
            self.server.answering.wait()
            self.close_connection = True
            return
        status, answer = self.server.answer(request)
        sent = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass
