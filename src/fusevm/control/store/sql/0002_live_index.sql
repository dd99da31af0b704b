-- Schema 2. SQLite took the index of all live environments also where a query names a host or a task, and read them all.
-- Partial indexes are no match for a column that such a query names.
drop index environments_live;
create index environments_live on environments (uid) where is_live = 1;
create index environments_over on environments (uid) where is_live = 0;
-- Counts and lists by state are of those that live; who asks for ended ones reads them by their place.
drop index environments_state;
create index environments_state on environments (state, uid) where is_live = 1;
