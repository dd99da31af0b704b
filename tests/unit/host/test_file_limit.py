"""The daemon takes all the descriptors that it may have."""

import subprocess
import sys


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one():
    code = "import resource\nfrom fusevm.host.main import raise_file_limit\nraise_file_limit()\n"
    code += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = f'ulimit -Sn 300 && ulimit -Hn 700 && exec {sys.executable} -c "$0"'
    done = subprocess.run(["sh", "-c", command, code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["700", "700"]
