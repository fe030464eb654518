"""The target: what Q is, for some tokens."""
