"""Kill everything, at any moment, and count afterwards. ``make chaos``, or ``python -m tests.chaos``."""
