package boot

// The syscall package lacks the number on this architecture.
const sysFinitModule = 313
