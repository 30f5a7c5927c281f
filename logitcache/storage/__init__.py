"""Where caches are: directories, and object stores behind a URL."""
