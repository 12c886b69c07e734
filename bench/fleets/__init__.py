"""A fleet on loopback: replicas, Redis and HAProxy, and what is done to it."""
