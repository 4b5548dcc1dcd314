"""The round machine and what it is made of: no I/O, clock, threads or randomness."""
