"""The host's network: namespaces, taps, nftables policy and DNS of the machines.

`network.HostNetwork` is the face towards the daemon; the other modules are its parts. What is inside a slot's namespace
is the same on every host and in every slot, so that a snapshot fits any slot; what is outside is unique.
"""
