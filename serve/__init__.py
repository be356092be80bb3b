"""Ray Serve applications: `serve run serve.app:build run=RUN`."""
