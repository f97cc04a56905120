"""The zip around a Word document: counted before anything is inflated, and never trusted."""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from typing import Any

from lxml import etree  # type: ignore[import-untyped]

from memos_vllm.errors import InvalidRequest, TooLarge
from memos_vllm.plaintext.ingest.document import MIB, IngestLimits

# What Word writes shrinks 5 to 50 times. Bombs shrink a thousand times.
_MAX_RATIO = 200
_SMALL_BYTES = MIB
_MAX_PART_BYTES = 64 * MIB
_READ_BYTES = MIB

_RELATIONS = "{http://schemas.openxmlformats.org/package/2006/relationships}Relationship"
_MAIN_CONTENT = re.compile(
    r"application/(?:vnd\.openxmlformats-officedocument\.wordprocessingml\.(?:document|template)"
    r"|vnd\.ms-word\.(?:document|template)\.macroEnabled)\.main\+xml"
)


class DocxPackage:
    """Parts of a docx by name. Relations that point outside the file are not looked at.

    Raises:
        InvalidRequest: no Word document, broken, or locked by a password.
        TooLarge: it would unpack to more than `limits` allow.
    """

    def __init__(self, data: bytes, limits: IngestLimits) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise broken("its zip directory cannot be read") from error
        self._parts = _checked_directory(self._zip, len(data), limits)
        self.main = self._find_main()

    def read_xml(self, name: str) -> Any | None:
        """The root element of a part; None when there is no such part.

        Raises:
            InvalidRequest: broken XML, or XML that declares entities.
        """
        info = self._parts.get(name)
        if info is None:
            return None
        parser = etree.XMLParser(
            resolve_entities=False,
            no_network=True,
            load_dtd=False,
            dtd_validation=False,
            huge_tree=False,
            remove_comments=True,
            remove_pis=True,
        )
        try:
            root = etree.fromstring(self._read(info), parser)
        except etree.XMLSyntaxError as error:
            raise broken(f"its part {_safe(name)} is not well-formed XML") from error
        if root.getroottree().docinfo.internalDTD is not None:
            raise InvalidRequest(
                "the Word document declares XML entities, which Word never does; it will not be "
                "opened",
                param="file",
            )
        return root

    def related(self, name: str, kind: str) -> str | None:
        """The part inside the file to which `name` has a relation whose type ends in `kind`."""
        folder, file = posixpath.split(name)
        relations = self.read_xml(posixpath.join(folder, "_rels", f"{file}.rels"))
        if relations is None:
            return None
        for relation in relations.iter(_RELATIONS):
            if relation.get("TargetMode") == "External":
                continue
            if relation.get("Type", "").endswith(f"/{kind}"):
                target = posixpath.join("/", folder, relation.get("Target", ""))
                return posixpath.normpath(target).lstrip("/")
        return None

    def _find_main(self) -> str:
        main = self.related("", "officeDocument") or "word/document.xml"
        if main not in self._parts:
            raise InvalidRequest(
                "the file is a zip archive and no Word document; save it as .docx in Word or "
                "LibreOffice",
                param="file",
            )
        types = self.read_xml("[Content_Types].xml")
        declared = (
            []
            if types is None
            else [
                element.get("ContentType", "")
                for element in types.iter()
                if element.get("PartName") == f"/{main}"
            ]
        )
        if declared and not any(_MAIN_CONTENT.fullmatch(each) for each in declared):
            raise InvalidRequest(
                "the file is an Office document of another kind than Word; save its text as .docx",
                param="file",
            )
        return main

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        """Inflate one part, in pieces, and stop where the directory said that it ends."""
        limit = min(info.file_size, _MAX_PART_BYTES)
        pieces: list[bytes] = []
        size = 0
        try:
            with self._zip.open(info) as part:
                while piece := part.read(_READ_BYTES):
                    size += len(piece)
                    if size > limit:
                        raise _bomb()
                    pieces.append(piece)
        except (zipfile.BadZipFile, EOFError, ValueError, OSError, RuntimeError) as error:
            raise broken(f"its part {_safe(info.filename)} cannot be unpacked") from error
        except Exception as error:
            # zlib.error, and NotImplementedError for methods that Word does not use.
            raise broken(f"its part {_safe(info.filename)} cannot be unpacked") from error
        return b"".join(pieces)


def broken(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"the Word document is broken: {reason}; open it in Word or LibreOffice and save it again",
        param="file",
    )


def _bomb() -> TooLarge:
    return TooLarge(
        "the Word document unpacks to far more than its size, as zip bombs do; save it again in "
        "Word or LibreOffice, without embedded files"
    )


def _safe(name: str) -> str:
    """The name of a part for a message: names are the sender's to choose."""
    return name if re.fullmatch(r"[\w./\[\]-]{1,60}", name, re.ASCII) else "(unnamed)"


def _checked_directory(
    archive: zipfile.ZipFile, size_bytes: int, limits: IngestLimits
) -> dict[str, zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > limits.max_archive_entries:
        raise TooLarge(
            f"the Word document has {len(entries)} parts and the limit is "
            f"{limits.max_archive_entries}; save it without embedded files"
        )
    # Parts that share their bytes are the other way to build a bomb.
    if (
        sum(entry.file_size for entry in entries) > limits.max_unpacked_bytes
        or sum(entry.compress_size for entry in entries) > size_bytes
    ):
        raise _bomb()
    for entry in entries:
        if entry.flag_bits & 0x1:
            raise InvalidRequest(
                "the Word document is locked by a password; remove it and send the file again",
                param="file",
            )
        if entry.file_size > _SMALL_BYTES and entry.file_size > _MAX_RATIO * entry.compress_size:
            raise _bomb()
    return {entry.filename: entry for entry in entries}
