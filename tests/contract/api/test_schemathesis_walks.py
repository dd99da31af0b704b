"""Walks along the links of the OpenAPI document, by schemathesis' own state machine: what is made is read, used,
changed and deleted, in any order, and every answer is held to the document.

Seeded: the same walks in every run, as far as the server's own pace allows. `--fuzz-requests 10000` makes them
longer. A document that lies about what is behind a link shows that the walks get there, and that they can fail.
"""

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fuzzing import DOCUMENT, Possible, checks_of, headers_of, read, server, settings_of
from hypothesis import seed
from hypothesis.errors import Flaky
from hypothesis.stateful import rule
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.stateful.state_machine import StepInput

import fuzz_rounds
from fusevm.testing.postgres import PostgresServer
from fusevm.wire.routes import ROUTES

#: Requests to each server, walks per seed, and the length of a walk.
REQUESTS, WALKS, STEPS = 300, 5, 50
#: Where chance led elsewhere (it depends on the server's pace), a walk is made so many times longer before it fails.
PATIENCE = 8
#: What was made must have been used, and by how many links in all.
SOURCES = {"POST /v1/environments", "POST /v1/hosts", "POST /v1/api-keys"}
LEAST_LINKS = 12
#: What is not built, and what is no request: nothing follows from them.
NOT_WALKED = [route.name for route in ROUTES if route.is_websocket or (route.unimplemented and not route.selector)]


def machine_of(document: dict[str, Any], url: str, kind: str) -> Any:
    """The state machine of a document against a kind of server."""
    headers = headers_of(kind)
    api = read(document).exclude(operation_id=NOT_WALKED)
    base, create = api.as_state_machine(), api["/v1/environments"]["POST"]
    possible = Possible()

    class Walk(base):
        #: Answers by status, links that led to a success, and what went wrong.
        answered: Counter[int] = Counter()
        succeeded: set[str] = set()
        problems: list[Exception] = []
        #: Another one leads elsewhere.
        number = 0

        def setup(self) -> None:
            """Begin with a host that takes environments, and without any."""
            self.chance = random.Random(self.number)
            with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
                for host in http.get("/v1/hosts").json()["hosts"]:
                    http.post(f"/v1/hosts/{host['id']}?action=uncordon")
                for env in http.get("/v1/environments").json()["environments"]:
                    http.delete(f"/v1/environments/{env['id']}")

        # By itself the machine begins with what depends on nothing: hosts and keys.
        @rule(target=base.bundles["POST /v1/environments -> 201"], case=create.as_strategy())
        def create_environment(self, case: Any) -> Any:
            self.recorder.record_case(case=case)
            return self.step(StepInput.initial(case))

        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"base_url": url, "headers": headers}

        def before_call(self, case: Any) -> None:
            possible.make(case, self.chance.randrange(1 << 16))

        def step(self, input: Any) -> Any:  # noqa: A002 - the name of the base
            try:
                output = super().step(input)
            except Exception as problem:
                self.problems.append(problem)
                raise
            self.answered[output.response.status_code] += 1
            if input.transition is not None and input.is_applied and output.response.status_code < 300:
                self.succeeded.add(input.transition.id)
            return output

        def validate_response(self, response: Any, case: Any, *_: Any, **__: Any) -> None:
            case.validate_response(response, checks=checks_of(kind))

    return Walk


def walk_along(document: dict[str, Any], url: str, kind: str, is_enough: Callable[[Any], bool]) -> Any:
    """Walk until it is enough, or until it never will be. Raises what the first answer was that should not be."""
    machine = machine_of(document, url, kind)
    while machine.answered.total() < PATIENCE * requests_wanted() and not is_enough(machine):
        machine.number += 1
        # An answer that comes late can lead elsewhere when a walk is begun again with the same choices: no failure.
        with contextlib.suppress(Flaky):
            seed(machine.number)(machine).run(settings=settings_of(max_examples=WALKS, stateful_step_count=STEPS))
        if machine.problems:
            raise machine.problems[0]
    return machine


def requests_wanted() -> int:
    return fuzz_rounds.requests or REQUESTS


def sources_used(machine: Any) -> set[str]:
    return {link.partition(" -> ")[0] for link in machine.succeeded}


@pytest.mark.parametrize("kind", ["stub", "open", "machines", "postgres"])
def test_what_is_made_can_be_used_in_any_order(kind: str, tmp_path: Path, postgres_server: PostgresServer) -> None:
    def is_enough(machine: Any) -> bool:
        has_been_everywhere = sources_used(machine) >= SOURCES and len(machine.succeeded) >= LEAST_LINKS
        return machine.answered.total() >= requests_wanted() and has_been_everywhere

    with server(kind, tmp_path, postgres_server) as url:
        walked = walk_along(DOCUMENT, url, kind, is_enough)
    assert sources_used(walked) >= SOURCES, "nothing could be done with what these made"
    assert len(walked.succeeded) >= LEAST_LINKS, walked.succeeded


LIES = {
    "a machine is drained": ("/v1/environments/{id}", "post", "200"),
    "a host is cordoned": ("/v1/hosts/{id}", "post", "204"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_not_declared_is_found_behind_a_link(lie: str, tmp_path: Path, postgres_server: PostgresServer) -> None:
    path, method, status = LIES[lie]
    changed = copy.deepcopy(DOCUMENT)
    del changed["paths"][path][method]["responses"][status]
    with (
        server("stub", tmp_path, postgres_server) as url,
        pytest.raises(FailureGroup, match="Undocumented status code"),
    ):
        walk_along(changed, url, "stub", lambda _machine: False)
