"""What workers and the aggregator must agree on, and the only place that knows how bytes move."""
