"""What the command line mounts: options, commands and the text of their results."""
