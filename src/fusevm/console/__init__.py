"""The web console: pages for people, in a process of its own.

It drives the REST API through `fusevm.sdk` like any other client and keeps no state but what it has read from there. It
holds the user's token, so it listens on loopback addresses only and lets in only whoever knows the key in the address
that it prints (`gate`). NiceGUI is imported by `main` and the pages, never by `config`.
"""
