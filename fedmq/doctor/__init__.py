"""``fedmq doctor``: is all that a run needs there, and what is to be changed if not."""
