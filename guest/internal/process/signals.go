package process

import (
	"strconv"
	"strings"
	"syscall"

	"fused/internal/fault"
)

const lastSignal = 64

// signalNames is what kill -l prints on amd64 and arm64; real-time signals
// have numbers only.
var signalNames = []string{
	"", "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
	"STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR",
	"SYS",
}

// SignalName is the name without SIG, or the number.
func SignalName(sig syscall.Signal) string {
	if int(sig) < len(signalNames) {
		return signalNames[sig]
	}
	return strconv.Itoa(int(sig))
}

// ParseSignal accepts "TERM", "SIGTERM" and "15".
func ParseSignal(text string) (syscall.Signal, error) {
	name := strings.TrimPrefix(strings.ToUpper(text), "SIG")
	for number, known := range signalNames {
		if number > 0 && known == name {
			return syscall.Signal(number), nil
		}
	}
	if number, err := strconv.Atoi(text); err == nil && number >= 1 && number <= lastSignal {
		return syscall.Signal(number), nil
	}
	return 0, fault.New("unknown_signal", "there is no signal "+strconv.Quote(text)+"; use a name like TERM or a number", "signal", text)
}
