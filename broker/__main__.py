"""``python -m broker`` is ``fedmq broker``."""

from broker.cli import main

main()
