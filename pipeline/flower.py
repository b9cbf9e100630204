"""Federated training over a network with Flower: the same sites and the same server behind its apps.

An optional extra. Flower carries requests and replies between one SuperLink and a SuperNode per site; what a site
computes and how weights are averaged is that of `fpt federate`. `write_app` writes the folder that `flwr run` starts.
Its messages are not encrypted unless SuperLink and SuperNodes are started with certificates.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import say
from pipeline.federation import conduct, plan_rounds, site_at
from pipeline.project import open_study
from schemas.errors import PlatformError, SettingsError
from schemas.federated import Partition, RoundLog

if TYPE_CHECKING:
    from stages.federate.messages import Failure, Replies, Reply, Request
    from stages.federate.site import Site

__all__ = ["GridExchange", "client_app", "serve", "server_app", "site_of", "write_app"]  # noqa: F822 - made by __getattr__

FAILED, KIND, NAME = "failed", "kind", "name"
"""Keys of the values of a message: reason of a failure, kind of a request, name of the site that replies."""
POLL = 1.0
"""Seconds between two looks at the connected nodes."""

_APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fpt-federated"
version = "1.0.0"
description = "Federated training of fpt"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fpt"

[tool.flwr.app.components]
serverapp = "{module}:server_app"
clientapp = "{module}:client_app"

[tool.flwr.app.config]
params = ""
output = ""
method = ""
sites = 2
rounds = 0
local-epochs = 1
mu = 0.0
wait-seconds = 3600
"""


def write_app(folder: Path) -> Path:
    """Write the folder that `flwr run` starts, and return it.

    Raises:
        StorageError: If it cannot be written.
    """
    from stages.files import atomic_write

    atomic_write(folder / "pyproject.toml", _APP.format(module=__name__).encode())
    return folder


def _flower() -> tuple[Any, Any, Any]:
    """Return the modules of Flower for apps, clients and servers.

    Raises:
        PlatformError: If Flower is not installed.
    """
    try:
        from flwr import app, clientapp, serverapp
    except ImportError as error:
        raise PlatformError(
            f"The package flwr, which carries federated training over a network, cannot be imported: {error}.",
            "It is not installed with fpt.",
            'Run: pip install "fpt-vit[federated]" (docs/federated.md tells when it needs an environment of its own).',
        ) from None
    return app, clientapp, serverapp


def site_of(node: Mapping[str, Any]) -> Site:
    """Return the site of a SuperNode.

    Args:
        node: Its `--node-config`: `params` (path of the study's params.yaml) and `site` (name). A manifest with a site
            column is reduced to this site. With `sites`, `partition` and `seed`, sites are simulated.

    Raises:
        SettingsError: If `params` or `site` is missing, or the manifest has no such site.
    """
    from stages.federate.partition import simulate, sites_of
    from stages.manifest import read_manifest

    missing = [name for name in ("params", "site") if not node.get(name)]
    if missing:
        raise SettingsError(
            "The node cannot be started.", [(f"--node-config {name}", "is missing") for name in missing]
        )
    study, name = open_study(Path(str(node["params"])), _assignments(node)), str(node["site"])
    manifest = read_manifest(study.manifest)
    if "sites" in node:
        rule = Partition.parse(int(node["sites"]), str(node.get("partition", "iid")), int(node.get("seed", 0)))
        manifests = simulate(manifest, rule)
    else:
        # Without a column, a study has the images of one site.
        manifests = sites_of(manifest) if any(row.site is not None for row in manifest.rows) else {name: manifest}
    if name not in manifests:
        raise SettingsError(f"The manifest has no site {name!r}.", [("sites", ", ".join(manifests))])
    return site_at(study, study.files(manifest), name, manifests[name])


def _assignments(config: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a configuration: its method, if it names one."""
    return [f"method={config['method']}"] if config.get("method") else []


def _packed(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Return a record of Flower with tensors and values."""
    app, _, _ = _flower()
    return app.RecordDict({"tensors": app.ArrayRecord(dict(tensors)), "values": app.ConfigRecord(dict(values))})


def _content(request: Request) -> Any:
    """Return the record of a request."""
    return _packed(request.tensors, {**request.values, KIND: request.kind})


def _answered(content: Any, node: Mapping[str, Any]) -> Any:
    """Return the reply of a site to the content of a message."""
    from stages.federate.messages import Request, reason_of

    try:
        values = dict(content["values"])
        kind = values.pop(KIND)
        site = site_of(node)
        try:
            reply = site.answer(Request(kind, content["tensors"].to_torch_state_dict(), values))
        finally:
            site.close()
    except Exception as error:
        return _packed({}, {FAILED: reason_of(error), NAME: str(node.get("site", ""))})
    return _packed(reply.tensors, {**reply.values, NAME: site.name})


def _client_app() -> Any:
    """Return the app of a SuperNode."""
    app, clientapp, _ = _flower()
    client = clientapp.ClientApp()

    @client.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        content = _answered(message.content, {**context.node_config, **_of_run(context)})
        return app.Message(content=content, reply_to=message)

    return client


def _of_run(context: Any) -> dict[str, Any]:
    """Return the values of the run that a node follows: the method, if the run names one."""
    method = context.run_config.get("method")
    return {"method": method} if method else {}


class GridExchange:
    """Requests to nodes of Flower, by the name of their site."""

    def __init__(self, grid: Any, sites: int, seconds: float, first: Request) -> None:
        """Wait for the nodes, and send them a first request, whose replies name their sites.

        Args:
            grid: Grid of Flower.
            sites: Nodes to wait for.
            seconds: How long to wait for nodes, and for each reply.
            first: Request that is answered only once: a process of a node takes seconds to start.

        Raises:
            PlatformError: If there are not enough nodes in time.
            SettingsError: If two nodes have the same name.
        """
        self._grid, self._seconds = grid, seconds
        nodes, end = self._nodes(), time.monotonic() + seconds
        while len(nodes) < sites and time.monotonic() < end:
            time.sleep(POLL)
            nodes = self._nodes()
        if len(nodes) < sites:
            raise PlatformError(f"{len(nodes)} of {sites} nodes are connected after {seconds:g} s.")
        self._node_of: dict[str, int] = {}
        self._first = first
        self._answered: dict[int, Any] = self._send(dict.fromkeys(nodes, _content(first)))
        for node, content in self._answered.items():
            name = str(dict(content["values"]).get(NAME, "")) if content is not None else ""
            if not name or name in self._node_of:
                raise SettingsError(f"Node {node} has no site name of its own (is {name!r}).")
            self._node_of[name] = node

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted(self._node_of))

    def _nodes(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def _send(self, contents: Mapping[int, Any]) -> dict[int, Any]:
        """Send a record to each node, and return the records that came back; None for an error."""
        app, _, _ = _flower()
        messages = [
            app.Message(content=content, message_type=app.MessageType.TRAIN, dst_node_id=node)
            for node, content in contents.items()
        ]
        replies = self._grid.send_and_receive(messages, timeout=self._seconds)
        return {one.metadata.src_node_id: one.content if one.has_content() else None for one in replies}

    def __call__(self, names: Sequence[str], request: Request) -> Replies:
        """Send a request to sites, and return their replies."""
        from stages.federate.messages import Failure, Reply

        if request == self._first:
            found = self._answered
        else:
            found = self._send({self._node_of[name]: _content(request) for name in names})
        replies: dict[str, Reply | Failure] = {}
        for name in names:
            record = found.get(self._node_of[name])
            if record is None:
                replies[name] = Failure("no reply: its process ended, or the time is over")
                continue
            values = dict(record["values"])
            failed = values.pop(FAILED, None)
            del values[NAME]
            replies[name] = (
                Reply(record["tensors"].to_torch_state_dict(), values) if failed is None else Failure(str(failed))
            )
        return replies


def _server_app() -> Any:
    """Return the app of the SuperLink."""
    _, _, serverapp = _flower()
    server = serverapp.ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        serve(grid, context.run_config)

    return server


def serve(grid: Any, config: Mapping[str, Any]) -> None:
    """Run all rounds and write the bundle.

    Args:
        grid: Grid of Flower.
        config: Configuration of the run, as in `write_app`: `params` is a study with the classes and the LPM, whose
            images are not read; `output` gets `model/` and the summary.
    """
    from stages.federate.handshake import recipe
    from stages.federate.messages import Request
    from stages.manifest import read_manifest

    study = open_study(Path(str(config["params"])), _assignments(config))
    folder = Path(str(config["output"])) if config["output"] else study.outputs / "federated"
    rounds = int(config["rounds"]) or None
    plan = plan_rounds(study.settings, rounds, int(config["local-epochs"]), float(config["mu"]))
    train = study.settings.train.model_copy(update={"epochs": plan.epochs})
    settings = study.settings.model_copy(update={"train": train})
    first = Request("describe", values=recipe(settings))
    exchange = GridExchange(grid, int(config["sites"]), float(config["wait-seconds"]), first)
    files = study.files(read_manifest(study.manifest))
    conduct(study, files, exchange, exchange.names, plan, folder, _say_round)


def _say_round(log: RoundLog) -> None:
    say(f"Round {log.number}: {len(log.sites)} sites, left out: {', '.join(log.failed) or 'none'}")


def __getattr__(name: str) -> Any:
    """Make the apps at their first use: Flower looks them up by name, and importing this module needs no Flower."""
    makers = {"client_app": _client_app, "server_app": _server_app}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = makers[name]()
    return made
