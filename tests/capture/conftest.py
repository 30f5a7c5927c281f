"""What the tests of capture share."""

from tests.storage.fixtures import proxy, s3, s3_server  # noqa: F401
