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
