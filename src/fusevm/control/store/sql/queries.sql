-- Every statement of the store, one block per name, for both databases. Parameters are $1, $2 ...: asyncpg's way, and
-- named ones to SQLite. A line that ends with the name of a database is only for that one.

-- name: now
select now_ms()

-- name: get_meta
select value from meta where name = $1

-- name: put_meta
insert into meta (name, value) values ($1, $2) on conflict (name) do nothing

-- name: insert_environment
insert into environments (uid, task_id, tenant, state, host_id, is_live, revision, pending_seq, not_before_ms,
    deadline_ms, lease_owner, lease_until_ms, ended_at_ms, doc)
values ($1, $2, $3, $4, $5, 1, 1, $6, $7, $8, $9, now_ms() + $10, $11, $12)
on conflict do nothing returning uid

-- name: get_environment
select doc from environments where uid = $1

-- name: get_live
select doc from environments where task_id = $1 and is_live = 1

-- name: get_last_ended
select doc from environments where task_id = $1 and is_live = 0 order by uid desc limit 1

-- name: get_for_commit
select doc, pending_seq, not_before_ms, lease_owner from environments where uid = $1 and revision = $2
for update -- postgres

-- name: update_environment
update environments set state = $2, host_id = $3, is_live = $4, revision = $5, pending_seq = $6, not_before_ms = $7,
    deadline_ms = $8, ended_at_ms = $9, doc = $10, lease_owner = $11,
    lease_until_ms = case when $12 then lease_until_ms else now_ms() + $13 end
where uid = $1

-- name: live_deadlines
select uid, doc, deadline_ms from environments where is_live = 1

-- name: update_deadline
update environments set deadline_ms = $3 where uid = $1 and revision = $2

-- name: live_on_host
select uid, doc from environments where host_id = $1 and is_live = 1

-- name: queued
-- In turns: the oldest of every tenant, then the second oldest ...
select uid, doc from environments join (
    select uid, row_number() over (partition by tenant order by uid) as turn from environments
    where host_id = '' and is_live = 1
    order by turn, uid limit $1
) as line using (uid) order by turn, uid

-- name: queued_after
select uid, doc from environments where host_id = '' and is_live = 1 and uid > $1 order by uid limit $2

-- name: count_live
select state, count(*) from environments where is_live = 1 group by state

-- name: count_queued
select count(*) from environments where host_id = '' and is_live = 1

-- name: count_snapshots
select host_id, state, count(*), cast(sum(size_bytes) as bigint) from snapshots group by host_id, state

-- name: usage_by_tenant
select tenant, cast(sum(cpus) as bigint), cast(sum(ram_mb) as bigint), cast(sum(storage_gb) as bigint),
    cast(sum(vm_count) as bigint)
from placements group by tenant

-- name: list_live
select uid, doc from environments where is_live = 1

-- name: list_ended
select uid, doc from environments where is_live = 0

-- name: due_actions
select uid, pending_seq from environments
where pending_seq is not null and not_before_ms <= now_ms() and (lease_owner is null or lease_until_ms <= now_ms())
order by not_before_ms limit $1

-- name: due_deadlines
select uid from environments where deadline_ms is not null and deadline_ms <= now_ms() order by deadline_ms limit $1

-- name: due_snapshots
-- One whose time is over stays while it is the newest ready one of an environment that lives.
select id from snapshots as old
where due_ms is not null and due_ms <= now_ms() and (lease_owner is null or lease_until_ms <= now_ms())
    and (due_ms = 0 or state <> 'ready' or exists (
        select 1 from snapshots as newer where newer.uid = old.uid and newer.id > old.id and newer.state = 'ready'
    ) or not exists (select 1 from environments where environments.uid = old.uid and is_live = 1))
order by due_ms limit $1

-- name: acquire_lease
update environments set lease_owner = $3, lease_until_ms = now_ms() + $4
where uid = $1 and pending_seq = $2 and (lease_owner is null or lease_until_ms <= now_ms())
returning doc

-- name: renew_lease
update environments set lease_until_ms = now_ms() + $4
where uid = $1 and pending_seq = $2 and lease_owner = $3
returning uid

-- name: release_leases
update environments set lease_owner = null, lease_until_ms = null where lease_owner = $1

-- name: release_hosts
update hosts set lease_owner = null, lease_until_ms = null where lease_owner = $1

-- name: release_snapshots
update snapshots set lease_owner = null, lease_until_ms = null where lease_owner = $1

-- name: end_action_leases
update environments set lease_owner = null, lease_until_ms = null where lease_owner is not null -- sqlite

-- name: end_host_leases
update hosts set lease_owner = null, lease_until_ms = null where lease_owner is not null -- sqlite

-- name: end_snapshot_leases
update snapshots set lease_owner = null, lease_until_ms = null where lease_owner is not null -- sqlite

-- name: insert_event
insert into events (uid, seq, task_id, tenant, at_ms, doc) values ($1, $2, $3, $4, $5, $6)

-- name: events_of
select uid || '.' || seq, 0, id, seq, task_id, tenant, doc from events where uid = $1 and seq > $2 order by seq limit $3 -- sqlite
select uid || '.' || seq, tx, id, seq, task_id, tenant, doc from events where uid = $1 and seq > $2 order by seq limit $3 -- postgres

-- name: events_after
select uid || '.' || seq, 0, id, seq, task_id, tenant, doc from events where id > $2 order by id limit $3 -- sqlite
select uid || '.' || seq, tx, id, seq, task_id, tenant, doc from events -- postgres
where (tx, id) > ($1, $2) and tx < pg_snapshot_xmin(pg_current_snapshot())::text::bigint -- postgres
order by tx, id limit $3 -- postgres

-- name: events_after_of_tenant
select uid || '.' || seq, 0, id, seq, task_id, tenant, doc from events where id > $2 and tenant = $4 order by id limit $3 -- sqlite
select uid || '.' || seq, tx, id, seq, task_id, tenant, doc from events -- postgres
where (tx, id) > ($1, $2) and tx < pg_snapshot_xmin(pg_current_snapshot())::text::bigint and tenant = $4 -- postgres
order by tx, id limit $3 -- postgres

-- name: event_position
select 0, id from events where uid = $1 and seq = $2 -- sqlite
select tx, id from events where uid = $1 and seq = $2 -- postgres

-- name: last_position
select 0, coalesce(max(id), 0) from events -- sqlite
select tx, id from events where tx < pg_snapshot_xmin(pg_current_snapshot())::text::bigint -- postgres
order by tx desc, id desc limit 1 -- postgres

-- name: restored_events
-- Events that claim transactions which this server has not begun yet: the database was restored from another one.
select 1 from events where tx >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint limit 1 -- postgres

-- name: rebase_events
update events set tx = 0 -- postgres

-- name: list_hosts
select id, doc, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count from hosts order by id

-- name: page_hosts
select id, doc, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count from hosts where id > $1 order by id limit $2

-- name: get_host
select id, doc, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count from hosts where id = $1

-- name: insert_host
insert into hosts (id, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count, doc)
values ($1, $2, $3, 0, 0, 0, 0, $4) on conflict (id) do nothing returning id

-- name: update_host
update hosts set revision = $3, last_seen_ms = $4, doc = $5 where id = $1 and revision = $2 returning id

-- name: touch_host
update hosts set last_seen_ms = $2 where id = $1 and last_seen_ms < $2

-- name: book_host
update hosts set cpus = cpus + $2, ram_mb = ram_mb + $3, storage_gb = storage_gb + $4, vm_count = vm_count + $5
where id = $1 returning id, doc, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count

-- name: lock_host
select revision from hosts where id = $1
for update -- postgres

-- name: count_placements
select count(*) from placements where host_id = $1

-- name: delete_host
delete from hosts where id = $1

-- name: acquire_host
update hosts set lease_owner = $2, lease_until_ms = now_ms() + $3
where id = $1 and (lease_owner is null or lease_owner = $2 or lease_until_ms <= now_ms()) returning id

-- name: insert_placement
insert into placements (uid, host_id, tenant, cpus, ram_mb, storage_gb, vm_count) values ($1, $2, $3, $4, $5, $6, $7)

-- name: delete_placement
delete from placements where uid = $1 returning host_id, cpus, ram_mb, storage_gb, vm_count

-- name: get_snapshot
select doc from snapshots where id = $1

-- name: get_snapshot_for_change
select doc from snapshots where id = $1
for update -- postgres

-- name: ready_snapshots_on
select doc from snapshots where host_id = $1 and state = 'ready' order by id
for update -- postgres

-- name: insert_snapshot
insert into snapshots (id, uid, task_id, tenant, host_id, state, mode, name, layer_key, arch, size_bytes, revision,
    due_ms, doc)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) on conflict (id) do nothing returning id

-- name: update_snapshot
update snapshots set host_id = $2, state = $3, mode = $4, name = $5, layer_key = $6, arch = $7, size_bytes = $8,
    revision = $9, due_ms = $10, doc = $11
where id = $1

-- name: list_snapshots
select id, doc from snapshots where 1 = 1

-- name: acquire_snapshot
update snapshots set lease_owner = $2, lease_until_ms = now_ms() + $3
where id = $1 and due_ms is not null and due_ms <= now_ms() and (lease_owner is null or lease_until_ms <= now_ms())
    and (due_ms = 0 or state <> 'ready' or exists (
        select 1 from snapshots as newer
        where newer.uid = snapshots.uid and newer.id > snapshots.id and newer.state = 'ready'
    ) or not exists (select 1 from environments where environments.uid = snapshots.uid and is_live = 1))
returning doc, now_ms()

-- name: delete_snapshot
delete from snapshots where id = $1

-- name: insert_key
insert into api_keys (id, prefix, created_at_ms, revoked_at_ms, last_used_at_ms, doc) values ($1, $2, $3, $4, $5, $6)
on conflict do nothing returning id

-- name: find_key
select doc, revoked_at_ms, last_used_at_ms from api_keys where prefix = $1

-- name: list_keys
select doc, revoked_at_ms, last_used_at_ms from api_keys order by created_at_ms desc, id

-- name: revoke_key
update api_keys set revoked_at_ms = coalesce(revoked_at_ms, $2) where id = $1 returning id

-- name: touch_key
update api_keys set last_used_at_ms = $2 where id = $1 and (last_used_at_ms is null or last_used_at_ms < $2)

-- name: claim_request
-- Free, expired, ours already (the answer to the claim was lost), or of a request that died before it bound anything.
insert into idempotency (tenant, route, key, fingerprint, claimant, claimed_at_ms, expires_at_ms)
values ($1, $2, $3, $4, $5, now_ms(), now_ms() + $6)
on conflict (tenant, route, key) do update set fingerprint = $4, claimant = $5, uid = null, status = null, body = null,
    is_sealed = 0, claimed_at_ms = now_ms(), expires_at_ms = now_ms() + $6
where idempotency.expires_at_ms <= now_ms()
    or (idempotency.uid is null and idempotency.status is null and idempotency.fingerprint = $4
        and (idempotency.claimant = $5 or idempotency.claimed_at_ms <= now_ms() - $7))
returning key

-- name: get_request
select fingerprint, uid, status, body, is_sealed from idempotency where tenant = $1 and route = $2 and key = $3

-- name: bind_request
update idempotency set uid = $5
where tenant = $1 and route = $2 and key = $3 and claimant = $4 and uid is null and status is null returning key

-- name: finish_request
update idempotency set status = $6, body = $7, is_sealed = $8
where tenant = $1 and route = $2 and key = $3 and status is null and (claimant = $4 or uid = $5)

-- name: forget_request
delete from idempotency
where tenant = $1 and route = $2 and key = $3 and claimant = $4 and uid is null and status is null returning key

-- name: put_secret
insert into secrets (owner, name, sealed, updated_at_ms) values ($1, $2, $3, now_ms())
on conflict (owner, name) do update set sealed = $3, updated_at_ms = now_ms()

-- name: reseal_secret
-- A dropped or replaced value stays as it is.
update secrets set sealed = $4, updated_at_ms = now_ms() where owner = $1 and name = $2 and sealed = $3

-- name: get_secret
select sealed from secrets where owner = $1 and name = $2

-- name: secrets_sealed_otherwise
-- Those that do not begin with $1, after a place in the order of their keys.
select owner, name, sealed from secrets where substr(sealed, 1, length($1)) <> $1 and (owner, name) > ($2, $3)
order by owner, name limit $4

-- name: drop_secrets
delete from secrets where owner = $1

-- name: ended_before
-- A record outlives its environment as long as it has snapshots.
select uid from environments
where ended_at_ms is not null and ended_at_ms < now_ms() - $1
    and not exists (select 1 from snapshots where snapshots.uid = environments.uid)
order by ended_at_ms limit $2

-- name: delete_events
delete from events where uid = $1

-- name: events_before
-- The oldest ones, but the last one of each environment. An environment's are deleted by number, and not by their times:
-- so what stays has no gap, whatever clocks said.
select uid, max(seq) from (
    select uid, seq from events as old
    where at_ms < now_ms() - $1
        and exists (select 1 from events as newer where newer.uid = old.uid and newer.seq > old.seq)
    order by at_ms limit $2
) as oldest group by uid order by uid

-- name: delete_events_until
delete from events where uid = $1 and seq <= $2 returning seq

-- name: delete_environment
delete from environments where uid = $1 and is_live = 0 returning uid

-- name: delete_requests
delete from idempotency where expires_at_ms <= now_ms()

-- name: all_environments
select doc from environments order by uid

-- name: all_placements
select uid, host_id, cpus, ram_mb, storage_gb, vm_count from placements

-- name: all_events
select doc from events order by uid, seq

-- name: all_snapshots
select doc from snapshots order by id

-- name: all_secrets
select owner, name, sealed from secrets order by owner, name

-- name: find_schema
select 1 from sqlite_master where type = 'table' and name = 'schema_version' -- sqlite
select 1 from pg_tables where tablename = 'schema_version' and schemaname = any(current_schemas(false)) -- postgres

-- name: tell_commits
select pg_notify('fuse_commits', uid) from unnest($1::text[]) as uid -- postgres

-- name: transaction_bounds
select pg_snapshot_xmin(pg_current_snapshot())::text::bigint, -- postgres
    pg_snapshot_xmax(pg_current_snapshot())::text::bigint -- postgres

-- name: check_environments
select uid, task_id, tenant, state, host_id, is_live, revision, pending_seq, not_before_ms, deadline_ms, ended_at_ms,
    lease_owner, lease_until_ms, doc
from environments order by uid

-- name: check_hosts
select id, revision, cpus, ram_mb, storage_gb, vm_count, last_seen_ms, lease_owner, lease_until_ms, doc
from hosts order by id

-- name: check_placements
select uid, tenant from placements order by uid

-- name: check_snapshots
select id, uid, task_id, tenant, host_id, state, mode, name, layer_key, arch, size_bytes, revision, due_ms, lease_owner,
    lease_until_ms, doc
from snapshots order by id

-- name: check_events
select uid, seq, task_id, tenant, at_ms, doc from events order by uid, seq

-- name: check_keys
select id, prefix, created_at_ms, doc from api_keys order by id

-- name: check_requests
select tenant, route, key, uid, status, body, is_sealed, claimed_at_ms, expires_at_ms, expires_at_ms <= now_ms()
from idempotency order by tenant, route, key
