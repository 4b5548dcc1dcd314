"""``python -m aggregator`` is ``fedmq aggregator``."""

from aggregator.cli import main

main()
