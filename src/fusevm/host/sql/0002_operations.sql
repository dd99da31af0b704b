-- What an operation may be is the program's to know: a new kind needs no new schema.

CREATE TABLE operations_2 (
    machine_id    TEXT PRIMARY KEY REFERENCES machines (id) ON DELETE CASCADE,
    kind          TEXT NOT NULL,
    step          TEXT NOT NULL,
    started_at_ms INTEGER NOT NULL,
    -- When the caller stops waiting; 0: no limit.
    deadline_ms   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO operations_2 SELECT machine_id, kind, step, started_at_ms, deadline_ms FROM operations;
DROP TABLE operations;
ALTER TABLE operations_2 RENAME TO operations;
