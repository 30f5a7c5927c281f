"""Makes a small reasoner: a teacher, a warmed-up student, and prompts. `python -m benchmarks.reasoner --size cpu --out DIR`"""

import argparse
from pathlib import Path

from benchmarks.reasoner.make import SIZES, make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoner", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="output folder; finished parts are skipped")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(SIZES[given.size], given.out, given.seed, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
