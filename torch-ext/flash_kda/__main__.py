"""``python -m flash_kda``: the environment report. Exits with 1 where the package's files are not as they were built."""

import sys

from .report import altered_files, environment_report

print(environment_report())
sys.exit(1 if altered_files() else 0)
