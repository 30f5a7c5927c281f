"""A command on a Ray cluster whose engines are fakes: python -m tests.capture.ray_driver ADDRESS COMMAND..."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    import ray

    from logitcache import cli

    address, *arguments = sys.argv[1:]
    given = {name: value for name, value in os.environ.items() if name.startswith(("FAKE_", "AWS_", "LOGITCACHE_"))}
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=40,
        runtime_env={
            "env_vars": {"PYTHONPATH": str(ROOT), **given},
            "worker_process_setup_hook": "tests.fake_engine.patch",
        },
    )
    sys.argv = ["logitcache", *arguments]
    return cli.call()


if __name__ == "__main__":
    sys.exit(main())
