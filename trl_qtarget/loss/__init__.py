"""The loss toward a target, without the logits."""
