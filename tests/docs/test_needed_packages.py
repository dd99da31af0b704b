"""What a source folder installs and what a host installs are the same Debian packages."""

import re
from pathlib import Path

from fusevm.cli.install.packages import missing_packages
from fusevm.host.run import PACKAGES

SETUP = Path(__file__).resolve().parents[2] / "tools" / "setup.sh"
#: On every Debian.
ESSENTIAL = {"apt", "dpkg", "tar"}


def test_the_setup_of_a_source_folder_installs_what_the_host_daemon_runs():
    needs = re.findall(r"^needs='\n(.*?)^'", SETUP.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    assert set(PACKAGES.values()) - ESSENTIAL <= {line.split()[1] for line in needs.splitlines()}


def test_nothing_is_missing_where_tests_run_and_qemu_is_for_one_architecture_only():
    assert missing_packages("x86_64") == ()
    assert "qemu-system-x86" not in missing_packages("aarch64")
