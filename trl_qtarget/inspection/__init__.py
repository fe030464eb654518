"""What is the model being taught? Targets of real examples, on a page, during training, and as curves."""
