"""What is done with a chunk's logits between two matrix products: plain torch operations, or Triton kernels."""
