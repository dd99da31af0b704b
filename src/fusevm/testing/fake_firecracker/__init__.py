"""A Firecracker without KVM, and its jailer: what runs where the real one cannot.

A separate process that keeps the reference's rules (paths, fields, order, states, limits, faults known of 1.16.1),
written down here once more so that it shares no mistake with the driver. Its guests are real: `qemu` boots the given
kernel, initramfs and disks in emulation; `process` runs the agent as an ordinary process, for tests of hundreds.
`install` writes the two programs.
"""
