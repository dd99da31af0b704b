"""Errors of who asks."""

from fusevm.model.errors.base import Error


class Unauthorized(Error):
    reason = "unauthorized"
    code, status = "unauthorized", 401
    template = "{problem}; send the header `Authorization: Bearer <token>`"
    problem: str


class Forbidden(Error):
    reason = "forbidden"
    code, status = "forbidden", 403
    template = "{problem}"
    problem: str


class ScopeMissing(Error):
    """The key is good, and not for this."""

    reason = "scope_missing"
    code, status = "unauthorized", 403
    template = "This key lacks the right {scope!r}; use one that has it, or the master token"
    scope: str


class RateLimited(Error):
    """Too many failed logins from one address."""

    reason = "rate_limited"
    code, status, retryable = "rate_limited", 429, True
    template = "Too many failed attempts; try again in {retry_after_s} s"
    retry_after_s: int
