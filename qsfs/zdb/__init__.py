"""A 0-db compatible server: values in append-only files, the index in memory, RESP2 on the wire."""
