-- name: get_meta
SELECT value FROM meta WHERE key = :key;

-- name: set_meta
INSERT INTO meta (key, value) VALUES (:key, :value)
ON CONFLICT (key) DO UPDATE SET value = excluded.value;

-- name: get_machine
SELECT record FROM machines WHERE id = :id;

-- name: get_incarnation
-- The machine of one incarnation, whatever its id.
SELECT id FROM machines WHERE cluster = :cluster AND uid = :uid AND incarnation = :incarnation;

-- name: list_machines
SELECT m.id, m.cluster, m.uid, m.incarnation, m.phase, m.cpus, m.memory_mib, m.disk_bytes, m.record,
       o.kind, o.step, o.started_at_ms, o.deadline_ms
FROM machines m LEFT JOIN operations o ON o.machine_id = m.id
ORDER BY m.id;

-- name: insert_machine
INSERT INTO machines (id, cluster, uid, incarnation, phase, cpus, memory_mib, disk_bytes, record)
VALUES (:id, :cluster, :uid, :incarnation, :phase, :cpus, :memory_mib, :disk_bytes, :record);

-- name: update_machine
UPDATE machines SET phase = :phase, cpus = :cpus, memory_mib = :memory_mib, disk_bytes = :disk_bytes, record = :record
WHERE id = :id;

-- name: delete_machine
-- Takes its operation and reservations along.
DELETE FROM machines WHERE id = :id;

-- name: usage
-- A machine at rest with an operation is visited: it has a VMM.
SELECT count(*), coalesce(sum(active), 0), coalesce(sum(active * cpus), 0),
       coalesce(sum(active * memory_mib), 0), coalesce(sum(disk_bytes), 0)
FROM (SELECT cpus, memory_mib, disk_bytes, 
      phase NOT IN ('stopped', 'failed') OR EXISTS (SELECT 1 FROM operations o WHERE o.machine_id = machines.id) AS active
      FROM machines WHERE id <> :except);

-- name: get_operation
SELECT kind, step, started_at_ms, deadline_ms FROM operations WHERE machine_id = :id;

-- name: put_operation
INSERT INTO operations (machine_id, kind, step, started_at_ms, deadline_ms)
VALUES (:id, :kind, :step, :started_at_ms, :deadline_ms)
ON CONFLICT (machine_id) DO UPDATE SET kind = excluded.kind, step = excluded.step,
    started_at_ms = excluded.started_at_ms, deadline_ms = excluded.deadline_ms;

-- name: mark_operation
UPDATE operations SET step = :step WHERE machine_id = :id AND kind = :kind;

-- name: clear_operation
DELETE FROM operations WHERE machine_id = :id AND kind = :kind;

-- name: reserve
INSERT INTO reservations (kind, number, machine_id) VALUES (:kind, :number, :machine_id);

-- name: release
DELETE FROM reservations WHERE machine_id = :machine_id AND kind = :kind;

-- name: reserved_numbers
SELECT number FROM reservations WHERE kind = :kind;

-- name: is_reserved
SELECT 1 FROM reservations WHERE kind = :kind AND number = :number;

-- name: first_free
-- The lowest number from :first on that nobody has.
SELECT min(number) FROM (
    SELECT :first AS number
    UNION ALL
    SELECT number + 1 FROM reservations WHERE kind = :kind AND number >= :first
) WHERE number NOT IN (SELECT number FROM reservations WHERE kind = :kind);

-- name: list_reservations
SELECT kind, number, machine_id FROM reservations ORDER BY kind, number;

-- name: get_fence
SELECT incarnation, action_seq, ended FROM fences WHERE cluster = :cluster AND uid = :uid;

-- name: put_fence
INSERT INTO fences (cluster, uid, incarnation, action_seq, ended, expires_at_ms)
VALUES (:cluster, :uid, :incarnation, :action_seq, :ended, :expires_at_ms)
ON CONFLICT (cluster, uid) DO UPDATE SET incarnation = excluded.incarnation, action_seq = excluded.action_seq,
    ended = excluded.ended, expires_at_ms = excluded.expires_at_ms;

-- name: list_fences
SELECT cluster, uid, incarnation, action_seq, ended, expires_at_ms FROM fences ORDER BY cluster, uid;

-- name: count_tombstones
SELECT count(*) FROM fences WHERE ended > 0 AND expires_at_ms > :now_ms;

-- name: purge_fences
DELETE FROM fences WHERE expires_at_ms <= :now_ms
    AND NOT EXISTS (SELECT 1 FROM machines m WHERE m.cluster = fences.cluster AND m.uid = fences.uid);

-- name: list_published
SELECT protocol, host_port, id, machine_id FROM published_ports ORDER BY protocol, host_port;

-- name: get_published
SELECT machine_id FROM published_ports WHERE id = :id;

-- name: published_numbers
SELECT host_port FROM published_ports WHERE protocol = :protocol;

-- name: publish
INSERT INTO published_ports (protocol, host_port, id, machine_id) VALUES (:protocol, :host_port, :id, :machine_id);

-- name: unpublish
DELETE FROM published_ports WHERE id = :id AND machine_id = :machine_id;
-- name: get_snapshot
SELECT id, cluster, machine_id, phase, image_digest, record FROM snapshots WHERE id = :id;

-- name: list_snapshots
SELECT id, cluster, machine_id, phase, image_digest, record FROM snapshots ORDER BY id;

-- name: snapshots_of_machine
SELECT id, cluster, machine_id, phase, image_digest, record FROM snapshots WHERE machine_id = :machine_id ORDER BY id;

-- name: snapshot_images
SELECT image_digest, id FROM snapshots ORDER BY id;

-- name: insert_snapshot
INSERT INTO snapshots (id, cluster, machine_id, phase, image_digest, record)
VALUES (:id, :cluster, :machine_id, :phase, :image_digest, :record);

-- name: update_snapshot
UPDATE snapshots SET phase = :phase, record = :record WHERE id = :id;

-- name: delete_snapshot
DELETE FROM snapshots WHERE id = :id;

-- name: free_snapshot
INSERT INTO freed_snapshots (id, expires_at_ms) VALUES (:id, :expires_at_ms)
ON CONFLICT (id) DO UPDATE SET expires_at_ms = excluded.expires_at_ms;

-- name: is_freed
SELECT 1 FROM freed_snapshots WHERE id = :id AND expires_at_ms > :now_ms;

-- name: purge_freed
DELETE FROM freed_snapshots WHERE expires_at_ms <= :now_ms;

-- name: is_stray_snapshot
-- Being taken, and nobody is at it.
SELECT 1 FROM snapshots s WHERE s.id = :id AND s.phase = 'taking'
    AND NOT EXISTS (SELECT 1 FROM operations o WHERE o.machine_id = s.machine_id AND o.kind = 'snapshot');
