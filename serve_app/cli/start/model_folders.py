"""Says which folders of a file's models no node of the cluster has."""

from collections.abc import Mapping, Sequence

from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import draft_path, model_path
from serve_app.facts.serve_file import ApplicationSpec

# A node has this many seconds to look.
TIMEOUT_S = 30.0


def require_folders(applications: Sequence[ApplicationSpec]) -> None:
    """Raises ConfigError with a line for each model or draft model that is a folder which no living node has. Nodes
    other than this one are asked only for what this one lacks. Relative paths are not looked at, because they count
    from a folder that Serve chooses. Raises RayError if a node does not answer."""
    wanted = {item.name: item.model_settings() for item in applications if item.is_model}
    models = {name: config.model for name, config in wanted.items()}
    drafts = {name: config.speculative.model for name, config in wanted.items() if config.speculative}
    named = [(name, text, False) for name, text in models.items()]
    named += [(name, text, True) for name, text in drafts.items() if text]
    found = problems_here([item for item in named if item[1].startswith(("/", "~"))])
    if found:
        found = _elsewhere_too(found)
    if found:
        raise ConfigError("\n".join(f"{name}: {problem}" for (name, _, _), problem in found.items()))


Named = tuple[str, str, bool]


def problems_here(named: Sequence[Named]) -> dict[Named, str]:
    """Returns what is wrong on this node with folders, each of which has its model's name and whether it is a draft
    model's."""
    problems = {}
    for item in named:
        try:
            (draft_path if item[2] else model_path)(item[1])
        except ConfigError as error:
            problems[item] = str(error)
    return problems


def _elsewhere_too(here: Mapping[Named, str]) -> dict[Named, str]:
    """Returns those of the problems that the other nodes have, too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    if not others:
        return dict(here)
    look = ray.remote(num_cpus=0, max_retries=0)(problems_here)
    tasks = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(list(here))
        for node in others
    ]
    seen = ray.get(tasks, timeout=TIMEOUT_S)
    return {item: problem for item, problem in here.items() if all(item in problems for problems in seen)}
