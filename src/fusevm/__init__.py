"""Fuse: a control plane for microVM sandboxes on your own servers."""

__version__ = "0.1.0"
