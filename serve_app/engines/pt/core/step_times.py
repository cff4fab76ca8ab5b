"""Keeps how long steps take, by the number of rows, and predicts how much longer a step takes with more tokens.

This is pure bookkeeping without a clock. All times are in seconds.
"""

# A new time moves the mean by this share. The first few times count by the least of them, because the first step with a
# new shape also prepares kernels and memory.
SHARE = 0.3
FIRST = 3
# A step without drafted tokens that could have had some lowers what they are thought to cost by this share. So a figure
# that was measured in a bad moment is measured again, the later the further it is from paying.
FORGET = 1 / 1024


class Mean:
    """This is a mean of the latest values."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Takes a new value."""
        self.count += 1
        if self.count == 1:
            self.value = value
        elif self.count <= FIRST:
            self.value = min(self.value, value)
        else:
            self.value += SHARE * (value - self.value)


class StepTimes:
    """Has a mean for each number of rows that occurs, which `max_num_seqs` bounds."""

    def __init__(self) -> None:
        self._plain: dict[int, Mean] = {}
        self._per_token: dict[int, Mean] = {}

    def add_plain(self, rows: int, seconds: float) -> None:
        """Takes the time of a step with one token in each row."""
        self._plain.setdefault(rows, Mean()).add(seconds)

    def add_drafted(self, rows: int, more: int, seconds: float) -> None:
        """Takes the time of a step with so many tokens `more` than one in each row."""
        if (plain := self._plain.get(rows)) is not None:
            self._per_token.setdefault(rows, Mean()).add(max(0.0, seconds - plain.value) / more)

    def forget(self, rows: int) -> None:
        """Lowers what drafted tokens are thought to cost, because they were not tried."""
        if (known := self._per_token.get(rows)) is not None:
            known.value *= 1 - FORGET

    def ratio(self, rows: int, more: int) -> float | None:
        """Returns how many times as long a step with so many tokens `more` takes, or None if there is no time yet of a
        step without them.

        A number of rows that was not tried yet has the figure of the next smaller one that was. A token costs no less
        with more rows, so what does not pay there need not be tried. If there is none, they are taken to cost nothing.
        """
        plain = self._plain.get(rows)
        if plain is None or plain.count < FIRST or plain.value <= 0:
            return None
        known = max((number for number in self._per_token if number <= rows), default=None)
        per_token = 0.0 if known is None else self._per_token[known].value
        return 1 + more * per_token / plain.value
