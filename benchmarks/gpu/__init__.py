"""The run pack for a GPU that is at hand for half an hour: see README.md beside this file."""
