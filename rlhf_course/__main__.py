"""`python -m rlhf_course …` is `rlhf-course …`, also where the package is not installed."""

import sys

from rlhf_course.cli import main

if __name__ == "__main__":
    sys.exit(main())
