-- Every statement of the store, one block per name. Parameters are $1, $2 ...: asyncpg's way, and named ones to SQLite.

-- name: get_meta
select value from meta where name = $1

-- name: put_meta
insert into meta (name, value) values ($1, $2) on conflict (name) do nothing

-- name: insert_environment
insert into environments (uid, task_id, tenant, state, host_id, is_live, revision, pending_seq, not_before_ms,
    deadline_ms, lease_owner, lease_until_ms, ended_at_ms, doc)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
on conflict do nothing returning uid

-- name: get_environment
select doc from environments where uid = $1

-- name: get_live
select doc from environments where task_id = $1 and is_live = 1

-- name: get_last_ended
select doc from environments where task_id = $1 and is_live = 0 order by uid desc limit 1

-- name: get_for_commit
select doc, revision, pending_seq, not_before_ms, lease_owner, lease_until_ms from environments where uid = $1

-- name: update_environment
update environments set state = $3, host_id = $4, is_live = $5, revision = $6, pending_seq = $7, not_before_ms = $8,
    deadline_ms = $9, lease_owner = $10, lease_until_ms = $11, ended_at_ms = $12, doc = $13
where uid = $1 and revision = $2

-- name: update_deadline
update environments set deadline_ms = $2 where uid = $1

-- name: all_live
select doc from environments where is_live = 1

-- name: live_on_host
select doc from environments where host_id = $1 and is_live = 1

-- name: count_live
select state, count(*) from environments where is_live = 1 group by state

-- name: due_actions
select uid, pending_seq from environments
where pending_seq is not null and not_before_ms <= $1 and (lease_owner is null or lease_until_ms <= $1)
order by not_before_ms limit $2

-- name: due_deadlines
select uid from environments where deadline_ms is not null and deadline_ms <= $1 order by deadline_ms limit $2

-- name: acquire_lease
update environments set lease_owner = $3, lease_until_ms = $4
where uid = $1 and pending_seq = $2 and (lease_owner is null or lease_until_ms <= $5)
returning doc

-- name: renew_lease
update environments set lease_until_ms = $4 where uid = $1 and pending_seq = $2 and lease_owner = $3 returning uid

-- name: release_lease
update environments set lease_owner = null, lease_until_ms = null
where uid = $1 and pending_seq = $2 and lease_owner = $3

-- name: release_leases
update environments set lease_owner = null, lease_until_ms = null where lease_owner = $1

-- name: end_action_leases
update environments set lease_owner = null, lease_until_ms = null where lease_owner is not null

-- name: end_host_leases
update hosts set lease_owner = null, lease_until_ms = null where lease_owner is not null

-- name: insert_event
insert into events (uid, seq, task_id, doc) values ($1, $2, $3, $4)

-- name: events_of
select position, task_id, doc from events where uid = $1 and seq > $2 order by seq limit $3

-- name: events_after
select position, task_id, doc from events where position > $1 order by position limit $2

-- name: event_position
select position from events where uid = $1 and seq = $2

-- name: last_position
select coalesce(max(position), 0) from events

-- name: list_hosts
select doc, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count from hosts order by id

-- name: get_host
select doc, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count from hosts where id = $1

-- name: insert_host
insert into hosts (id, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count, doc)
values ($1, $2, $3, 0, 0, 0, 0, $4) on conflict (id) do nothing returning id

-- name: update_host
update hosts set revision = $3, last_seen_ms = $4, doc = $5 where id = $1 and revision = $2 returning id

-- name: touch_host
update hosts set last_seen_ms = $2 where id = $1 and last_seen_ms < $2

-- name: book_host
update hosts set cpus = cpus + $2, ram_mb = ram_mb + $3, storage_gb = storage_gb + $4, vm_count = vm_count + $5
where id = $1

-- name: acquire_host
update hosts set lease_owner = $2, lease_until_ms = $3
where id = $1 and (lease_owner is null or lease_owner = $2 or lease_until_ms <= $4) returning id

-- name: release_hosts
update hosts set lease_owner = null, lease_until_ms = null where lease_owner = $1

-- name: insert_placement
insert into placements (uid, host_id, cpus, ram_mb, storage_gb, vm_count) values ($1, $2, $3, $4, $5, $6)

-- name: delete_placement
delete from placements where uid = $1 returning host_id, cpus, ram_mb, storage_gb, vm_count

-- name: claim_request
insert into idempotency (tenant, route, key, fingerprint, claimed_at_ms, expires_at_ms)
values ($1, $2, $3, $4, $5, $6)
on conflict (tenant, route, key) do update set fingerprint = $4, uid = null, status = null, body = null,
    claimed_at_ms = $5, expires_at_ms = $6
where idempotency.expires_at_ms <= $5
returning key

-- name: get_request
select fingerprint, uid, status, body, claimed_at_ms from idempotency where tenant = $1 and route = $2 and key = $3

-- name: bind_request
update idempotency set uid = $4 where tenant = $1 and route = $2 and key = $3

-- name: finish_request
update idempotency set status = $4, body = $5 where tenant = $1 and route = $2 and key = $3

-- name: forget_request
delete from idempotency where tenant = $1 and route = $2 and key = $3

-- name: put_secret
insert into secrets (owner, name, sealed, updated_at_ms) values ($1, $2, $3, $4)
on conflict (owner, name) do update set sealed = $3, updated_at_ms = $4

-- name: get_secret
select sealed from secrets where owner = $1 and name = $2

-- name: ended_before
select uid from environments where ended_at_ms is not null and ended_at_ms < $1 limit $2

-- name: delete_events
delete from events where uid = $1

-- name: delete_environment
delete from environments where uid = $1 and is_live = 0

-- name: delete_requests
delete from idempotency where expires_at_ms <= $1

-- name: all_environments
select doc from environments

-- name: all_placements
select uid, host_id, cpus, ram_mb, storage_gb, vm_count from placements

-- name: all_events
select doc from events order by uid, seq
