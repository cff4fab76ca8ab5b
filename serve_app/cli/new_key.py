"""`serve-app new-key` makes a key for a client, and its entry for the keys file."""

import re
import secrets
import sys

import yaml

from serve_app.access.keys import NAME, WRONG_VALUES, Role, sha256_of
from serve_app.errors import ConfigError


def new_key(name: str, role: Role = "user") -> int:
    """Prints a new key to stderr, and its entry for the keys file to stdout, so that `>> keys.yaml` keeps no key.

    Raises ConfigError for a name that the file would not accept.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"'{name}' cannot be the name of a key: it {WRONG_VALUES['name']}")
    key = f"sk-{secrets.token_urlsafe(32)}"  # 256 bits, 43 characters
    print(key, file=sys.stderr)
    print("This is the key. It is shown only once and stored nowhere, so give it to its user now.", file=sys.stderr)
    print("The entry below belongs under 'keys:' in the keys file. It does not reveal the key.", file=sys.stderr)
    entry = {"name": name, "sha256": sha256_of(key)} | ({} if role == "user" else {"role": role})
    print(yaml.safe_dump([entry], sort_keys=False), end="")
    return 0
