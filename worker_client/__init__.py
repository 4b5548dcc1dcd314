"""The worker's side: trains on data that never leaves it and publishes updates."""
