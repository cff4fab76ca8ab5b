"""Runs one config file: Ray, Serve and the applications are started, watched, and ended by a signal."""

import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from serve_app.cli.check import require_serves_schema, unplaced
from serve_app.cli.exit_codes import INTERRUPTED
from serve_app.cli.start.served_applications import living
from serve_app.cli.start.view import StartView
from serve_app.deploy.serve_env import for_cluster, found_on_nodes, with_environment
from serve_app.errors import ConfigError
from serve_app.facts.inventory import as_empty, ray_inventory
from serve_app.facts.nodes import ray_nodes
from serve_app.facts.serve_file import ApplicationSpec
from serve_app.ray_serve import NAMESPACE
from serve_app.status.served_file import Outcome, ServedFile, ServedFiles

if TYPE_CHECKING:  # It imports Ray.
    from serve_app.cli.start.watch import StartWatch

# Serve's status is read at these intervals in seconds: the first until everything has come up, the second afterwards.
START_INTERVAL_S, LATER_INTERVAL_S = 0.5, 2.0
# A second signal within this many seconds counts as the first one, since `timeout` and some shells send it twice.
SAME_SIGNAL_S = 1.0
# The controller of a Serve that runs already may take this many seconds to report its applications.
STATUS_TIMEOUT_S = 30.0
# After a signal, answers that are running have so many seconds to end. Serve is asked at this interval whether they
# have, and may take this long to say so.
DRAIN_S, DRAIN_INTERVAL_S, DRAIN_TIMEOUT_S = 30.0, 0.2, 10.0
# Characters of an error of Serve that the terminal shows.
MOST_REASON = 300


def _would_end(file: Path, lost: Sequence[str]) -> str:
    return (
        f"Serve runs applications that were deployed in another way since and that {file.name} does not have, so they "
        f"would end: {', '.join(lost)}. Nothing was changed. Add them to the file, or remove them from Serve, and read "
        "it again."
    )


@dataclass(frozen=True)
class Start:
    """What is to be started, that is the config, its applications, and the address of the cluster to join.

    `app_dir` is the folder of other import paths, and `replace` is as in `RunOptions`. `command` is what the user has
    called, and `http_options` are those that it has put in the place of the file's. `text` is that of the file.
    """

    file: Path
    document: Mapping[str, Any]
    applications: Sequence[ApplicationSpec]
    joins: str | None
    app_dir: Path
    replace: bool = False
    command: str = "serve-app run"
    http_options: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def names(self) -> list[str]:
        """Returns the names of all applications."""
        return [application.name for application in self.applications]

    @property
    def others(self) -> list[str]:
        """Returns the names of the applications that are not models."""
        return [application.name for application in self.applications if not application.is_model]

    @property
    def routers(self) -> list[str]:
        """Returns the names of the applications that are routers."""
        return [application.name for application in self.applications if application.is_router]


class _Stop(KeyboardInterrupt):
    """Is raised by the first SIGINT or SIGTERM."""


class _NothingServes(Exception):
    """No model of the file can be served."""


@dataclass
class Runner:
    """Starts what `start` names, shows it in `view`, and ends it.

    A Serve that was there before ends only by a signal. A run that fails leaves it, because it served before.
    """

    start: Start
    view: StartView
    # These say whether the file was deployed or Serve was started, and whether Serve was there before.
    _serves: bool = field(default=False, init=False)
    _found_serve: bool = field(default=False, init=False)
    _stopped_at: float | None = field(default=None, init=False)
    # This names the run in the notes by which others ask it to read its file again.
    _token: str = field(default_factory=lambda: secrets.token_hex(8), init=False)
    _served: ServedFiles = field(default_factory=ServedFiles, init=False)

    def run(self) -> int:
        """Starts everything and watches it until a signal. Returns the exit code."""
        code = 0
        try:
            self._heed_signals()
            self._start_ray()
            self._start_serve()
            self._watch()
        except KeyboardInterrupt:
            self._stopped_at = self._stopped_at or time.monotonic()
        except _NothingServes as error:
            self.view.event(f"{self.start.command} has failed: {error}")
            code = 1
        except SystemExit as error:
            code = self._code_of(error)
        except ConfigError:
            raise
        except Exception as error:
            import traceback

            with contextlib.suppress(OSError):
                traceback.print_exc()
            self.view.event(f"{self.start.command} has failed: {type(error).__name__}: {error}")
            code = 1
        finally:
            is_stopped = self._stop()
        return code if is_stopped else code or 1

    def _code_of(self, error: SystemExit) -> int:
        """Returns 0 if a signal ended the start, and otherwise the code with which a library has ended it."""
        if self._stopped_at is not None or error.code == signal.SIGTERM:  # Ray's own handler exits with the number.
            self._stopped_at = self._stopped_at or time.monotonic()
            return 0
        self.view.event(f"{self.start.command} has failed: a library has ended it with SystemExit: {error.code}")
        return error.code if isinstance(error.code, int) else int(error.code is not None)

    def _heed_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # A shell makes background jobs ignore SIGINT.
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            raise _Stop
        if time.monotonic() - self._stopped_at > SAME_SIGNAL_S:
            left = f"; Serve keeps running at {self.start.joins}" if self.start.joins else ""
            self.view.last_words(f"exiting immediately{left}")
            os._exit(INTERRUPTED)  # Ray's processes end with the one that started them.

    def _start_ray(self) -> None:
        self.view.wait_for(["Ray is starting" if self.start.joins is None else f"connecting to {self.start.joins}"])
        import ray.serve

        # This comes after the libraries, so that a ray.py in it is not taken for Ray. Ray gives workers the current
        # folder.
        sys.path.insert(0, str(self.start.app_dir))
        require_serves_schema(self.start.file)
        try:
            context = ray.init(address=self.start.joins or "local", namespace=NAMESPACE)
        except ConnectionError as error:
            raise ConfigError(
                f"{self.start.joins or 'Ray'} does not accept this program as a client: {error}. If the cluster uses "
                "tokens, export RAY_AUTH_MODE=token."
            ) from None
        self._heed_signals()  # Ray has set its own handler of SIGTERM.
        if self.start.joins is None:
            dashboard = f"dashboard http://{context.dashboard_url}, " if context.dashboard_url else ""
            # A Ray that a program starts asks for a token unless the variable says otherwise.
            has_token = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
            first = "export RAY_AUTH_MODE=token and " if has_token else ""
            self.view.event(
                f"Ray is up ({dashboard}{first}--address {context.address_info['gcs_address']} for other commands)"
            )
        else:
            self.view.event(f"joined the Ray cluster at {self.start.joins}")

    def _start_serve(self) -> None:
        self.view.wait_for(["Serve is starting"])
        from ray import serve

        from serve_app.ray_serve import controller, deploy

        document = self.start.document
        try:
            controller()
        except ValueError:
            document = self._with_settings_of_nodes()
            self._serves = True  # What has been started must be stopped.
        else:
            self._take_over()
        options = {name: document[name] for name in ("proxy_location", "grpc_options") if name in document}
        serve.start(
            http_options=document.get("http_options"), controller_options=document.get("controller_options"), **options
        )
        deploy(document)
        self._serves = True
        self._announce()
        self.view.event("Serve is up")

    def _announce(self) -> None:
        """Says which file is served here, so that it can be read again when the console asks for it."""
        import ray

        from serve_app.cli.start.watch import UNREACHABLE

        file, node = str(self.start.file.resolve()), str(ray.util.get_node_ip_address())
        try:
            self._served.announce(ServedFile(self._token, file, node, os.getpid(), self.start.command))
            self._served.keep_text(self._token, self.start.text)
        except UNREACHABLE as error:
            self.view.event(
                f"the console cannot have {self.start.file} read again, because Ray keeps no notes: {error}"
            )

    def _take_over(self) -> None:
        """Checks the Serve that runs already. Raises ConfigError if it would lose applications without --replace, and
        _NothingServes if no node could hold any model of the file."""
        from serve_app.ray_serve import serve_details

        self._found_serve = True
        running = living(serve_details(STATUS_TIMEOUT_S)["applications"])
        lost = sorted(running - set(self.start.names))
        if lost and not self.start.replace:
            raise ConfigError(
                f"Serve runs already at {self.start.joins}, and {self.start.file} does not have its applications "
                f"{', '.join(lost)}, so they would end. Add them to the file, start a Ray of its own with --address "
                "local, or give --replace to let them end."
            )
        self._require_a_place(self.start)
        self.view.event("Serve runs there already, so its http_options and controller_options stay as they are")
        if lost:
            self.view.event(f"because of --replace, these end with this run or before: {', '.join(lost)}")
        if kept := sorted(running & set(self.start.names)):
            self.view.event(f"taking over {', '.join(kept)}: each becomes what the file says, and ends with this run")

    def _require_a_place(self, start: Start) -> None:
        """Raises _NothingServes if a file has nothing but models that no node could hold, even an empty one. Serve
        would replace what it runs by them."""
        models = [application for application in start.applications if application.is_model]
        if not models or len(models) < len(start.applications) - len(start.routers):
            return
        self.view.wait_for([f"checking whether the nodes could hold the models of {start.file}"])
        from ray.exceptions import RayError

        try:
            problems = unplaced(models, ray_nodes(), as_empty(ray_inventory()))
        except (RayError, ConfigError) as error:
            why = " ".join(str(error).split())[:MOST_REASON]
            self.view.event(f"a node did not report its GPUs, so whether the models have a place is not checked: {why}")
            return
        if len(problems) < len(models):
            return
        for name, problem in problems.items():
            self.view.event(f"{name} cannot be placed: {problem}")
        raise _NothingServes(f"no model of {start.file} has a place on the nodes, so nothing was changed.")

    def _with_settings_of_nodes(self) -> Mapping[str, Any]:
        """Returns the config with the settings that the nodes of a joined cluster lack."""
        if self.start.joins is None:
            return self.start.document
        from serve_app.deploy.node_env import node_environments

        nodes = node_environments()
        for note in found_on_nodes(self.start.document, os.environ, nodes):
            self.view.line(f"note: {note}")
        settings = for_cluster(self.start.document, nodes)
        if settings:
            self.view.line(f"note: Ray was started without {len(settings)} of the settings of `serve-app node-env`; "
                           "Serve gets them with this config")  # fmt: skip
        return with_environment(self.start.document, settings)

    def _watch(self) -> None:
        """Shows how the applications come up, and then each change. A signal ends it. Raises _NothingServes if each
        application of the file has failed for good."""
        from serve_app.cli.start.watch import StartWatch

        watch = StartWatch(self.start.names, self.start.others, self.start.routers, self.view)
        while not watch.is_over:
            watch.look()
            self._hear(watch)
            time.sleep(START_INTERVAL_S)
        if watch.serves_nothing:
            raise _NothingServes(
                f"nothing in {self.start.file} can be served. The reasons are above. Correct the file and run it again."
            )
        while True:
            watch.look()
            self._hear(watch)
            time.sleep(LATER_INTERVAL_S)

    def _hear(self, watch: "StartWatch") -> None:
        """Reads the file again if somebody asks for it, and says what became of that."""
        from serve_app.cli.start.watch import UNREACHABLE

        with contextlib.suppress(*UNREACHABLE):  # Ray's head may be restarting, and the wish waits.
            if wishes := self._served.wishes(self._token):
                who = ", ".join(sorted({name for name in wishes.values() if name}))
                outcome = self._read_again(watch, f" for {who}" if who else "")
                for wish in wishes:
                    self._served.tell(self._token, wish, outcome)

    def _read_again(self, watch: "StartWatch", why: str) -> Outcome:
        """Deploys the file as it is now. If it is wrong or would end what others have deployed, nothing changes."""
        from serve_app.cli.start.model_folders import require_folders
        from serve_app.cli.start.reload import as_served, effects, ended_by, read_again, with_started_options
        from serve_app.cli.start.watch import UNREACHABLE
        from serve_app.ray_serve import deploy, serve_details

        file = self.start.file
        try:
            start = read_again(self.start)
            require_folders(start.applications)
            applications = serve_details(STATUS_TIMEOUT_S)["applications"]
            if lost := ended_by(start, self.start, applications):
                return self._refused(why, _would_end(file, lost))
            lines = effects(as_served(self.start, applications), start)
            if problem := self._lacks_a_place(start):
                raise ConfigError(problem)
        except ConfigError as error:
            self.view.event(f"{file} was read again{why}, but it is wrong, so nothing was changed: {error}")
            return Outcome(problem=str(error))
        except UNREACHABLE as error:
            reason = " ".join(str(error).split())[:MOST_REASON]
            return self._refused(why, f"Serve did not say what it runs, so nothing was changed: {reason}")
        try:
            deploy(start.document)
        except Exception as error:  # Serve's controller refuses it, or does not answer.
            reason = f"Serve did not deploy it: {' '.join(str(error).split())[:MOST_REASON]}"
            self.view.event(f"{file} was read again{why}. {reason}")
            return Outcome(problem=reason)
        self.start = with_started_options(start, self.start)
        with contextlib.suppress(*UNREACHABLE):  # Ray's head may be restarting.
            self._served.keep_text(self._token, start.text)
        watch.expect(start.names, start.others, start.routers)
        self.view.event(f"{file} was read again{why}: {'; '.join(lines) or 'it is as it was'}")
        return Outcome(lines=tuple(lines))

    def _refused(self, why: str, problem: str) -> Outcome:
        self.view.event(f"{self.start.file} was read again{why}. {problem}")
        return Outcome(problem=problem, is_conflict=True)

    def _lacks_a_place(self, start: Start) -> str:
        """Returns why no node could hold any model of a file, or an empty text if one could."""
        try:
            self._require_a_place(start)
        except _NothingServes as error:
            return str(error)
        return ""

    def _stop(self) -> bool:
        """Stops Serve if this run has started it or a signal ends it, and leaves or stops Ray. Returns whether it
        could."""
        ends_serve = self._serves and (self._stopped_at is not None or not self._found_serve)
        self._stopped_at = self._stopped_at or time.monotonic()
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            self.view.close()
            return True
        if self._serves:
            from serve_app.cli.start.watch import UNREACHABLE

            with contextlib.suppress(*UNREACHABLE):
                self._served.forget(self._token)
        try:
            self.view.close()
            if self._found_serve and not ends_serve:
                what = f"with the applications of {self.start.file}" if self._serves else "which was not taken over"
                self.view.event(f"leaving the Serve at {self.start.joins} running, {what}")
            else:
                self.view.event(
                    f"stopping when running answers have ended, within {DRAIN_S:.0f} s; press Ctrl-C again to exit "
                    "immediately"
                )
        finally:  # This happens whatever becomes of the terminal.
            problem = self._shut_down(ray, ends_serve)
        if problem:
            rest = f"it may go on at {self.start.joins}" if self.start.joins else "it ends with its Ray"
            self.view.event(f"Serve did not answer when it was told to stop, so {rest}: {problem}")
        self.view.event(f"{self.start.command} has stopped")
        return not problem

    def _drain(self) -> None:
        """Ends the models that serve, and waits for their answers. The routers pass these on meanwhile, and refuse new
        requests. A model that still loads has none and is not waited for. If Serve does not answer, it is stopped all
        the same."""
        from serve_app.cli.start.watch import UNREACHABLE

        with contextlib.suppress(*UNREACHABLE):
            self._end_serving()

    def _end_serving(self) -> None:
        from serve_app.cli.start.progress import read_states
        from serve_app.ray_serve import end_applications, serve_details

        states = read_states(serve_details(DRAIN_TIMEOUT_S)["applications"], self.start.others)
        serving = {name for name, item in states.items() if item.is_model and item.state == "ready"}
        if not serving:
            return
        end_applications(sorted(serving), DRAIN_TIMEOUT_S)
        deadline = time.monotonic() + DRAIN_S
        while serving & serve_details(DRAIN_TIMEOUT_S)["applications"].keys() and time.monotonic() < deadline:
            time.sleep(DRAIN_INTERVAL_S)

    def _shut_down(self, ray: ModuleType, ends_serve: bool) -> str:
        """Returns why Serve could not be stopped, or an empty text. Ray's head may be dead, for example."""
        try:
            if ends_serve:
                from ray import serve

                self._drain()
                serve.shutdown()
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:MOST_REASON]}"
        finally:
            ray.shutdown()
        return ""
