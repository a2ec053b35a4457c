"""A small W&B server for tests: what wandb 0.31 needs for runs, their resuming, and sweeps.

It keeps in memory what clients tell it, and records every request.
"""

import base64
import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ENTITY = "lab"
KEY = "5ec3e7" * 6 + "abcd"  # a key has 40 characters
OWNER = {"id": "RW50aXR5OjE=", "name": ENTITY}

Variables = dict[str, Any]


@dataclass
class Run:
    """What the server knows of one run."""

    project: str
    id: str
    fields: Variables = field(default_factory=dict)  # of its UpsertBucket requests, the last wins
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # file: line number: line
    preempting: bool = False
    exit_code: int | None = None  # None while it runs

    def lines(self, file: str) -> list[str]:
        return [line for _, line in sorted(self.streams.get(file, {}).items())]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines("wandb-history.jsonl")]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.lines("wandb-summary.json") or ["{}"])[0]))

    @property
    def config(self) -> dict[str, Any]:
        """Without W&B's own entry."""
        return config_in(self.fields)

    @property
    def state(self) -> str:
        """running, finished, failed, or preempted: a sweep will hand it out again."""
        if self.exit_code is None:
            return "running"
        if self.exit_code == 0:
            return "finished"
        return "preempted" if self.preempting else "failed"

    @property
    def key(self) -> str:
        return base64.b64encode(f"Run:v1:{self.id}:{self.project}:{ENTITY}".encode()).decode()


def config_in(upsert: Variables) -> dict[str, Any]:
    """The config that an UpsertBucket request holds, without W&B's own entry."""
    config = json.loads(upsert.get("config") or "{}")
    return {key: entry["value"] for key, entry in config.items() if key != "_wandb"}


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
        self.requests: list[Request] = []
        self.unknown: set[str] = set()  # what clients asked for in vain
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed are part of the tests

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, to be online here."""
        own = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ENTITY": ENTITY}
        return own | {"WANDB_ERROR_REPORTING": "false"}

    def run(self, id: str) -> Run:
        return self.runs[id]

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
            if request.path.startswith("/storage/"):  # as on a store of its own: without the key
                return 200, {}
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
        action = OPERATIONS.get(request.operation)
        if action is None:
            self.unknown.add(request.operation)
            return {"data": None, "errors": [{"message": f"no {request.operation} here"}]}
        return {"data": action(self, request.variables)}

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
        files = [{"name": n, "uploadUrl": f"{self.url}/storage/{v['run']}/{n}"} for n in v["files"]]
        key = self._open(v["project"], v["run"]).key
        return {"createRunFiles": {"runID": key, "uploadHeaders": [], "files": files}}

    def _stopped_status(self, v: Variables) -> Variables:
        return {"project": {"run": {"stopped": False}}}

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


OPERATIONS: dict[str, Callable[[WandbServer, Variables], Variables]] = {
    "ServerFeaturesQuery": WandbServer._features,
    "Viewer": WandbServer._viewer,
    "OrganizationCoreWeaveOrganizationID": WandbServer._organization,
    "UpsertBucket": WandbServer._upsert_run,
    "RunResumeStatus": WandbServer._resume_status,
    "CreateRunFiles": WandbServer._run_files,
    "RunStoppedStatus": WandbServer._stopped_status,
    "SweepWithRuns": WandbServer._sweep,
    "CreateAgent": WandbServer._create_agent,
    "Heartbeat": WandbServer._heartbeat,
}


class _Answer(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(unquote(urlsplit(self.path).path), headers, body)
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
