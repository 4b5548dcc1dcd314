"""The text task, small enough to be simulated in seconds: ``examples.simulation.small_text:SmallText``."""

from worker_client.tasks.text import Text


class SmallText(Text):
    """A transformer of one layer that looks back on 32 characters: 22 thousand parameters."""

    def __init__(self) -> None:
        super().__init__(width=32, layers=1, heads=2, length=32)
