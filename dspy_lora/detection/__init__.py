"""Which domain is this text."""
