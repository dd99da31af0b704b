"""The `firecracker` driver: machines in Firecracker's jail, configured and watched over its API socket.

Held to Firecracker 1.16.1 (`versions`). Where a file says "the reference", it means the behaviour of that release.
"""
