"""Benchmarks of trl-qtarget: `python -m benchmarks.head`, `.memory`, `.step`, and `.report` for a table of results."""
