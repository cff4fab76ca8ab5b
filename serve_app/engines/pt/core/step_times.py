"""Keeps how long steps take, by the number of rows, and predicts how much longer a step takes with more tokens.

This is pure bookkeeping without a clock. All times are in seconds.
"""

# A new time moves what is known by these shares, a shorter one by the larger share. What else runs on the machine only
# makes steps longer, so the shorter times are those of the steps themselves.
DOWN, UP = 0.7, 0.1
# So many times have to be known before they are compared. The first step with a new shape also prepares kernels.
FEW = 3
# A time that differs by more than this factor from what was known is a surprise.
SURPRISE = 1.3
# A step without drafted tokens that could have had some lowers what they are thought to cost by this share. So a figure
# that was measured in a bad moment is measured again, the later the further it is from paying.
FORGET = 1 / 1024


class Typical:
    """This is what a step takes when nothing else holds it up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0

    def add(self, seconds: float) -> bool:
        """Takes a new time, and returns whether it is a surprise, as the first few are."""
        is_known = self.count >= FEW and self.seconds / SURPRISE < seconds < self.seconds * SURPRISE
        self.count += 1
        share = 1.0 if self.count == 1 else DOWN if seconds < self.seconds else UP
        self.seconds += share * (seconds - self.seconds)
        return not is_known


class StepTimes:
    """Has a time for each number of rows and of drafted tokens that occurs, which `max_num_seqs` and
    `num_speculative_tokens` bound."""

    def __init__(self) -> None:
        self._plain: dict[int, Typical] = {}
        self._drafted: dict[int, dict[int, Typical]] = {}

    def add_plain(self, rows: int, seconds: float) -> bool:
        """Takes the time of a step with one token in each row, and returns whether it is a surprise."""
        return self._plain.setdefault(rows, Typical()).add(seconds)

    def add_drafted(self, rows: int, more: int, seconds: float) -> None:
        """Takes the time of a step with so many tokens `more` than one in each row."""
        self._drafted.setdefault(rows, {}).setdefault(more, Typical()).add(seconds)

    def forget(self, rows: int) -> None:
        """Lowers what drafted tokens are thought to cost, because they were not tried."""
        plain = self._plain[rows].seconds if rows in self._plain else 0.0
        for drafted in self._drafted.get(rows, {}).values():
            drafted.seconds -= FORGET * max(0.0, drafted.seconds - plain)

    def ratio(self, rows: int, more: int) -> float | None:
        """Returns how many times as long a step with so many tokens `more` takes, or None if there is no time yet of a
        step without them.

        A number of rows that was not tried yet has the figure of the next smaller one that was. A token costs no less
        with more rows, so what does not pay there need not be tried. If there is none, they are taken to cost nothing.
        """
        plain = self._plain.get(rows)
        if plain is None or plain.count < FEW or plain.seconds <= 0:
            return None
        return 1 + more * self._per_token(rows, more) / plain.seconds

    def _per_token(self, rows: int, more: int) -> float:
        """Returns the seconds of one more token, by the step that is most like one with `more` of them."""
        known = max((number for number in self._drafted if number <= rows and number in self._plain), default=None)
        if known is None:
            return 0.0
        tokens, drafted = min(self._drafted[known].items(), key=lambda item: abs(item[0] * rows - more * known))
        return max(0.0, drafted.seconds - self._plain[known].seconds) / tokens
