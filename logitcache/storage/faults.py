"""What an error of an object store means, said in one line without credentials."""

import re
from dataclasses import dataclass

from logitcache.errors import first_line
from logitcache.runtime.secrets import hide
from logitcache.storage.location import Url

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles in ~/.aws are not read)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
ENDPOINT = {"s3": "AWS_ENDPOINT_URL and AWS_REGION", "gs": "the network", "az": "AZURE_STORAGE_ACCOUNT_NAME"}

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<\n]*)")
_REGION = re.compile(r"<Region>([\w-]+)</Region>")
_SERVER = re.compile(r"Error performing [A-Z]+ (https?://[^/\s?]+)")
# Where a machine in a cloud asks for its own credentials; elsewhere nobody answers.
_METADATA = re.compile(r"/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity/|/v2/credentials")
_NO_CREDENTIALS = re.compile(
    r"Account must be specified|Missing(AccessKeyId|SecretAccessKey|Credentials)|missing.*crede", re.I
)
_CONNECT = {
    "dns error": "no such host",
    "refused": "connection refused",
    "certificate": "its certificate is not trusted",
    "invalid peer certificate": "its certificate is not trusted",
    "InvalidContentType": "it does not speak TLS",
    "timed out": "no answer",
}
_BUCKET = {"NoSuchBucket", "ContainerNotFound", "InvalidBucketName"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_PASSING_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"}


@dataclass(frozen=True, slots=True)
class Fault:
    """One line for the user: what is wrong, and the way out where the user can correct it."""

    text: str
    passes: bool  # the same request may succeed later
    answered: bool  # the store itself replied
    bucket: bool = False  # there is no bucket


def fault_of(error: BaseException, url: Url) -> Fault:
    """What obstore's ``error`` means. Its types say little: most are GenericError, so its text is read."""
    text = str(error)
    status = int(found[1]) if (found := _STATUS.search(text)) else None
    code = found[1] if (found := _CODE.search(text)) else ""
    if _METADATA.search(text) or _NO_CREDENTIALS.search(text):
        return Fault(
            f"no credentials; {CREDENTIALS.get(url.scheme, 'give credentials')}",
            status is None and "kind:" in text,
            False,
        )
    if status is not None:
        return _answer(status, code, text, url)
    server = hide(found[1]) if (found := _SERVER.search(text)) else url.scheme
    if "incorrectly configured region" in text:
        return Fault(_other_region(url, text), False, True)
    if "kind: Connect" in text:
        why = next((said for sign, said in _CONNECT.items() if sign in text), "no connection")
        return Fault(
            f"{server} cannot be reached ({why}); check {ENDPOINT.get(url.scheme, 'the network')}", True, False
        )
    if "kind: Timeout" in text:
        return Fault(f"{server} stopped answering", True, True)
    if "HttpError" in text or "HTTP error" in text:
        return Fault(f"the connection to {server} was cut", "Builder" not in text, True)
    return Fault(hide(first_line(error)), False, False)


def _answer(status: int, code: str, text: str, url: Url) -> Fault:
    said = f"{status} {code}".strip()
    if code in _BUCKET or (status == 404 and code != "NoSuchKey" and "ucket" in text and "does not exist" in text):
        bucket = url.text.split("/")[2]
        return Fault(f"there is no bucket {bucket}; create it, or correct the name ({said})", False, True, bucket=True)
    if code == "RequestTimeTooSkewed":
        return Fault(
            "the clock of this machine differs from the store's; set it, the store refuses such requests", False, True
        )
    if code in _ELSEWHERE or status in (301, 307, 308):
        return Fault(_other_region(url, text), False, True)
    if status in (401, 403):
        return Fault(
            f"access denied ({said}); check the credentials and what they may do: list, read, write and delete",
            False,
            True,
        )
    why = f": {hide(found[1].strip())}" if (found := _MESSAGE.search(text)) and found[1].strip() else ""
    if status in _PASSING or code in _PASSING_CODES:
        return Fault(f"the store answers {said}{why}", True, True)
    return Fault(f"the store refuses the request ({said}{why})", False, True)


def _other_region(url: Url, text: str) -> str:
    region = f" {found[1]}" if (found := _REGION.search(text)) else ""
    return f"the bucket is in another region{region}; set AWS_REGION to it"
