"""The comparison once more on a real model: fewer methods and settings, with LoRA, by the same search and store."""
