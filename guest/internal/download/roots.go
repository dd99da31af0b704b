package download

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
)

// bundles are where distributions keep their CA certificates in one file, and
// folders where in many.
var (
	bundles = []string{
		"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
		"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
	}
	folders = []string{"/etc/ssl/certs", "/etc/pki/tls/certs"}
)

var errNoRoots = errors.New("the machine has no CA certificates to check it with; install ca-certificates in the image or by the startup script")

// systemRoots reads the machine's CA certificates. Unlike x509.SystemCertPool it
// looks anew each time: a startup script may just have installed them.
// SSL_CERT_FILE in the agent's own environment names another file.
func systemRoots() (*x509.CertPool, error) {
	files := bundles
	if own := os.Getenv("SSL_CERT_FILE"); own != "" {
		files = []string{own}
	}
	for _, path := range files {
		pool := x509.NewCertPool()
		if text, err := os.ReadFile(path); err == nil && pool.AppendCertsFromPEM(text) {
			return pool, nil
		}
	}
	pool, found := x509.NewCertPool(), false
	for _, folder := range folders {
		paths, _ := filepath.Glob(filepath.Join(folder, "*.pem"))
		for _, path := range paths {
			text, err := os.ReadFile(path)
			found = err == nil && pool.AppendCertsFromPEM(text) || found
		}
	}
	if !found {
		return nil, errNoRoots
	}
	return pool, nil
}
