"""Has the API keys, which say who may call which models, and reads the file that names them.

A keys file is YAML:

    keys:
    - name: team-a
      sha256: 3c0f…               # 64 hex digits
      role: admin                 # user, if left out
      models: [tiny-pt]           # all models, if left out
      requests_per_minute: 60     # each limit is optional
      tokens_per_minute: 10000
      max_concurrent_requests: 4

The keys themselves are not stored anywhere, only their SHA-256. A fast hash without salt is right here, though it would
be wrong for passwords: an API key is long and random (`serve-app new-key` makes 256 bits), so it cannot be guessed or
looked up in a table. `SERVE_APP_API_KEYS` names plain keys without limits, separated by commas. They are hashed at
once, and a short one, which somebody could guess, is refused.
"""

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.access.limits import KeyLimits
from serve_app.errors import ConfigError, Forbidden, Unauthorized, nearest
from serve_app.terminal import notify
from serve_app.wire.asked_model import ALL_ADAPTERS, Asked, names_any

logger = logging.getLogger("ray.serve")

# This variable names the file with the keys. A config file sets it under `controller_options.runtime_env.env_vars`.
FILE_VARIABLE = "SERVE_APP_API_KEYS_FILE"
ENVIRONMENT = "SERVE_APP_API_KEYS"

# The file is checked at most once in this many seconds, and only when requests come.
CHECK_EVERY_S = 1.0

# A key in the environment has at least this length, since a word or a PIN could be guessed. `new-key` makes 46.
LEAST_KEY_CHARACTERS = 16

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
HOW_TO_HASH = (
    "Make the hash with: printf %s THE_KEY | sha256sum. Make a new key and its entry with: serve-app new-key NAME."
)

# pydantic's messages about patterns do not help. The input is not shown, because it may be a key in the wrong field.
WRONG_VALUES = {
    "name": "must be 1 to 64 letters, digits, '.', '_' or '-', and start with a letter or digit.",
    "sha256": f"must be the 64 hex digits of a SHA-256. {HOW_TO_HASH}",
    "role": "must be 'user' or 'admin'. Leave it out for a user.",
    "models": "must be a list of at least one model's name. Leave it out for all models.",
}

Positive = Annotated[int, Field(gt=0, strict=True)]
Role = Literal["user", "admin"]


class ApiKey(BaseModel):
    """This is one key as it is known here. `models` is None for all models. An adapter is a model of its own there, as
    ADAPTER or MODEL:ADAPTER, and MODEL:* stands for all adapters of a model. Limits are per minute, and None means no
    limit. A key of the role "admin" may also change the cluster from the console (docs/console.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(strict=True, pattern=rf"^({NAME}|env:\d+)$")]
    sha256: Annotated[str, Field(strict=True, pattern=r"^[0-9a-fA-F]{64}$")]
    models: Annotated[tuple[Annotated[str, Field(strict=True, min_length=1)], ...], Field(min_length=1)] | None = None
    role: Role = "user"
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_concurrent_requests: Positive | None = None

    @property
    def limits(self) -> KeyLimits:
        """Returns what the key may use. The result is false if nothing is limited."""
        return KeyLimits(self.requests_per_minute, self.tokens_per_minute, self.max_concurrent_requests)

    @property
    def is_admin(self) -> bool:
        """Returns whether the key may change the cluster, and not only use its models."""
        return self.role == "admin"

    def may_use(self, asked: Asked) -> bool:
        """Returns whether the key may use this model or adapter."""
        return self.models is None or asked.is_in(self.models)

    def may_use_all_of(self, model: str) -> bool:
        """Returns whether the key may use a model and all of its adapters, so nobody has to know which is asked."""
        every = Asked(model, ALL_ADAPTERS)
        return self.models is None or (model in self.models and every.qualified in self.models)

    def require_any_of(self, model: str, adapters: Collection[str]) -> None:
        """Raises Forbidden if the key may use neither a model nor any of these adapters of it."""
        if self.models is not None and not names_any(model, adapters, self.models):
            self.require(Asked(model))

    def require(self, asked: Asked) -> None:
        """Raises Forbidden if the key may not use the model or adapter."""
        if not self.may_use(asked):
            names = ", ".join(self.models or ())
            text = f"The API key '{self.name}' may not use the model '{asked.name}', only {names}."
            raise Forbidden(text, param="model")


class KeyRing:
    """Holds all keys that are known at one time."""

    def __init__(self, keys: Sequence[ApiKey]):
        self.keys = tuple(keys)
        self._hashes = [(bytes.fromhex(key.sha256), key) for key in self.keys]

    def find(self, authorization_header: bytes | None, x_api_key: bytes | None = None) -> ApiKey:
        """Returns the key that a request shows, as `Authorization: Bearer KEY` or else as `x-api-key: KEY`.

        Every key is compared in constant time, so the time does not reveal which one was nearly right. It takes about
        0.1 µs a key. Raises Unauthorized.
        """
        shown = _bearer(authorization_header) or (x_api_key or b"").strip()
        if not shown:
            raise Unauthorized("No API key was given. Send it in the header 'Authorization: Bearer YOUR_KEY'.")
        digest = hashlib.sha256(shown).digest()
        found = None
        for known, key in self._hashes:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise Unauthorized("The API key is not known here. Ask the operator of this service for one.")
        return found


def _bearer(header: bytes | None) -> bytes:
    """Returns what follows `Bearer` in any case (RFC 9110, 11.1), or an empty value for another scheme."""
    scheme, _, token = (header or b"").strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def configured_keys() -> "KeySource":
    """Returns the keys that this process's environment names. Raises ConfigError if something is wrong with them."""
    file = os.environ.get(FILE_VARIABLE)
    if file is not None and not file.strip():
        raise ConfigError(f"{FILE_VARIABLE}: it is set but empty. Name the file of API keys, or unset the variable.")
    return KeySource(None if file is None else Path(file).expanduser())


class KeySource:
    """Holds the keys of a file and of the environment, and reads them anew when the file changes.

    Access is open, so that no key is needed, only if neither names keys. This is decided once: a file that names none,
    that breaks, or that vanishes later opens nothing. Raises ConfigError for a mistake at the start, such as a variable
    that is set but empty.
    """

    def __init__(
        self, path: Path | None, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ):
        self._path = path
        self._environ = dict(environ)
        self._clock = clock
        self._seen = None if path is None else _signature(path)
        self._checked_at = clock()
        self._complained: str | None = None
        keys = read_keys(path, self._environ)
        self.ring = KeyRing(keys)
        self.is_open = path is None and not keys

    def shut(self) -> None:
        """Requires a key from now on. If no key is known here, nobody may enter."""
        self.is_open = False

    def refresh(self) -> KeyRing:
        """Returns the current keys. It checks the file at most every `CHECK_EVERY_S` seconds, and mistakes in it are
        logged.

        While the file is wrong or missing, the keys that were read last stay valid.
        """
        now = self._clock()
        if self._path is None or now - self._checked_at < CHECK_EVERY_S:
            return self.ring
        self._checked_at = now
        # The signature is taken before the file is read, so a change in between is seen the next time.
        signature = _signature(self._path)
        if signature is not None and signature == self._seen:
            return self.ring
        self._seen = signature
        try:
            self.ring = KeyRing(read_keys(self._path, self._environ))
        except ConfigError as error:
            if str(error) != self._complained:
                logger.error("The API keys could not be read again, and the previous ones stay valid. %s", error)
                notify(f"WARNING: The API keys could not be read again, and the previous ones stay valid. {error}")
            self._complained = str(error)
        else:
            logger.info("%d API keys were read from %s.", len(self.ring.keys), self._path)
            self._complained = None
        return self.ring


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Returns what changes with the file: time in ns, size in bytes, and inode. Returns None if it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_keys(path: Path | None, environ: Mapping[str, str]) -> list[ApiKey]:
    """Returns the keys of the file and of `SERVE_APP_API_KEYS`. Raises ConfigError with a line for each mistake."""
    keys = [(f"{path}: keys[{number}]", key) for number, key in enumerate(_read_file(path) if path else ())]
    plain = _plain_keys(environ.get(ENVIRONMENT))
    hashed = [ApiKey(name=f"env:{number}", sha256=sha256_of(key)) for number, key in enumerate(plain)]
    keys += [(f"{ENVIRONMENT}[{number}]", key) for number, key in enumerate(hashed)]
    problems = []
    for field, what in (("name", "the name"), ("sha256", "the key")):
        first: dict[str, str] = {}
        for where, key in keys:
            value = getattr(key, field).lower() if field == "sha256" else getattr(key, field)
            if value in first:
                problems.append(f"{where}.{field}: {what} is also that of {first[value]}. Remove one of the two.")
            first.setdefault(value, where)
    if problems:
        raise ConfigError("\n".join(problems))
    return [key for _, key in keys]


def sha256_of(key: str) -> str:
    """Returns the 64 hex digits by which a key is known."""
    return hashlib.sha256(key.encode()).hexdigest()


def _plain_keys(text: str | None) -> list[str]:
    """Returns the keys in the environment variable. Messages name places and not keys, because they go to logs."""
    if text is None:
        return []
    if not text.strip():
        raise ConfigError(f"{ENVIRONMENT}: it is set but empty. Write the keys into it, or unset the variable.")
    keys = [part.strip() for part in text.split(",")]
    for number, key in enumerate(keys):
        if not key:
            raise ConfigError(f"{ENVIRONMENT}[{number}]: it is empty. Remove the comma, or unset the variable.")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(
                f"{ENVIRONMENT}[{number}]: it has a character that no header can carry. Use letters, digits, - and _."
            )
        if len(key) < LEAST_KEY_CHARACTERS:
            raise ConfigError(
                f"{ENVIRONMENT}[{number}]: it has {len(key)} characters, and fewer than {LEAST_KEY_CHARACTERS} can be "
                "guessed. Make a key with: serve-app new-key NAME."
            )
    return keys


class _Loader(yaml.SafeLoader):
    """Loads YAML, and refuses two equal fields, of which the last one would silently win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_file(path: Path) -> list[ApiKey]:
    document = _load(path)
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ConfigError(f"{path}: this is not a keys file, as it has no list of 'keys'. 'keys: []' lets nobody in.")
    problems = [f"{path}: unknown field '{name}'. The only field is 'keys'." for name in document if name != "keys"]
    keys = []
    for number, entry in enumerate(document["keys"]):
        where = f"{path}: keys[{number}]"
        if found := _entry_problems(entry, where):
            problems += found
        else:
            keys.append(ApiKey.model_validate(entry))
    if problems:
        raise ConfigError("\n".join(problems))
    return keys


def _load(path: Path) -> object:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not a text file in UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. This should be the file of API keys.") from None
    except yaml.MarkedYAMLError as error:  # Its own text would show a piece of the file.
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise ConfigError(f"{path}: it is not valid YAML{line}: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{path}: it is not valid YAML.") from None


def _entry_problems(entry: object, where: str) -> list[str]:
    """Returns one line for each mistake in one key's entry."""
    if not isinstance(entry, dict):
        return [f"{where}: it must be a mapping such as {{name: team-a, sha256: …}}."]
    problems = []
    for name in entry:
        if name == "key":
            problems.append(f"{where}.key: plain keys are not stored. Write sha256 instead. {HOW_TO_HASH}")
        elif name not in ApiKey.model_fields:
            hint = nearest(name, ApiKey.model_fields) or f" Known fields: {', '.join(ApiKey.model_fields)}."
            problems.append(f"{where}: unknown field '{name}'.{hint}")
    try:
        ApiKey.model_validate({name: value for name, value in entry.items() if name in ApiKey.model_fields})
    except ValidationError as error:
        wrong = {item["loc"][0]: item["type"] for item in error.errors()}
        has_key = "key" in entry
        problems += [f"{where}.{_wrong(str(f), kind)}" for f, kind in wrong.items() if not (has_key and f == "sha256")]
    if isinstance(name := entry.get("name"), str) and name.startswith("env:"):
        problems.append(f"{where}.name: {WRONG_VALUES['name']}")
    return problems


def _wrong(field: str, kind: str) -> str:
    if kind == "missing":
        return f"{field}: it is missing. {HOW_TO_HASH if field == 'sha256' else 'Every key has one for the logs.'}"
    return f"{field}: {WRONG_VALUES.get(field, 'must be a whole number above 0. Leave it out for no limit.')}"
