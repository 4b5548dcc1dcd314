"""The aggregator: one consumer that buffers updates, applies their average, makes it durable, broadcasts."""
