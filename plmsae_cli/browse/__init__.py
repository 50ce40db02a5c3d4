"""Feature pages: a static site from a run's features, and the server that adds one's own sequences."""
