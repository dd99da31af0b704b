"""What Firecracker's own advice for production hosts asks of a machine, as numbered checks.

`facts` looks; `cpu`, `memory`, `kernel` and `machine` judge what was seen, without looking themselves; `table` lists
the checks in order.
"""
