"""One request to an S3 store: the client, what its errors mean, and when to send it again.

botocore's own retries are off: they hide a lost answer to a conditional write, do not cover a body that
breaks off, and stop by count, not by time. `retry` is the one place where requests are repeated.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential, wait_random

from raytune_ft.errors import StorageDenied, StorageError, StorageFull, StorageMissing

OUTAGE_S = 75.0
"""A store may be away for about so long, counted for each request from its first failure."""
CHECK_OUTAGE_S = 10.0
"""The same for the first request of a run: a wrong endpoint should show soon."""
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
CONNECTIONS = 16

BROKEN_CONNECTION = (BotoConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)
_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_REFUSED_CODES = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_FULL_CODES = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})

Result = TypeVar("Result")


class Transient(StorageError):
    """One request failed in a way that another try may not."""


class Exists(StorageError):
    """The object of a conditional request is there, or is another than was asked for."""


class NoObject(StorageMissing):
    """The bucket may be there, the object is not."""


class OutOfRange(StorageError):
    """The object ends before the first byte that was asked for."""


class UploadGone(StorageError):
    """No such multipart upload: aborted or completed."""


@dataclass(frozen=True)
class S3Client:
    """A boto3 client, with the endpoint it talks to in a form that may be shown."""

    api: Any
    endpoint: str

    def send(self, operation: str, place: str, **arguments: Any) -> Any:
        """Send one request, once.

        Args:
            operation: method of the boto3 client.
            place: uri for messages.
            arguments: of the method.

        Raises:
            Transient: another try may help.
            StorageError: or another of its kinds, where it would not.
        """
        try:
            return getattr(self.api, operation)(**arguments)
        except (BotoCoreError, ClientError) as error:
            raise _translate(error, place, arguments["Bucket"], self.endpoint) from error


def connect() -> S3Client:
    """Make a client from the usual AWS environment: variables, profile, or the machine's role.

    Raises:
        StorageDenied: the profile does not exist or yields no credentials.
        StorageError: the endpoint or the configuration file is not valid.
    """
    try:
        session = boto3.session.Session()
        api = session.client("s3", region_name=region() or session.region_name, config=Config(**config()))
    except _NO_CREDENTIALS as error:
        raise StorageDenied(
            f"AWS credentials: {error}; correct AWS_PROFILE or the AWS configuration file"
        ) from error
    except (BotoCoreError, ValueError) as error:
        # botocore's message would quote AWS_ENDPOINT_URL, which may hold a password.
        raise StorageError(
            "AWS_ENDPOINT_URL or the AWS configuration file is not valid; write http://host:port"
        ) from error
    return S3Client(api, _without_password(api.meta.endpoint_url))


def region() -> str | None:
    """The region that the environment names; None where a profile may. boto3 itself knows no AWS_REGION."""
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # A store with an endpoint of its own has no regions, but a signature needs one.
    return named or ("us-east-1" if _has_endpoint() else None)


def config() -> dict[str, Any]:
    """Arguments of botocore's Config that hold for every S3 client of the project."""
    return {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "max_pool_connections": CONNECTIONS,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        # Stores other than AWS refuse the newer trailing checksums.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        # Other stores seldom have a DNS name for each bucket.
        "s3": {"addressing_style": "path" if _has_endpoint() else "auto"},
    }


def retry(request: Callable[[], Result], place: str, outage_s: float = OUTAGE_S) -> Result:
    """Send a request again, with growing pauses, while it fails with `Transient`.

    Raises:
        StorageError: it still failed after `outage_s` seconds; or what `request` raises otherwise.
    """
    attempts = Retrying(
        retry=retry_if_exception_type(Transient),
        wait=wait_exponential(multiplier=0.1, max=5.0) + wait_random(0.0, 0.5),
        stop=stop_after_delay(outage_s),
        reraise=True,
    )
    try:
        return attempts(request)
    except Transient as error:
        raise StorageError(
            f"{place}: the store did not work for {outage_s:.0f} s; last: {error}; "
            "check AWS_ENDPOINT_URL and that the store is up, and run again"
        ) from error


def _has_endpoint() -> bool:
    return bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))


def _without_password(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _translate(error: BotoCoreError | ClientError, place: str, bucket: str, endpoint: str) -> StorageError:
    """The project's error for one of botocore's. Says nothing of keys, tokens or signatures."""
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _translate_answer(code, status, place, bucket, endpoint)
    if isinstance(error, _NO_CREDENTIALS):
        return StorageDenied(
            f"{place}: no credentials for {endpoint}; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageDenied(
            f"{place}: the certificate of {endpoint} is not trusted; set AWS_CA_BUNDLE to its CA"
        )
    if isinstance(error, BROKEN_CONNECTION):
        return Transient(f"no answer from {endpoint} ({type(error).__name__})")
    return StorageError(f"{place}: {type(error).__name__} at {endpoint}; check the AWS_* variables")


def _translate_answer(code: str, status: int, place: str, bucket: str, endpoint: str) -> StorageError:
    if code in _FULL_CODES or status == 507:
        return StorageFull(
            f"{place}: {endpoint} is full ({code}): the object was not written; nothing of it is visible; "
            "free space or raise the quota and run again"
        )
    if code in _TRANSIENT_CODES or status in (429, 500, 502, 503, 504):
        return Transient(f"{endpoint} answered {status} {code}".rstrip())
    if code in _REFUSED_CODES:
        return StorageDenied(
            f"{place}: {endpoint} refused the credentials ({code}); "
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN"
        )
    if code == "RequestTimeTooSkewed":
        return StorageDenied(
            f"{place}: this machine's clock is too far from that of {endpoint}; set it right"
        )
    if status in (401, 403):
        return StorageDenied(
            f"{place}: {endpoint} denied access to bucket {bucket} ({code}); give the credentials in "
            "AWS_ACCESS_KEY_ID the right to list, read and write it, or set others"
        )
    if code == "NoSuchBucket":
        return StorageMissing(f"{place}: no bucket {bucket} at {endpoint}; create it or correct the name")
    if code == "NoSuchUpload":
        return UploadGone(f"{place}: the upload was ended from outside; run again")
    if status == 412:
        return Exists(f"{place}: is there, or has changed")
    if status == 416:
        return OutOfRange(f"{place}: ends before the byte that was asked for")
    if status == 404:
        return NoObject(f"{place}: no such object; check the name")
    return StorageError(
        f"{place}: {endpoint} answered {status} {code}; check AWS_REGION and AWS_ENDPOINT_URL"
    )
