"""The second distribution: where it comes from."""
