"""What the tests' W&B server keeps: runs, artifacts, and saved views."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ENTITY = "lab"

Variables = dict[str, Any]
Operations = dict[str, Callable[[Variables], Variables]]


class Refused(Exception):
    """The server's answer is an error of GraphQL."""


@dataclass
class Run:
    """What the server knows of one run."""

    project: str
    id: str
    fields: Variables = field(default_factory=dict)  # of its UpsertBucket requests, the last wins
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # file: line number: line
    files: dict[str, bytes] = field(default_factory=dict)  # uploaded ones: media, config.yaml, ...
    alerts: list[tuple[str, str, str]] = field(default_factory=list)  # title, text, level
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
class Artifact:
    """A version of an artifact; what its manifest names is in `files` once it is committed."""

    id: str
    project: str
    name: str
    type: str
    digest: str
    run: str  # the id of the run that logged it
    client_ids: tuple[str, str]  # of this version, of the versions of this name
    aliases: list[str]
    metadata: dict[str, Any]
    version: int | None = None  # None until it is committed
    manifest: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """The rows of the wandb.Table that this one holds, with the bytes of their pictures."""
        [name] = [name for name in self.files if name.endswith(".table.json")]
        table = json.loads(self.files[name])
        for row in table["data"]:
            row[:] = [self.files[cell["path"]] if isinstance(cell, dict) else cell for cell in row]
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

    def node(self) -> Variables:
        """As GraphQL has it."""
        project = {"id": "UHJvamVjdDox", "internalId": "1", "name": self.project}
        place = {"name": self.name, "project": project | {"entity": {"name": ENTITY}}}
        collection = {"__typename": "ArtifactSequence", **place}
        nothing = dict.fromkeys(("description", "historyStep", "commitHash", "updatedAt"))
        return nothing | {
            "id": self.id,
            "artifactSequence": collection,
            "versionIndex": self.version,
            "artifactType": {"name": self.type},
            "metadata": json.dumps(self.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "state": "PENDING" if self.version is None else "COMMITTED",
            "size": sum(map(len, self.files.values())),
            "digest": self.digest,
            "fileCount": len(self.files),
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [
                {"id": "QWxpYXM6MQ", "alias": alias, "artifactCollection": collection}
                for alias in self.aliases
            ],
        }


class Artifacts:
    """Versions of artifacts, and the bytes of their files by MD5, each sent once."""

    def __init__(self, url: str) -> None:
        self.url = url  # of the place that files are uploaded to
        self.all: list[Artifact] = []
        self.blobs: dict[str, bytes] = {}
        self.operations: Operations = {
            "ArtifactType": self._type,
            "ArtifactByID": lambda v: {"artifact": self._by_id(v["id"]).node()},
            "FetchArtifactDigestAlgorithm": lambda v: {"project": {"artifactType": None}},
            "XXHashDigestsEnabled": lambda v: {"entity": {"xxhashDigestsEnabled": False}},
            "ClientIDMapping": self._client_id,
            "CreateArtifact": self._create,
            "CreateArtifactManifest": lambda v: self._manifest(v, v["artifactID"]),
            "UpdateArtifactManifest": lambda v: self._manifest(v, v["artifactManifestID"]),
            "CreateArtifactFiles": self._files,
            "CommitArtifact": self._commit,
        }

    def upload(self, place: str, body: bytes) -> None:
        """Keep what was uploaded to this place: a manifest, or any other file."""
        kind, _, id = place.partition("/")
        if kind == "manifests":
            self._by_id(id).manifest = body
        else:
            self.blobs[base64.b64encode(hashlib.md5(body).digest()).decode()] = body

    def _by_id(self, id: str) -> Artifact:
        return next(artifact for artifact in self.all if artifact.id == id)

    def _versions(self, project: str, name: str) -> list[Artifact]:
        """The committed versions of this name, the oldest first."""
        committed = (a for a in self.all if a.version is not None)
        return [a for a in committed if (a.project, a.name) == (project, name)]

    def _type(self, v: Variables) -> Variables:
        """The type that the artifacts of a name have; asked before another one is logged."""
        versions = self._versions(v["project"], v["name"].split(":")[0])
        found = {"artifactType": {"name": versions[0].type}} if versions else None
        return {"project": {"artifact": found}}

    def _client_id(self, v: Variables) -> Variables:
        """The server's id of a version, which its client has named."""
        found = [a.id for a in self.all if v["clientID"] in a.client_ids]
        return {"clientIDMapping": {"serverID": found[0] if found else None}}

    def _create(self, v: Variables) -> Variables:
        """Begin a version; the old one if the same content is committed under this name."""
        wanted = v["input"]
        project, name = wanted["projectName"], wanted["artifactCollectionName"]
        aliases = [entry["alias"] for entry in wanted.get("aliases") or []]
        versions = self._versions(project, name)
        same = [old for old in versions if old.digest == wanted["digest"]]
        if same:
            artifact = same[0]
            self._give(artifact, aliases)
        else:
            artifact = Artifact(
                id=f"QXJ0aWZhY3Q{len(self.all)}",
                project=project,
                name=name,
                type=wanted["artifactTypeName"],
                digest=wanted["digest"],
                run=wanted.get("runName") or "",
                client_ids=(wanted.get("clientID") or "", wanted.get("sequenceClientID") or ""),
                aliases=aliases,
                metadata=json.loads(wanted.get("metadata") or "{}"),
            )
            self.all.append(artifact)
        latest = {"latestArtifact": {"id": versions[-1].id} if versions else None}
        state = "COMMITTED" if same else "PENDING"
        created = {"id": artifact.id, "state": state, "artifactSequence": latest}
        return {"createArtifact": {"artifact": created}}

    def _give(self, artifact: Artifact, aliases: list[str]) -> None:
        """Give these aliases to a version, and take them from the others of its name."""
        for other in self._versions(artifact.project, artifact.name):
            if other is not artifact:
                other.aliases = [alias for alias in other.aliases if alias not in aliases]
        artifact.aliases = sorted({*artifact.aliases, *aliases})

    def _manifest(self, v: Variables, id: str) -> Variables:
        """Where to upload the list of an artifact's files."""
        url = f"{self.url}/manifests/{id}"
        file = {"id": "RmlsZTox", "uploadUrl": url, "uploadHeaders": []}
        answer = {"artifactManifest": {"id": id, "file": file}}
        return {"createArtifactManifest": answer, "updateArtifactManifest": answer}

    def _files(self, v: Variables) -> Variables:
        """Where to upload files: nowhere if the same content is here already."""
        edges = []
        for file in v["input"]["artifactFiles"]:
            place = f"{file['artifactID']}/{file['name']}"
            node = {
                "storagePath": place,
                "uploadUrl": None if file["md5"] in self.blobs else f"{self.url}/files/{place}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit(self, v: Variables) -> Variables:
        """A version is whole, and it is the latest one; else the commit is refused."""
        artifact = self._by_id(v["artifactID"])
        try:
            contents = json.loads(artifact.manifest)["contents"]
            artifact.files = {name: self.blobs[at["digest"]] for name, at in contents.items()}
        except (ValueError, KeyError) as error:
            raise Refused(f"the manifest or a file is missing: {error}") from None
        artifact.version = len(self._versions(artifact.project, artifact.name))
        self._give(artifact, [*artifact.aliases, "latest"])
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}


@dataclass
class View:
    """A saved workspace (type "project-view") or report (type "runs")."""

    id: str
    entity: str
    project: str
    type: str
    name: str
    display_name: str
    spec: dict[str, Any]

    def node(self) -> Variables:
        """As GraphQL has it."""
        return {
            "id": self.id,
            "name": self.name,
            "type": self.type,
            "displayName": self.display_name,
            "description": "",
            "spec": json.dumps(self.spec),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
            "user": {"username": self.entity, "photoUrl": None, "email": None},
            "project": {"id": "UHJvamVjdDox", "name": self.project, "entityName": self.entity},
        }


class Views:
    """Saved views. A view is changed by its id: without one, there is one view more."""

    def __init__(self) -> None:
        self.all: list[View] = []
        self.operations: Operations = {
            "UpsertView2": self._upsert,
            "View": self._of_project,
            "ProjectViews": self._of_project,
        }

    def _upsert(self, v: Variables) -> Variables:
        old = [view for view in self.all if view.id == v.get("id")]
        if v.get("id") and not old:
            raise Refused(f"there is no view {v['id']}")
        place = v["entityName"], v["projectName"], v["type"], v["name"]
        id = v.get("id") or f"VmlldzoxMDA{len(self.all)}"
        view = View(id, *place, v.get("displayName") or "", json.loads(v["spec"]))
        if old:
            self.all[self.all.index(old[0])] = view
        else:
            self.all.append(view)
        return {"upsertView": {"view": view.node(), "inserted": not old}}

    def _of_project(self, v: Variables) -> Variables:
        """The views of a project: of one type, and where a name is given of this one."""
        project = v.get("projectName") or v.get("project") or v.get("name")
        place = v.get("entityName") or v.get("entity"), project, v.get("viewType") or "runs"
        found = [view for view in self.all if (view.entity, view.project, view.type) == place]
        found = [view for view in found if v.get("viewName") in (None, view.name)]
        edges = [{"node": view.node(), "cursor": view.id} for view in found]
        page = {"endCursor": None, "hasNextPage": False}
        return {"project": {"allViews": {"edges": edges, "pageInfo": page}}}
