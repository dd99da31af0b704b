-- Schema 1. Times are milliseconds since the epoch. `doc` is the record as JSON; the columns beside it are what queries
-- need. One text for both databases: a line that ends with the name of one is left out for the other, and PostgreSQL
-- says `collate "C"` for `collate binary`. No text literals with semicolons.

-- Database time. SQLite has a function of this name from the program, because its database lives in the program's process.
create function now_ms() returns bigint language sql stable -- postgres
return cast(extract(epoch from statement_timestamp()) * 1000 as bigint); -- postgres

create table meta (
    name text primary key,
    value text not null
);

create table environments (
    uid text collate binary primary key,
    task_id text not null,
    tenant text not null,
    state text not null,
    -- Empty while it waits for a place.
    host_id text not null,
    -- 1 until the state is terminal.
    is_live integer not null,
    -- Compare-and-swap counter.
    revision bigint not null,
    -- The one pending action: its number, and when it may start.
    pending_seq bigint,
    not_before_ms bigint,
    -- When a Tick will end the environment, or give up what it waits for.
    deadline_ms bigint,
    -- Who performs the pending action, and until when that is believed.
    lease_owner text,
    lease_until_ms bigint,
    ended_at_ms bigint,
    doc text not null
);
create unique index environments_live_task on environments (task_id) where is_live = 1;
create index environments_task on environments (task_id, uid);
create index environments_live on environments (is_live, uid);
create index environments_tenant on environments (tenant, is_live, uid);
create index environments_host on environments (host_id, uid) where is_live = 1;
create index environments_queued on environments (tenant, uid) where host_id = '' and is_live = 1;
create index environments_state on environments (state, uid);
create index environments_due on environments (not_before_ms) where pending_seq is not null;
create index environments_deadline on environments (deadline_ms) where deadline_ms is not null;
create index environments_ended on environments (ended_at_ms) where ended_at_ms is not null;

create table hosts (
    id text collate binary primary key,
    revision bigint not null,
    last_seen_ms bigint not null,
    -- Sum of the placements, kept in the transactions that change them.
    cpus bigint not null,
    ram_mb bigint not null,
    storage_gb bigint not null,
    vm_count bigint not null,
    -- The replica that watches the host.
    lease_owner text,
    lease_until_ms bigint,
    doc text not null
);

create table placements (
    uid text primary key,
    host_id text not null,
    tenant text not null,
    cpus bigint not null,
    ram_mb bigint not null,
    storage_gb bigint not null,
    vm_count bigint not null
);
create index placements_host on placements (host_id);

create table snapshots (
    id text collate binary primary key,
    -- The environment it was taken of; it is kept as long as this row is.
    uid text not null,
    task_id text not null,
    tenant text not null,
    host_id text not null,
    state text not null,
    mode text not null,
    name text not null,
    layer_key text not null,
    arch text not null,
    size_bytes bigint not null,
    revision bigint not null,
    -- When its deletion is due: 0 when that was asked for, else the end of its retention.
    due_ms bigint,
    -- Who deletes it, and until when that is believed.
    lease_owner text,
    lease_until_ms bigint,
    doc text not null
);
create index snapshots_environment on snapshots (uid, id);
create index snapshots_tenant on snapshots (tenant, id);
create index snapshots_layer on snapshots (layer_key, arch, id) where layer_key <> '';
create index snapshots_sizes on snapshots (host_id, state, size_bytes);
create index snapshots_due on snapshots (due_ms) where due_ms is not null;

create table events (
    -- With `tx`, its place in the global order.
    id integer primary key autoincrement, -- sqlite
    id bigint not null generated always as identity, -- postgres
    -- The transaction that wrote it: events are read only below the oldest one that is still under way.
    tx bigint not null default (pg_current_xact_id()::text::bigint), -- postgres
    uid text not null,
    -- 1, 2, 3 ... per environment.
    seq bigint not null,
    task_id text not null,
    tenant text not null,
    at_ms bigint not null,
    doc text not null,
    primary key (tx, id), -- postgres
    unique (uid, seq)
);
create index events_tenant on events (tenant, id); -- sqlite
create index events_tenant on events (tenant, tx, id); -- postgres
create index events_age on events (at_ms);

create table api_keys (
    id text primary key,
    -- Public part of the key, by which it is found.
    prefix text not null unique,
    created_at_ms bigint not null,
    revoked_at_ms bigint,
    last_used_at_ms bigint,
    doc text not null
);

create table idempotency (
    tenant text not null,
    route text not null,
    key text not null,
    -- SHA-256 of the request.
    fingerprint text not null,
    -- Which of the equal requests handles it.
    claimant text not null,
    -- The environment that the request made, set in the transaction that made it.
    uid text,
    status integer,
    body text,
    is_sealed integer not null default 0,
    claimed_at_ms bigint not null,
    expires_at_ms bigint not null,
    primary key (tenant, route, key)
);
create index idempotency_expiry on idempotency (expires_at_ms);

create table secrets (
    owner text not null,
    name text not null,
    -- Sealed (control/secrets.py), base64.
    sealed text not null,
    updated_at_ms bigint not null,
    primary key (owner, name)
);
