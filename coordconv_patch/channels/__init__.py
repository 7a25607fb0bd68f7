"""The coordinate channels: blocks that a convention is a list of, one kind a file."""
