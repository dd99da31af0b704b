"""The host daemon's shell: what a server needs to run machines.

`main` puts it together. Above the driver: `journal` (what is intended and known), `machines` and `machine` (one task
for each), `quarters` and `wiring` (what a machine occupies), `sweep` (what nobody owns), `api` with `relay` and
`boundary` (who may ask). Below: `vmm`, `net`, `disk`, `images`, `cgroup`, `process`, `channel`, and `run` for tools.
"""
