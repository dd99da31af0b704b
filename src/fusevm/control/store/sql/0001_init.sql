-- Schema 1. Times are milliseconds since the epoch. `doc` is the record as JSON; the columns beside it are what queries
-- need. PostgreSQL takes the same text but for events.position (identity, plus the transaction id for the global order).

create table meta (
    name text primary key,
    value text not null
);

create table environments (
    uid text primary key,
    task_id text not null,
    tenant text not null,
    state text not null,
    host_id text not null,
    -- 1 until the state is terminal.
    is_live integer not null,
    -- Compare-and-swap counter.
    revision bigint not null,
    -- The one pending action: its number, and when it may start.
    pending_seq bigint,
    not_before_ms bigint,
    -- When a Tick will end the environment.
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
create index environments_host on environments (host_id, uid) where is_live = 1;
create index environments_state on environments (state, uid);
create index environments_due on environments (not_before_ms) where pending_seq is not null;
create index environments_deadline on environments (deadline_ms) where deadline_ms is not null;
create index environments_ended on environments (ended_at_ms) where ended_at_ms is not null;

create table hosts (
    id text primary key,
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
    cpus bigint not null,
    ram_mb bigint not null,
    storage_gb bigint not null,
    vm_count bigint not null
);
create index placements_host on placements (host_id);

create table events (
    -- Global order: that of the transactions.
    position integer primary key autoincrement,
    uid text not null,
    -- 1, 2, 3 ... per environment.
    seq bigint not null,
    task_id text not null,
    doc text not null,
    unique (uid, seq)
);

create table idempotency (
    tenant text not null,
    route text not null,
    key text not null,
    -- SHA-256 of the request.
    fingerprint text not null,
    -- The environment that the request made, set in the transaction that made it.
    uid text,
    status integer,
    body text,
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
