"""Bounds how many bytes of bodies one process holds at once, over all its requests."""

from collections import defaultdict
from collections.abc import Callable

from serve_app.errors import Overloaded, RequestTooLarge

# This many bytes of each body are free. The number of requests bounds their sum, and clients that send large bodies
# must not shut out ordinary ones.
FREE_BYTES = 64 * 2**10
RETRY_S = 1.0


class BodyBudget:
    """Lets all bodies together have at most `most()` bytes, and those of one owner, the name of a key, half of that.

    The owner None has no such share.
    """

    def __init__(self, most: Callable[[], int]):
        self._most = most
        self._held: dict[str | None, int] = defaultdict(int)
        self.held = 0

    def hold(self, owner: str | None = None) -> "Held":
        """Returns the account of one body, which grows while it arrives."""
        return Held(self, owner)

    def take(self, owner: str | None, count: int) -> None:
        """Takes `count` more bytes. Raises Overloaded, and takes nothing, if there is no room for them."""
        most = self._most()
        is_over_share = owner is not None and self._held[owner] + count > most // 2
        if is_over_share or self.held + count > most:
            whose = "of this API key" if is_over_share else "here"
            limit = most // 2 if is_over_share else most
            raise Overloaded(
                f"The request bodies {whose} may have {limit} bytes together, so there is no room for this one now. "
                "Try again when others have been answered.",
                retry_after_s=RETRY_S,
            )
        self._held[owner] += count
        self.held += count

    def give_back(self, owner: str | None, count: int) -> None:
        """Makes these bytes free again."""
        self.held -= count
        self._held[owner] -= count
        if not self._held[owner]:
            del self._held[owner]


class Held:
    """Counts the bytes of one body while it is held."""

    def __init__(self, budget: BodyBudget, owner: str | None):
        self._budget = budget
        self._owner = owner
        self._size = 0
        self._charged = 0

    def grow(self, count: int) -> None:
        """Counts `count` more bytes. Raises Overloaded if there is no room for them."""
        self._size += count
        more = max(0, self._size - FREE_BYTES) - self._charged
        if more:
            self._budget.take(self._owner, more)
            self._charged += more

    def release(self) -> None:
        """Gives all bytes of the body back. A second call does nothing."""
        self._budget.give_back(self._owner, self._charged)
        self._size = self._charged = 0


class NoBody(Held):
    """This is the account of a request that needs no key. It may not bring a body, because without a key's name nothing
    would bound what one client takes of the budget."""

    def __init__(self) -> None:
        """Makes an account without a budget."""

    def grow(self, count: int) -> None:
        """Raises RequestTooLarge at the first byte of a body."""
        if count:
            raise RequestTooLarge("This address needs no API key and takes no body. Send the request without one.")

    def release(self) -> None:
        """Does nothing, because nothing was held."""
