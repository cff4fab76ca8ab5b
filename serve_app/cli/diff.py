"""`serve-app diff` says what deploying another config file would start, stop and restart, and whether the result
fits."""

from pathlib import Path

import yaml

from serve_app.cli.adapter_notes import refused_later
from serve_app.cli.changes import Change, changes, for_all, not_applied
from serve_app.cli.check import dangling_names, require_serves_schema, require_valid
from serve_app.cli.engine_args import doubtful_engine_args
from serve_app.cli.plan.plan import plan_of_file
from serve_app.errors import ConfigError
from serve_app.facts.serve_file import read_applications
from serve_app.planning.resolve import fix_lines, joint_lines

MARKS = {"starts": "+", "stops": "-", "restarts": "!", "changes in place": "~", "stays as it is": " "}


def diff(old: Path, new: Path, gpus: str | None, inventory: Path | None, address: str | None) -> int:
    """Prints what happens to each application. Returns 1 if the new file does not fit, else 0. Raises ConfigError."""
    for file in (old, new):
        require_valid(read_applications(file))
        require_serves_schema(file)
    before, after = (yaml.safe_load(file.read_text()) for file in (old, new))
    found = changes(before, after)
    for change in found:
        print("\n".join(lines_of(change)))
    for name in not_applied(before, after):
        print(f"note: {name} differs. `serve deploy` does not change it while Serve runs. Stop Serve and run it again.")
    for name in for_all(before, after):
        print(f"note: {name} differs. Serve applies it to every application.")
    before_it, after_it = read_applications(old), read_applications(new)
    in_place = {change.name for change in found if change.kind == "changes in place"}
    later = refused_later(before_it, after_it, in_place)
    for note in (*dangling_names(after_it), *doubtful_engine_args(after_it), *later):
        print(f"note: {note}")
    if not any(application.is_model for application in after_it):
        return 0
    try:
        made = plan_of_file(new, gpus, inventory, address)
    except ConfigError as error:
        raise ConfigError(f"the new file cannot be planned: {error}") from None
    for problem in made.problems:
        print(f"does not fit: {problem.model}: {problem.message}")
        print("".join(f"      {line}\n" for line in fix_lines(problem.fixes)), end="")
    print("".join(f"{line}\n" for line in joint_lines(made.joint_fixes)), end="")
    if made.fits:
        print("The new file's models fit together.")
    return 0 if made.fits else 1


def lines_of(change: Change) -> list[str]:
    """Returns the lines that say what happens to an application, and why."""
    restarts = "restarts replica by replica; streams continue, and new requests wait if it has only one replica"
    text = {"restarts": restarts}.get(change.kind, change.kind)
    return [f"{MARKS[change.kind]} {change.name}: {text}", *(f"      {reason}" for reason in change.why)]
