-- Ports of the host that lead to machines. What else is to say about them is in the machine's record.

CREATE TABLE published_ports (
    protocol   TEXT NOT NULL CHECK (protocol IN ('tcp', 'udp')),
    host_port  INTEGER NOT NULL,
    id         TEXT NOT NULL UNIQUE,
    machine_id TEXT NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    PRIMARY KEY (protocol, host_port)
) STRICT, WITHOUT ROWID;

CREATE INDEX published_ports_by_machine ON published_ports (machine_id);
