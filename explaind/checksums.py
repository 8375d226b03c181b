"""Checksums of plain data, by which its JSON text vouches for itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import google_crc32c

__all__ = ["check_metadata", "checksum", "sealed_metadata", "sealed_text"]


def checksum(content: Any) -> int:
    """CRC-32C of plain data, as the shortest JSON text with sorted keys.

    Example:
        >>> checksum({"b": [1, 2.5], "a": None}) == google_crc32c.value(b'{"a":null,"b":[1,2.5]}')
        True
    """
    return int(google_crc32c.value(_text(content).encode()))


def sealed_text(content: Mapping[str, Any]) -> str:
    """The JSON text of an object, with the checksum of all the rest as its entry `checksum`."""
    text = _text(content)
    return f'{text[:-1]},"checksum":{google_crc32c.value(text.encode())}}}'


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def sealed_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `zarr.json` with the checksum of what explaind reads from it, among its attributes."""
    attributes = {key: value for key, value in metadata["attributes"].items() if key != "checksum"}
    return {**metadata, "attributes": attributes | {"checksum": _metadata_checksum(metadata, attributes)}}


def check_metadata(metadata: Mapping[str, Any], *, required: bool) -> None:
    """Compare the content of a `zarr.json` with its checksum.

    Args:
        metadata: the content.
        required: whether one without a checksum is refused.

    Raises:
        ValueError: it differs, or there is none.
    """
    attributes = dict(metadata["attributes"])
    noted = attributes.pop("checksum", None)
    if noted is None and not required:
        return
    if noted != _metadata_checksum(metadata, attributes):
        raise ValueError("its content does not have the checksum that was noted when it was written")


def _metadata_checksum(metadata: Mapping[str, Any], attributes: Mapping[str, Any]) -> int:
    if metadata.get("node_type") == "group":  # of which only the attributes are read, and other tools add to the rest
        return checksum(attributes)
    return checksum({key: value for key, value in metadata.items() if key != "attributes"})
