"""What a model is being taught: targets of real examples, token by token."""
