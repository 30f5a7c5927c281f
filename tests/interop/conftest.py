from tests.interop.hub_server import hub  # noqa: F401
