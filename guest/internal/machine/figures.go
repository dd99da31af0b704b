package machine

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Metrics renders the machine's figures as Prometheus text.
func Metrics(processes, streams int) string {
	var text strings.Builder
	gauge := func(name, help string, value float64) {
		fmt.Fprintf(&text, "# HELP %s %s\n# TYPE %s gauge\n%s %s\n", name, help, name, name, strconv.FormatFloat(value, 'f', -1, 64))
	}
	gauge("fused_uptime_seconds", "Time since the kernel started.", Uptime().Seconds())
	load := loadAverages()
	gauge("fused_load1", "Load average over one minute.", load[0])
	gauge("fused_load5", "Load average over five minutes.", load[1])
	gauge("fused_load15", "Load average over fifteen minutes.", load[2])
	memory := memoryInfo()
	gauge("fused_memory_total_bytes", "Memory of the machine.", memory["MemTotal"])
	gauge("fused_memory_available_bytes", "Memory available without swapping.", memory["MemAvailable"])
	var disk syscall.Statfs_t
	if syscall.Statfs("/", &disk) == nil {
		gauge("fused_overlay_total_bytes", "Size of the writable disk.", float64(disk.Blocks)*float64(disk.Bsize))
		gauge("fused_overlay_free_bytes", "Space of the writable disk that is available to users.", float64(disk.Bavail)*float64(disk.Bsize))
	}
	gauge("fused_processes", "Commands of users that are running.", float64(processes))
	gauge("fused_streams", "Streams in use on the channel.", float64(streams))
	return text.String()
}

func loadAverages() [3]float64 {
	var load [3]float64
	text, _ := os.ReadFile("/proc/loadavg")
	for i, field := range strings.Fields(string(text)) {
		if i < len(load) {
			load[i], _ = strconv.ParseFloat(field, 64)
		}
	}
	return load
}

// memoryInfo reads /proc/meminfo, in bytes.
func memoryInfo() map[string]float64 {
	info := map[string]float64{}
	text, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(text)) {
		name, rest, _ := strings.Cut(line, ":")
		if fields := strings.Fields(rest); len(fields) > 0 {
			kib, _ := strconv.ParseFloat(fields[0], 64)
			info[name] = kib * 1024
		}
	}
	return info
}

// MemoryBytes is the machine's memory; 0 when unknown.
func MemoryBytes() int64 { return int64(memoryInfo()["MemTotal"]) }

// BootID is the kernel's random name for this boot.
func BootID() string {
	text, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text))
}
