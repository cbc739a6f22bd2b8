"""Runs one nvcc command for CMake and fails it where ptxas had to serialise wgmma.

Serialised wgmma still computes the right thing, several times slower, and ptxas only notes it (C7510, C7511, C7515 and
others, each a reason of its own). ptxas's resource lines are shown with KERNEL_BUILD_VERBOSE, and kept beside the object.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
output = Path(command[command.index("-o") + 1]) if "-o" in command else None
if output:
    output.with_suffix(".ptxas.txt").write_text(result.stdout)

serialised = result.stdout.count("wgmma.mma_async instructions are serialized")
resources = re.compile(r"^(ptxas info    : (?!\(C)|    \d+ bytes stack frame)")
for line in result.stdout.splitlines():
    if os.environ.get("KERNEL_BUILD_VERBOSE") or not resources.match(line):
        print(line)
if result.returncode == 0 and serialised:
    print(f"error: ptxas serialised wgmma in {serialised} places, which makes the kernel several times slower")
    if output:
        output.unlink(missing_ok=True)  # else the next build would take it as done
    sys.exit(1)
sys.exit(result.returncode)
