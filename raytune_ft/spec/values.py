"""What the values of all sections are made of: names, locations, and the base of a section."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""Job, adapter and alias names: they become keys, folders and submission ids."""

VERSION = re.compile(r"v([0-9]+)")
"""How a reference names a version: `summarise@v3`. No alias may look like it."""

SUPPORTED_SCHEMES = ("file", "s3")
HUB_URI = re.compile(
    r"hf://(?:datasets/)?(?!(?:datasets|models|spaces|buckets)/)"
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<key>.*))?"
)
"""A data set of the Hugging Face Hub, perhaps a revision, and a file, folder, split or glob in it."""

_MISTYPED = re.compile(r"\s*(s3[an]?|file|hf)(?::[/\\]*|/{2,})(.*)", re.IGNORECASE | re.DOTALL)
_UNSUPPORTED = re.compile(r"(gs|gcs|hdfs|https?|ftp|abfss?|wasbs?|az|dbfs):[/\\]", re.IGNORECASE)
_WELL_FORMED = re.compile(r"(?:s3|hf)://(?!/)|file://")


def uri_mistake(text: str) -> str | None:
    """Return why a text that looks like a uri is none, with the uri that it likely means; None for the rest.

    A folder of such a name can still be had: `./s3:/adapters` is a path.

    >>> uri_mistake("S3:/adapters")
    "'S3:/adapters' is no uri; did you mean s3://adapters? The folder of that name is ./S3:/adapters"
    >>> uri_mistake("s3://adapters"), uri_mistake("./s3:/adapters"), uri_mistake("/data/s3")
    (None, None, None)
    """
    if _UNSUPPORTED.match(text) and "://" not in text:
        scheme = text.partition(":")[0]
        return f"scheme '{scheme}' is not supported; use a folder, file:// or s3://"
    found = _MISTYPED.fullmatch(text)
    if found is None or _WELL_FORMED.match(text):
        return None
    scheme, rest = found[1].lower(), found[2].lstrip("/\\").replace("\\", "/")
    start = {"s3a": "s3://", "s3n": "s3://", "file": "file:///"}.get(scheme, f"{scheme}://")
    if {"@", "?"} & set(rest):
        # What follows may be a password or a signed query, so it is not repeated.
        return f"'{found[1]}:…' is no uri; did you mean {start}…?"
    folder = "" if "://" in text else f" The folder of that name is ./{text}"
    return f"{text!r} is no uri; did you mean {start}{rest or '…'}?{folder}"


def looked_for(path: str) -> str:
    """Return the place that a relative path means, in brackets, for messages that miss something there.

    >>> looked_for("/data/base")
    ''
    """
    place = os.path.abspath(os.path.expanduser(path))
    return "" if os.path.isabs(path) or "://" in path else f" (looked for {place})"


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("must be 1 to 63 of a-z, 0-9 and '-', and begin and end with a letter or digit")
    return name


def _check_alias(alias: str) -> str:
    if VERSION.fullmatch(alias):
        raise ValueError("means a version; use a word such as candidate")
    return alias


def _check_location(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if not uri.strip():
        raise ValueError("must not be empty")
    if mistake := uri_mistake(uri):
        raise PydanticCustomError("secret", mistake)
    if not separator:
        return uri
    # The rest of such a uri may hold a password or a signed query, so it is not repeated.
    if scheme not in SUPPORTED_SCHEMES:
        raise PydanticCustomError(
            "secret", f"scheme '{scheme[:20]}' is not supported; use a folder, file:// or s3://"
        )
    if "@" in rest.partition("/")[0]:
        raise PydanticCustomError(
            "secret", "holds credentials; remove them and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return uri


def _check_data_location(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    if scheme == "hf":
        if not HUB_URI.fullmatch(uri):
            raise PydanticCustomError(
                "secret", "write hf://owner/name for a data set of the Hub, or hf://owner/name@revision"
            )
        return uri
    if separator and not uri_mistake(uri) and scheme not in SUPPORTED_SCHEMES:
        raise PydanticCustomError(
            "secret", f"scheme '{scheme[:20]}' is not supported; use a folder, file://, s3:// or hf://"
        )
    return _check_location(uri)


Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]
Location = Annotated[
    str, AfterValidator(_check_location), Field(json_schema_extra={"format": "uri-reference"})
]
"""A folder, `file://` or `s3://`. The only strings in which `${NAME}` is expanded, with DataLocation."""
DataLocation = Annotated[
    str, AfterValidator(_check_data_location), Field(json_schema_extra={"format": "uri-reference"})
]
"""A Location, or `hf://` for a data set of the Hugging Face Hub."""
Alias = Annotated[Name, AfterValidator(_check_alias)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
