"""The index of plaintext memory: vectors and filter fields, rebuilt from the catalog at any time.

base                              what an index does; the types
payload, conditions, queries      what is stored and asked, the same for every store
qdrant_edge                       the embedded index, whose process runs
    edge_worker, edge_host          collections of one folder
    edge_collection, edge_folder    one of them; how it lies on disk
    edge_optimizer                  another process, for copies of large ones
qdrant_server                     the index on a Qdrant server
    server_calls, server_models     time limits and errors; qdrant-client's types
"""
