"""Files become chunks with provenance; nothing of a file is trusted.

    bytes + name ─ kinds: which format ─ isolation: a fresh process with limits
                                            └ worker: sandbox, then one read_* module
    blocks (headings, paragraphs, rows, code) ◄┘  over a pipe, as JSON
       └ chunking: packed to a token budget, restarted at headings ─ Document

`pipeline.ingest_document` is the way in. This file imports nothing, because the worker pays for
every import anew.
"""
