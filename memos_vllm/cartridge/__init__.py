"""The `.memcube` archive: a cube as one file, written and read as a stream.

    .memcube = zstd( tar( manifest.json
                          memories.jsonl versions.jsonl edges.jsonl lineage.jsonl
                          documents.jsonl chunks.jsonl sessions.jsonl vectors.jsonl audit.jsonl
                          artifacts/N/manifest.json  artifacts/N/shard-M.safetensors ...
                          checksums.json ) )

The files stand in this order, so that a writer needs no second look and a reader knows what is
to come. `records` says what stands in a line, `writer` and `reader` turn files into bytes and
back. Nothing here knows of a catalog, a store or a server.
"""
