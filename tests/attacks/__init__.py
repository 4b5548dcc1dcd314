"""What hostile members, outsiders and brokers try, and who stops it."""
