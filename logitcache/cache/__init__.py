"""The cache on disk: schema, manifest, shards, reading, writing and verification. FORMAT.md specifies the format."""
