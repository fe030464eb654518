"""Other people's training programs, each taught the target by its own plugin interface: one module each."""
