"""computer-host's machine API beside Fuse's own: its bodies, words and defaults, over the same machines."""
