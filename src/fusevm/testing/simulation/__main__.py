"""Run one simulation from the command line: `python -m fusevm.testing.simulation --seed 7`.

Prints the verdict and its numbers; where a rule was broken, every broken rule and the story of the first object
concerned. Exit status 0: all rules held.
"""

import argparse
import sys

from fusevm.testing.simulation.cluster import Verdict, simulate
from fusevm.testing.simulation.scale import NO_FAULTS, Safeguards, Scale

_OFF = Safeguards.__struct_fields__


def main(argv: list[str]) -> int:
    """Run, print, and return the exit status."""
    asked = _parser().parse_args(argv)
    sizes = {name: getattr(asked, name) for name in Scale.__struct_fields__}
    scale = Scale(**{name: value for name, value in sizes.items() if value is not None})
    safeguards = Safeguards(**{name: name not in asked.without for name in _OFF})
    verdict = simulate(asked.seed, scale, safeguards=safeguards, luck=NO_FAULTS if asked.no_faults else None)
    sys.stdout.write(render(verdict))
    return 0 if verdict.is_good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusevm.testing.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    for name in Scale.__struct_fields__:
        default = getattr(Scale(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--no-faults", action="store_true", help="nothing goes wrong")
    parser.add_argument("--without", action="append", default=[], choices=_OFF, help="a safeguard to switch off")
    return parser


def render(verdict: Verdict) -> str:
    """The verdict for people."""
    lines = [
        f"seed {verdict.seed}: {'all rules held' if verdict.is_good else f'{len(verdict.violations)} rules broken'}",
        f"{verdict.virtual_s:.0f} virtual seconds in {verdict.real_s:.1f} s, trace {verdict.digest}",
        *(f"  {name}: {count}" for name, count in verdict.counts.items()),
        *(f"BROKEN at {one.at_s:.1f} s: {one.subject} {one.rule}" for one in verdict.violations),
    ]
    if verdict.story:
        lines += ["", f"The story of {verdict.violations[0].subject or 'the cluster'}:", *verdict.story]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
