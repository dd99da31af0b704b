-- Snapshots of disks. Their bytes are below <data_root>/snapshots/<id>.

CREATE TABLE snapshots (
    id           TEXT PRIMARY KEY,
    -- Whose: that of its machine.
    cluster      TEXT NOT NULL,
    machine_id   TEXT NOT NULL,
    -- taking, sealing, ready, deleting.
    phase        TEXT NOT NULL,
    -- The image below the disk, which must not go before it.
    image_digest TEXT NOT NULL,
    -- host.snapshots.record.HostSnapshot as JSON.
    record       BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX snapshots_by_machine ON snapshots (machine_id);

-- Ids of deleted snapshots: an order to take one that comes late must not bring it back.
CREATE TABLE freed_snapshots (
    id            TEXT PRIMARY KEY,
    expires_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
