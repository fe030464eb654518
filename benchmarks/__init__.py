"""Benchmarks of trl-qtarget: `python -m benchmarks` runs all of them, and each module is a command of its own."""
