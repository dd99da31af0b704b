-- The host daemon's journal. One row per machine, its intent beside it, its reserved numbers, and who may give orders.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE machines (
    id          TEXT PRIMARY KEY,
    cluster     TEXT NOT NULL,
    uid         TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    phase       TEXT NOT NULL,
    -- What admission adds up.
    cpus        INTEGER NOT NULL,
    memory_mib  INTEGER NOT NULL,
    disk_bytes  INTEGER NOT NULL,
    -- model.machine.Machine as JSON.
    record      BLOB NOT NULL,
    UNIQUE (cluster, uid, incarnation)
) STRICT, WITHOUT ROWID;

-- The intent: written before side effects, gone when they are complete or undone. At most one per machine.
CREATE TABLE operations (
    machine_id    TEXT PRIMARY KEY REFERENCES machines (id) ON DELETE CASCADE,
    kind          TEXT NOT NULL CHECK (kind IN ('create', 'start', 'stop', 'delete')),
    step          TEXT NOT NULL,
    started_at_ms INTEGER NOT NULL,
    -- When the caller stops waiting; 0: no limit.
    deadline_ms   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE reservations (
    kind       TEXT NOT NULL CHECK (kind IN ('slot', 'uid', 'port', 'cid')),
    number     INTEGER NOT NULL,
    machine_id TEXT NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    PRIMARY KEY (kind, number)
) STRICT, WITHOUT ROWID;

CREATE INDEX reservations_by_machine ON reservations (machine_id);
-- A machine may have many ports, but one of everything else.
CREATE UNIQUE INDEX reservations_once ON reservations (machine_id, kind) WHERE kind <> 'port';

-- Outlives the machine: what the host has seen of an environment.
CREATE TABLE fences (
    cluster       TEXT NOT NULL,
    uid           TEXT NOT NULL,
    -- Highest seen.
    incarnation   INTEGER NOT NULL,
    action_seq    INTEGER NOT NULL,
    -- Highest incarnation whose deletion was ordered (the tombstone); 0: none.
    ended         INTEGER NOT NULL,
    -- The row may go after this moment, if there is no machine.
    expires_at_ms INTEGER NOT NULL,
    PRIMARY KEY (cluster, uid)
) STRICT, WITHOUT ROWID;
