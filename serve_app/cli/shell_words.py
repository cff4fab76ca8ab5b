"""Splits a command line into words as a shell does, without running anything."""

import re
import shlex

from serve_app.errors import ConfigError

# These words may come before the command.
WRAPPERS = frozenset({"env", "exec", "nohup", "sudo", "time"})
_OPERATORS = set("();<>|&")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def shell_words(command: str) -> list[str]:
    """Returns the words of a command line. Those of nothing but operators, such as `&&` and `>`, are words too. Raises
    ConfigError for a quote that is not closed."""
    joined = re.sub(r"(?<=\s)\d(?=>)", "", re.sub(r"\\\r?\n", " ", command))
    lexer = shlex.shlex(joined, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConfigError(f"the command cannot be read: {error}. Close every quote.") from None


def is_operator(word: str) -> bool:
    """Returns whether a word is one of the shell's operators."""
    return bool(word) and set(word) <= _OPERATORS


def without_wrappers(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the variables that are set before a command, and the words of the command itself."""
    variables: dict[str, str] = {}
    for place, word in enumerate(words):
        if match := _ASSIGNMENT.fullmatch(word):
            variables[match[1]] = match[2]
        elif word not in WRAPPERS:
            return variables, words[place:]
    return variables, []
