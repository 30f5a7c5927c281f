from tests.interop.hub_server import hub  # noqa: F401
from tests.storage.fixtures import proxy, s3, s3_server  # noqa: F401
