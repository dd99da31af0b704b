"""One function per row of the route table (`wire.routes`), found by the row's name."""
