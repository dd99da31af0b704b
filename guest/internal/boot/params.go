package boot

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Params are the agent's words on the kernel command line.
type Params struct {
	Nonce    string
	Address  netip.Prefix // invalid: no network device is configured
	Gateway  netip.Addr   // invalid: no default route
	MTU      int          // 0: the device's own
	DNS      []string
	Hostname string
}

// ParseParams reads a kernel command line; words of others are ignored.
func ParseParams(commandLine string) (Params, error) {
	var p Params
	var err error
	for _, word := range strings.Fields(commandLine) {
		name, value, _ := strings.Cut(word, "=")
		switch name {
		case "fuse.nonce":
			p.Nonce = value
		case "fuse.hostname":
			p.Hostname = value
		case "fuse.dns":
			p.DNS, err = parseDNS(value)
		case "fuse.ip":
			err = p.parseIP(value)
		}
		if err != nil {
			return p, fmt.Errorf("kernel command line: %s: %w", word, err)
		}
	}
	return p, nil
}

func parseDNS(value string) ([]string, error) {
	var servers []string
	for _, server := range strings.Split(value, ",") {
		if _, err := netip.ParseAddr(server); err != nil {
			return nil, err
		}
		servers = append(servers, server)
	}
	return servers, nil
}

// parseIP reads <address>/<prefix>[,<gateway>[,<mtu>]].
func (p *Params) parseIP(value string) error {
	fields := strings.Split(value, ",")
	var err error
	if p.Address, err = netip.ParsePrefix(fields[0]); err != nil {
		return err
	}
	if !p.Address.Addr().Is4() {
		return fmt.Errorf("only IPv4 is supported")
	}
	if len(fields) > 1 && fields[1] != "" {
		if p.Gateway, err = netip.ParseAddr(fields[1]); err != nil {
			return err
		}
	}
	if len(fields) > 2 && fields[2] != "" {
		p.MTU, err = strconv.Atoi(fields[2])
	}
	return err
}
