"""A run as those who watch it see it: one view, for the terminal, ``fedmq status``, the demonstration and the page."""
