"""Maps in a web browser: a server on this machine only, and its page, with MapLibre GL JS beside it."""
